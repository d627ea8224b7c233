"""Rules that exist elsewhere equal their twins in torch.optim and optax, in float32 to 1e-6.

Conventions: Muon's momentum is an average (m ← βm + (1 - β)g, as in torch; optax's too, but with a
bias correction, which orthogonalisation removes); scale "rms" is torch's "match_rms_adamw",
"spectral" its "original". Heavy ball sums (m ← βm + g), and its weight decay is decoupled where
torch.optim.SGD's is not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.optim._muon
from torch import nn

import jax_backend
import torch_backend

STEPS = 20
SHAPES = [(6, 4), (4, 7), (5, 5)]
TOLERANCE = 1e-6


def factor(step: int) -> float:
    """The schedule of all twins: warm-up and decay."""
    return min(1.0, (step + 1) / 5) * 0.9**step


def inputs() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    rng = np.random.default_rng(0)

    def draw():
        return [rng.standard_normal(s).astype(np.float32) for s in SHAPES]

    return draw(), [draw() for _ in range(STEPS)]


def torch_path(make) -> list[np.ndarray]:
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
        path += [p.detach().numpy().copy() for p in params]
    return path


def optax_path(tx, transposed: bool = False) -> list[np.ndarray]:
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
        path += [np.asarray(p) for p in turned(params)]
    return path


def schedule(lr: float):
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
}


@pytest.mark.parametrize("name", TORCH)
def test_torch_twins(name):
    mine, twin = TORCH[name]
    assert difference(torch_path(mine), torch_path(twin)) <= TOLERANCE


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
    mine = torch_path(lambda p: torch_backend.Muon(p, 0.03, scale=scale, **options))
    twin = torch_path(lambda p: torch.optim.Muon(p, 0.03, adjust_lr_fn=name, **options))
    assert difference(mine, twin) <= TOLERANCE


def test_a_checkpoint_of_torchs_muon_continues_equal(monkeypatch):
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz)
    weights, gradients = inputs()
    one, two = ([nn.Parameter(torch.tensor(w)) for w in weights] for _ in range(2))
    twin, mine = torch.optim.Muon(one, 0.03, ns_steps=4), torch_backend.Muon(two)
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
        mine = torch_path(lambda p: torch_backend.Muon(p, 0.03, **options))
    assert difference(mine, expected) <= TOLERANCE
