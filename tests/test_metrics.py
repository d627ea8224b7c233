"""What an optimizer tells of itself: the step that it would take, and nothing changed by asking."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from cases import CASES, contexts, stream
from torch import nn

import torch_backend
from deepopt import rules
from deepopt.around import clipped_globally
from deepopt.rules import ALL
from deepopt.signs import signed_memories
from torch_backend import Optimizer

FIRST = [next(c for c in CASES if type(c.rule) is rule) for rule in ALL]
SWITCHES = [c for c in CASES if c.rule.every > 1 or not c.rule.decoupled]


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def cosine(x, y) -> float:
    x, y = (np.asarray(a, np.float64).ravel() for a in (x, y))
    size = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / size) if size else 0.0


def snapshot(optimizer: Optimizer):
    """All that a step could change, and the objects that hold it."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    state = {id(p): dict(optimizer.state[p]) for p in params if p in optimizer.state}
    tensors = [*params, *(x for s in state.values() for x in s.values())]
    tensors += [p.grad for p in params if p.grad is not None]
    return state, [x.detach().clone() for x in tensors], torch.get_rng_state()


def unchanged(optimizer: Optimizer, before) -> None:
    now = snapshot(optimizer)
    assert now[0].keys() == before[0].keys() and torch.equal(now[2], before[2])
    for one, two in zip(now[0].values(), before[0].values(), strict=True):
        assert one.keys() == two.keys() and all(one[k] is two[k] for k in one)
    assert all(torch.equal(a, b) for a, b in zip(now[1], before[1], strict=True))


@pytest.mark.parametrize("fused", [False, None], ids=["plain", "fused"])
@pytest.mark.parametrize("case", FIRST + SWITCHES, ids=str)
def test_the_step_that_follows_is_the_one_that_was_told(case, fused):
    """Sizes and angles as NumPy has them, from what the step did and what stood before it."""
    w, gradients = stream(case.shape, 6)
    p = nn.Parameter(torch.tensor(w))
    optimizer = Optimizer([p], case.rule, fused=fused)
    context = contexts(case.rule, case.shape, 6)
    own: dict[str, float] = {}
    for i, g in enumerate(gradients):
        p.grad = torch.tensor(g)
        if context[i]:
            optimizer.context[p] = {k: torch.tensor(x) for k, x in context[i].items()}
        was, before = p.detach().clone(), snapshot(optimizer)
        numbers = optimizer.metrics()
        unchanged(optimizer, before)
        json.dumps(numbers)
        memories = dict(optimizer.state[p]) if p in optimizer.state else {}
        own = {k.split("/", 2)[2]: x for k, x in numbers.items() if k.startswith("0/")}
        assert own["weight_rms"] == pytest.approx(rms(was), rel=1e-9)
        for name in signed_memories(case.rule, case.shape):
            expected = cosine(memories[name], g) if memories else 0.0
            assert own[f"alignment/{name}"] == pytest.approx(expected, abs=1e-9), name
        optimizer.step()
        moved = rms((p.detach() - was).numpy())
        assert own["update_rms"] == pytest.approx(moved, rel=1e-6, abs=1e-12)
        for clock, period in {"every": 1, **case.rule.clocks()}.items():
            every = case.rule.every
            if f"phase/{clock}" in own:
                assert own[f"phase/{clock}"] == i % (period * every)
    assert all(f"phase/{k}" in own for k in case.rule.clocks())
    assert ("phase/every" in own) == (case.rule.every > 1)


def test_a_step_may_be_asked_about_before_it_after_it_and_without_gradients():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    optimizer = torch_backend.M3(model, lr=0.01, period=3)
    assert {k.split("/", 2)[-1] for k in optimizer.metrics()} == {
        *("skipped_steps", "weight_rms", "nonfinite", "phase/slow_1")
    }
    assert not optimizer.state
    model(torch.randn(4, 6)).square().sum().backward()
    first = optimizer.metrics()
    optimizer.step()
    then = optimizer.metrics()
    assert first.keys() == then.keys() and then["0/M3/alignment/fast"] > 0.99
    assert (first["0/M3/phase/slow_1"], then["0/M3/phase/slow_1"]) == (0.0, 1.0)
    optimizer.zero_grad()
    assert "0/M3/update_rms" not in optimizer.metrics()
    assert all(type(x) is float for x in then.values())


def test_groups_are_told_apart_and_frozen_parameters_only_weigh():
    params = [nn.Parameter(torch.full((2, 3), x)) for x in (1.0, 2.0, 4.0)]
    params[1].requires_grad_(False)
    optimizer = Optimizer([{"params": params[:2]}, {"params": params[2:]}], rules.SGD(lr=0.5))
    params[0].grad, params[2].grad = torch.full((2, 3), 2.0), torch.full((2, 3), 3.0)
    numbers = optimizer.metrics()
    assert numbers["0/SGD/weight_rms"] == pytest.approx(math.sqrt(2.5))
    assert numbers["0/SGD/update_rms"] == pytest.approx(1.0)
    assert numbers["1/SGD/update_rms"] == pytest.approx(1.5)
    optimizer.param_groups[1]["lr"] = 0.1
    assert optimizer.metrics()["1/SGD/update_rms"] == pytest.approx(0.3)


def test_several_parameters_are_measured_as_one():
    """Stacked, as one of several matrices, and of other shapes: root mean squares over all."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(s)) for s in ((4, 3), (4, 3), (8, 3), (5,))]
    several = {"params": params[2:3], "seen_as": "split:2", "rule": rules.Muon(lr=0.1)}
    groups = [{"params": [*params[:2], params[3]]}, several]
    optimizer = Optimizer(groups, rules.HeavyBall(lr=0.1), fused=False)
    members = {"0/HeavyBall": (0, 1, 3), "1/Muon": (2,)}

    memories: list[torch.Tensor] = []
    numbers: dict[str, float] = {}

    def flat(tensors, members):
        return np.concatenate([tensors[i].detach().numpy().ravel() for i in members])

    for i in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        numbers, was = optimizer.metrics(), [p.detach().clone() for p in params]
        memories = [optimizer.state[p]["momentum_buffer"].clone() for p in params if i]
        optimizer.step()
        moved = [p.detach() - x for p, x in zip(params, was, strict=True)]
        for name, own in members.items():
            assert numbers[f"{name}/update_rms"] == pytest.approx(rms(flat(moved, own)), rel=1e-5)
    for name, own in members.items():
        expected = cosine(flat(memories, own), flat([p.grad for p in params], own))
        assert numbers[f"{name}/alignment/momentum_buffer"] == pytest.approx(expected)


def test_what_is_not_finite_is_counted():
    p = nn.Parameter(torch.ones(5))
    p.grad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0])
    optimizer = Optimizer([p], on_nonfinite="skip")
    numbers = optimizer.metrics()
    assert numbers["0/AdamW/nonfinite"] == 3.0 and math.isnan(numbers["0/AdamW/update_rms"])
    optimizer.step()
    assert optimizer.metrics()["skipped_steps"] == 1.0


def test_options_of_the_step_count():
    """Uphill the memory and what is added turn; a joint norm is that of all groups."""
    params = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    for p in params:
        p.grad = torch.full((3, 3), 2.0)
    rule = clipped_globally(rules.HeavyBall(lr=1.0), 1.0)
    optimizer = Optimizer(params, rule, maximize=True)
    name = optimizer.param_groups[0]["rule"]
    expected = 2.0 / math.sqrt(18 * 4.0)
    assert optimizer.metrics()[f"0/{name}/update_rms"] == pytest.approx(expected)
    optimizer.step()
    numbers = optimizer.metrics()
    assert numbers[f"0/{name}/alignment/momentum_buffer"] == pytest.approx(1.0)
    assert all(float(p[0, 0].detach()) > 1 for p in params)


@pytest.mark.parametrize("rounding", ["stochastic", "exact"])
def test_weights_that_kernels_round_are_asked_about(rounding):
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = Optimizer([p], rules.SGD(lr=2.0**-10), rounding=rounding)
    assert optimizer.metrics()["0/SGD/update_rms"] == 2.0**-10


def test_staggered_clocks_have_the_phase_of_their_parameter():
    """The clock of the first parameter ticked when its phase is 0."""
    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    optimizer = Optimizer(params, rules.M3(period=3, stagger=True), fused=False)
    for _ in range(7):
        for p in params:
            p.grad = torch.randn_like(p)
        before = torch.zeros(4, 4)
        if optimizer.state:
            before = optimizer.state[params[0]]["readout_1"].clone()
        optimizer.step()
        ticked = not torch.equal(before, optimizer.state[params[0]]["readout_1"])
        assert (optimizer.metrics()["0/M3/phase/slow_1"] == 0.0) == ticked


def test_a_missing_context_leaves_the_update_out():
    p = nn.Parameter(torch.randn(3, 4))
    p.grad = torch.randn(3, 4)
    optimizer = Optimizer([p], rules.DGD())
    assert "0/DGD/update_rms" not in optimizer.metrics()
    optimizer.context[p]["gram"] = torch.eye(4)
    assert optimizer.metrics()["0/DGD/update_rms"] > 0


def test_copies_tell_the_same():
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = torch_backend.Shampoo([p], period=2)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    q.grad = torch.ones_like(q)
    p.grad = torch.ones_like(p)
    assert twin.metrics() == optimizer.metrics() and "negatives" in twin.metrics()


def test_signs_of_memories():
    named = {type(r).__name__: signed_memories(r, (8, 6)) for r in (rule() for rule in ALL)}
    assert named["AdamW"] == ("exp_avg",) and named["AMSGrad"] == ("exp_avg",)
    assert named["M3"] == ("fast", "slow_1", "readout_1") and named["SGD"] == ()
    assert named["SOAP"] == ("exp_avg",) and named["AdaGrad"] == ()
    assert named["Lion"] == ("exp_avg",) and named["AdEMAMix"] == ("exp_avg", "exp_avg_slow")
    assert signed_memories(rules.AdamW(every=4), (6,)) == ("exp_avg", "gradient_sum")
