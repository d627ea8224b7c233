"""Rules that exist elsewhere equal their twins in torch.optim and optax, in float32 to 1e-6.

Conventions: Muon's momentum is an average (m ← βm + (1 - β)g, as in torch; optax's too, but with a
bias correction, which orthogonalisation removes); scale "rms" is torch's "match_rms_adamw",
"spectral" its "original". Heavy ball sums (m ← βm + g), and its weight decay is decoupled where
torch.optim.SGD's is not. Both libraries round more where a second moment is young: optax has
1 - b2**t in float32, so a small b2 or lr stands for a long run.
"""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.optim._muon
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn

import jax_backend
import torch_backend
from deepopt import around, rules

STEPS = 20
SHAPES = [(6, 4), (4, 7), (5, 5)]
TOLERANCE = 1e-6
# torch's NAdam adds two terms to a weight, one after the other, and rounds twice as often. Kernels
# multiply by the inverse of a bias correction, which rounds once more.
TWICE = ("NAdam", "NAdam, decoupled decay", "AdamW")


def factor(step: int) -> float:
    """The schedule of the twins: warm-up and decay."""
    return warm_up(step) * 0.9**step


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 5)


def inputs() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    rng = np.random.default_rng(0)

    def draw():
        return [rng.standard_normal(s).astype(np.float32) for s in SHAPES]

    return draw(), [draw() for _ in range(STEPS)]


def torch_path(make, factor=factor, averaged: bool = False) -> list[np.ndarray]:
    weights, gradients = inputs()
    params = [nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = make(params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    path = []
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        scheduler.step()
        with torch_backend.averaged(optimizer) if averaged else nullcontext():
            path += [p.detach().numpy().copy() for p in params]
    return path


def optax_path(tx, transposed: bool = False, read=lambda params, state: params):
    def turned(arrays):
        return [jnp.asarray(x.T if transposed else x) for x in arrays]

    weights, gradients = inputs()
    params = turned(weights)
    state = tx.init(params)
    update = jax.jit(tx.update)
    path = []
    for step in gradients:
        updates, state = update(turned(step), state, params)
        params = optax.apply_updates(params, updates)
        path += [np.asarray(p) for p in turned(read(params, state))]
    return path


def schedule(lr: float, factor=factor):
    table = jnp.asarray([lr * factor(t) for t in range(STEPS)], jnp.float32)
    return lambda count: table[count]


def difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    moved = np.concatenate([x.ravel() for x in a[-len(SHAPES) :]])
    assert np.abs(moved - np.concatenate([w.ravel() for w in inputs()[0]])).max() > 1e-2
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


ours, theirs = torch_backend, torch.optim
TORCH = {
    "SGD": (lambda p: ours.SGD(p, 0.1), lambda p: theirs.SGD(p, 0.1)),
    "SGD, coupled decay": (
        lambda p: ours.SGD(p, 0.1, weight_decay=0.1, decoupled=False),
        lambda p: theirs.SGD(p, 0.1, weight_decay=0.1),
    ),
    "heavy ball": (
        lambda p: ours.HeavyBall(p, 0.03, momentum=0.8, weight_decay=0.1, decoupled=False),
        lambda p: theirs.SGD(p, 0.03, momentum=0.8, weight_decay=0.1),
    ),
    "Nesterov": (
        lambda p: ours.HeavyBall(p, 0.03, momentum=0.8, nesterov=True),
        lambda p: theirs.SGD(p, 0.03, momentum=0.8, nesterov=True),
    ),
    "Adam": (
        lambda p: ours.AdamW(p, 0.1, weight_decay=0.1, decoupled=False),
        lambda p: theirs.Adam(p, 0.1, weight_decay=0.1),
    ),
    "AdamW": (
        lambda p: ours.AdamW(p, 0.1, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
        lambda p: theirs.AdamW(p, 0.1, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    ),
    "AdamW, uphill": (
        lambda p: ours.AdamW(p, 0.1, maximize=True),
        lambda p: theirs.AdamW(p, 0.1, maximize=True),
    ),
    "Nesterov by name": (
        lambda p: ours.Nesterov(p, 0.03, momentum=0.8),
        lambda p: theirs.SGD(p, 0.03, momentum=0.8, nesterov=True),
    ),
    "Adam by name": (
        lambda p: ours.Adam(p, 0.1, weight_decay=0.1),
        lambda p: theirs.Adam(p, 0.1, weight_decay=0.1),
    ),
    "AdaGrad": (lambda p: ours.AdaGrad(p, 0.1), lambda p: theirs.Adagrad(p, 0.1)),
    "AdaGrad from a start": (
        lambda p: ours.AdaGrad(p, 0.1, initial=0.1, eps=1e-3, weight_decay=0.1, decoupled=False),
        lambda p: theirs.Adagrad(p, 0.1, initial_accumulator_value=0.1, eps=1e-3, weight_decay=0.1),
    ),
    "RMSProp": (
        lambda p: ours.RMSProp(p, 0.03, eps=1e-3, weight_decay=0.1, decoupled=False),
        lambda p: theirs.RMSprop(p, 0.03, eps=1e-3, weight_decay=0.1),
    ),
    "RMSProp, centered": (
        lambda p: ours.RMSProp(p, 0.03, beta2=0.9, centered=True),
        lambda p: theirs.RMSprop(p, 0.03, alpha=0.9, centered=True),
    ),
    "NAdam": (lambda p: ours.NAdam(p, 0.01), lambda p: theirs.NAdam(p, 0.01)),
    "NAdam, decoupled decay": (
        lambda p: ours.NAdam(
            p, 0.01, betas=(0.8, 0.95), eps=1e-3, momentum_decay=0.1, weight_decay=0.1
        ),
        lambda p: theirs.NAdam(
            p,
            0.01,
            betas=(0.8, 0.95),
            eps=1e-3,
            momentum_decay=0.1,
            weight_decay=0.1,
            decoupled_weight_decay=True,
        ),
    ),
    # torch adds the eps to the root before it corrects the bias, so this holds for a small one.
    "RAdam": (lambda p: ours.RAdam(p, 0.03), lambda p: theirs.RAdam(p, 0.03)),
    "RAdam, coupled decay": (
        lambda p: ours.RAdam(p, 0.01, betas=(0.8, 0.95), weight_decay=0.1, decoupled=False),
        lambda p: theirs.RAdam(p, 0.01, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    "AMSGrad": (
        lambda p: ours.AMSGrad(p, 0.03, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1),
        lambda p: theirs.AdamW(p, 0.03, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, amsgrad=True),
    ),
    "AMSGrad, coupled decay": (
        lambda p: ours.AMSGrad(p, 0.1, betas=(0.8, 0.9), weight_decay=0.1, decoupled=False),
        lambda p: theirs.Adam(p, 0.1, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=True),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch_twins(name):
    mine, twin = TORCH[name]
    found = difference(torch_path(mine), torch_path(twin))
    assert found <= TOLERANCE * (1 + (name in TWICE))


def newton_schulz(g, coefficients, steps, eps):
    """torch's iteration without its cast to bfloat16."""
    a, b, c = coefficients
    x = g.T if g.size(0) > g.size(1) else g
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.size(0) > g.size(1) else x


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "name"), [("rms", "match_rms_adamw"), ("spectral", "original")])
def test_muon_of_torch(monkeypatch, scale, name, nesterov):
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz)
    options = {"weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    mine = torch_path(
        lambda p: torch_backend.Muon(p, 0.03, scale=scale, precision="float32", **options)
    )
    twin = torch_path(lambda p: torch.optim.Muon(p, 0.03, adjust_lr_fn=name, **options))
    assert difference(mine, twin) <= TOLERANCE


def test_a_checkpoint_of_torchs_muon_continues_equal(monkeypatch):
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz)
    weights, gradients = inputs()
    one, two = ([nn.Parameter(torch.tensor(w)) for w in weights] for _ in range(2))
    twin, mine = (
        torch.optim.Muon(one, 0.03, ns_steps=4),
        torch_backend.Muon(two, precision="float32"),
    )
    for step, several in enumerate(gradients):
        for p, q, g in zip(one, two, several, strict=True):
            p.grad, q.grad = torch.tensor(g), torch.tensor(g)
        twin.step()
        if step < 9:
            continue
        if step == 9:
            mine.load_state_dict(twin.state_dict())
            for p, q in zip(one, two, strict=True):
                q.data.copy_(p.data)
            assert mine.param_groups[0]["scale"] == "spectral"
            assert mine.param_groups[0]["steps"] == 4
            continue
        mine.step()
    worst = max(float((p - q).detach().abs().max()) for p, q in zip(one, two, strict=True))
    assert worst <= TOLERANCE


def lion():
    return optax.lion(schedule(0.02), b1=0.9, b2=0.99, weight_decay=0.1)


def bound(rule):
    """A rule at lr 0.1, in jax and in torch."""
    return (
        lambda: jax_backend.transform(rule, lr=schedule(0.1)),
        lambda p: ours.Optimizer(p, rule.with_values({"lr": 0.1})),
    )


def sgd_after(*before):
    return optax.chain(*before, optax.sgd(schedule(0.1)))


def clipped_by_leaf(max_norm: float):
    """optax clips the root mean square of a leaf, not its norm."""
    rms = [max_norm / np.sqrt(np.prod(shape)) for shape in SHAPES]
    each = {i: sgd_after(optax.clip_by_block_rms(x)) for i, x in enumerate(rms)}
    return optax.partition(each, list(each))


OPTAX = {
    "sgd": (
        lambda: jax_backend.sgd(schedule(0.1)),
        lambda p: ours.SGD(p, 0.1),
        lambda: optax.sgd(schedule(0.1)),
    ),
    "heavy_ball": (
        lambda: jax_backend.heavy_ball(schedule(0.03), momentum=0.8),
        lambda p: ours.HeavyBall(p, 0.03, momentum=0.8),
        lambda: optax.chain(optax.trace(0.8), optax.scale_by_learning_rate(schedule(0.03))),
    ),
    "nesterov": (
        lambda: jax_backend.heavy_ball(schedule(0.03), momentum=0.8, nesterov=True),
        lambda p: ours.HeavyBall(p, 0.03, momentum=0.8, nesterov=True),
        lambda: optax.sgd(schedule(0.03), momentum=0.8, nesterov=True),
    ),
    "adamw": (
        # optax rounds 1 - b2**t to float32, which is an error of 3e-5 in its first steps.
        lambda: jax_backend.adamw(schedule(0.02), weight_decay=0.1),
        lambda p: ours.AdamW(p, 0.02, weight_decay=0.1),
        lambda: optax.adamw(schedule(0.02), weight_decay=0.1),
    ),
    "lion": (
        lambda: jax_backend.lion(schedule(0.02), weight_decay=0.1),
        lambda p: ours.Lion(p, 0.02, weight_decay=0.1),
        lion,
    ),
    "sign_sgd": (
        lambda: jax_backend.sign_sgd(schedule(0.03)),
        lambda p: ours.SignSGD(p, 0.03),
        lambda: optax.sign_sgd(schedule(0.03)),
    ),
    "signum": (
        lambda: jax_backend.signum(schedule(0.03), momentum=0.8),
        lambda p: ours.Signum(p, 0.03, momentum=0.8),
        lambda: optax.signum(schedule(0.03), beta=0.8),
    ),
    "adagrad": (
        # optax adds the eps to the sum, under the root: to us it is part of the start.
        lambda: jax_backend.adagrad(schedule(0.1), initial=0.1 + 1e-3, eps=0.0),
        lambda p: ours.AdaGrad(p, 0.1, initial=0.1 + 1e-3, eps=0.0),
        lambda: optax.adagrad(schedule(0.1), initial_accumulator_value=0.1, eps=1e-3),
    ),
    "rmsprop": (
        lambda: jax_backend.rmsprop(schedule(0.03), beta2=0.9, eps=1e-3),
        lambda p: ours.RMSProp(p, 0.03, beta2=0.9, eps=1e-3),
        lambda: optax.rmsprop(schedule(0.03), decay=0.9, eps=1e-3, eps_in_sqrt=False),
    ),
    "rmsprop, centered": (
        lambda: jax_backend.rmsprop(schedule(0.03), beta2=0.9, eps=1e-3, centered=True),
        lambda p: ours.RMSProp(p, 0.03, beta2=0.9, eps=1e-3, centered=True),
        lambda: optax.rmsprop(
            schedule(0.03), decay=0.9, eps=1e-3, eps_in_sqrt=False, centered=True
        ),
    ),
    "nadam": (
        lambda: jax_backend.nadam(schedule(0.03), schedule="constant", betas=(0.8, 0.9), eps=1e-3),
        lambda p: ours.NAdam(p, 0.03, schedule="constant", betas=(0.8, 0.9), eps=1e-3),
        lambda: optax.nadam(schedule(0.03), b1=0.8, b2=0.9, eps=1e-3),
    ),
    "radam": (
        lambda: jax_backend.radam(schedule(0.03), betas=(0.8, 0.9), eps=1e-3),
        lambda p: ours.RAdam(p, 0.03, betas=(0.8, 0.9), eps=1e-3),
        lambda: optax.radam(schedule(0.03), b1=0.8, b2=0.9, eps=1e-3),
    ),
    "amsgrad": (
        lambda: jax_backend.amsgrad(schedule(0.03), betas=(0.8, 0.9), eps=1e-3, corrected=True),
        lambda p: ours.AMSGrad(p, 0.03, betas=(0.8, 0.9), eps=1e-3, corrected=True),
        lambda: optax.amsgrad(schedule(0.03), b1=0.8, b2=0.9, eps=1e-3),
    ),
    "ademamix": (
        lambda: jax_backend.ademamix(
            schedule(0.03), betas=(0.8, 0.95), slow=0.99, weight=2.0, weight_decay=0.1
        ),
        lambda p: ours.AdEMAMix(
            p, 0.03, betas=(0.8, 0.95), slow=0.99, weight=2.0, weight_decay=0.1
        ),
        lambda: optax.contrib.ademamix(
            schedule(0.03), b1=0.8, b2=0.95, b3=0.99, alpha=2.0, weight_decay=0.1
        ),
    ),
    "centralized": (
        *bound(around.centralized(rules.SGD())),
        lambda: sgd_after(optax.centralize()),
    ),
    "clipped": (*bound(around.clipped(rules.SGD(), 5.0)), lambda: clipped_by_leaf(5.0)),
    "clipped_globally": (
        *bound(around.clipped_globally(rules.SGD(), 8.8)),
        lambda: sgd_after(optax.clip_by_global_norm(8.8)),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_optax_twins(name):
    in_jax, in_torch, twin = OPTAX[name]
    expected = optax_path(twin())
    assert difference(optax_path(in_jax()), expected) <= TOLERANCE
    assert difference(torch_path(in_torch), expected) <= TOLERANCE


@pytest.mark.parametrize("scale", ["rms", "spectral"])
@pytest.mark.parametrize("binding", ["torch", "jax"])
def test_muon_of_optax(binding, scale):
    """Without Nesterov, where the bias correction of optax's momentum cancels."""
    twin = optax.contrib.muon(
        schedule(0.03),
        beta=0.9,
        nesterov=False,
        weight_decay=0.1,
        eps=1e-30,
        consistent_rms=0.2 if scale == "rms" else None,
    )
    # A weight is (in, out) to optax and (out, in) to torch, which "spectral" can tell.
    expected = optax_path(twin, transposed=True)
    options = {"momentum": 0.9, "nesterov": False, "scale": scale, "weight_decay": 0.1}
    if binding == "jax":
        mine = optax_path(jax_backend.muon(schedule(0.03), **options))
    else:
        mine = torch_path(lambda p: torch_backend.Muon(p, 0.03, precision="float32", **options))
    assert difference(mine, expected) <= TOLERANCE


SCHEDULE_FREE = {
    "SGD": (
        rules.SGD(lr=0.1, weight_decay=0.1),
        lambda lr: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lr)),
    ),
    "AdamW": (
        rules.AdamW(lr=0.02, betas=(0.0, 0.9), eps=1e-3, weight_decay=0.1),
        lambda lr: optax.adamw(lr, b1=0.0, b2=0.9, eps=1e-3, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_of_optax(name, evaluated):
    """Without decay of the rate: optax weighs a step by the largest rate so far, ours by its own.

    It asks for that rate by the number of the step, from 1. To evaluate, it divides weights that
    cancel in part by b1, so it rounds more.
    """
    inner, twin = SCHEDULE_FREE[name]
    rule, rates = around.schedule_free(inner, 0.8), schedule(inner.lr, warm_up)
    theirs = optax.contrib.schedule_free(twin(rates), lambda step: rates(step - 1), b1=0.8)
    here, there, tolerance = {}, {}, TOLERANCE
    if evaluated:
        read = optax.contrib.schedule_free_eval_params
        here, there = {"read": jax_backend.averaged}, {"read": lambda p, state: read(state, p)}
        tolerance = 2 * TOLERANCE
    expected = optax_path(theirs, **there)
    in_jax = optax_path(jax_backend.transform(rule, lr=rates), **here)
    in_torch = torch_path(lambda p: ours.Optimizer(p, rule), warm_up, averaged=evaluated)
    assert difference(in_jax, expected) <= tolerance
    assert difference(in_torch, expected) <= tolerance


AVERAGES = {
    "torch": lambda average, new: get_ema_avg_fn(0.9)(average, new, 0),
    "optax": lambda average, new: optax.incremental_update(new, average, 0.1),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_average_of_the_weights(name):
    expected = inputs()[0]
    for new in torch_path(lambda p: theirs.SGD(p, 0.1)):
        # One tensor after another, so the same one stands so far back.
        expected.append(np.asarray(AVERAGES[name](expected[-len(SHAPES)], new)))
    del expected[: len(SHAPES)]
    in_jax, in_torch = bound(around.averaged(rules.SGD(), 0.9))
    assert difference(optax_path(in_jax(), read=jax_backend.averaged), expected) <= TOLERANCE
    assert difference(torch_path(in_torch, averaged=True), expected) <= TOLERANCE
