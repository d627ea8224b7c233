"""The transcriptions in `papers` of further rules, checked against closed forms and oracles."""

from functools import partial

import numpy as np
import pytest
from papers import around, kronecker
from papers.ada_muon import ada_muon
from papers.adamw import adam, adamw
from papers.ademamix import ademamix
from papers.common import average, columns, frob, newton_schulz, readout, rms, run, scale
from papers.deep_momentum import deep_momentum
from papers.delta_momentum import delta_momentum
from papers.dgd import dgd
from papers.diagonal_memory import diagonal_memory
from papers.feature_momentum import feature_momentum
from papers.feature_momentum import feature_momentum as features
from papers.ggd import ggd
from papers.heavy_ball import heavy_ball
from papers.multi_frequency import multi_frequency
from papers.muon import muon
from papers.nest import nest
from papers.preconditioned_momentum import preconditioned_momentum
from papers.second_moments import adagrad, amsgrad, nadam, radam, rmsprop
from papers.sgd import sgd
from papers.shampoo import shampoo
from papers.signs import sign_sgd, signum
from papers.soap import refreshed, soap
from scipy.linalg import block_diag, fractional_matrix_power
from scipy.optimize import minimize

WRAPPERS = {
    "cautious": around.cautious,
    "centralized": around.centralized,
    "clipped": around.clipped,
    "averaged": partial(around.averaged, average_retention=0.7),
    "restarted": partial(around.restarted, restart_period=2),
    "nonlinear": partial(around.nonlinear, output="rms"),
}
ELEMENTWISE = {
    "sign_sgd": sign_sgd,
    "signum": signum,
    "adam": partial(adam, decoupled=True),
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "centered": partial(rmsprop, centered=True),
    "nadam": nadam,
    "nadam_constant": partial(nadam, schedule="constant"),
    "radam": partial(radam, betas=(0.9, 0.7)),
    "amsgrad": amsgrad,
    "diagonal_memory": diagonal_memory,
    "preconditioned_momentum": preconditioned_momentum,
    "feature_momentum": feature_momentum,
    "ademamix": partial(ademamix, slow=0.9),
    "ggd": partial(ggd, objective="dot", states=3),
}
RULES = {
    **ELEMENTWISE,
    "kronecker": partial(preconditioned_momentum, values="kronecker", block=2),
    "polynomial": partial(feature_momentum, feature="polynomial"),
    "ada_muon": ada_muon,
    "shampoo": partial(shampoo, block=2, graft="adam"),
    "multi_frequency": partial(multi_frequency, period=(1, 2)),
    "soap": partial(soap, period=2),
    "nest": partial(nest, memory=("table", "deep"), period=(1, 2), weight=(1.0, 0.5)),
    **{
        f"{name}_{i}": partial(f, inner=i) for name, f in WRAPPERS.items() for i in ("sgd", "adamw")
    },
}
GRAMS = {
    "dgd": dgd,
    "neurips": partial(dgd, solver="neurips"),
    "ggd_l2": partial(ggd, states=3),
    "ggd_target": partial(ggd, states=3, values="target"),
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def close(a, b, atol=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def numerical_gradient(f, x, h=1e-5):
    """Central differences, entry by entry."""
    out = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        e = np.zeros_like(x)
        e[i] = h
        out[i] = (f(x + e) - f(x - e)) / (2 * h)
    return out


def weights(beta, t):
    """beta^(t-1), ..., beta, 1: the discounts of t numbers, the newest last."""
    return beta ** np.arange(t - 1.0, -1, -1)


def averaged(g, beta, t):
    """The uncorrected average of the first t gradients, as a sum."""
    return (1 - beta) * np.tensordot(weights(beta, t), g[:t], 1)


def directions(rule, g, **arguments):
    """What a rule takes off the weights at each step, at learning rate 1."""
    path = rule(np.zeros_like(g[0]), g, lr=1.0, **arguments)[0]
    return -np.diff([np.zeros_like(g[0]), *path], axis=0)


def grams(count, n, seed=5):
    return [{"gram": x.T @ x / 6} for x in draw(count, 6, n, seed=seed)]


def polar(g):
    left, _, right = np.linalg.svd(g, full_matrices=False)
    return left @ right


# The common frame.


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_runs_the_rule_on_summed_gradients(rule):
    w0, g = draw(4, 3), draw(11, 4, 3, seed=1)
    parameters, history = rule(w0, g, lr=0.1, weight_decay=0.3, every=3, stagger=True)
    sums = [g[0:3].sum(0), g[3:6].sum(0), g[6:9].sum(0)]
    expected, memories = rule(w0, sums, lr=0.1, weight_decay=0.3)
    for t in range(1, 12):
        close(parameters[t - 1], w0 if t < 3 else expected[t // 3 - 1])
        if t >= 3:
            assert history[t - 1].keys() == memories[t // 3 - 1].keys()
            for name, memory in memories[t // 3 - 1].items():
                close(history[t - 1][name], memory)
    assert frob(parameters[2] - w0) > 1e-3


@pytest.mark.parametrize("name", [*RULES, *GRAMS])
def test_weight_decay(name):
    w0, g = draw(4, 3), draw(5, 4, 3, seed=1)
    rule = {**RULES, **GRAMS}[name]
    more = {"context": grams(5, 3)} if name in GRAMS else {}
    coupled = [w0, *rule(w0, g, lr=0.1, weight_decay=0.3, decoupled=False, **more)[0]]
    if not name.startswith(("clipped", "centralized")):  # which leave the decay alone
        replayed = rule(w0, [g[t] + 0.3 * coupled[t] for t in range(5)], lr=0.1, **more)[0]
        close(coupled[1:], replayed)
    plain = [w0, *rule(w0, g, lr=0.1, **more)[0]]
    decayed = [w0, *rule(w0, g, lr=0.1, weight_decay=0.3, **more)[0]]
    close(decayed[1] - plain[1], -0.1 * 0.3 * w0)
    if not (name in GRAMS or name == "ggd"):  # theirs also depends on the weights
        for t in range(5):
            close(decayed[t + 1] - (1 - 0.1 * 0.3) * decayed[t], plain[t + 1] - plain[t])


@pytest.mark.parametrize("name", RULES)
def test_zero_gradients_give_zero_steps(name):
    w0 = draw(4, 3)
    zero = np.zeros((4, 3))
    parameters, history = RULES[name](w0, [zero, zero, draw(4, 3)], lr=0.1)
    close(parameters[1], w0, atol=1e-15 if name == "ggd" else 0)  # ggd divides a sum of weights
    assert np.all(np.isfinite(parameters[2])) and frob(parameters[2] - w0) > 1e-3
    assert all(np.all(np.isfinite(m)) for memories in history for m in memories.values())


@pytest.mark.parametrize("rule", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_elementwise_rules_take_vectors(rule):
    w0, g = draw(12), draw(5, 12, seed=1)
    flat = rule(w0, g, lr=0.1)[0]
    close(flat, np.reshape(rule(w0.reshape(4, 3), g.reshape(5, 4, 3), lr=0.1)[0], (5, 12)))


def test_frame_shifts_the_weights():
    path, _ = run(lambda w, G, m, t: (G, m, t * w), {}, np.ones(2), np.ones((2, 2)), lr=0.5)
    close(path, [[1.5, 1.5], [4.0, 4.0]])  # 1 + 1 - 0.5, then 1.5 + 3 - 0.5


def test_shared_helpers():
    x = draw(3, 5)
    close(readout(x, "identity", "none"), x)
    close(readout(x, "sign", "spectral"), np.sign(x))
    close(rms(readout(x, "rms", "none")), 1)
    close(readout(x, "identity", "rms"), 0.2 * x / rms(x))
    close(
        readout(x, "newton_schulz", "rms", 3, "cubic"), 0.2 * 5**0.5 * newton_schulz(x, "cubic", 3)
    )
    close(average(x, 2 * x, 0.25), 1.75 * x)
    assert columns((1, 2, 3), ("a",)) == [(1, "a"), (2, "a"), (3, "a")]


# Descent.


def test_sign_rules():
    """SignSGD and Signum; item 16, the sign as a feature; item 21, a window of one."""
    g = draw(6, 4, 3)
    g[2, 1] = 0
    close(directions(sign_sgd, g), np.sign(g))
    close(directions(feature_momentum, g, momentum=0.0, power=0.0), np.sign(g))
    close(directions(diagonal_memory, g, retention=0.0, ridge=0.0), np.sign(g))
    for t, d in enumerate(directions(signum, g, momentum=0.8), start=1):
        close(d, np.sign(averaged(g, 0.8, t)))


@pytest.mark.parametrize("inputs", ["last", "first"])
def test_dgd_exact_minimises(inputs):
    """Item 22, for any symmetric positive semidefinite C."""
    lr, kappa, (w, g) = 0.7, 0.6, draw(2, 4, 3)
    n = 3 if inputs == "last" else 4
    context = grams(1, n)
    C = context[0]["gram"]

    def objective(flat):
        W = flat.reshape(4, 3)
        quadratic = np.sum((W @ C) * W) if inputs == "last" else np.sum((C @ W) * W)
        return np.sum(W * g) + kappa / 2 * quadratic + np.sum((W - w) ** 2) / (2 * lr)

    new = dgd(w, [g], lr=lr, context=context, kappa=kappa, inputs=inputs)[0][0]
    close(numerical_gradient(objective, new.ravel()), 0, atol=1e-8)
    close(new.ravel(), minimize(objective, w.ravel(), options={"gtol": 1e-9}).x, atol=1e-6)


def test_dgd_single_row():
    """Items 22, 24, 25 and 28: one rate eta / (1 + eta |x|^2) on both terms."""
    lr, w, delta, x = 0.7, draw(4, 3), draw(4, seed=1), 1.3 * draw(3, seed=2)
    damped = lr / (1 + lr * x @ x)
    context = [{"gram": np.outer(x, x)}]
    g = np.outer(delta, x)
    new = dgd(w, [g], lr=lr, context=context)[0][0]
    close(new, w @ (np.eye(3) - damped * np.outer(x, x)) - damped * g)
    close(new @ x, (w @ x - lr * x @ x * delta) / (1 + lr * x @ x))
    z = np.cross(x, [1.0, 2.0, 3.0])
    close(new @ z, w @ z)

    def augmented(W):
        return delta @ W @ x + 0.5 * np.sum((W @ x) ** 2)

    close(new, w - damped * numerical_gradient(augmented, w), atol=1e-9)
    blind = w - np.outer(w @ x, x) / (x @ x)
    close(dgd(blind, [g], lr=lr, context=context)[0][0], blind - damped * g)
    alpha = 1 - lr * 0.4
    kept = dgd(w, [g], lr=lr, context=context, weight_decay=0.4, decoupled=False)[0][0]
    close(kept, alpha * w @ (np.eye(3) - damped * np.outer(x, x)) - damped * g)
    unit = x / np.sqrt(x @ x)
    g, context = np.outer(delta, unit), [{"gram": np.outer(unit, unit)}]
    exact = dgd(w, [g], lr=lr, context=context, kappa=0.6)[0][0]
    paper = dgd(w, [g], lr=lr, context=context, kappa=0.6, solver="unit")[0][0]
    close(exact, paper)
    rate = lr / (1 + lr)
    paper = dgd(w, [g], lr=lr, context=context, solver="unit")[0][0]
    close(paper, w @ (np.eye(3) - rate * np.outer(unit, unit)) - rate * g)


def test_dgd_batches():
    """Item 27, with everything averaged over the rows."""
    lr, w, X, deltas = 0.7, draw(4, 3), draw(5, 3, seed=1), draw(5, 4, seed=2)
    g, C = deltas.T @ X / 5, X.T @ X / 5
    arguments = {"lr": lr, "context": [{"gram": C}]}
    woodbury = w - (X @ w.T + deltas).T @ np.linalg.inv(5 * np.eye(5) / lr + X @ X.T) @ X
    exact = dgd(w, [g], **arguments)[0][0]
    close(exact, woodbury)
    explicit = dgd(w, [g], solver="explicit", kappa=0.6, **arguments)[0][0]
    close(explicit, w @ (np.eye(3) - lr * 0.6 * C) - lr * g)
    neurips = dgd(w, [g], solver="neurips", kappa=0.6, **arguments)[0][0]
    close(neurips, w @ (np.eye(3) - 0.6 * C) - lr * g)
    rows = [{"gram": np.outer(x, x)} for x in X]
    in_turn = dgd(w, [np.outer(*p) for p in zip(deltas, X, strict=True)], lr=lr / 5, context=rows)
    assert frob(in_turn[0][-1] - exact) > 1e-2
    for solver in ("exact", "unit", "explicit", "neurips"):
        plain = dgd(w, [g], kappa=0.0, solver=solver, **arguments)[0][0]
        close(plain, w - lr * g)
        turned = dgd(w.T, [g.T], kappa=0.6, solver=solver, inputs="first", **arguments)[0][0]
        close(turned.T, dgd(w, [g], kappa=0.6, solver=solver, **arguments)[0][0])


def test_dgd_fixed_points():
    """Item 26."""

    def limit(w, X, T, **arguments):
        for _ in range(500):
            g = (X @ w.T - T).T @ X / len(X)
            w = dgd(w, [g], lr=0.4, context=[{"gram": X.T @ X / len(X)}], **arguments)[0][0]
        return w

    w0, target = draw(2, 3), draw(1, 2, seed=1)
    x = draw(1, 3, seed=2)
    close(limit(w0, x, target) @ x[0], target[0] / 2)
    close(limit(w0, x, target, solver="explicit") @ x[0], target[0] / 2)
    x = x / frob(x)
    close(limit(w0, x, target, solver="neurips") @ x[0], 0.4 * target[0] / 1.4)
    X, T = draw(6, 3, seed=3), draw(6, 2, seed=4)
    least_squares = np.linalg.lstsq(X, T, rcond=None)[0].T
    close(limit(w0, X, T, kappa=0.5), least_squares / 1.5, atol=1e-9)


def test_ggd_anchors():
    """Item 29, and the memories as differences from the weights."""
    w0, g, c = draw(4, 3), draw(6, 4, 3, seed=1), np.array([1.0, 0.6, 0.36])
    arguments = {"objective": "dot", "states": 3, "decay": 0.6, "weight_decay": 0.2}
    path = [w0, w0, w0]
    parameters, history = ggd(w0, g, lr=0.3, **arguments)
    for t in range(6):
        near = np.tensordot(c, path[:-4:-1], 1)
        path.append((near - 0.3 * g[t]) / c.sum() - 0.3 * 0.2 * path[-1])
        close(parameters[t], path[-1])
        close(history[t]["past_1"], path[-2] - path[-1])
        close(history[t]["past_2"], path[-3] - path[-1])
    assert list(history[0]) == ["past_1", "past_2"]
    close(ggd(w0, g, lr=0.3, objective="dot", states=1)[0], sgd(w0, g, lr=0.3)[0])


@pytest.mark.parametrize("values", ["gradient", "target"])
@pytest.mark.parametrize("inputs", ["last", "first"])
def test_ggd_minimises(values, inputs):
    """Eq. 59 on rows x with the values u = -delta, or u = w x - delta."""
    X, deltas = draw(5, 6, 3), draw(5, 6, 4, seed=1)
    g = np.stack([d.T @ x / 6 for d, x in zip(deltas, X, strict=True)])
    context, w0 = [{"gram": x.T @ x / 6} for x in X], draw(4, 3, seed=2)
    arguments = {"lr": 0.3, "context": context, "values": values, "states": 3, "decay": 0.7}
    if inputs == "first":
        turned = ggd(w0.T, g.swapaxes(1, 2), inputs="first", kappa=1.0, **arguments)[0]
        path = [w0, w0, w0, *(w.T for w in turned)]
    else:
        path = [w0, w0, w0, *ggd(w0, g, kappa=1.0, **arguments)[0]]
    for t in range(5):
        w = path[t + 2]
        U = -deltas[t] + (X[t] @ w.T if values == "target" else 0)

        def objective(W, t=t, U=U):
            kept = sum(0.7**i * np.sum((W - path[t + 2 - i]) ** 2) for i in range(3))
            return np.sum((X[t] @ W.T - U) ** 2) / 12 + kept / 0.6

        close(numerical_gradient(objective, path[t + 3]), 0, atol=1e-7)


def test_ggd_of_one_state_is_dgd():
    w0, g, context = draw(4, 3), draw(5, 4, 3, seed=1), grams(5, 3)
    arguments = {"lr": 0.3, "context": context, "kappa": 0.6, "weight_decay": 0.1}
    close(ggd(w0, g, states=1, **arguments)[0], dgd(w0, g, **arguments)[0])


# Momentum.


def test_preconditioned_momentum_given():
    """Item 4."""
    g, P = draw(6, 4, 3), draw(4, 4, seed=1)
    arguments = {"values": "given", "momentum": 0.8, "rate": 0.3}
    balls = heavy_ball(np.zeros((4, 3)), g, lr=0.1, momentum=0.8)[1]
    for matrix in (P, np.eye(4)):
        context = [{"preconditioner": matrix}] * 6
        history = preconditioned_momentum(0 * g[0], g, lr=0.1, context=context, **arguments)[1]
        for ball, memories in zip(balls, history, strict=True):
            close(memories["momentum_buffer"], 0.3 * matrix @ ball["momentum_buffer"])
    H, w, target = P @ P.T, draw(4, 3, seed=2), draw(4, 3, seed=3)
    newton = {**arguments, "momentum": 0.0, "rate": 1.0}
    context = [{"preconditioner": np.linalg.inv(H)}]
    new = preconditioned_momentum(w, [H @ (w - target)], lr=1.0, context=context, **newton)[0][0]
    close(H @ (new - target), 0, atol=1e-11)


def test_preconditioned_momentum_diagonal():
    g = draw(6, 4, 3)
    arguments = {"beta2": 0.9, "eps": 1e-3}
    without = directions(preconditioned_momentum, g, momentum=0.0, **arguments)
    close(without, directions(adamw, g, betas=(0.0, 0.9), eps=1e-3))
    d = directions(preconditioned_momentum, g, momentum=0.8, rate=0.3, **arguments)
    for t in range(1, 7):
        close(d[t - 1], 0.3 * np.tensordot(weights(0.8, t), without[:t], 1))
    turned = {"output": "newton_schulz", "scale": "rms", "steps": 3, "coefficients": "cubic"}
    read = directions(preconditioned_momentum, g, momentum=0.8, **turned, **arguments)
    close(read[-1], 0.2 * 2 * newton_schulz(d[-1], "cubic", 3))


def test_preconditioned_momentum_kronecker():
    g, kronecker_ = draw(6, 4, 4), {"values": "kronecker", "beta2": 0.9, "floor": 0.0}
    first = directions(preconditioned_momentum, g[:1], **kronecker_)[0]
    close(first, polar(g[0]), atol=1e-9)
    late = {**kronecker_, "momentum": 0.0, "period": 3, "rate": 0.5}
    d = directions(preconditioned_momentum, g, **late)
    close(d[:2], 0.5 * g[:2])
    w3 = weights(0.9, 3) / weights(0.9, 3).sum()
    L = sum(a * x @ x.T for a, x in zip(w3, g[:3], strict=True))
    R = sum(a * x.T @ x for a, x in zip(w3, g[:3], strict=True))
    A, B = fractional_matrix_power(L, -0.25), fractional_matrix_power(R, -0.25)
    for t in (2, 3, 4):
        close(d[t], 0.5 * A @ g[t] @ B, atol=1e-10)
    history = preconditioned_momentum(0 * g[0], g, lr=0.1, block=2, **late)[1]
    assert history[-1]["left"].shape == history[-1]["right_root"].shape == (2, 2, 2)


def test_feature_momentum():
    """Item 16; a polynomial acts on the singular values."""
    w0, g = draw(4, 3), draw(5, 4, 3, seed=1)
    g[1, 2] = 0
    feature_momentum = partial(features, normalize=False, scale="none")
    ball = heavy_ball(w0, g, lr=0.1 * 0.3, momentum=0.8)[0]
    close(feature_momentum(w0, g, lr=0.1, momentum=0.8, rate=0.3, feature="identity")[0], ball)
    close(feature_momentum(w0, g, lr=0.1, momentum=0.8, rate=0.3, power=1.0)[0], ball)
    root = directions(feature_momentum, g, momentum=0.0, power=0.5)
    close(root * np.abs(root), g)
    close(directions(feature_momentum, -g, power=0.5), -directions(feature_momentum, g, power=0.5))
    polynomial = {"feature": "polynomial", "polynomial": (0.7, -0.3, 0.2)}
    left, s, right = np.linalg.svd(g[0], full_matrices=False)
    expected = left @ np.diag(0.7 * s - 0.3 * s**3 + 0.2 * s**5) @ right
    close(directions(feature_momentum, g[:1], **polynomial)[0], expected, atol=1e-11)
    once = directions(
        feature_momentum, g[:1] / frob(g[0]), feature="polynomial", polynomial=(1.5, -0.5)
    )[0]
    close(once, newton_schulz(g[0], "cubic", 1))
    unit = directions(features, g[:1], feature="polynomial", scale="none")[0]
    close(unit, newton_schulz(g[0], "cubic", 1))
    read = directions(feature_momentum, g[:1], power=1.0, output="rms", scale="spectral")[0]
    close(read, np.sqrt(4 / 3) * g[0] / rms(g[0]))


# The Adam family.


def test_adam_couples_its_weight_decay():
    w0, g = draw(4), draw(5, 4, seed=1)
    close(adam(w0, g, lr=0.1)[0], adamw(w0, g, lr=0.1)[0])
    coupled = adamw(w0, g, lr=0.1, weight_decay=0.3, decoupled=False)[0]
    close(adam(w0, g, lr=0.1, weight_decay=0.3)[0], coupled)


def test_adagrad_and_rmsprop_against_explicit_sums():
    g = draw(7, 5)
    plain = directions(rmsprop, g, beta2=0.8, eps=1e-2)
    centered = directions(rmsprop, g, beta2=0.8, eps=1e-2, centered=True)
    sums = directions(adagrad, g, eps=1e-2, initial=0.5)
    for t in range(1, 8):
        v, a = averaged(g**2, 0.8, t), averaged(g, 0.8, t)
        close(plain[t - 1], g[t - 1] / (np.sqrt(v) + 1e-2))
        close(centered[t - 1], g[t - 1] / (np.sqrt(v - a**2) + 1e-2))
        close(sums[t - 1], g[t - 1] / (np.sqrt(np.sum(g[:t] ** 2, axis=0) + 0.5) + 1e-2))
    constant = directions(rmsprop, np.full((300, 3), 0.7), beta2=0.5, centered=True)
    assert np.all(np.isfinite(constant))
    close(directions(adagrad, np.full((9, 3), 0.1), eps=0.0)[-1], 1 / 3)


@pytest.mark.parametrize("schedule", ["dozat", "constant"])
def test_nadam_against_explicit_sums(schedule):
    g, b1, b2 = draw(7, 5), 0.8, 0.9
    arguments = {"betas": (b1, b2), "eps": 1e-2, "momentum_decay": 0.5, "schedule": schedule}
    d = directions(nadam, g, **arguments)
    history = nadam(0 * g[0], g, lr=0.1, **arguments)[1]
    steps = np.arange(1.0, 10)
    mu = b1 * (1 - 0.5 * 0.96 ** (0.5 * steps)) if schedule == "dozat" else b1 + 0 * steps
    for t in range(1, 8):
        now, ahead = np.prod(mu[:t]), np.prod(mu[: t + 1])
        m, v = averaged(g, b1, t), averaged(g**2, b2, t) / (1 - b2**t)
        u = (1 - mu[t - 1]) / (1 - now) * g[t - 1] + mu[t] / (1 - ahead) * m
        close(d[t - 1], u / (np.sqrt(v) + 1e-2))
        if schedule == "dozat":
            close(history[t - 1]["mu_product"], now)
    assert ("mu_product" in history[0]) == (schedule == "dozat")
    bare = {"betas": (0.0, b2)}
    close(directions(nadam, g, schedule=schedule, **bare), directions(adamw, g, **bare))


def test_radam_against_explicit_sums():
    """The length of the window is that of a flat one with the same centre of mass."""
    g, b1, b2, eps = draw(20, 5), 0.8, 0.9, 1e-2
    d = directions(radam, g, betas=(b1, b2), eps=eps)
    limit = 2 / (1 - b2) - 1
    rectified = []
    for t in range(1, 21):
        w2 = weights(b2, t)
        rho = 2 * (w2 @ np.arange(t, 0, -1.0)) / w2.sum() - 1
        m, v = averaged(g, b1, t) / (1 - b1**t), averaged(g**2, b2, t) / (1 - b2**t)
        if rho > 5:
            r2 = (rho - 4) / (limit - 4) * (rho - 2) / (limit - 2) * limit / rho
            m = np.sqrt(r2) * m / (np.sqrt(v) + eps)
            rectified.append(t)
        close(d[t - 1], m)
    assert rectified == list(range(6, 21))
    constant = np.full((400, 2), 0.3)
    close(directions(radam, constant, betas=(b1, b2), eps=0.0)[-1], 1)


@pytest.mark.parametrize("corrected", [True, False])
def test_amsgrad_against_explicit_sums(corrected):
    g = draw(9, 5) * 0.7 ** np.arange(9.0)[:, None]
    arguments = {"betas": (0.8, 0.9), "eps": 1e-2, "corrected": corrected}
    d = directions(amsgrad, g, **arguments)
    last = amsgrad(0 * g[0], g, lr=0.1, **arguments)[1][-1]
    seen, masses = [], 1 - 0.9 ** np.arange(1.0, 10)
    for t in range(1, 10):
        seen.append(averaged(g**2, 0.9, t) / (masses[t - 1] if corrected else 1))
        top = np.max(seen, axis=0)
        root = np.sqrt(top if corrected else top / masses[t - 1])
        close(d[t - 1], averaged(g, 0.8, t) / (1 - 0.8**t) / (root + 1e-2))
    close(last["max_exp_avg_sq"], top)
    assert np.all(top > last["exp_avg_sq"])
    rising = np.cumsum(np.abs(draw(9, 5)), axis=0)
    same = directions(adamw, rising, betas=(0.8, 0.9), eps=1e-2)
    close(directions(amsgrad, rising, **arguments), same)


@pytest.mark.parametrize("accumulate", ["ema", "sum"])
@pytest.mark.parametrize("values", ["root", "square"])
def test_diagonal_memory_is_ridge_regression(accumulate, values):
    """Item 21, per entry and with the discounts as weights of the squares."""
    g, discount, ridge = draw(8, 5), 0.8, 0.3
    arguments = {"accumulate": accumulate, "values": values, "ridge": ridge}
    d = directions(diagonal_memory, g, retention=discount, **arguments)
    for t in (1, 5, 8):
        a = weights(discount if accumulate == "ema" else 1.0, t)
        a = a / a.sum() if accumulate == "ema" else a
        H = a @ g[:t] ** 2
        for j, P in enumerate(np.sqrt(H) if values == "root" else H):
            design = np.append(np.sqrt(a) * g[:t, j], np.sqrt(ridge))[:, None]
            best = np.linalg.lstsq(design, np.append(np.sqrt(a) * P, 0), rcond=None)[0][0]
            close(d[t - 1, j], best)
    free = {"accumulate": accumulate, "values": values, "ridge": 0.0, "retention": discount}
    if (accumulate, values) == ("sum", "square"):
        close(directions(diagonal_memory, g, **free), np.cumsum(g, axis=0))
    if (accumulate, values) == ("ema", "root"):
        same = directions(adamw, g, betas=(discount, discount), eps=0.0)
        close(directions(diagonal_memory, g, **free), same)


def test_ademamix_against_explicit_sums():
    g = draw(7, 5)
    close(directions(ademamix, g, weight=0.0), directions(adamw, g))
    d = directions(ademamix, g, betas=(0.8, 0.9), slow=0.95, weight=3.0, eps=1e-2)
    for t in range(1, 8):
        m = averaged(g, 0.8, t) / (1 - 0.8**t) + 3 * averaged(g, 0.95, t)
        close(d[t - 1], m / (np.sqrt(averaged(g**2, 0.9, t) / (1 - 0.9**t)) + 1e-2))


# Orthogonal and preconditioned.


@pytest.mark.parametrize("signed", [True, False])
def test_ada_muon(signed):
    g = draw(5, 3, 4)
    plain = {"eps": 0.0, "scale": "none", "signed": signed, "steps": 3, "coefficients": "cubic"}
    d = directions(ada_muon, g, momentum=0.8, beta2=0.9, **plain)
    turned = []
    for t in range(1, 6):
        m = averaged(g, 0.8, t)
        turned.append(newton_schulz(np.sign(m) if signed else m, "cubic", 3))
        close(d[t - 1], turned[-1] / np.sqrt(averaged(np.square(turned), 0.9, t)))
    close(d[0], np.sign(turned[0]) / np.sqrt(0.1))
    scaled = directions(ada_muon, g, signed=signed)
    close([rms(x) for x in scaled], 0.2)
    close(directions(ada_muon, 7 * g, signed=signed), scaled)


def test_kronecker_factors():
    for p in (2, 4):
        M = draw(5, 7) @ draw(5, 7).T
        A = kronecker.invroot(M, p, 0.0)
        close(np.linalg.matrix_power(A, p) @ M, np.eye(5), atol=1e-9)
        close(A, A.T)
        x = draw(5) / frob(draw(5))
        one = np.outer(x, x)  # the floor lifts all its other eigenvalues
        A = kronecker.invroot(7 * one, p, 1e-2)
        lifted = 7 * one + 0.07 * (np.eye(5) - one)
        close(np.linalg.matrix_power(A, p) @ lifted, np.eye(5))
    assert np.array_equal(kronecker.invroot(np.zeros((3, 3)), 4, 0.1), np.eye(3))
    assert [kronecker.cut(n, 4) for n in (3, 4, 6, 7, 8, 12, 9, 1)] == [1, 1, 2, 7, 2, 3, 3, 1]
    g = draw(6, 4)
    close(kronecker.gram(g, "left", 3), [g[:3] @ g[:3].T, g[3:] @ g[3:].T])
    close(kronecker.gram(g, "right", 2), [g[:, :2].T @ g[:, :2], g[:, 2:].T @ g[:, 2:]])
    blocks = draw(2, 3, 3)
    close(kronecker.dense(blocks), block_diag(*blocks))


@pytest.mark.parametrize("sides", ["both", "left", "right"])
@pytest.mark.parametrize("accumulate", ["ema", "sum"])
def test_shampoo_against_matrix_powers(sides, accumulate):
    """The matrix form of AdaGrad with momentum (Eq. 111), cut into its Kronecker factors."""
    g, plain = draw(6, 4, 4), {"floor": 0.0, "scale": "none", "sides": sides}
    arguments = {**plain, "accumulate": accumulate, "beta2": 0.9}
    close(directions(shampoo, g[:1], momentum=0.0, **arguments)[0], polar(g[0]), atol=1e-8)
    d = directions(shampoo, g, momentum=0.8, period=2, **arguments)
    close(d[0], 0.2 * g[0])
    for t in range(2, 7):
        seen, power = t - t % 2, -0.25 if sides == "both" else -0.5
        a = weights(0.9 if accumulate == "ema" else 1.0, seen)
        a = a / a.sum() if accumulate == "ema" else a
        expected = averaged(g, 0.8, t)
        if sides != "right":
            L = sum(c * x @ x.T for c, x in zip(a, g[:seen], strict=True))
            expected = fractional_matrix_power(L, power) @ expected
        if sides != "left":
            R = sum(c * x.T @ x for c, x in zip(a, g[:seen], strict=True))
            expected = expected @ fractional_matrix_power(R, power)
        close(d[t - 1], expected, atol=1e-9)
    history = shampoo(0 * g[0], g, lr=0.1, **arguments)[1]
    assert ("left" in history[0]) == (sides != "right")
    assert ("right_root" in history[0]) == (sides != "left")


def test_shampoo_blocks_and_grafts():
    g = draw(5, 4, 6)
    arguments = {"floor": 0.0, "beta2": 0.9, "momentum": 0.8}
    free = directions(shampoo, g, scale="none", **arguments)
    close(directions(shampoo, g, scale="rms", **arguments)[3], 0.2 * free[3] / rms(free[3]))
    first = np.stack([averaged(g, 0.8, t) / (1 - 0.8**t) for t in range(1, 6)])
    adam = directions(adamw, g, betas=(0.8, 0.9), eps=1e-8)
    for graft, target in (("sgd", first), ("adam", adam)):
        d = directions(shampoo, g, graft=graft, **arguments)
        for t in range(5):
            close(d[t], free[t] * frob(target[t]) / frob(free[t]))
    # blocks of one row leave the root of the mean square of each row
    d = directions(shampoo, g, scale="none", sides="left", block=1, **arguments)
    for t in range(1, 6):
        rows = averaged(np.sum(g**2, axis=2, keepdims=True), 0.9, t) / (1 - 0.9**t)
        close(d[t - 1], averaged(g, 0.8, t) / np.sqrt(rows))
    # blocks of rows alone are tensors of their own
    halves = [g[:, :2], g[:, 2:]]
    blocked = {"scale": "none", "sides": "left", **arguments}
    apart = np.concatenate([directions(shampoo, x, **blocked) for x in halves], axis=1)
    close(directions(shampoo, g, block=3, **blocked), apart, atol=1e-10)


@pytest.mark.parametrize("weighting", ["static", "mass"])
def test_multi_frequency_against_explicit_sums(weighting):
    """A gradient has lost one factor of retention for every period that ended after it."""
    g = draw(9, 4, 4)
    levels = {"retention": (0.9, 0.6, 0.7), "period": (1, 3, 2), "weight": (0.5, 0.3, 0.4)}
    arguments = {**levels, "weighting": weighting, "floor": 0.0, "scale": "none", "root": 2}
    parameters, history = multi_frequency(0 * g[0], g, lr=1.0, momentum=0.8, **arguments)
    d = -np.diff([0 * g[0], *parameters], axis=0)
    close(d[0], 0.2 * g[0])
    for t in range(2, 10):
        seen = t - t % 2
        L, R, total = 0, 0, 0
        for b, T, a in zip(*levels.values(), strict=True):
            i = np.arange(1, seen + 1)
            c = (1 - b) / T * b ** ((seen - 1) // T - (i - 1) // T)
            share = a * c / c.sum() if weighting == "static" else a * c
            total += share.sum()
            L = L + np.einsum("i,ijk,ilk->jl", share, g[:seen], g[:seen])
            R = R + np.einsum("i,ikj,ikl->jl", share, g[:seen], g[:seen])
        mass = 1 if weighting == "static" else total
        A, B = fractional_matrix_power(L / mass, -0.25), fractional_matrix_power(R / mass, -0.25)
        close(d[t - 1], A @ averaged(g, 0.8, t) @ B, atol=1e-8)
    masses = [0.4 / 3, 0.8 / 3, 0.6 * 0.4, 0.24 + 0.4 / 3]
    close([m["mass_1"][0] for m in history[:4]], masses)
    assert "mass_0" not in history[0] and history[0]["left_2"].shape == (1, 4, 4)


def test_multi_frequency_of_one_level_is_shampoo():
    g = draw(6, 4, 6)
    for sides in ("both", "left", "right"):
        for graft in ("none", "sgd", "adam"):
            common = {"momentum": 0.8, "graft": graft, "sides": sides, "block": 3, "floor": 1e-3}
            one = {"retention": (0.9,), "period": (1,), "weight": (1.0,), "root": 2, "beta2": 0.9}
            expected = directions(shampoo, g, beta2=0.9, period=2, **common)
            close(directions(multi_frequency, g, **one, **common), expected)


def test_soap_without_bases_is_adam():
    w0, g = draw(4, 6), draw(7, 4, 6, seed=1)
    for sides in ("both", "left", "right"):
        arguments = {"betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1}
        expected = adamw(w0, g, lr=0.1, **arguments)[0]
        close(soap(w0, g, lr=0.1, period=8, sides=sides, **arguments)[0], expected)


@pytest.mark.parametrize("refresh", ["qr", "eigh"])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_soap_is_adam_of_turned_vectors(refresh, rotate, sides):
    """The two bases as one orthogonal matrix, kron(Q_L, Q_R), on the flattened tensor."""
    g, b1, b2, b3 = draw(9, 4, 6), 0.8, 0.9, 0.7
    arguments = {"betas": (b1, b2), "shampoo_beta": b3, "eps": 1e-2, "sides": sides, "block": 3}
    arguments |= {"refresh": refresh, "rotate": rotate, "period": 2}
    d = directions(soap, g, **arguments)
    history = soap(0 * g[0], g, lr=0.1, **arguments)[1]

    def turn(memories):
        Q_L = block_diag(*memories["left_basis"]) if sides != "right" else np.eye(4)
        Q_R = block_diag(*memories["right_basis"]) if sides != "left" else np.eye(6)
        return np.kron(Q_L, Q_R)

    v, K = np.zeros(24), np.eye(24)
    for t in range(1, 10):
        v = b2 * v + (1 - b2) * (K.T @ g[t - 1].ravel()) ** 2
        m = K.T @ averaged(g, b1, t).ravel() / (1 - b1**t)
        close(d[t - 1].ravel(), K @ (m / (np.sqrt(v / (1 - b2**t)) + 1e-2)))
        new = turn(history[t - 1])
        close(new.T @ new, np.eye(24))
        assert np.array_equal(new, K) == (t % 2 == 1)
        v = np.square(K.T @ new).T @ v if rotate else v
        K = new
        close(history[t - 1]["exp_avg_sq"].ravel(), v)
        if sides != "right":
            close(history[t - 1]["left"][1], averaged(g[:, 2:] @ g[:, 2:].swapaxes(1, 2), b3, t))
    scaled = directions(soap, g, scale="rms", **arguments)
    close(scaled[-1], scale(d[-1], "rms", False))


def test_soap_bases():
    """Eigenvectors at once, or after many steps on a constant gradient; the signs do not turn."""
    g = draw(4, 4)
    for refresh, count in (("eigh", 1), ("qr", 400)):
        last = soap(0 * g, [g] * count, lr=0.1, period=1, refresh=refresh)[1][-1]
        for side, M in (("left", g @ g.T), ("right", g.T @ g)):
            Q = last[f"{side}_basis"][0]
            diagonal = Q.T @ M @ Q
            close(diagonal, np.diag(np.diag(diagonal)), atol=1e-9)
            if refresh == "eigh":
                assert np.all(np.diff(np.diag(diagonal)) > 0)
    Q = np.linalg.qr(g)[0]
    assert np.array_equal(refreshed(0 * g, Q, "qr", 1e-4), Q)
    # one step from the identity: N = Q R with R^T R = N^T N
    N = g @ g.T + 1e-4 * np.sum(g * g) / 4 * np.eye(4)
    once = soap(0 * g, [g], lr=0.1, period=1, shampoo_beta=0.0)[1][0]
    close(once["left_basis"][0], N @ np.linalg.inv(np.linalg.cholesky(N.T @ N).T), atol=1e-9)


# The nest.


def test_nest_of_one_level():
    w0, g = draw(3, 5), draw(7, 3, 5, seed=1)
    one = {"retention": (0.8,), "period": (1,), "weight": (1.0,)}
    table = nest(w0, g, lr=0.1, memory=("table",), **one)
    close(table[0], muon(w0, g, lr=0.1, momentum=0.8, nesterov=False)[0])
    for output in ("newton_schulz", "identity"):
        arguments = {"output": (output,), "coefficients": "cubic", "steps": 3}
        delta = nest(w0, g, lr=0.1, memory=("delta",), **one, **arguments)
        arguments["output"] = output
        close(delta[0], delta_momentum(w0, g, lr=0.1, momentum=0.8, **arguments)[0])
        deep = nest(w0, g, lr=0.1, memory=("deep",), output=(output,), width=4, **one)
        same = deep_momentum(
            w0,
            g,
            lr=0.1,
            retention=0.8,
            width=4,
            output=output,
            objective="dot",
            teacher="gradient",
        )
        close(deep[0], same[0])
        assert sorted(deep[1][0]) == ["first_0", "second_0"]
        for ours, theirs in zip(deep[1], same[1], strict=True):
            close(ours["first_0"], theirs["first"])
            close(ours["second_0"], theirs["second"])


def test_nest_levels_are_late_and_add_up():
    """A slow level is the rule on mean gradients, its answer held over the next period."""
    g = draw(10, 3, 5)
    levels = {"memory": ("table", "delta", "deep"), "retention": (0.9, 0.8, 0.7)}
    levels |= {"weight": (1.0, 0.5, 0.3), "period": (1, 3, 2), "width": 4}
    outputs = ("rms", "sign", "newton_schulz")
    parameters, history = nest(0 * g[0], g, lr=1.0, output=outputs, scale="none", **levels)
    d = -np.diff([0 * g[0], *parameters], axis=0)
    threes, twos = g[:9].reshape(3, 3, 3, 5).mean(1), g.reshape(5, 2, 3, 5).mean(1)
    delta = np.sign(directions(delta_momentum, threes, momentum=0.8, output="identity"))
    deep = {"width": 4, "teacher": "gradient", "scale": "none", "output": "newton_schulz"}
    deep["objective"] = "dot"
    deep = directions(deep_momentum, twos, retention=0.7, **deep)
    for t in range(1, 11):
        m = averaged(g, 0.9, t)
        slow = delta[(t - 1) // 3 - 1] if t > 3 else 0
        slower = deep[(t - 1) // 2 - 1] if t > 2 else 0
        close(d[t - 1], m / rms(m) + 0.5 * slow + 0.3 * slower, atol=1e-11)
        close(history[t - 1]["chunk_1"], g[t - t % 3 : t].sum(0))
    assert not {"chunk_0", "readout_0"} & set(history[0]) and "memory_1" in history[0]
    table = {"memory": ("table",), "retention": (0.8,), "period": (3,), "weight": (0.5,)}
    late = directions(nest, g, output=("identity",), scale="none", **table)
    for t in range(1, 11):
        close(late[t - 1], 0.5 * averaged(threes, 0.8, (t - 1) // 3))
    for scaling in ("rms", "spectral"):
        mixed = directions(nest, g, output=outputs, scale=scaling, **levels)
        close(mixed[4], scale(d[4], scaling, orthogonal=False))
        free = directions(nest, g, scale="none", output=("newton_schulz",), **levels)
        turned = directions(nest, g, scale=scaling, output=("newton_schulz",), **levels)
        close(turned, [scale(x, scaling, orthogonal=False) for x in free])


# Around a rule.

INNERS = {"sgd": sgd, "adamw": adamw}


@pytest.fixture(params=["sgd", "adamw"])
def inner(request):
    return request.param


def test_around_adds_nothing_by_itself(inner):
    """Settings without an effect leave the rule, with its decay and its `every`."""
    w0, g = draw(4, 3), draw(7, 4, 3, seed=1)
    for frame in ({}, {"weight_decay": 0.2}, {"weight_decay": 0.2, "decoupled": False}):
        expected, memories = INNERS[inner](w0, g, lr=0.1, every=2, **frame)
        arguments = {"inner": inner, "lr": 0.1, "every": 2, **frame}
        for path, history in (
            around.clipped(w0, g, max_norm=1e9, **arguments),
            around.averaged(w0, g, **arguments),
            around.restarted(w0, g, restart_period=9, **arguments),
            around.nonlinear(w0, g, output="identity", **arguments),
            around.schedule_free(w0, g, beta=0.0, **arguments),
        ):
            close(path, expected)
            for ours, theirs in zip(history, memories, strict=True):
                assert all(np.allclose(ours[name], theirs[name]) for name in theirs)
                assert set(ours) - set(theirs) <= {"average_offset"}


def test_cautious(inner):
    g = draw(8, 4, 3)
    g[0, 1] = 0
    free = directions(INNERS[inner], g)
    d = directions(around.cautious, g, inner=inner)
    for t in range(8):
        agree = np.sign(free[t]) * np.sign(g[t]) > 0
        close(d[t], np.where(agree, free[t] * agree.size / agree.sum(), 0))
    shares = [np.mean(x != 0) for x in d]
    assert shares[0] == 0.75 and (inner == "sgd" or min(shares[1:]) < 0.9)
    one = np.zeros((1, 50, 50))
    one[0, 0, 0] = 1
    close(directions(around.cautious, one, inner="sgd")[0, 0, 0], 1000)  # at least 1e-3


def test_centralized(inner):
    for shape in ((4, 3), (4, 3, 2), (5,)):
        w0, g = draw(*shape), draw(6, *shape, seed=1) + 1
        flat = g.reshape(6, shape[0], -1)
        means = flat.mean(axis=2, keepdims=True) if len(shape) > 1 else 0
        expected = INNERS[inner](w0, (flat - means).reshape(g.shape), lr=0.1)[0]
        close(around.centralized(w0, g, inner=inner, lr=0.1)[0], expected)


def test_clipped(inner):
    """Per tensor, and over all tensors with one factor."""
    w0s = [draw(4, 3), draw(5), draw(2, 2, 2)]
    sizes = np.geomspace(0.1, 10, 6)
    streams = [[s * x for s, x in zip(sizes, draw(6, *w.shape), strict=True)] for w in w0s]
    norms = np.array([[frob(x) for x in g] for g in streams])
    assert norms.min() < 2 < norms.max()
    for w0, g, norm in zip(w0s, streams, norms, strict=True):
        short = [x if n <= 2 else 2 * x / n for x, n in zip(g, norm, strict=True)]
        expected = INNERS[inner](w0, short, lr=0.1)[0]
        close(around.clipped(w0, g, max_norm=2.0, inner=inner, lr=0.1)[0], expected)
    frame = {"lr": 0.1, "weight_decay": 0.2}
    both = around.clipped_globally(w0s, streams, max_norm=2.0, inner=inner, **frame)
    factors = 2 / np.maximum(np.sqrt(np.sum(norms**2, axis=0)), 2)
    for w0, g, (path, history) in zip(w0s, streams, both, strict=True):
        short = [f * x for f, x in zip(factors, g, strict=True)]
        expected, memories = INNERS[inner](w0, short, **frame)
        close(path, expected)
        for ours, theirs in zip(history, memories, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(np.allclose(ours[name], theirs[name]) for name in theirs)


def test_averaged(inner):
    w0, g = draw(4, 3), draw(6, 4, 3, seed=1)
    path, history = around.averaged(w0, g, inner=inner, lr=0.1, average_retention=0.7)
    for t in range(1, 7):
        a = 0.7**t * w0 + averaged(np.array(path), 0.7, t)
        close(path[t - 1] + history[t - 1]["average_offset"], a)
    once = around.averaged(w0, g, inner=inner, lr=0.1, average_retention=0.7, every=6)
    close(once[1][-1]["average_offset"], 0.7 * (w0 - once[0][-1]))
    assert not once[1][4]["average_offset"].any()


def test_schedule_free(inner):
    """z sums the steps, x is the mean of the z weighted by lr^2, y lies between them."""
    w0, g = draw(4, 3), draw(8, 4, 3, seed=1)
    steps = directions(INNERS[inner], g)
    for lr in (0.1, np.array([0.0, 0.05, 0.1, 0.2, 0.2, 0.1, 0.0, 0.05])):
        rates = np.broadcast_to(lr, 8)
        path, history = around.schedule_free(w0, g, inner=inner, lr=lr, beta=0.8)
        z = w0 - np.cumsum(rates[:, None, None] * steps, axis=0)
        for t in range(1, 9):
            share = rates[:t] ** 2
            x = np.average(z[:t], axis=0, weights=share) if share.any() else w0
            close(path[t - 1], 0.2 * z[t - 1] + 0.8 * x)
            close(history[t - 1]["average_offset"], x - path[t - 1])
    # the decay is that of y: constant gradients 0 leave a linear recursion
    path, _ = around.schedule_free(w0, 0 * g, inner=inner, lr=0.1, beta=0.8, weight_decay=0.5)
    z, x, y = [1.0], [], 1.0
    for t in range(8):
        z.append(z[-1] - 0.05 * y)
        y = 0.2 * z[-1] + 0.8 * np.mean(z[1:])
        close(path[t], y * w0)
    coupled = {"weight_decay": 0.5, "decoupled": False}
    path = around.schedule_free(w0, g, inner=inner, lr=0.1, **coupled)[0]
    seen = [x + 0.5 * y for x, y in zip(g, [w0, *path], strict=False)]
    close(path, around.schedule_free(w0, seen, inner=inner, lr=0.1)[0])


def test_restarted(inner):
    """Every stretch is a run of its own from where the last one ended."""
    w0, g = draw(4, 3), draw(8, 4, 3, seed=1)
    path, history = around.restarted(w0, g, inner=inner, lr=0.1, restart_period=3, weight_decay=0.2)
    expected, memories, w = [], [], w0
    for i in (0, 3, 6):
        run_, kept = INNERS[inner](w, g[i : i + 3], lr=0.1, weight_decay=0.2)
        expected, memories, w = expected + run_, memories + kept, run_[-1]
    close(path, expected)
    for t in range(8):
        for name, memory in memories[t].items():
            close(history[t][name], 0 * memory if t in (2, 5) else memory)


def test_nonlinear(inner):
    g = draw(5, 4, 3)
    free = directions(INNERS[inner], g)
    close(directions(around.nonlinear, g, inner=inner, output="sign"), np.sign(free))
    expected = [x / rms(x) for x in free]
    close(directions(around.nonlinear, g, inner=inner, output="rms"), expected)
    turned = {"output": "newton_schulz", "steps": 3, "coefficients": "cubic"}
    expected = [newton_schulz(x, "cubic", 3) for x in free]
    close(directions(around.nonlinear, g, inner=inner, **turned), expected)
