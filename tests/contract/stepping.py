"""What a step does to parameters: which of them move, where to, and at which rate."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from torch_backend import Optimizer

from .subject import (
    Subject,
    check,
    copied,
    equal,
    everything,
    feed,
    give,
    parameters,
    refused,
)


def model(strided: bool = False) -> nn.Linear:
    """torch's problem, a layer whose outputs are to be zero; or one with holes in its memory."""
    layer = nn.Linear(5, 10)
    if strided:
        for name, p in list(layer.named_parameters()):
            wide = torch.zeros(*p.shape, 2)
            wide[..., 0] = p.detach()
            setattr(layer, name, nn.Parameter(wide[..., 0]))
        assert not layer.weight.is_contiguous()
    return layer


def train(
    s: Subject, optimizer: Optimizer, layer: nn.Linear, schedulers: Any = (), steps: int = 20
):
    """The loss before and after some steps."""
    x = torch.randn(5, generator=torch.Generator().manual_seed(3))

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=s.mode != "g")
        loss = layer(x).pow(2).sum()
        loss.backward()
        return loss

    first = float(closure().detach())
    for _ in range(steps):
        loss = float(closure().detach())
        s.step(optimizer)
        for scheduler in schedulers:
            scheduler.step(*[loss] * isinstance(scheduler, ReduceLROnPlateau))
    return first, float(closure().detach())


@check()
def goes_the_right_direction(s: Subject) -> None:
    """test_forloop_goes_right_direction, contiguous and strided, with and without schedulers."""
    sets = ((), *s.info.scheduler_inputs)
    for strided in (False, True):
        for schedulers in sets if not strided and s.mode == "p" else sets[:: len(sets) - 1]:
            layer = model(strided)
            # Kernels step what fills its memory; where they are optional the rest goes without.
            form = {"fused": None} if strided and s.mode in "fg" else {}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*by the plain path", RuntimeWarning)
                optimizer = s.make(layer, **form)
                first, last = train(s, optimizer, layer, [f(optimizer) for f in schedulers])
            assert last < first, f"{first} to {last}, strided={strided}"


@check()
def groups_under_schedulers(s: Subject) -> None:
    """test_param_group_with_lrscheduler_goes_right_direction"""
    for schedulers in s.info.scheduler_inputs if s.mode == "p" else s.info.scheduler_inputs[-1:]:
        layer = model()
        groups = [{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.01}]
        optimizer = s.make(groups, lr=1e-3)
        first, last = train(s, optimizer, layer, [f(optimizer) for f in schedulers])
        assert last < first


@check()
def tensor_lr(s: Subject) -> None:
    """test_tensor_lr: the same as a number, followed when it is written, never written itself."""
    for shape in ((), (1,)):
        rate = torch.full(shape, 0.25, dtype=torch.float64)
        number, tensor = s.make(parameters(), lr=0.25), s.make(parameters(), lr=rate)
        for i in range(3):
            s.eager.steps(number, 1, i)
            s.steps(tensor, 1, i)
            equal(number, tensor)
            assert all(g["lr"] is rate for g in tensor.param_groups) and float(rate) == 0.5**2 / (
                1 + i
            )
            rate.div_((2 + i) / (1 + i))
            for group in number.param_groups:
                group["lr"] = float(rate)


@check()
def schedulers_set_the_rate(s: Subject) -> None:
    """Each scheduler over a float and a tensor equals the rate set by hand."""
    for make in [x[0] for x in s.info.scheduler_inputs[:4]]:
        for lr in (0.25, torch.tensor(0.25, dtype=torch.float64)):
            given = lr.clone() if isinstance(lr, Tensor) else lr
            optimizer, hand = s.make(parameters(), lr=given), s.make(parameters())
            scheduler: LRScheduler = make(optimizer)
            rates: set[float] = set()
            for i in range(12 if s.mode == "p" else 3):
                for a, b in zip(optimizer.param_groups, hand.param_groups, strict=True):
                    b["lr"] = float(a["lr"])
                    rates.add(b["lr"])
                s.steps(optimizer, 1, i)
                s.eager.steps(hand, 1, i)
                scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))
            equal(optimizer, hand)
            assert len(rates) > 1 or s.mode != "p"
            if s.mode != "p":
                break


@check()
def a_float_over_a_tensor_lr(s: Subject) -> None:
    """ReduceLROnPlateau writes a float where a tensor stood (pytorch#163093); and back again."""
    optimizer = s.make(parameters(), lr=torch.tensor(0.25))
    hand = s.make(parameters(), lr=0.25)
    for i, rate in enumerate((0.125, torch.tensor(0.0625, dtype=torch.float64), 0.5)):
        for group, other in zip(optimizer.param_groups, hand.param_groups, strict=True):
            group["lr"], other["lr"] = rate, float(rate)
        s.steps(optimizer, 1, i)
        s.eager.steps(hand, 1, i)
        equal(optimizer, hand)


@check()
def rate_of_a_group(s: Subject) -> None:
    """test_param_groups_lr: a group whose rate is 1e-28 stays where it is, another moves."""
    still, moving = parameters(), parameters()
    before = copied(still)
    optimizer = s.make([{"params": still, "lr": 1e-28}, {"params": moving}], lr=1e-2)
    s.steps(optimizer, 4)
    assert all(map(torch.equal, still, before))
    assert not any(map(torch.equal, moving, before))


@check()
def weight_decay_of_a_group(s: Subject) -> None:
    """test_param_groups_weight_decay: it shrinks the weights of its group alone."""
    weight, bias = parameters()
    groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias]}]
    optimizer = s.make(groups, lr=1e-2, weight_decay=0.0)
    feed(optimizer, 0.0)
    before = copied((weight, bias))
    for p in (weight, bias):
        p.grad = torch.zeros_like(p)
    s.step(optimizer)
    assert torch.equal(bias, before[1])
    moved = weight.detach() - before[0]
    assert bool((moved * before[0] < 0).all()), "decay goes to zero in every entry"
    if optimizer.param_groups[0]["decoupled"]:
        torch.testing.assert_close(moved, -1e-2 * 0.5 * before[0], rtol=1e-3, atol=1e-6)


@check()
def freeze_and_unfreeze(s: Subject) -> None:
    """A parameter that lost its gradient is left alone, and goes on with the state it had."""
    optimizer, alone = s.make(parameters()), s.make(parameters()[:1])
    weight, bias = (p for group in optimizer.param_groups for p in group["params"])
    s.steps(optimizer, 2)
    bias.requires_grad_(False)
    bias.grad = None
    kept = everything(optimizer)
    for i in (2, 3):
        give(alone, i)
        if weight.grad is None:
            weight.grad = torch.empty_like(weight)
        weight.grad.copy_(alone.param_groups[0]["params"][0].grad)
        s.step(optimizer)
    now = everything(optimizer)
    for key in [k for k in kept if k[0] == 1]:
        assert torch.equal(kept[key], now[key]), key
    assert float(now[0, "step"]) == 4 and float(now[1, "step"]) == 2
    bias.requires_grad_(True)
    s.steps(optimizer, 1, 4)
    assert float(everything(optimizer)[1, "step"]) == 3 and not torch.equal(bias, now[1, "p"])


@check()
def no_gradients(s: Subject) -> None:
    """test_step_is_noop_when_params_have_no_grad"""
    optimizer = s.make(parameters())
    before = everything(optimizer)
    s.step(optimizer)
    equal(before, optimizer)
    assert not optimizer.state


@check()
def zero_gradients(s: Subject) -> None:
    """test_step_is_noop_for_zero_grads, exactly and in every state; with a rate of zero as well."""
    for dtype in (torch.float32, torch.bfloat16):
        for lr in (0.1, 0.0):
            optimizer = s.make(parameters(dtype), lr=lr, weight_decay=0.0)
            before = everything(optimizer)
            feed(optimizer, 0.0)
            for _ in range(3):
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
                s.step(optimizer)
            after = everything(optimizer)
            assert all(torch.equal(x, after[k]) for k, x in before.items())
            assert all(bool(x.isfinite().all()) for x in after.values())


@check()
def scalars_are_parameters(s: Subject) -> None:
    """Parameters of shape () move, as one of shape (1,) does."""
    scalar, vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor([2.0]))
    for p in (scalar, vector):
        optimizer = s.make([p], lr=0.1)
        for _ in range(2):
            p.grad = torch.full_like(p, 0.5) if p.grad is None else p.grad.fill_(0.5)
            s.step(optimizer)
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
        for p, q in zip(full, (q for g in alone.param_groups for q in g["params"]), strict=True):
            p.grad = q.grad.clone() if p.grad is None else p.grad.copy_(q.grad)
        s.step(optimizer)
        s.eager.step(alone)
    mine = [optimizer.state[p]["step"] for p in empty]
    assert [float(x) for x in mine] == [2.0] * 3
    for p, q in zip(full, (q for g in alone.param_groups for q in g["params"]), strict=True):
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
def maximize(s: Subject) -> None:
    """Uphill is downhill for the negative, bit by bit."""
    up, down = s.make(parameters(), maximize=True), s.make(parameters())
    for i in range(3):
        give(up, i)
        give(down, i)
        for group in down.param_groups:
            for p in group["params"]:
                p.grad.neg_()
        s.step(up)
        s.eager.step(down)
    equal(up, down)


@check()
def gradients_are_left_alone(s: Subject) -> None:
    """Neither written nor kept: what a user does to them after a step is nobody's business."""
    optimizer, other = s.make(parameters()), s.make(parameters())
    for i in range(3):
        for x, own in ((optimizer, s), (other, s.eager)):
            give(x, i)
            kept = copied(p.grad for g in x.param_groups for p in g["params"])
            own.step(x)
            assert all(
                map(torch.equal, kept, [p.grad for g in x.param_groups for p in g["params"]])
            )
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
    together = {
        id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])
    }
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
    for p in (p for group in optimizer.param_groups for p in group["params"]):
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
        s.steps(wide, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    for p in (p for group in wide.param_groups for p in group["params"]):
        kept = {k: x.dtype for k, x in wide.state[p].items() if k != "step"}
        assert p.dtype == torch.float64 and set(kept.values()) <= {torch.float64}


@check()
def gradients_that_are_not_finite(s: Subject) -> None:
    """NaN is left out and counted, or named; by default it goes through, into its own parameter."""
    for bad in (math.nan, math.inf):
        for how in ("propagate", "skip", "raise"):
            optimizer = s.make(parameters(), on_nonfinite=how)
            s.steps(optimizer, 1)
            before = everything(optimizer)
            weight, bias = (p for group in optimizer.param_groups for p in group["params"])
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
        if s.mode == "c":
            break


@check()
def closures(s: Subject) -> None:
    """Called once, with gradients on, before any is read; its loss is returned."""
    optimizer, hand = s.make(parameters()), s.make(parameters())
    calls: list[int] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        give(optimizer, len(calls))
        calls.append(1)
        return torch.tensor(2.5)

    feed(optimizer)
    for i in range(2):
        with torch.no_grad():
            assert float(s.step(optimizer, closure)) == 2.5
        s.eager.steps(hand, 1, i)
    assert len(calls) == 2
    equal(optimizer, hand)
    assert s.step(optimizer) is None


@check()
def two_optimizers(s: Subject) -> None:
    """Two objects of a class over two halves of a model, in turn, are each as if alone."""
    one, two = s.make(parameters(), lr=0.1), s.make(parameters(), lr=0.01)
    alone = s.make(parameters(), lr=0.1), s.make(parameters(), lr=0.01)
    for i in range(2):
        for x in (one, two):
            s.steps(x, 1, i)
    for x, y in zip((one, two), alone, strict=True):
        s.eager.steps(y, 2)
        equal(x, y)
    assert not torch.equal(everything(one)[0, "p"], everything(two)[0, "p"])
