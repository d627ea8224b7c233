"""The transcriptions in `papers`, checked by themselves against closed forms of the paper."""

import numpy as np
import pytest
from papers.adamw import adamw
from papers.common import frob, newton_schulz, rms, scale
from papers.deep_momentum import deep_momentum, inner_gradients
from papers.delta_momentum import delta_momentum
from papers.heavy_ball import heavy_ball
from papers.lion import lion
from papers.m3 import m3
from papers.muon import muon
from papers.sgd import sgd

ELEMENTWISE = (sgd, heavy_ball, adamw, lion)
RULES = (*ELEMENTWISE, muon, delta_momentum, deep_momentum, m3)
VIEWS = ("matrix", "flat", "scalar")
LITERAL_DELTA = {"normalize": False, "output": "identity", "scale": "none"}
PLAIN_SUM_M3 = {"accumulate": "sum", "nesterov": False, "floor": 0.0, "scale": "none"}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def orthogonal(n, seed=0):
    return np.linalg.qr(draw(n, n, seed=seed))[0]


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


def closed_loop(rule, w0, gradient, count, **arguments):
    """Run an open-loop rule in closed loop, by replaying a growing list of gradients."""
    seen, path = [], [w0]
    for _ in range(count):
        seen.append(gradient(path[-1]))
        path = [w0, *rule(w0, seen, **arguments)[0]]
    return path


def delta_buffers(gradients, **arguments):
    _, history = delta_momentum(
        np.zeros_like(gradients[0]), gradients, lr=0.1, **{**LITERAL_DELTA, **arguments}
    )
    return [memories["momentum_buffer"] for memories in history]


def heavy_ball_buffers(gradients, alpha, eta):
    w0 = np.zeros_like(gradients[0])
    _, history = heavy_ball(w0, gradients, lr=1.0, momentum=alpha)
    return [eta * memories["momentum_buffer"] for memories in history]


# The common frame.


@pytest.mark.parametrize("rule", RULES)
def test_every_runs_the_rule_on_summed_gradients(rule):
    """Item 30: C > 1 is the rule on the sums of C gradients, and an incomplete chunk is unused."""
    w0, g = draw(4, 3), draw(11, 4, 3, seed=1)
    parameters, history = rule(w0, g, lr=0.1, weight_decay=0.3, every=3)
    sums = [g[0:3].sum(0), g[3:6].sum(0), g[6:9].sum(0)]
    expected, memories = rule(w0, sums, lr=0.1, weight_decay=0.3)
    for t in range(1, 12):
        close(parameters[t - 1], w0 if t < 3 else expected[t // 3 - 1])
        if t >= 3:
            assert history[t - 1].keys() == memories[t // 3 - 1].keys()
            for name, memory in memories[t // 3 - 1].items():
                close(history[t - 1][name], memory)
    assert frob(parameters[2] - w0) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_weight_decay(rule):
    w0, g = draw(4, 3), draw(5, 4, 3, seed=1)
    plain = [w0, *rule(w0, g, lr=0.1)[0]]
    decayed = [w0, *rule(w0, g, lr=0.1, weight_decay=0.3)[0]]
    coupled = [w0, *rule(w0, g, lr=0.1, weight_decay=0.3, decoupled=False)[0]]
    for t in range(5):
        close(decayed[t + 1] - (1 - 0.1 * 0.3) * decayed[t], plain[t + 1] - plain[t])
    replayed = rule(w0, [g[t] + 0.3 * coupled[t] for t in range(5)], lr=0.1)[0]
    close(coupled[1:], replayed)
    assert frob(coupled[5] - plain[5]) > 1e-3 or rule is lion


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients_give_exact_zero_steps(rule):
    w0 = draw(4, 3)
    parameters, history = rule(w0, [np.zeros((4, 3)), np.zeros((4, 3)), draw(4, 3)], lr=0.1)
    assert np.array_equal(parameters[1], w0)
    assert np.all(np.isfinite(parameters[2])) and frob(parameters[2] - w0) > 1e-3
    assert all(np.all(np.isfinite(m)) for memories in history for m in memories.values())


@pytest.mark.parametrize("rule", ELEMENTWISE)
def test_elementwise_rules_take_vectors(rule):
    w0, g = draw(12), draw(5, 12, seed=1)
    flat = rule(w0, g, lr=0.1)[0]
    close(flat, np.reshape(rule(w0.reshape(4, 3), g.reshape(5, 4, 3), lr=0.1)[0], (5, 12)))


def test_sgd():
    w0, g = draw(7), draw(4, 7, seed=1)
    parameters, history = sgd(w0, g, lr=0.2)
    close(parameters[-1], w0 - 0.2 * g.sum(0))
    assert history == [{}] * 4


def test_scale():
    tall, wide = draw(6, 2), draw(2, 6)
    close(scale(tall, "spectral", True), np.sqrt(3) * tall)
    close(scale(wide, "spectral", True), wide)
    close(scale(tall, "rms", True), 0.2 * np.sqrt(6) * tall)
    close(scale(wide, "rms", True), 0.2 * np.sqrt(6) * wide)
    close(rms(scale(tall, "rms", False)), 0.2)
    assert scale(tall, "none", True) is tall
    # exactly semi-orthogonal matrices have the same root mean square, 0.2, after the scaling
    close(rms(scale(np.linalg.qr(tall)[0], "rms", True)), 0.2)


# Momentum and the Adam family.


def test_heavy_ball_is_gradient_descent_on_a_regularised_inner_product():
    """Item 2, with the paper's m being -eta times the buffer."""
    eta, alpha = 0.3, 0.9
    g = draw(6, 4, 3, seed=1)
    buffers = [-m for m in heavy_ball_buffers(g, alpha, eta)]
    old = np.zeros((4, 3))
    for t in range(6):

        def regularised(m, g=g[t], weight=(1 - alpha) / eta):
            return np.sum(m * g) + weight / 2 * np.sum(m * m)

        def retained(m, g=g[t], old=old):
            return np.sum(m * g) + np.sum((m - alpha * old) ** 2) / (2 * eta)

        close(buffers[t], old - eta * numerical_gradient(regularised, old), atol=1e-8)
        close(numerical_gradient(retained, buffers[t]), 0, atol=1e-8)
        old = buffers[t]


def test_heavy_ball_moves_by_its_buffer():
    w0, g = draw(4), draw(6, 4, seed=1)
    w, m = w0, np.zeros(4)
    for t, parameter in enumerate(heavy_ball(w0, g, lr=0.3, momentum=0.8)[0]):
        m = 0.8 * m - 0.3 * g[t]
        w = w + m
        close(parameter, w)


def test_nesterov_is_the_look_ahead_form():
    """The stored parameter is the point at which the look-ahead form takes its gradient."""
    H, w0 = np.diag([1.0, 0.3, 3.0]), draw(3)
    path = closed_loop(heavy_ball, w0, lambda w: H @ w, 20, lr=0.1, momentum=0.8, nesterov=True)
    w, v = w0, np.zeros(3)
    for point in path:
        close(point, w + 0.8 * v)
        v = 0.8 * v - 0.1 * H @ (w + 0.8 * v)
        w = w + v


def test_horizon_of_an_average():
    """Item 3: the n newest gradients carry 1 - beta^n."""
    _, history = muon(np.zeros((1, 1)), np.ones((50, 1, 1)), lr=0.1, momentum=0.9)
    mass = np.array([memories["momentum_buffer"][0, 0] for memories in history])
    close(mass, 1 - 0.9 ** np.arange(1, 51))
    assert (np.argmax(mass >= 0.5) + 1, np.argmax(mass >= 0.99) + 1) == (7, 44)


def test_adamw_against_explicit_sums():
    w0, g = draw(5), draw(8, 5, seed=1)
    b1, b2, eps = 0.8, 0.95, 1e-3
    parameters, history = adamw(w0, g, lr=0.1, betas=(b1, b2), eps=eps)
    w = w0
    for t in range(1, 9):
        w1, w2 = b1 ** np.arange(t - 1, -1, -1), b2 ** np.arange(t - 1, -1, -1)
        w = w - 0.1 * (w1 @ g[:t] / w1.sum()) / (np.sqrt(w2 @ g[:t] ** 2 / w2.sum()) + eps)
        close(parameters[t - 1], w)
        close(history[t - 1]["exp_avg"], (1 - b1) * w1 @ g[:t])
        close(history[t - 1]["exp_avg_sq"], (1 - b2) * w2 @ g[:t] ** 2)


def test_adam_with_one_discount_is_least_squares():
    """Item 21: min over m of the discounted sum of (m g_i - P)^2, P the root mean square."""
    g, discount = draw(9, 5, seed=1), 0.8
    parameters, _ = adamw(np.zeros(5), g, lr=1.0, betas=(discount, discount), eps=0.0)
    weights = discount ** np.arange(8.0, -1, -1)
    weights /= weights.sum()
    for j in range(5):
        value = np.sqrt(weights @ g[:, j] ** 2)
        design = np.sqrt(weights)[:, None] * g[:, j : j + 1]
        best = np.linalg.lstsq(design, np.sqrt(weights) * value, rcond=None)[0][0]
        close(parameters[7][j] - parameters[8][j], best)


def test_lion():
    """With nothing retained the sign of the gradient (item 16), else of the interpolated state."""
    w0, g = draw(5), draw(6, 5, seed=1)
    close(lion(w0, g, lr=0.1, betas=(0.0, 0.7))[0][-1], w0 - 0.1 * np.sign(g).sum(0))
    parameters, history = lion(w0, g, lr=0.1, betas=(0.6, 0.8))
    weights = 0.2 * 0.8 ** np.arange(4.0, -1, -1)
    close(history[4]["exp_avg"], weights @ g[:5])
    close(parameters[4] - parameters[5], 0.1 * np.sign(0.6 * weights @ g[:5] + 0.4 * g[5]))


# Delta momentum; the buffers have the sign of +g, hence the targets +P.


def test_delta_constant_gradient_full_retention():
    """Item 6: the limit is the transposed pseudo-inverse; for rank one, g / |g|^2."""
    g = draw(3, 5)
    eta = 0.5 / np.linalg.norm(g, 2) ** 2
    arguments = {"momentum": 1.0, "rate": eta, "view": "matrix"}
    for solver in ("explicit", "prox"):
        last = delta_buffers([g] * 2000, solver=solver, **arguments)[-1]
        close(last, np.linalg.pinv(g).T)
    g = np.outer(draw(3, seed=1), draw(5, seed=2))
    arguments["rate"] = 0.5 / frob(g) ** 2
    for solver in ("explicit", "prox"):
        last = delta_buffers([g] * 200, solver=solver, **arguments)[-1]
        close(last, g / frob(g) ** 2)
    # the other two views know a tensor as one vector
    for view in ("flat", "scalar"):
        g = draw(2, 2)
        arguments = {"momentum": 1.0, "rate": 0.5 / frob(g) ** 2, "view": view}
        close(delta_buffers([g] * 100, solver="explicit", **arguments)[-1], g / frob(g) ** 2)


@pytest.mark.parametrize("solver", ["explicit", "prox"])
def test_delta_constant_gradient_fixed_point(solver):
    """Items 7 and 9: eta g ((1 - alpha) I + eta g^T g)^-1 for either solver."""
    g, alpha, eta = draw(3, 4) / 3, 0.9, 0.2
    last = delta_buffers([g] * 400, momentum=alpha, rate=eta, solver=solver, view="matrix")[-1]
    close(last, eta * g @ np.linalg.inv((1 - alpha) * np.eye(4) + eta * g.T @ g))
    for view in ("flat", "scalar"):
        last = delta_buffers([g] * 400, momentum=alpha, rate=eta, solver=solver, view=view)[-1]
        close(last, eta * g / (1 - alpha + eta * frob(g) ** 2))


def test_delta_bounds():
    """Item 7: half sqrt(eta / (1 - alpha)), or eta / (2 sqrt(1 - alpha)) for the literal decay."""
    alpha, eta = 0.9, 0.2
    arguments = {"momentum": alpha, "rate": eta, "solver": "explicit", "view": "flat"}

    def size(square, decay):
        g = np.sqrt(square) * np.array([[0.6, 0.8]])
        return frob(delta_buffers([g] * 300, decay=decay, **arguments)[-1])

    squares = np.array([0.2, 0.5, 0.8, 1.2, 2.0])
    derived = [size((1 - alpha) / eta * s, "eta") for s in (*squares, 1.0)]
    literal = [size((1 - alpha) * s, "literal") for s in (*squares, 1.0)]
    close(derived[-1], np.sqrt(eta / (1 - alpha)) / 2)
    close(derived[-1], 0.70711, atol=1e-5)
    close(literal[-1], eta / (2 * np.sqrt(1 - alpha)))
    assert max(derived[:-1]) < derived[-1] and max(literal[:-1]) < literal[-1]
    g = 0.7 * np.array([[0.6, 0.8]])
    last = delta_buffers([g] * 300, decay="literal", **arguments)[-1]
    close(last, eta * g / (1 - alpha + 0.49))


@pytest.mark.parametrize("view", VIEWS)
def test_delta_divergence_thresholds(view):
    """Item 8: |g|^2 < 1.9 for the literal decay at alpha = 0.9, eta |g|^2 < 1.9 for the derived."""
    for eta, decay, unit in ((1.0, "eta", 1.0), (0.25, "eta", 4.0), (0.25, "literal", 1.0)):
        for square, stable in ((1.89, True), (1.91, False)):
            g = np.sqrt(square * unit) * np.array([[0.6, 0.8]])
            arguments = {"momentum": 0.9, "rate": eta, "decay": decay, "view": view}
            m = delta_buffers([g] * 1500, solver="explicit", **arguments)
            change = frob(m[-1] - m[-2]) / frob(m[1] - m[0])
            assert change < 1e-5 if stable else change > 1e5


@pytest.mark.parametrize("view", VIEWS)
def test_delta_prox_is_stable(view):
    """Item 9, for a gradient of norm 1e3."""
    g, alpha, eta = draw(3, 4), 0.9, 0.2
    g *= 1e3 / frob(g)
    m = delta_buffers([g] * 60, momentum=alpha, rate=eta, view=view)
    expected = eta * g / (1 - alpha + eta * 1e6)
    if view == "matrix":
        expected = eta * g @ np.linalg.inv((1 - alpha) * np.eye(4) + eta * g.T @ g)
    close(m[-1], expected)
    assert max(frob(x) for x in m) < 0.1


def test_delta_prox_closed_forms():
    """Item 9: flat is Sherman-Morrison, scalar a division; both for changing gradients."""
    g, alpha, eta = draw(6, 3, 4), 0.8, 0.7
    flat = delta_buffers(g, momentum=alpha, rate=eta, view="flat")
    scalar = delta_buffers(g, momentum=alpha, rate=eta, view="scalar")
    a, b = np.zeros((3, 4)), np.zeros((3, 4))
    for t in range(6):
        damped = eta / (1 + eta * np.sum(g[t] ** 2))
        a = alpha * a - alpha * damped * np.sum(a * g[t]) * g[t] + damped * g[t]
        b = (alpha * b + eta * g[t]) / (1 + eta * np.sum(g[t] ** 2))
        close(flat[t], a)
        close(scalar[t], b)


@pytest.mark.parametrize("view", VIEWS)
def test_delta_solvers_against_their_objective(view):
    """Items 5, 9 and 14: explicit is alpha m - eta grad, prox a stationary point, of Eq. 48."""
    shape = {"matrix": (2, 3), "flat": (1, 6), "scalar": (6, 1)}[view]
    alpha, eta = 0.8, 0.7
    first, second = draw(2, 2, 3)
    k = second.reshape(shape)

    def objective(m):
        return 0.5 * np.sum((m @ k.T - np.eye(shape[0])) ** 2)

    arguments = {"momentum": alpha, "rate": eta, "view": view}
    old, new = delta_buffers([first, second], solver="explicit", **arguments)
    slope = numerical_gradient(objective, old.reshape(shape)).reshape(2, 3)
    close(new, alpha * old - eta * slope, atol=1e-8)
    old, new = delta_buffers([first, second], solver="prox", **arguments)
    slope = numerical_gradient(objective, new.reshape(shape)).reshape(2, 3)
    close(slope + (new - alpha * old) / eta, 0, atol=1e-8)
    assert frob(new - alpha * old) > 1e-2


def test_delta_on_orthogonal_gradients_is_heavy_ball():
    """Item 10, and the two cases in which it is not."""
    alpha, eta = 0.9, 0.1

    def differences(gradients, view):
        arguments = {"momentum": alpha, "rate": eta, "solver": "explicit", "view": view}
        m = delta_buffers(gradients, **arguments)
        return frob(m[-1] - heavy_ball_buffers(gradients, alpha, eta)[-1])

    basis = orthogonal(6)
    vectors = [row.reshape(2, 3) for row in basis]
    assert differences(vectors, "flat") < 1e-15
    assert differences(vectors, "scalar") > 1e-2
    disjoint = [draw(3, 2, seed=i) @ basis[2 * i : 2 * i + 2] for i in range(3)]
    assert differences(disjoint, "matrix") < 1e-14
    columns = orthogonal(3, seed=1)
    shared = [np.outer(columns[:, i], basis[0]) for i in (0, 1)]  # Frobenius-orthogonal only
    assert 1e-3 < differences(shared, "matrix") < 1e-1
    assert differences(shared, "flat") < 1e-15


def test_delta_overwrites_and_preserves():
    """Items 11 and 12."""
    basis = [row.reshape(2, 2) for row in orthogonal(4)]
    arguments = {"solver": "explicit", "view": "flat", "momentum": 1.0, "rate": 1.0}
    for m in delta_buffers([basis[0]] * 5, **arguments):
        close(m, basis[0], atol=1e-15)
    later = [3.0 * basis[1], basis[2] - basis[3]] * 25
    for solver, rate in (("explicit", 0.1), ("prox", 1.0)):
        arguments = {"solver": solver, "view": "flat", "momentum": 1.0, "rate": rate}
        m = delta_buffers([basis[0], *later], **arguments)
        close(np.sum(m[-1] * basis[0]), np.sum(m[0] * basis[0]), atol=1e-14)
        assert np.sum(m[0] * basis[0]) > 0.09
    m = heavy_ball_buffers([basis[0], *later], 0.9, 1.0)
    close(np.sum(m[-1] * basis[0]), 0.9**50, atol=1e-14)


@pytest.mark.parametrize("solver", ["explicit", "prox"])
@pytest.mark.parametrize("view", VIEWS)
def test_delta_of_small_gradients_is_heavy_ball(view, solver):
    """Item 13: the relative difference is of second order in the gradient."""
    g, alpha, eta = draw(30, 3, 4), 0.9, 0.2
    relative = []
    for size in (1e-2, 1e-3, 1e-4):
        m = delta_buffers(size * g, momentum=alpha, rate=eta, view=view, solver=solver)[-1]
        expected = heavy_ball_buffers(size * g, alpha, eta)[-1]
        relative.append(frob(m - expected) / frob(expected))
    assert relative[0] < 1e-1
    close(np.array(relative[:-1]) / relative[1:], 100, atol=20)


def test_delta_steps():
    """Normalised keys, and the two outputs."""
    w0, g = draw(3, 4), draw(5, 3, 4, seed=1)
    unit = g / np.sqrt(np.sum(g * g, axis=(1, 2), keepdims=True))
    buffers = delta_buffers(unit, momentum=0.8, rate=0.7, view="matrix")
    arguments = {"lr": 0.1, "momentum": 0.8, "rate": 0.7}
    path = [w0, *delta_momentum(w0, 50 * g, **arguments)[0]]
    plain = [w0, *delta_momentum(w0, 50 * g, **arguments, output="identity")[0]]
    for t, m in enumerate(buffers):
        close(path[t] - path[t + 1], 0.1 * 0.2 * 2 * newton_schulz(m))
        close(plain[t] - plain[t + 1], 0.1 * 0.2 * m / rms(m))
    literal, history = delta_momentum(w0, g, lr=0.1, **LITERAL_DELTA)
    close(literal[-1], w0 - 0.1 * sum(memories["momentum_buffer"] for memories in history))


# Deep momentum.


def read(A, B, s):
    return s + np.tanh(s @ A) @ B


def inner_objective(A, B, s, v, objective):
    if objective == "l2":
        return 0.5 * np.sum((read(A, B, s) - v) ** 2)
    return -np.sum(read(A, B, s) * v)


@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_deep_inner_gradients(objective):
    """Item 15."""
    A, B, s, v = draw(4, 6), draw(6, 4, seed=1), draw(3, 4, seed=2), draw(3, 4, seed=3)
    dA, dB = inner_gradients(A, B, s, v, objective)
    close(dA, numerical_gradient(lambda x: inner_objective(x, B, s, v, objective), A), 1e-8)
    close(dB, numerical_gradient(lambda x: inner_objective(A, x, s, v, objective), B), 1e-8)
    assert min(frob(dA), frob(dB)) > 1e-1


@pytest.mark.parametrize("anchor", ["initial", "zero"])
@pytest.mark.parametrize("teacher", ["ema", "gradient"])
@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_deep_memory_by_finite_differences(objective, teacher, anchor):
    w0, g = draw(3, 4), 7 * draw(5, 3, 4, seed=1)
    choices = {"objective": objective, "teacher": teacher, "anchor": anchor, "scale": "none"}
    numbers = {"retention": 0.9, "rate": 0.5, "teacher_retention": 0.8, "width": 6}
    parameters, history = deep_momentum(w0, g, lr=0.1, **choices, **numbers)
    assert ("exp_avg" in history[0]) == (teacher == "ema")
    keys = [x / np.sqrt(np.mean(x**2)) for x in g]
    A0 = np.zeros((4, 6))
    A0[:, :4] = [[np.cos(np.pi * (i + 0.5) * j / 4) for j in range(4)] for i in range(4)]
    A0[:, :4] /= np.sqrt(np.sum(A0[:, :4] ** 2, axis=0))
    fixed = A0 if anchor == "initial" else np.zeros((4, 6))
    A, B, w = A0, np.zeros((6, 4)), w0
    for t, s in enumerate(keys):
        powers = 0.8 ** np.arange(t, -1.0, -1)
        average = np.tensordot(powers, keys[: t + 1], 1)
        v = average / powers.sum() if teacher == "ema" else s
        slope = (
            numerical_gradient(lambda x, s=s, v=v, B=B: inner_objective(x, B, s, v, objective), A),
            numerical_gradient(lambda x, s=s, v=v, A=A: inner_objective(A, x, s, v, objective), B),
        )
        # the rows of s have mean square 1, so that |s|^2 is the number of its entries
        B = 0.9 * B - 0.5 / np.sum(np.tanh(s @ A) ** 2) * slope[1]
        A = 0.9 * A + 0.1 * fixed - 0.5 / 12 * slope[0]
        w = w - 0.1 * read(A, B, s)
        close(history[t]["first"], A, atol=1e-8)
        close(history[t]["second"], B, atol=1e-8)
        close(parameters[t], w, atol=1e-8)
        if teacher == "ema":
            close(history[t]["exp_avg"], 0.2 * average)
    assert frob(B) > 1e-2 or (objective, teacher) == ("l2", "gradient")


def test_deep_initial_memory():
    """A zero rate at full retention leaves an orthonormal first layer, cut or padded to width."""
    w0, g = draw(3, 5), draw(4, 3, 5, seed=1)
    for width in (3, 5, 8):
        arguments = {"rate": 0.0, "retention": 1.0, "width": width, "scale": "none"}
        parameters, history = deep_momentum(w0, g, lr=0.1, **arguments)
        A = history[-1]["first"]
        close(A.T @ A, np.diag([1.0] * min(width, 5) + [0.0] * max(0, width - 5)))
        assert A.shape == (5, width) and np.all(history[-1]["second"] == 0)
        # the identity memory is gradient descent on the normalised gradients
        close(parameters[-1], w0 - 0.1 * sum(x / rms(x) for x in g))


def test_deep_already_perfect_memory():
    """The l2 objective with the gradient itself as the value never leaves the identity."""
    g = draw(6, 3, 5, seed=1)
    _, history = deep_momentum(draw(3, 5), g, lr=0.1, teacher="gradient")
    assert all(np.all(memories["second"] == 0) for memories in history)


def test_deep_momentum_descends():
    """Item 15, the test of the sign."""
    H, w0 = np.diag([1.0, 0.3, 3.0, 2.0]), draw(3, 4)
    for objective in ("l2", "dot"):
        arguments = {"objective": objective, "width": 6}
        path = closed_loop(deep_momentum, w0, lambda w: w @ H, 30, lr=0.02, **arguments)
        losses = np.array([np.sum((w @ H) * w) for w in path])
        assert np.all(np.diff(losses) < 0)


def test_deep_outputs():
    w0, g = draw(3, 5), draw(4, 3, 5, seed=1)
    _, history = deep_momentum(w0, g, lr=0.1)
    plain = [w0, *deep_momentum(w0, g, lr=0.1)[0]]
    turned = [w0, *deep_momentum(w0, g, lr=0.1, output="newton_schulz")[0]]
    for t in range(4):
        d = read(history[t]["first"], history[t]["second"], g[t] / rms(g[t]))
        close(plain[t] - plain[t + 1], 0.1 * 0.2 * d / rms(d))
        close(turned[t] - turned[t + 1], 0.1 * 0.2 * np.sqrt(5) * newton_schulz(d))


# Newton-Schulz and Muon.


def test_cubic_newton_schulz_is_gradient_descent_with_the_polar_limit():
    """Item 17, the rate being 1/4 on half |O^T O - I|^2."""
    g = draw(5, 5)
    O_ = g / frob(g)
    for steps in range(1, 4):
        slope = numerical_gradient(lambda x: 0.5 * np.sum((x.T @ x - np.eye(5)) ** 2), O_)
        close(newton_schulz(g, "cubic", steps), O_ - 0.25 * slope, atol=1e-8)
        O_ = O_ - 0.25 * (2 * O_ @ (O_.T @ O_ - np.eye(5)))
        close(newton_schulz(g, "cubic", steps), O_)
    for shape in ((5, 5), (3, 6), (6, 3)):
        left, _, right = np.linalg.svd(draw(*shape), full_matrices=False)
        close(newton_schulz(draw(*shape), "cubic", 60), left @ right)


@pytest.mark.parametrize("coefficients", ["cubic", "quintic"])
def test_newton_schulz_symmetries(coefficients):
    """Item 19."""
    g, q1, q2 = draw(3, 5), orthogonal(3), orthogonal(5, seed=1)
    out = newton_schulz(g, coefficients)
    close(newton_schulz(1e-6 * g, coefficients), out)
    close(newton_schulz(-g, coefficients), -out)
    close(newton_schulz(g.T, coefficients), out.T)
    close(newton_schulz(q1 @ g @ q2, coefficients), q1 @ out @ q2)
    assert np.array_equal(newton_schulz(0 * g, coefficients), 0 * g)


def test_newton_schulz_singular_values():
    """Item 19: the band of five quintic steps, and both polynomials on a vector."""
    mapped = []
    for s in np.geomspace(0.01, 1 / np.sqrt(2), 200):
        pair = np.sqrt(1 - s * s), s
        close(newton_schulz(np.diag(pair)), np.diag(np.diag(newton_schulz(np.diag(pair)))))
        mapped += [*np.diag(newton_schulz(np.diag(pair)))]
    assert 0.68 < min(mapped) < 0.72 and 1.1 < max(mapped) < 1.20
    vector = draw(1, 7)
    close(newton_schulz(vector, "cubic"), vector / frob(vector))
    close(frob(newton_schulz(vector)), 0.70, atol=5e-3)
    x = 0.5  # the polynomial itself, on the singular values of a half-turn of a square
    for _ in range(2):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    close(newton_schulz(orthogonal(4), steps=2), x * orthogonal(4))


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_learning_rate_must_act_outside(nesterov):
    """Item 20: the scale of the inner step has no effect, lr acts linearly."""
    w0, g = draw(4, 6), draw(8, 4, 6, seed=1)
    arguments = {"nesterov": nesterov, "scale": "none"}
    path = muon(w0, g, lr=0.1, **arguments)[0]
    close(muon(w0, 0.01 * g, lr=0.1, **arguments)[0], path)
    close(np.array(muon(w0, g, lr=0.3, **arguments)[0]) - w0, 3 * (np.array(path) - w0))


def test_muon_average_equals_heavy_ball():
    """Item 32: both forms of the momentum have the same read-out."""
    w0, g, alpha = draw(4, 6), draw(8, 4, 6, seed=1), 0.9
    for nesterov in (False, True):
        w, m = w0, np.zeros((4, 6))
        for t, point in enumerate(muon(w0, g, lr=0.1, momentum=alpha, nesterov=nesterov)[0]):
            m = alpha * m + g[t]
            u = alpha * m + g[t] if nesterov else m
            w = w - 0.1 * 0.2 * np.sqrt(6) * newton_schulz(u)
            close(point, w)


# M3.


def algorithm_1(w0, g, *, lr, b1, b2, b3, alpha, eps, f):
    """Algorithm 1 as printed, with windows of f terms."""
    M1, M2, V, w, path = 0 * w0, 0 * w0, 0 * w0, w0, []
    for k in range(len(g) // f):
        M2 = M2 + b3 * np.sum(g[max(k - 1, 0) * f : k * f], axis=0)
        O2 = newton_schulz(M2)
        for t in range(k * f, (k + 1) * f):
            M1 = M1 + b1 * g[t]
            V = V + b2 * g[t] ** 2
            w = w - lr * (newton_schulz(M1) + alpha * O2) / (np.sqrt(V) + eps)
            path.append(w)
    return path


def test_m3_literal_is_algorithm_1():
    w0, g = draw(3, 5), draw(16, 3, 5, seed=1)
    numbers = {"momentum": 0.8, "slow": (0.7,), "period": (4,), "weight": (0.6,), "beta2": 0.9}
    expected = algorithm_1(w0, g, lr=0.1, b1=0.8, b2=0.9, b3=0.7, alpha=0.6, eps=1e-2, f=4)
    close(m3(w0, g, lr=0.1, literal=True, eps=1e-2, **numbers)[0], expected)
    by_hand = {**PLAIN_SUM_M3, "second_moment": "gradient", "eps": 1e-8}
    close(m3(w0, g, lr=0.1, literal=True, **numbers)[0], m3(w0, g, lr=0.1, **by_hand, **numbers)[0])


def test_m3_literal_has_factors_without_effect():
    """Item 31, the first part in closed loop."""
    H, w0 = np.diag([1.0, 0.3, 3.0, 2.0]), draw(3, 4)
    common = {"lr": 0.02, "literal": True, "period": (3,), "weight": (0.5,)}

    def path(**numbers):
        return np.array(closed_loop(m3, w0, lambda w: w @ H, 12, **common, **numbers))

    reference = path(momentum=0.9, slow=(0.9,))
    close(path(momentum=0.3, slow=(0.2,)), reference, atol=2e-10)
    g = draw(12, 3, 4, seed=1)
    plain = {**PLAIN_SUM_M3, "lr": 0.1, "period": (3,), "weight": (0.5,)}

    def displacement(gradients, **numbers):
        return np.array(m3(w0, gradients, **{**plain, **numbers})[0]) - w0

    reference = displacement(g, beta2=0.2)
    close(displacement(g, beta2=0.8), reference / 2)
    close(displacement(10 * g, beta2=0.2), reference / 10, atol=5e-11)
    assert frob(reference) > 1e-1
    off = displacement(g, second_moment="none")
    close(displacement(10 * g, second_moment="none"), off)
    # with the update itself in the second moment the degree is zero, too
    arguments = {"second_moment": "update", "accumulate": "ema", "floor": 0.1}
    close(displacement(10 * g, **arguments), displacement(g, **arguments))


def test_m3_without_a_slow_level_is_muon():
    """Item 32."""
    w0, g = draw(3, 5), draw(10, 3, 5, seed=1)
    w = w0
    sums = m3(w0, g, lr=0.1, weight=(0.0,), second_moment="none", **PLAIN_SUM_M3)[0]
    for t in range(10):
        w = w - 0.1 * newton_schulz(g[: t + 1].sum(0))
        close(sums[t], w)
    late = {"second_moment": "none", "period": (11,), "weight": (0.7,)}
    close(m3(w0, g, lr=0.1, **PLAIN_SUM_M3, **late)[0], sums)
    for nesterov in (True, False):
        expected = muon(w0, g, lr=0.1, nesterov=nesterov)[0]
        close(m3(w0, g, lr=0.1, nesterov=nesterov, **late)[0], expected)


@pytest.mark.parametrize("second_moment", ["gradient", "update", "none"])
def test_m3_first_chunk(second_moment):
    """Item 33: the slow weight first acts on step f + 1."""
    w0, g = draw(3, 5), draw(6, 3, 5, seed=1)
    arguments = {"lr": 0.1, "period": (4,), "second_moment": second_moment}
    small = m3(w0, g, weight=(0.1,), **arguments)[0]
    large = m3(w0, g, weight=(0.9,), **arguments)[0]
    assert np.array_equal(small[:4], large[:4])
    assert frob(small[4] - large[4]) > 1e-3


def test_m3_period_one_is_one_step_late():
    """Item 33."""
    w0, g = draw(3, 5), draw(6, 3, 5, seed=1)
    arguments = {"period": (1,), "weight": (0.5,), "second_moment": "none", **PLAIN_SUM_M3}
    path = [w0, *m3(w0, g, lr=0.1, **arguments)[0]]
    for t in range(6):
        late = newton_schulz(g[:t].sum(0)) if t else np.zeros((3, 5))
        d = newton_schulz(g[: t + 1].sum(0)) + 0.5 * late
        close(path[t] - path[t + 1], 0.1 * d)


def test_m3_slow_buffer_needs_no_chunk():
    """Item 34, for both accumulations."""
    w0, g, b, f = draw(3, 5), draw(12, 3, 5, seed=1), 0.7, 4
    arguments = {"lr": 0.1, "slow": (b,), "period": (f,)}
    sums = m3(w0, g, accumulate="sum", **arguments)[1]
    averages = m3(w0, g, accumulate="ema", **arguments)[1]
    total = average = np.zeros((3, 5))
    for k in range(1, 4):
        chunk = g[(k - 1) * f : k * f].sum(0)
        total, average = total + b * chunk, b * average + (1 - b) * chunk
        close(sums[k * f - 1]["slow_1"], total)
        close(averages[k * f - 1]["slow_1"], b * average)  # decayed for the next chunk
        for t in range(k * f - 1, min((k + 1) * f - 1, 12)):  # held all through the next chunk
            close(sums[t]["readout_1"], newton_schulz(total))
            close(averages[t]["readout_1"], newton_schulz(average))
    assert np.all(averages[f - 2]["readout_1"] == 0)


def test_m3_printed_window_counts_boundaries_twice():
    """Item 35: the window kf - f ... kf, whose excess is exactly the boundary gradients."""
    g, b, f, chunks = draw(13, 3, 5, seed=1), 0.7, 4, 3  # g[0] precedes the first step
    arguments = {"accumulate": "sum", "slow": (b,), "period": (f,)}
    ours = m3(draw(3, 5), g[1:], lr=0.1, **arguments)[1][-1]["slow_1"]
    printed = sum(b * g[(k - 1) * f : k * f + 1].sum(0) for k in range(1, chunks + 1))
    close(printed - ours, b * sum(g[k * f] for k in range(chunks)))


def test_m3_literal_slows_as_the_root_of_time():
    """Item 36."""
    g = draw(3, 5)
    path = m3(draw(3, 5, seed=1), [g] * 400, lr=0.1, **PLAIN_SUM_M3)[0]
    close((path[98] - path[99]) / (path[398] - path[399]), 2, atol=1e-9)


def test_m3_caps_single_entries():
    """A zero in an otherwise rank-one gradient spikes, and is cut last of all."""
    g = np.outer(draw(6), draw(8, seed=1))
    g[2, 3] = 0

    def direction(gradients, **arguments):
        path = m3(np.zeros_like(gradients[0]), gradients, lr=1.0, **arguments)[0]
        return -np.diff([0 * path[0], *path], axis=0)

    free = direction([g], cap=np.inf)[0]
    size = np.abs(free)
    cap = np.sort(size, axis=None)[-2:].mean()
    assert size.argmax() == np.ravel_multi_index((2, 3), g.shape) and size.max() > 1.2 * cap
    cut = direction([g], cap=cap)[0]
    assert cut[2, 3] == np.sign(free[2, 3]) * cap
    assert np.array_equal(np.delete(cut, 2 * 8 + 3), np.delete(free, 2 * 8 + 3))
    assert np.array_equal(direction([g], cap=1.01 * size.max())[0], free)  # not reached
    assert np.array_equal(direction([g])[0], free)
    # the memories stay as they are; both second moments and both signs are cut
    many = draw(10, 6, 8, seed=2)
    for second_moment in ("gradient", "update"):
        free = direction(many, second_moment=second_moment, cap=np.inf)
        assert free.max() > 0.3 and free.min() < -0.3
        close(direction(many, second_moment=second_moment, cap=0.3), np.clip(free, -0.3, 0.3))
    for off in (
        {"second_moment": "none"},
        {"literal": True},
        {"scale": "none"},
        {"scale": "spectral"},
    ):
        free = direction(many, cap=np.inf, **off)
        assert np.abs(free).max() > 0.3 and np.array_equal(direction(many, cap=0.3, **off), free)
    # a spike alone among r * c entries has the size 0.2 sqrt(r c) = 12.8, above the default
    g = np.outer(draw(64), draw(64, seed=1))
    g[2, 3] = 0
    spike = {"floor": 0.0, "eps": 1e-12}
    assert np.abs(direction([g], cap=np.inf, **spike)[0, 2, 3]) > 12.7
    assert np.abs(direction([g], **spike)[0, 2, 3]) == 10


@pytest.mark.parametrize("accumulate", ["sum", "ema"])
def test_m3_step_from_its_memories(accumulate):
    """Two levels with staggered clocks: the step reads the memories of the step before."""
    w0, g = draw(3, 5), draw(14, 3, 5, seed=1)
    levels = {"slow": (0.9, 0.8), "period": (3, 4), "weight": (0.3, 0.5)}
    arguments = {"accumulate": accumulate, "stagger": True, "index": 7, "floor": 0.8, "eps": 0.01}
    parameters, history = m3(w0, g, lr=0.1, beta2=0.9, **levels, **arguments)
    path, readouts, ticks = [w0, *parameters], [np.zeros((3, 5))] * 2, {1: [], 2: []}
    powers = 0.95 ** np.arange(14)
    for t in range(1, 15):
        if accumulate == "ema":
            kept = (1 - 0.9) * 0.9 ** np.arange(t - 1, -1.0, -1)
            V = np.tensordot(kept / kept.sum(), g[:t] ** 2, 1)
            u = np.tensordot(powers[t - 1 :: -1], g[:t], 1) * 0.95 + g[t - 1]
        else:
            V = 0.9 * np.sum(g[:t] ** 2, axis=0)
            u = np.sum(g[:t], axis=0) + g[t - 1]
        D = np.maximum(np.sqrt(V), 0.8 * np.sqrt(V.mean())) + 0.01
        X = (newton_schulz(u) + 0.3 * readouts[0] + 0.5 * readouts[1]) / D
        close(path[t - 1] - path[t], 0.1 * 0.2 * X / np.sqrt(np.mean(X * X)))
        for n in (1, 2):
            if not np.array_equal(history[t - 1][f"readout_{n}"], readouts[n - 1]):
                ticks[n].append(t)
            readouts[n - 1] = history[t - 1][f"readout_{n}"]
    assert ticks == {1: [2, 5, 8, 11, 14], 2: [1, 5, 9, 13]}
    unstaggered = m3(w0, g, lr=0.1, **levels, index=7)[1]
    assert np.all(unstaggered[2]["readout_2"] == 0) and np.any(unstaggered[3]["readout_2"] != 0)
    short = m3(w0, g, lr=0.1, slow=(0.9,), period=(3, 4), weight=(0.1,))[0]
    long = m3(w0, g, lr=0.1, slow=(0.9, 0.9), period=(3, 4), weight=(0.1, 0.1))[0]
    assert np.array_equal(short, long)
