"""Rules equal pytorch_optimizer 4.1.0 over the first 100 steps of a small network, in float64.

It is not among the pinned packages: make a folder of it, and name the marker, which is off else.

    pip install --no-deps --target DIR pytorch_optimizer==4.1.0
    PYTHONPATH=DIR pytest -m thirdparty -rP
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from deepopt import Rule, rules
from torch_backend import Optimizer

pytestmark = pytest.mark.thirdparty

STEPS = 100
# Rounding of 1e-16, amplified by 100 steps of training; a larger lr amplifies it much more.
TOLERANCE = 1e-11
# What their factors start from: this times the identity.
START = 1e-6


class Precise:
    """torch for their SOAP, without its cast to float32 and its sorting of the basis."""

    float32 = torch.float64

    @staticmethod
    def argsort(x: torch.Tensor, descending: bool) -> torch.Tensor:
        return torch.arange(len(x))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def other(monkeypatch):
    """Their package, computing in float64 where it would not."""
    package = pytest.importorskip("pytorch_optimizer")
    from pytorch_optimizer.optimizer import soap
    from pytorch_optimizer.optimizer.muon import adamuon

    monkeypatch.setattr(soap, "torch", Precise())
    wide = partial(adamuon.zero_power_via_newton_schulz_5, dtype=torch.float64)
    monkeypatch.setattr(adamuon, "zero_power_via_newton_schulz_5", wide)
    return package


class Twin(NamedTuple):
    """A rule and its original, and what makes them equal."""

    rule: Rule
    make: Callable[[Any, list[nn.Parameter]], torch.optim.Optimizer]
    # Memories to start from, by the state of theirs and the shape.
    memories: Callable[[dict[str, Any], torch.Size], dict[str, torch.Tensor]] = lambda s, shape: {}
    # Hyperparameters of a step, from 1.
    values: Callable[[int], dict[str, float]] = lambda t: {}
    # Steps that theirs takes before, without moving.
    before: int = 0


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)[None]


def factors(state, shape, root: float, sides=("left", "right")) -> dict[str, torch.Tensor]:
    """Their factors at the start, and roots of which those before the first refresh are."""
    sizes = {k: n for k, n in zip(("left", "right"), shape, strict=True) if k in sides}
    grams = {k: START * eye(n) for k, n in sizes.items()}
    return grams | {f"{k}_root": root * eye(n) for k, n in sizes.items()}


def their_basis(state, shape) -> dict[str, torch.Tensor]:
    """Of the first gradient, which their first step takes for the basis alone."""
    names = {"left": 0, "right": 1}
    grams = {k: state["GG"][i][None] for k, i in names.items()}
    return grams | {f"{k}_basis": state["Q"][i][None] for k, i in names.items()}


def soap(period: int) -> Twin:
    """Their eps is added before the correction of the bias, ours after it."""
    rule = rules.SOAP(lr=0.01, rotate=False, period=period, scale="none", damping=0.0)
    return Twin(
        rule,
        lambda o, p: o.SOAP(p, lr=0.01, weight_decay=0.0, precondition_frequency=period, eps=1e-8),
        their_basis,
        lambda t: {"eps": 1e-8 / (1 - 0.95**t) ** 0.5},
        before=1,
    )


def scalable(other, params, lr: float, kind: str = "ALL", graft: str = "SGD"):
    """Distributed Shampoo without momentum, which it puts after the roots and not before them."""
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting
    from pytorch_optimizer.optimizer.utils.partition import PreConditionerType

    return other.ScalableShampoo(
        params,
        lr=lr,
        betas=(0.0, 0.95),
        nesterov=False,
        start_preconditioning_step=1,
        preconditioning_compute_steps=10,
        shape_interpretation=False,
        graft_type=LayerWiseGrafting[graft],
        pre_conditioner_type=PreConditionerType[kind],
        matrix_eps=START,
        diagonal_eps=1e-30,
        use_svd=True,
    )


def shampoo(**options) -> Rule:
    return rules.Shampoo(momentum=0.0, beta2=0.95, period=10, floor=0.0, eps=1e-30, **options)


def ada_muon(other, params):
    groups = [{"params": params, "use_muon": True}]
    return other.AdaMuon(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-30)


TWINS = {
    "Shampoo": Twin(
        shampoo(lr=0.1, accumulate="sum", scale="none"),
        lambda o, p: o.Shampoo(p, lr=0.1, preconditioning_compute_steps=10, matrix_eps=START),
        partial(factors, root=0.0),
    ),
    "Shampoo, grafted to SGD": Twin(
        shampoo(lr=0.1, graft="sgd"), partial(scalable, lr=0.1), partial(factors, root=1.0)
    ),
    "Shampoo, of rows": Twin(
        shampoo(lr=0.1, graft="sgd", sides="left"),
        partial(scalable, lr=0.1, kind="INPUT"),
        partial(factors, root=1.0, sides=("left",)),
    ),
    "Shampoo, of columns": Twin(
        shampoo(lr=0.1, graft="sgd", sides="right"),
        partial(scalable, lr=0.1, kind="OUTPUT"),
        partial(factors, root=1.0, sides=("right",)),
    ),
    "Shampoo, grafted to Adam": Twin(
        shampoo(lr=0.01, graft="adam"),
        partial(scalable, lr=0.01, graft="RMSPROP"),
        partial(factors, root=1.0),
        # Their graft is not corrected for its bias.
        lambda t: {"lr": 0.01 / (1 - 0.95**t) ** 0.5},
    ),
    "SOAP in its first basis": soap(period=2 * STEPS),
    "SOAP": soap(period=10),
    "SOAP, refreshed every step": soap(period=1),
    "AdaMuon": Twin(
        rules.AdaMuon(lr=0.01, momentum=0.9, weight_decay=0.1, eps=1e-30, signed=False), ada_muon
    ),
    "AdEMAMix": Twin(
        rules.AdEMAMix(lr=0.01, betas=(0.9, 0.95), slow=0.99, weight=3.0, weight_decay=0.1),
        lambda o, p: o.AdEMAMix(
            p, lr=0.01, betas=(0.9, 0.95, 0.99), alpha=3.0, weight_decay=0.1, weight_decouple=True
        ),
    ),
}


def network() -> nn.Module:
    """Square layers, whose gradients are of full rank: no basis is left to rounding."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)
    return nn.Sequential(*layers).double()


def backward(model: nn.Module) -> None:
    """The gradients of a fixed regression."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn((2, 64, 6), generator=generator, dtype=torch.float64)
    teacher = torch.randn((6, 6), generator=generator, dtype=torch.float64)
    model.zero_grad()
    (model(x) - torch.sin(x @ teacher) - 0.5 * noise).square().mean().backward()


def started(optimizer: Optimizer, rule: Rule, given: list[dict[str, torch.Tensor]]) -> None:
    """Load memories in the place of those that a rule starts with."""
    state = {}
    for i, (p, own) in enumerate(zip(optimizer.param_groups[0]["params"], given, strict=True)):
        slots = {k: torch.tensor(s.start()) for k, s in rule.all_slots(tuple(p.shape)).items()}
        assert set(own) <= set(slots)
        state[i] = {"step": torch.tensor(0.0)} | slots | own
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def differences(other, twin: Twin) -> list[float]:
    """The largest difference between parameters after each step."""
    one, two = network(), network()
    ours, theirs = list(one.parameters()), list(two.parameters())
    mine, original = Optimizer(ours, twin.rule), twin.make(other, theirs)
    for _ in range(twin.before):
        backward(two)
        original.step()
    started(mine, twin.rule, [twin.memories(original.state[p], p.shape) for p in theirs])
    found = []
    for step in range(STEPS):
        for model in (one, two):
            backward(model)
        mine.param_groups[0].update(twin.values(step + 1))
        for optimizer in (mine, original):
            optimizer.step()
        pairs = zip(ours, theirs, strict=True)
        found.append(max(float((p - q).detach().abs().max()) for p, q in pairs))
    moved = zip(ours, network().parameters(), strict=True)
    assert min(float((p - q).detach().abs().max()) for p, q in moved) > 0.1
    return found


@pytest.mark.parametrize("name", TWINS)
def test_a_third_party_steps_equal(other, name):
    found = differences(other, TWINS[name])
    print(*(f"{found[step - 1]:.1e} after {step} steps" for step in (1, 10, STEPS)), sep=", ")
    assert max(found) <= TOLERANCE
