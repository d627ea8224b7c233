"""What a step does to parameters: which of them move, where to, and at which rate."""

from __future__ import annotations

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
    everyone,
    everything,
    feed,
    give,
    parameters,
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
        few = sets[:1] if strided else sets[-1:] if s.dear else sets
        for schedulers in few:
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
    for shape in ((), (1,))[: 1 if s.dear else 2]:
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
        for lr in (torch.tensor(0.25, dtype=torch.float64), 0.25)[: 1 if s.dear else 2]:
            given = lr.clone() if isinstance(lr, Tensor) else lr
            optimizer, hand = s.make(parameters(), lr=given), s.make(parameters())
            scheduler: LRScheduler = make(optimizer)
            rates: set[float] = set()
            for i in range(12):
                for a, b in zip(optimizer.param_groups, hand.param_groups, strict=True):
                    b["lr"] = float(a["lr"])
                    rates.add(b["lr"])
                s.steps(optimizer, 1, i)
                s.eager.steps(hand, 1, i)
                scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))
            equal(optimizer, hand)
            assert len(rates) > 1


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
    weight, bias = everyone(optimizer)
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
        for lr in (0.1,) if s.dear else (0.1, 0.0):
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
