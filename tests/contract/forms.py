"""The forms of a step against each other, and the steps that others take: scalers, tracers."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import torch_backend.fused
import torch_backend.plain
from torch_backend import Optimizer

from .subject import (
    Subject,
    check,
    equal,
    everyone,
    everything,
    feed,
    give,
    parameters,
    quick,
)

# Relative and absolute, after three steps: the same arithmetic in another order, which the
# iterations of Newton-Schulz amplify; narrow weights may round to the other neighbour.
CLOSE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-11),
    torch.float32: (2e-3, 2e-5),
    torch.bfloat16: (2.0**-6, 2.0**-8),
    torch.float16: (2.0**-9, 2.0**-10),
}


def near(one: Optimizer, two: Optimizer, dtype: torch.dtype) -> None:
    """Assert that parameters and states agree key by key; bases, whose signs are free, in shape."""
    a, b = everything(one), everything(two)
    free = [k for k in a if k[1].endswith("_basis")]
    assert [a.pop(k).shape for k in free] == [b.pop(k).shape for k in free]
    rtol, atol = CLOSE[dtype]
    equal(a, b, rtol=rtol, atol=atol)


def starting(dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters of which some are alike, so that they can be stacked."""
    return [nn.Parameter(p.detach() + i) for i in range(3) for p in parameters(dtype)]


@check()
def matches_the_for_loop(s: Subject) -> None:
    """test_foreach_matches_forloop, test_fused_matches_forloop, compiled parity: key by key."""
    configurations = s.info.optim_inputs_func(device="cpu")
    for x in configurations if s.mode in "pf" else configurations[2:4]:
        wide = s.mode == "f" and x.desc == "weight_decay"
        for dtype in [*CLOSE] if wide else [torch.float64 if s.mode == "p" else torch.float32]:
            form = {"foreach": True} if s.mode == "p" else {}
            optimizer = s.make(starting(dtype), **form, **x.kwargs)
            loop = Subject(s.info, "p").make(starting(dtype), foreach=False, **x.kwargs)
            for i in range(3):
                give(optimizer, i)
                give(loop, i)
                s.step(optimizer)
                feed(loop)
                loop.step()
            near(optimizer, loop, dtype)


class Memory(TorchDispatchMode):
    """The most bytes that are held at a time by tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        old = {x.untyped_storage()._cdata for x in given if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is None or storage._cdata in old | self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


@check(c="its temporaries are those of the one operator that it calls")
def peak_memory(s: Subject) -> None:
    """test_peak_memory_foreach: temporaries do not grow with the number of parameters."""
    peaks: list[int] = []
    caps = torch_backend.plain.BATCH, torch_backend.fused.SLAB
    torch_backend.plain.BATCH, torch_backend.fused.SLAB = {"cpu": 256}, {"cpu": 1 << 12}
    try:
        for count in (16, 32):
            optimizer = s.make([nn.Parameter(torch.randn(8, 8)) for _ in range(count)])
            s.steps(optimizer, 3)
            with Memory() as memory:
                s.step(optimizer)
            peaks.append(memory.peak)
    finally:
        torch_backend.plain.BATCH, torch_backend.fused.SLAB = caps
    assert peaks[1] <= 1.1 * peaks[0], peaks


ALONE = "`fused` does not support `differentiable`, in torch's words; see the row of flags"


def differentiable(s: Subject) -> dict[str, Any]:
    """The hyperparameters of a small subject whose clocks tick."""
    hidden = {k: 2 for k in ("width",) if k in s.rule.__annotations__}
    return quick(s.rule) | hidden


@check(f=ALONE, g=ALONE)
def gradients_through_a_step(s: Subject) -> None:
    """TestDifferentiableOptimizer: gradcheck by parameter, gradient, learning rate and state."""
    start = torch.randn(3, 2, dtype=torch.float64)
    first = s.info.optim_cls([nn.Parameter(start.clone())], lr=0.1, **differentiable(s))
    Subject(s.info, "p").steps(first, 5)
    (state,) = first.state.values()
    count, names = state["step"].clone(), [k for k in state if k != "step"]
    # Matrices that are symmetric are known by one triangle to their decomposition.
    symmetric = {k for k in names if _is_square(state[k]) and torch.equal(state[k], state[k].mT)}

    def step(p: Tensor, g: Tensor, lr: Tensor, *own: Tensor, by: Subject = s) -> Any:
        p = p.clone()
        p.grad = g
        optimizer = s.info.optim_cls([p], lr=lr, differentiable=True, **differentiable(s))
        optimizer.state[p]["step"] = count.clone()
        for name, x in zip(names, own, strict=True):
            optimizer.state[p][name] = (x + x.mT) / 2 if name in symmetric else x.clone()
        by.step(optimizer)
        return p, *(x for x in optimizer.state[p].values() if x.requires_grad)

    rate = torch.tensor(0.1, dtype=torch.float64)
    given = [start, torch.randn_like(start), rate, *(state[k].clone() for k in names)]
    given = [x.requires_grad_() for x in given]
    if s.mode == "c":
        # The compiler leaves the step to autograd: what flows is what flows without it.
        found = [step(*given, by=x)[0].square().sum() for x in (s, s.eager)]
        one, two = (torch.autograd.grad(x, given[:3]) for x in found)
        assert all(map(torch.equal, one, two)) and bool(one[0].all())
        return
    assert gradcheck(step, given, fast_mode=True)


def _is_square(x: Tensor) -> bool:
    return x.ndim > 1 and x.shape[-1] == x.shape[-2]


@check(f=ALONE, g=ALONE)
def differentiable_equals_plain(s: Subject) -> None:
    """Out of place under autograd, several steps long, is the same arithmetic."""
    start = parameters(torch.float64)
    moving = [p.detach().clone().requires_grad_() * 1.0 for p in start]
    optimizer = s.info.optim_cls(moving, differentiable=True, **differentiable(s))
    plain = s.info.optim_cls(start, fused=False, **differentiable(s))
    assert {id(p) for p in everyone(optimizer)} == {id(p) for p in moving}
    for i in range(3):
        for p in moving:
            p.retain_grad()
            p.grad = torch.zeros_like(p)
        give(optimizer, i)
        give(plain, i)
        s.step(optimizer)
        feed(plain)
        plain.step()
    equal(optimizer, plain, rtol=1e-12, atol=1e-13)
    assert all(p.grad_fn is not None for p in moving)
