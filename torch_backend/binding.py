"""Optimizer classes of single rules, with their hyperparameters as arguments."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, Protocol, cast, overload

from torch import Tensor

from deepopt.rule import Rule, hints
from torch_backend.checkpoint import NEUTRAL
from torch_backend.optimizer import Optimizer, Parameters
from torch_backend.values import made

P = ParamSpec("P")


class Binding(Protocol, Generic[P]):
    """The class that `bind` makes, as type checkers see it."""

    @overload
    def __call__(self, params: Parameters, *args: P.args, **kwargs: P.kwargs) -> Optimizer: ...
    @overload
    def __call__(
        self, params: Parameters, lr: float | Tensor = ..., **options: Any
    ) -> Optimizer: ...


_bound: dict[type[Rule], Any] = {}
# The options of `Optimizer` that the classes of rules take too.
SHARED = (
    *("fallback", "views", "strict", "maximize", "foreach", "differentiable", "on_nonfinite"),
    *("fused", "precision", "rounding", "capturable", "state_dtype"),
)


def bind(rule: Callable[P, Rule], module: str | None = None) -> Binding[P]:
    """The torch optimizer class of a rule: `M3 = bind(rules.M3)`; then `M3(model, lr=3e-4)`.

    It takes params, lr and every hyperparameter of the rule by name, and the options of
    `Optimizer`. There is one class per rule, and its objects can be pickled under any name.
    """
    cls = cast(type[Rule], rule)
    if not (isinstance(cls, type) and issubclass(cls, Rule)):
        raise TypeError(f"bind takes a class of rules, such as deepopt.rules.M3, not {rule!r}")
    if cls in _bound:
        return _bound[cls]
    options = dict(inspect.signature(Optimizer.__init__).parameters)
    shared = [options[k] for k in SHARED]

    def __init__(self: Any, params: Any, lr: Any = None, **given: Any) -> None:
        chosen = {x.name: given.pop(x.name) for x in shared if x.name in given}
        # Flags of torch's classes that ask for nothing may stay in the line that is replaced.
        for name in set(NEUTRAL) & set(given) - set(hints(cls)):
            if given[name] in (None, False, 0):
                del given[name]
        given |= {} if lr is None else {"lr": lr}
        self._tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
        Optimizer.__init__(self, params, made(cls, given), **chosen)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if type(self) is not bound:
            return object.__reduce_ex__(self, protocol)
        return _unpickled, (cls, bound.__module__), self.__getstate__()

    hyper = dict(inspect.signature(cls).parameters)
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter("self", positional), inspect.Parameter("params", positional)]
    lr = hyper.pop("lr").replace(kind=positional)
    signature = inspect.Signature([*first, lr, *hyper.values(), *shared])
    __init__.__qualname__ = f"{cls.__name__}.__init__"
    __init__.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    namespace = {
        "__init__": __init__,
        "__reduce_ex__": __reduce_ex__,
        "__doc__": cls.__doc__,
        "__module__": module or sys._getframe(1).f_globals["__name__"],
    }
    bound = _bound[cls] = type(cls.__name__, (Optimizer,), namespace)
    return cast(Binding[P], bound)


def _unpickled(rule: type[Rule], module: str) -> Any:
    cls = cast(type[Optimizer], bind(rule, module))
    return cls.__new__(cls)
