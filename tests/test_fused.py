"""The fused step equals the plain one, for every rule, and touches nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
import pytest
import torch
from cases import CASES, Case, contexts, stream
from torch import nn

from deepopt import Rule, rules
from torch_backend import Optimizer

STEPS = 50
# Parameters and gradients of one dtype, state and arithmetic of another. The products of an
# iteration of Newton-Schulz and sums are taken in another order, which five steps of it amplify;
# narrow weights round, rarely to the other neighbour.
DTYPES = {
    "float64": (torch.float64, 1e-12),
    "float32": (torch.float32, 2e-4),
    "bfloat16": (torch.bfloat16, 50 * 2.0**-9),
    "float16": (torch.float16, 50 * 2.0**-12),
}
# Its momentum grows without bound, and differences with it, in every precision alike.
DIVERGES = "decay=literal"
GUARD = 64


def guarded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of x in the middle of memory that holds a known pattern, and that memory."""
    around = torch.full((x.numel() + 2 * GUARD,), 77.0).to(x.dtype)
    inside = around[GUARD : GUARD + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside, around


def untouched(around: torch.Tensor) -> bool:
    return bool((around[:GUARD] == 77).all() and (around[-GUARD:] == 77).all())


def shapes_of(case: Case) -> list[tuple[int, ...]]:
    """The case's shape, and odd ones around the lengths of vectors and blocks."""
    if case.rule.context((1, 1)) or {"negatives", "left", "right"} & {*case.rule.all_slots((2, 2))}:
        # Roots of a Gram matrix of one row follow its rounding errors.
        return [case.shape]
    network = any("first" in k for k in case.rule.all_slots((2, 2)))
    # A network of few units that is taught by one row moves far with the least difference.
    odd = [(1, 1), (3, 1), (9, 7) if network else (1, 17), (31, 33)]
    return [case.shape, *odd, *([] if case.rule.domain == "matrix" else [(1023,), (1,)])]


def parameters(case: Case, dtype: torch.dtype) -> tuple[list[nn.Parameter], list[np.ndarray]]:
    streams = [stream(s, STEPS, seed=i) for i, s in enumerate(shapes_of(case))]
    made = [nn.Parameter(torch.tensor(w).to(dtype)) for w, _ in streams]
    return made, [g for _, g in streams]


def step(optimizer: Optimizer, params: list[nn.Parameter], gradients, context, i: int) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = torch.tensor(g[i]).to(p.dtype)
        if context[i]:
            optimizer.context[p] = {k: torch.tensor(x) for k, x in context[i].items()}
    optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fused_step_is_the_plain_one(case, dtype):
    kind, tolerance = DTYPES[dtype]
    tolerance *= 100 if DIVERGES in str(case) else 1
    plain, gradients = parameters(case, kind)
    fused, _ = parameters(case, kind)
    context = contexts(case.rule, case.shape, STEPS)
    one = Optimizer(plain, case.rule, fused=False)
    two = Optimizer(fused, case.rule, fused=True, precision="float32")
    memory: list[torch.Tensor] = []
    for p in fused:
        p.data, around = guarded(p.data)
        memory.append(around)
    for i in range(STEPS):
        step(one, plain, gradients, context, i)
        step(two, fused, gradients, context, i)
        if i == 0:
            for state in two.state.values():
                for name in [k for k in state if k != "step"]:
                    state[name], around = guarded(state[name])
                    memory.append(around)
        for p, q in zip(plain, fused, strict=True):
            near(p, q, tolerance, f"step {i}")
    for p, q in zip(plain, fused, strict=True):
        assert one.state[p].keys() == two.state[q].keys()
        for name, x in one.state[p].items():
            y = two.state[q][name]
            assert x.dtype == y.dtype and x.shape == y.shape
            if not name.endswith("_basis"):
                near(x, y, tolerance, name)
    assert all(map(untouched, memory))


def near(x: torch.Tensor, y: torch.Tensor, tolerance: float, what: str) -> None:
    """Raise AssertionError where y is not x, relative to x's largest entry."""
    a, b = x.detach().double(), y.detach().double()
    known = a.isfinite()
    same = torch.where(known, 0.0, a).equal(torch.where(known, 0.0, b)) or a.isnan().any()
    assert same, f"{what} of shape {tuple(x.shape)} is infinite elsewhere"
    assert torch.equal(a.isnan(), b.isnan()), what
    error = float((a - b)[known].abs().max()) if known.any() else 0.0
    scale = max(float(a[known].abs().max()), 1e-30) if known.any() else 1.0
    assert error <= tolerance * scale, f"{what} of shape {tuple(x.shape)}: {error / scale:.3g}"
