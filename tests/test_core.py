"""The graph, its derivative, the named functions and the derived write rules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepopt import MLP, Linear, Table, average, dot, l2, write
from deepopt import expr as ex
from deepopt.algebra import Program, constant_array, fold
from deepopt.describe import total_flops
from deepopt.expr import array, symbol
from deepopt.functions import (
    COEFFICIENTS,
    mean,
    named,
    newton_schulz,
    norm,
    ratio,
    rms,
    solve,
    unit,
)
from deepopt.grad import grad
from deepopt.memory import read_along
from deepopt.oracle import NUMPY

RNG = np.random.default_rng


def value(of, /, **inputs):
    return fold(Program({"": of}), NUMPY, {k: np.asarray(v) for k, v in inputs.items()})[""]


# The graph


def test_equal_subexpressions_are_one_node():
    a, b = symbol("a", (3, 4)), symbol("b", (3, 4))
    assert a * b + 1.0 is b * a + 1.0
    assert ex.tanh(a @ b.mT) is ex.tanh(symbol("a", (3, 4)) @ symbol("b", (3, 4)).mT)
    assert a - b is not b - a


def test_shapes_are_checked_when_a_node_is_built():
    a, v = symbol("a", (3, 4)), symbol("v", (4,))
    with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(4,\) do not combine"):
        a + v
    with pytest.raises(
        ValueError, match=r"cannot multiply matrices of shapes \(3, 4\) and \(3, 4\)"
    ):
        a @ a
    with pytest.raises(ValueError, match=r"cannot see shape \(3, 4\) as \(5, 2\)"):
        ex.reshape(a, (5, 2))
    assert (a * symbol("s")).shape == (3, 4)


def test_branching_on_a_symbol_is_refused_with_its_place():
    with pytest.raises(TypeError, match=r"branched at test_core.py:\d+ on the value of 'less'"):
        bool(symbol("lr") < 1.0)


def test_products_run_in_the_cheaper_order():
    m, g = symbol("m", (9, 2)), symbol("g", (9, 2))
    tall = m @ g.mT @ g
    assert tall is m @ (g.mT @ g)
    assert ex.products(tall) == 2 * 9 * 2 * 2
    wide_m, wide_g = symbol("m", (2, 9)), symbol("g", (2, 9))
    assert ex.products(wide_m @ (wide_g.mT @ wide_g)) == 2 * 2 * 2 * 9
    residual = (m @ g.mT - array("eye", (9, 9))) @ g
    assert all(node.shape != (9, 9) for node in ex.topological([residual]))
    a, b = RNG(0).standard_normal((2, 9, 2))
    np.testing.assert_allclose(value(residual, m=a, g=b), a @ b.T @ b - b, atol=1e-13)


def test_simplifications_change_no_value():
    a = symbol("a", (2, 3))
    x = RNG(1).standard_normal((2, 3))
    for got, want in [
        (a + 0.0, x),
        (a * 1.0, x),
        (ex.neg(ex.neg(a)), x),
        (a - (-a), 2 * x),
        (2.0 * (3.0 * a), 6 * x),
        (a * array("full", (2, 3), 2.0), 2 * x),
        (-(a - 1.0), 1 - x),
        ((-a) / 2.0, -x / 2),
    ]:
        np.testing.assert_array_equal(value(got, a=x), want)


# The derivative


@st.composite
def graphs(draw):
    """A random smooth function of two matrices as a size-one objective."""
    m, n = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    a, b = symbol("a", (m, n)), symbol("b", (m, n))
    pool = [a, b]
    for _ in range(draw(st.integers(1, 6))):
        x, y = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        pool.append(
            draw(
                st.sampled_from(
                    [
                        lambda x, y: x + y,
                        lambda x, y: x - y,
                        lambda x, y: x * y,
                        lambda x, y: x / (1.0 + y * y),
                        lambda x, y: ex.tanh(x),
                        lambda x, y: ex.sigmoid(x) * y,
                        lambda x, y: ex.exp(-(x * x)),
                        lambda x, y: ex.log(1.0 + x * x),
                        lambda x, y: ex.sqrt(1.0 + x * x) - ex.rsqrt(2.0 + y * y),
                        lambda x, y: (2.0 + x * x) ** 1.5,
                        lambda x, y: x @ y.mT @ x,
                        lambda x, y: x + ex.sum_(y, (-1,)),
                        lambda x, y: x * mean(y),
                        lambda x, y: ex.reshape(ex.reshape(x, (x.size, 1)), x.shape) + y,
                        lambda x, y: unit(x + 3.0),
                        lambda x, y: x * norm(y + 2.0) - rms(x + 2.0) * y,
                        lambda x, y: solve(array("eye", (m, m)) + 0.5 * (x @ x.mT), y),
                        lambda x, y: ex.where(1.9 * a < b, x * y, y * x * x),
                        lambda x, y: ex.maximum(a, b - 0.9) * x + ex.minimum(2.1 * a, b) * y,
                    ]
                )
            )(x, y)
        )
    return ex.sum_(pool[-1] * pool[-1] + pool[-1]) + ex.sum_(a * b), (m, n)


@given(graphs(), st.integers(0, 2**32 - 1))
def test_grad_equals_finite_differences(graph, seed):
    objective, shape = graph
    inputs = dict(zip("ab", RNG(seed).uniform(0.2, 0.8, (2, *shape)), strict=True))
    symbols = [symbol("a", shape), symbol("b", shape)]
    direction = RNG(seed + 1).standard_normal((2, *shape))
    parts = [
        value(d, **inputs) * v for d, v in zip(grad(objective, symbols), direction, strict=True)
    ]
    # A difference along the imaginary axis has no cancellation, so its step can be tiny.
    h = 1e-30
    moved = {k: inputs[k] + 1j * h * v for k, v in zip("ab", direction, strict=True)}
    numeric = value(objective, **moved).item().imag / h
    size = sum(float(np.abs(part).sum()) for part in parts)
    assert abs(sum(float(part.sum()) for part in parts) - numeric) <= 1e-10 * (1 + size)


def test_grad_of_the_absolute_value_and_the_sign():
    a = symbol("a", (2, 2))
    x = np.array([[1.5, -2.0], [0.5, -0.1]])
    (d,) = grad(ex.sum_(ex.absolute(a) * 3.0 + ex.sign(a)), [a])
    np.testing.assert_array_equal(value(d, a=x), 3 * np.sign(x))


def test_grad_undoes_broadcasts_of_constants():
    z, r = symbol("z", (4, 1)), symbol("r", (1, 3))
    total = ex.sum_(3.0 * (z + r))
    x, y = RNG(0).standard_normal((4, 1)), RNG(1).standard_normal((1, 3))
    for got, shape in zip(grad(total * total, [z, r]), ((4, 1), (1, 3)), strict=True):
        assert got.shape == shape
        want = 2 * value(total, z=x, r=y) * 3.0 * (12 / max(shape))
        np.testing.assert_allclose(value(got, z=x, r=y), np.full(shape, want.item()), rtol=1e-12)
    (d,) = grad(ex.sum_(2.0**z), [z])
    np.testing.assert_allclose(value(d, z=x), np.log(2.0) * 2.0**x)


def test_only_a_square_eye_is_the_identity():
    b, eps = symbol("b", (5, 2)), symbol("eps")
    assert (array("eye", (3, 5)) @ b).shape == (3, 2)
    assert array("eye", (3, 5)).mT.shape == (5, 3)
    x = RNG(0).standard_normal((5, 2))
    got = value((array("eye", (5, 5)) + eps) @ b, b=x, eps=0.5)
    np.testing.assert_allclose(got, x + 0.5 * x.sum(0))
    np.testing.assert_array_equal(constant_array("eye", (3, 3), 0.5), 0.5 * np.eye(3))


def test_a_node_is_neither_number_nor_sequence():
    a, lr = symbol("a", (2, 2)), symbol("lr")
    with pytest.raises(TypeError, match=r"branched at test_core\.py"):
        bool(lr == 0)
    with pytest.raises(TypeError, match="cannot be indexed"):
        a[0]
    with pytest.raises(TypeError):
        list(a)
    with pytest.raises(TypeError, match="'3' is neither a number nor a node"):
        a + "3"
    with pytest.raises(ValueError, match="rank 0 is for hyperparameters"):
        ex.reshape(symbol("b", (1, 1)), ())
    with pytest.raises(ValueError, match="'zeros'"):
        array("zeros", (2, 2))


def test_named_functions_drop_nothing():
    x = symbol("x", (2, 2))
    with pytest.raises(TypeError):
        newton_schulz(x, 3)
    with pytest.raises(TypeError, match=r"steps=\[3\]"):
        newton_schulz(x, steps=[3])
    with pytest.raises(ValueError, match=r"needs a matrix, got shape \(3,\)"):
        newton_schulz(symbol("v", (3,)))
    with pytest.raises(ValueError, match="named function of deepopt"):

        @named
        def norm(x):
            return x


def test_grad_refuses_what_it_cannot_differentiate():
    a = symbol("a", (2, 3))
    with pytest.raises(ValueError, match=r"one number per matrix, got shape \(2, 3\)"):
        grad(a, [a])
    with pytest.raises(ValueError, match="does not depend on"):
        grad(ex.sum_(a), [symbol("b", (2, 3))])
    with pytest.raises(ValueError, match="does not depend on"):
        grad(ex.sum_(ex.stop_gradient(a)), [a])
    with pytest.raises(ValueError, match="is a hyperparameter"):
        grad(ex.sum_(symbol("lr") * a), [symbol("lr")])


def test_stop_gradient_is_a_constant_for_grad_only():
    a = symbol("a", (2, 2))
    (d,) = grad(ex.sum_(a * ex.stop_gradient(a)), [a])
    x = RNG(0).standard_normal((2, 2))
    np.testing.assert_array_equal(value(d, a=x), x)


# Named functions


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1)])
def test_newton_schulz(shape):
    x = symbol("x", shape)
    g = RNG(2).standard_normal(shape)
    cubic = newton_schulz(x, steps=40, coefficients="cubic")
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    np.testing.assert_allclose(value(cubic, x=g), u @ vt, atol=1e-12)
    quintic = value(newton_schulz(x), x=g)
    np.testing.assert_allclose(value(newton_schulz(x), x=1e6 * g), quintic, atol=1e-10)
    np.testing.assert_allclose(value(newton_schulz(x), x=-g), -quintic, atol=1e-14)
    transposed = value(newton_schulz(symbol("x", shape[::-1])), x=g.T)
    np.testing.assert_allclose(transposed.T, quintic, atol=1e-13 * (shape[0] == shape[1]))
    assert not value(newton_schulz(x), x=np.zeros(shape)).any()
    cost, other = (
        total_flops(Program({"": newton_schulz(symbol("x", s))})) for s in (shape, shape[::-1])
    )
    assert cost == other


@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64)])
def test_newton_schulz_lifts_a_spectrum_over_three_decades(shape):
    n = min(shape)
    u, _ = np.linalg.qr(RNG(3).standard_normal((shape[0], n)))
    v, _ = np.linalg.qr(RNG(4).standard_normal((shape[1], n)))
    g = u * np.logspace(0, -3, n) @ v.T
    singular = np.linalg.svd(value(newton_schulz(symbol("x", shape)), x=g), compute_uv=False)
    assert np.median(singular) >= 0.7
    assert singular.max() <= 1.21


def test_the_cubic_is_a_gradient_step_on_the_distance_from_orthogonality():
    o = symbol("o", (3, 5))
    error = o @ o.mT - array("eye", (3, 3))
    (d,) = grad(0.5 * ex.sum_(error * error), [o])
    x = RNG(5).standard_normal((3, 5))
    a, b, _ = COEFFICIENTS["cubic"]
    np.testing.assert_allclose(x - 0.25 * value(d, o=x), a * x + b * x @ x.T @ x, atol=1e-13)


def test_ratio_and_unit_of_zero_are_zero():
    x = symbol("x", (2, 2))
    assert not value(unit(x), x=np.zeros((2, 2))).any()
    got = value(ratio(x, x * x), x=np.array([[0.0, 2.0], [-4.0, 0.0]]))
    np.testing.assert_array_equal(got, [[0.0, 0.5], [-0.25, 0.0]])


def test_the_dct_basis_is_orthonormal_and_stops_at_the_square():
    basis = constant_array("dct", (6, 9))
    np.testing.assert_allclose(basis[:, :6].T @ basis[:, :6], np.eye(6), atol=1e-14)
    assert not basis[:, 6:].any()


# Write rules, derived against closed forms (paper.md of the notation: m holds plus the gradient)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1)])
class TestDerivedWrites:
    alpha, eta = 0.9, 0.3

    def inputs(self, shape):
        m, g = RNG(6).standard_normal((2, *shape))
        return m, g

    def test_dot_is_heavy_ball_and_average(self, shape):
        m, g = self.inputs(shape)
        s, t = symbol("m", shape), symbol("g", shape)
        new = write(dot(Table(s), t), retention=self.alpha, rate=self.eta).value
        np.testing.assert_allclose(value(new, m=m, g=g), self.alpha * m + self.eta * g, rtol=1e-14)
        mean = average(s, t, self.alpha)
        np.testing.assert_allclose(value(mean, m=m, g=g), 0.9 * m + (1 - 0.9) * g, rtol=1e-14)

    def test_dot_with_identity_values_read_by_the_gradient_is_heavy_ball(self, shape):
        m, g = self.inputs(shape)
        s, t = symbol("m", shape), symbol("g", shape)
        goal = dot(Linear(s.mT), array("eye", (shape[0], shape[0])), t)
        new = write(goal, retention=self.alpha, rate=self.eta).weight.mT
        np.testing.assert_allclose(value(new, m=m, g=g), self.alpha * m + self.eta * g, rtol=1e-14)

    def test_l2_is_the_delta_rule(self, shape):
        m, g = self.inputs(shape)
        s, t = symbol("m", shape), symbol("g", shape)
        goal = l2(Linear(s.mT), array("eye", (shape[0], shape[0])), t)
        new = value(write(goal, retention=self.alpha, rate=self.eta).weight.mT, m=m, g=g)
        want = m @ (self.alpha * np.eye(shape[1]) - self.eta * g.T @ g) + self.eta * g
        np.testing.assert_allclose(new, want, rtol=1e-10, atol=1e-13)

    def test_prox_minimises_what_it_says(self, shape):
        m, g = self.inputs(shape)
        s, t, p = symbol("m", shape), symbol("g", shape), symbol("p", shape)
        eye = array("eye", (shape[0], shape[0]))
        goal = l2(Linear(s.mT), eye, t)
        new = value(write(goal, retention=0.9, rate=0.3, solver="prox").weight.mT, m=m, g=g)
        want = (0.9 * m + 0.3 * g) @ np.linalg.inv(np.eye(shape[1]) + 0.3 * g.T @ g)
        np.testing.assert_allclose(new, want, rtol=1e-10, atol=1e-13)
        drift = p - 0.9 * s
        penalty = ex.sum_(drift * drift) * (1 / (2 * 0.3))
        (slope,) = grad(l2(Linear(p.mT), eye, t).loss + penalty, [p])
        assert np.abs(value(slope, p=new, m=m, g=g)).max() <= 1e-12

    def test_explicit_and_prox_agree_to_second_order_and_share_their_fixed_point(self, shape):
        m, g = self.inputs(shape)
        s, t = symbol("m", shape), symbol("g", shape)
        eta = symbol("eta")
        goal = l2(Linear(s.mT), array("eye", (shape[0], shape[0])), t)
        both = [
            write(goal, retention=1.0, rate=eta, solver=solver).weight.mT
            for solver in ("prox", "explicit")
        ]
        gaps = [
            np.abs(np.subtract(*(value(x, m=m, g=g, eta=h) for x in both))).max()
            for h in (1e-3, 1e-4)
        ]
        assert 50 < gaps[0] / gaps[1] < 200
        fixed = np.linalg.pinv(g).T
        for x in both:
            np.testing.assert_allclose(value(x, m=fixed, g=g, eta=0.1), fixed, atol=1e-12)

    def test_delta_gradient_descent_by_layer(self, shape):
        d = shape[1]
        k, v = self.inputs(shape)
        first, second = RNG(7).standard_normal((d, 3)), RNG(8).standard_normal((3, d))
        memory = MLP(symbol("a", (d, 3)), symbol("b", (3, d)))
        goal = l2(memory, symbol("v", shape), symbol("k", shape))
        given = {"a": first, "b": second, "k": k, "v": v}
        new = write(goal, retention=0.9, rate=0.3, delta=True)
        hidden = np.tanh(k @ first)
        error = k + hidden @ second - v
        want_b = (0.9 * np.eye(3) - 0.3 * hidden.T @ hidden) @ second - 0.3 * hidden.T @ error
        inner = error @ second.T * (1 - hidden**2)
        want_a = (0.9 * np.eye(d) - 0.3 * k.T @ k) @ first - 0.3 * k.T @ inner
        np.testing.assert_allclose(value(new.first, **given), want_a, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(value(new.second, **given), want_b, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("delta", [True, False])
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("small", [0.7, 1e-3, 0.0])
    def test_sequential_equals_a_loop_over_tokens(self, shape, delta, normalize, small):
        n, d = shape
        k, v = self.inputs(shape)
        first, second = 0.5 * RNG(9).standard_normal((2, d, 3))
        alpha, eta = RNG(10).uniform(0.5, 1.0, (2, n, 1))
        alpha[n // 2] = small
        memory = MLP(symbol("a", (d, 3)), symbol("b", (3, d)))
        goal = l2(memory, symbol("v", shape), symbol("k", shape))
        options = {"delta": delta, "normalize": normalize}
        rates = {"retention": symbol("r", (n, 1)), "rate": symbol("e", (n, 1))}
        given = {"a": first, "b": second.T, "k": k, "v": v, "r": alpha, "e": eta}
        end = write(goal, solver="sequential", **rates, **options)
        along = value(read_along(goal, symbol("k", shape), **rates, **options), **given)
        a, b = first, second.T
        hidden = np.tanh(k @ a)
        error = k + hidden @ b - v
        inner = error @ b.T * (1 - hidden**2)
        for t in range(n):
            np.testing.assert_allclose(along[t], k[t] + np.tanh(k[t] @ a) @ b, atol=1e-11)
            for w, x, e in ((0, k[t], inner[t]), (1, hidden[t], error[t])):
                old = (a, b)[w]
                rate = eta[t] / (1 + eta[t] * x @ x) if normalize else eta[t]
                push = np.outer(x, (x @ old if delta else 0) + e)
                moved = alpha[t] * old - rate * push
                a, b = (moved, b) if w == 0 else (a, moved)
        np.testing.assert_allclose(value(end.first, **given), a, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(value(end.second, **given), b, rtol=1e-10, atol=1e-11)


def test_writes_that_make_no_sense_are_refused():
    m, g = symbol("m", (2, 3)), symbol("g", (2, 3))
    with pytest.raises(
        ValueError, match="exact for an l2 objective on a Linear memory, not for dot"
    ):
        write(dot(Table(m), g), solver="prox")
    with pytest.raises(ValueError, match="read without keys"):
        dot(Table(m), g, g)
    with pytest.raises(ValueError, match="only a Table has none"):
        l2(Linear(m), g)
    for option in ({"normalize": True}, {"delta": True}):
        with pytest.raises(ValueError, match="this objective has none"):
            write(dot(Table(m), g), **option)
    goal = l2(Linear(m.mT), array("eye", (2, 2)), g)
    with pytest.raises(ValueError, match=r"solver='prox' does not take \['delta'\]"):
        write(goal, solver="prox", delta=True)
    with pytest.raises(ValueError, match=r"solver='proximal' must be"):
        write(goal, solver="proximal")
