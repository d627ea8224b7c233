"""What is checked: an optimizer class in one mode, and the table that checks register in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import OptimizerInfo

from deepopt import Rule, rules
from deepopt.rule import hints
from torch_backend import Optimizer
from torch_backend.seen import arithmetic
from torch_backend.values import host, instance

MODES = {"p": "plain", "f": "fused", "g": "capturable", "c": "compiled"}
OPTIONS: dict[str, dict[str, Any]] = {
    "p": {"fused": False},
    "f": {"fused": True, "precision": "float32"},
    "g": {"fused": True, "precision": "float32", "capturable": True},
    "c": {"precision": "float32"},
    # As compiled, but not compiled.
    "e": {"precision": "float32"},
}
NO_STEP = "nothing is stepped, so there is nothing to compile"
ANY_FORM = "it is decided before a form of the step is chosen"

Without = Mapping[str, str]


class Meaningless(Exception):
    """What is checked means nothing for this subject; says why."""


@dataclass(frozen=True)
class Check:
    """A row of the matrix: what it demands, and why it demands it not of some modes."""

    name: str
    run: Callable[[Subject], None]
    without: Without


CHECKS: dict[str, Check] = {}


def check(**without: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Make a function a row; `without` says by mode why the row means nothing there."""

    def register(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        name = run.__name__.replace("_", " ")
        CHECKS[name] = Check(name, run, without)
        return run

    return register


@dataclass(frozen=True)
class Subject:
    """An optimizer class and how it is to take its steps."""

    info: OptimizerInfo
    mode: str

    @property
    def rule(self) -> type[Rule]:
        return getattr(rules, self.info.name)

    @property
    def options(self) -> dict[str, Any]:
        """The flags of the mode, with clocks that tick within a few steps."""
        return OPTIONS[self.mode] | quick(self.rule)

    @property
    def dear(self) -> bool:
        """Whether each optimizer costs a compilation, so that few must do."""
        return self.mode == "c"

    @property
    def eager(self) -> Subject:
        """The same, but for a compiler: what a compiled step must equal."""
        return Subject(self.info, "e" if self.mode == "c" else self.mode)

    def make(self, params: Any, **given: Any) -> Optimizer:
        return self.info.optim_cls(params, **self.options | given)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """One step in the mode, with what rules need beyond gradients."""
        feed(optimizer)
        step = optimizer.step
        if self.mode == "c":
            if optimizer not in _compiled:
                _compiled[optimizer] = torch.compile(step, backend="eager")
            step = _compiled[optimizer]
        return step() if closure is None else step(closure)

    def steps(self, optimizer: Optimizer, count: int, start: int = 0) -> None:
        """Steps with gradients that depend on their number alone."""
        for i in range(start, start + count):
            give(optimizer, i)
            self.step(optimizer)


# The compiled steps, which hold their optimizers, for as long as one check takes.
_compiled: WeakKeyDictionary[Optimizer, Callable[..., Any]] = WeakKeyDictionary()


@contextmanager
def fresh(mode: str) -> Iterator[None]:
    """What no check may inherit from another, nor from its caller."""
    torch.manual_seed(0)
    # Every optimizer is a graph of its own, of the one method.
    most = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 1 << 20)
    with ExitStack() as stack:
        stack.callback(_compiled.clear)
        if mode == "c":
            stack.enter_context(torch._dynamo.config.patch(most))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        stack.enter_context(torch.enable_grad())
        yield
        assert torch.is_grad_enabled(), "gradients were left off"


def quick(rule: type[Rule]) -> dict[str, Any]:
    """Hyperparameters by which every clock ticks within two steps."""
    if not any(f.name == "period" for f in fields(rule)):
        return {}
    own = rule().period
    return {"period": (1, *[2] * (len(own) - 1)) if isinstance(own, tuple) else 2}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """The weight and the bias of torch's tests."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((10, 5), (10,))]
    return [nn.Parameter(x.to(dtype)) for x in draw]


def everyone(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Gradients that depend on a seed alone; they stay where they are, as graphs need it."""
    generator = torch.Generator().manual_seed(seed + 1)
    for p in everyone(optimizer):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def needs(optimizer: Optimizer, group: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """The shapes of what the rule of a group needs of a matrix beyond its gradient."""
    cls = optimizer.rules[group["rule"]]
    rule = instance(cls, {k: host(group[k], k) for k in hints(cls)})
    return rule.context(tuple(p.shape[-2:])) if rule.context((1, 1)) else {}


def feed(optimizer: Optimizer, factor: float = 1.0) -> None:
    """Gram matrices, times a factor, where rules need them and nobody has given any."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name, shape in needs(optimizer, group, p).items():
                if name not in (optimizer.context[p] if p in optimizer.context else {}):
                    optimizer.context[p][name] = factor * gram(shape[0]).to(arithmetic(p.dtype))


def gram(n: int) -> Tensor:
    """The mean of outer products of n + 4 vectors."""
    x = torch.randn(n + 4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return x.T @ x / len(x)


def copied(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


def everything(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Copies of all parameters and states, by place and name."""
    found: dict[tuple[int, str], Tensor] = {}
    for i, p in enumerate(everyone(optimizer)):
        found[i, "p"] = p.detach().clone()
        found |= {(i, k): x.detach().clone() for k, x in optimizer.state.get(p, {}).items()}
    return found


def equal(one: torch.optim.Optimizer | dict, two: torch.optim.Optimizer | dict, **close: float):
    """Assert that parameters, states and dtypes are the same, bit by bit unless told otherwise."""
    a, b = (x if isinstance(x, dict) else everything(x) for x in (one, two))
    assert a.keys() == b.keys(), f"{sorted(a.keys() ^ b.keys())} only in one of two"
    for key, x in a.items():
        torch.testing.assert_close(
            x,
            b[key],
            **(close or {"rtol": 0, "atol": 0}),
            equal_nan=True,
            msg=lambda m, k=key: f"{k}: {m}",
        )


@contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    """Assert that the block raises an error of this kind, with these words."""
    try:
        yield
    except kind as error:
        missing = [w for w in words if w not in str(error)]
        assert not missing, f"{missing} not in {str(error)!r}"
    else:
        raise AssertionError(f"no {kind.__name__} with {words}")
