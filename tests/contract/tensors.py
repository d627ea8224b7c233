"""Tensors of every kind, and what a step leaves alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torch_backend import Optimizer

from .subject import (
    Subject,
    check,
    copied,
    equal,
    everyone,
    everything,
    give,
    parameters,
    refused,
)


@check()
def scalars_are_parameters(s: Subject) -> None:
    """Parameters of shape () move, as one of shape (1,) does."""
    scalar, vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor([2.0]))
    for p, own in ((scalar, s), (vector, s.eager)):
        optimizer = s.make([p], lr=0.1)
        for _ in range(2):
            p.grad = torch.full_like(p, 0.5) if p.grad is None else p.grad.fill_(0.5)
            own.step(optimizer)
    assert scalar.shape == () and float(scalar.detach()) == float(vector.detach()) < 2.0


@check()
def empty_parameters(s: Subject) -> None:
    """Tensors without entries count their steps, and stop nobody else's."""
    empty = [nn.Parameter(torch.zeros(shape)) for shape in ((0, 4), (4, 0), (0,))]
    full = parameters()
    optimizer, alone = s.make([*empty, *full]), s.make(parameters())
    for i in range(2):
        for p in empty:
            p.grad = torch.zeros_like(p)
        give(alone, i)
        for p, q in zip(full, everyone(alone), strict=True):
            p.grad = q.grad.clone() if p.grad is None else p.grad.copy_(q.grad)
        s.step(optimizer)
        s.eager.step(alone)
    mine = [optimizer.state[p]["step"] for p in empty]
    assert [float(x) for x in mine] == [2.0] * 3
    for p, q in zip(full, everyone(alone), strict=True):
        assert torch.equal(p, q)


@check()
def state_is_not_empty(s: Subject) -> None:
    """test_non_empty_state: a flat dict of tensors, wide and finite, with a step that is exact."""
    optimizer = s.make(parameters(torch.bfloat16))
    s.steps(optimizer, 1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            assert state and all(type(k) is str and type(x) is Tensor for k, x in state.items())
            assert {x.dtype for x in state.values() if x.is_floating_point()} == {torch.float32}
            assert state["step"].shape == () and float(state["step"]) == 1


@check()
def steps_are_counted_exactly(s: Subject) -> None:
    """A counter as narrow as bfloat16 stops at 256."""
    optimizer = s.make(parameters(torch.bfloat16))
    s.steps(optimizer, 1)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"].fill_(256.0)
    optimizer.load_state_dict(saved)
    s.steps(optimizer, 3)
    assert {float(x["step"]) for x in optimizer.state.values()} == {259.0}


@check()
def gradients_are_left_alone(s: Subject) -> None:
    """Neither written nor kept: what a user does to them after a step is nobody's business."""
    optimizer, other = s.make(parameters()), s.make(parameters())
    for i in range(3):
        for x, own in ((optimizer, s), (other, s.eager)):
            give(x, i)
            kept = copied(p.grad for p in everyone(x))
            own.step(x)
            assert all(map(torch.equal, kept, [p.grad for p in everyone(x)]))
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.fill_(torch.nan)
    equal(optimizer, other)


@check()
def hyperparameters_are_left_alone(s: Subject) -> None:
    """No value of a group changes in a step, and no tensor among them."""
    rate, decay = torch.tensor(0.01), torch.tensor(0.1)
    optimizer = s.make(parameters(), lr=rate, weight_decay=decay)
    before = repr([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    version = rate._version, decay._version
    s.steps(optimizer, 3)
    after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert repr(after) == before and (rate._version, decay._version) == version


@check()
def mixed_dtypes(s: Subject) -> None:
    """test_mixed_device_dtype: each parameter steps as it would alone."""
    widths = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    optimizer = s.make([p for dtype in widths for p in parameters(dtype)])
    alone = [s.make(parameters(dtype)) for dtype in widths]
    apart = [p for x in alone for group in x.param_groups for p in group["params"]]
    together = {id(p): i for i, p in enumerate(p for p in everyone(optimizer))}
    pairs = _paired(optimizer, apart)
    assert len(together) == len(apart) == len(pairs)
    for i in range(2):
        for x in alone:
            give(x, i)
        for p, q in pairs:
            p.grad = q.grad.clone() if p.grad is None else p.grad.copy_(q.grad)
        s.step(optimizer)
        for x in alone:
            s.eager.step(x)
    for p, q in pairs:
        assert torch.equal(p, q) and p.dtype == q.dtype
        assert all(x.dtype == optimizer.state[p][k].dtype for k, x in _state(alone, q).items())


def _paired(optimizer: Optimizer, apart: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Parameters of one optimizer and their equals in others."""
    left, pairs = list(apart), []
    for p in everyone(optimizer):
        q = next(q for q in left if q.dtype == p.dtype and q.shape == p.shape)
        left = [x for x in left if x is not q]
        pairs.append((p, q))
    return pairs


def _state(optimizers: list[Optimizer], p: Tensor) -> dict[str, Tensor]:
    return next(x.state[p] for x in optimizers if p in x.state)


@check()
def default_dtype_float64(s: Subject) -> None:
    """test_set_default_dtype_works_with_foreach: what the default is changes no result."""
    expected = s.make(parameters())
    s.eager.steps(expected, 3)
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = s.make(parameters())
        s.steps(optimizer, 3)
        equal(optimizer, expected)
        wide = s.make(parameters(torch.float64))
        s.eager.steps(wide, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    for p in everyone(wide):
        kept = {k: x.dtype for k, x in wide.state[p].items() if k != "step"}
        assert p.dtype == torch.float64 and set(kept.values()) <= {torch.float64}


@check()
def gradients_that_are_not_finite(s: Subject) -> None:
    """NaN is left out and counted, or named; by default it goes through, into its own parameter."""
    for bad in (math.nan, math.inf):
        for how in ("skip", "raise") if s.dear else ("propagate", "skip", "raise"):
            optimizer = s.make(parameters(), on_nonfinite=how)
            s.eager.steps(optimizer, 1)
            before = everything(optimizer)
            weight, bias = everyone(optimizer)
            bias.grad[3] = bad
            if how == "raise":
                with refused(ValueError, "has NaN or Inf entries"):
                    s.step(optimizer)
            else:
                s.step(optimizer)
            if how == "propagate":
                assert bool(weight.isfinite().all()) and optimizer.skipped_steps == 0
                assert bad == math.inf or not bool(bias.isfinite().all())
            else:
                equal(optimizer, before)
                assert optimizer.skipped_steps == (how == "skip")
        if s.dear:
            break
