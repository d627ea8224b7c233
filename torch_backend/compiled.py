"""The step under torch.compile: one operator that the compiler does not look into."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch_backend.optimizer import Optimizer

F = TypeVar("F")
# The modes in which operations are noted, or done on tensors without numbers, and not run.
TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)

_numbers = count()
_handles: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_optimizers: WeakValueDictionary[int, Optimizer] = WeakValueDictionary()


def announces_itself(step: F) -> F:
    """Mark a step that sets `_opt_called`, so that schedulers do not wrap it to learn of its calls.

    The compiler refuses to look into their wrapper.
    """
    step._wrapped_by_lr_sched = True  # pyright: ignore[reportAttributeAccessIssue]
    return step


def handle(optimizer: Optimizer) -> int:
    """The number by which a graph knows an optimizer."""
    if optimizer not in _handles:
        _handles[optimizer] = next(_numbers)
        _optimizers[_handles[optimizer]] = optimizer
    return _handles[optimizer]


def is_traced() -> bool:
    """Whether a compiler looks on: Dynamo, `make_fx`, or fake tensors."""
    tracing = torch.compiler.is_dynamo_compiling
    return tracing() or any(torch._C._get_dispatch_mode(x) is not None for x in TRACERS)


@cast(Any, torch.compiler.disable)
def step_in_sight_of_autograd(optimizer: Optimizer) -> None:
    """Take a step that autograd follows, which the compiler's one operator would hide from it."""
    with torch.enable_grad():
        optimizer.take_step()


def trace_step(optimizer: Optimizer) -> None:
    """What the compiler sees of a step: which tensors it reads and writes, and no number.

    Where parameters lie on a device mesh it sees nothing, and breaks its graph.
    """
    if optimizer.is_on_mesh:
        disabled: Any = torch.compiler.disable
        disabled(optimizer.take_step)()
        return
    places: list[int] = []
    params: list[Tensor] = []
    gradients: list[Tensor] = []
    states: list[Tensor] = []
    # The attribute itself would make the compiler guard every hyperparameter of every group.
    groups = optimizer.__dict__["param_groups"]
    for i, p in enumerate([p for group in groups for p in group["params"]]):
        if p.grad is not None:
            places.append(i)
            params.append(p)
            gradients.append(p.grad)
    if not params:
        return
    number = optimizer.entered(tuple(places))
    for p in params:
        states += [*optimizer.state[p].values()]
    grad = torch.is_grad_enabled() and torch.compiler.is_dynamo_compiling()
    with torch.no_grad():
        _step(number, places, params, gradients, states, grad)


# A replayed graph would leave out what the host decides: clocks, counts and hyperparameters.
@torch.library.custom_op(
    "deepopt::step", mutates_args=("params", "states"), tags=(torch.Tag.cudagraph_unsafe,)
)
def _step(
    handle: int,
    places: list[int],
    params: list[Tensor],
    gradients: list[Tensor],
    states: list[Tensor],
    grad: bool = False,
) -> None:
    """Step the parameters at these places of all groups' parameters, as the tensors given are.

    grad: an error is to leave gradients on, which a compiled `no_grad` leaves off.
    """
    optimizer = _optimizers.get(handle)
    if optimizer is None:
        raise RuntimeError("the optimizer that this step was compiled for is no more; compile anew")
    every = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    members: list[Tensor] = [every[i] for i in places]
    own = [*members, *(x for p in members for x in optimizer.state[p].values())]
    with (
        _Lent(own, [*params, *states]),
        _Gradients(every, dict(zip(places, gradients, strict=True))),
    ):
        try:
            optimizer.take_step()
        except Exception:
            torch._C._set_grad_enabled(grad or torch.is_grad_enabled())
            raise


@_step.register_fake
def _(*_: Any) -> None:
    """Shapes stay what they are."""


class _Lent:
    """An optimizer's own tensors as those given, which a compiler may have made copies of.

    Then the graph's copies get the results, and the graph decides when to write them home.
    """

    def __init__(self, own: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        pairs = zip(own, given, strict=True)
        self.pairs = [(x, y) for x, y in pairs if x.data_ptr() != y.data_ptr()]

    def __enter__(self) -> None:
        self.before = [x.detach().clone() for x, _ in self.pairs]
        for x, y in self.pairs:
            x.detach().copy_(y)

    def __exit__(self, *error: object) -> None:
        for (x, y), before in zip(self.pairs, self.before, strict=True):
            y.copy_(x.detach())
            x.detach().copy_(before)


class _Gradients:
    """The given gradients, by place, and no others."""

    def __init__(self, params: Sequence[Tensor], given: dict[int, Tensor]) -> None:
        now = [p.grad for p in params]
        self.changed = [
            (p, now[i], given.get(i)) for i, p in enumerate(params) if now[i] is not given.get(i)
        ]

    def __enter__(self) -> None:
        for p, _, gradient in self.changed:
            p.grad = gradient

    def __exit__(self, *error: object) -> None:
        for p, before, _ in self.changed:
            p.grad = before
