"""Named functions: defined once in the graph, replaced by a backend that knows better.

A call is one node, so a planner sees `newton_schulz` and not its twenty products. An algebra may
offer a method of the same name; otherwise it folds the definition. `solve`, `eigenvectors` and
`orthonormal` have no definition: every algebra must provide them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from math import isclose
from typing import Concatenate, ParamSpec, cast

import numpy as np

from deepopt.expr import (
    Expr,
    Shape,
    absolute,
    array,
    as_expr,
    equal,
    matmul,
    max_,
    maximum,
    node,
    sqrt,
    sum_,
    symbol,
    transpose,
    where,
)

P = ParamSpec("P")

FUNCTIONS: dict[str, Callable[..., Expr]] = {}

Polynomial = tuple[float, float, float]

# (a, b, c) of the odd polynomial aX + bAX + cAAX with A = XXᵀ, by the name of their iteration.
COEFFICIENTS: dict[str, Polynomial] = {
    "cubic": (1.5, -0.5, 0.0),
    "quintic": (3.4445, -4.7750, 2.0315),
}

# The lower end, for 1 as upper one, whose optimal polynomial leaves ends at the ratio 1 to 10.
CUSHION = 0.02407327424182761


def polynomials(coefficients: str, steps: int) -> tuple[Polynomial, ...]:
    """(a, b, c) of each step of an orthogonalising iteration; ValueError for an unknown one."""
    if coefficients == "polar_express":
        return polar_express(steps)
    if coefficients not in COEFFICIENTS:
        names = sorted([*COEFFICIENTS, "polar_express"])
        raise ValueError(f"coefficients={coefficients!r}: choose one of {names}")
    return (COEFFICIENTS[coefficients],) * steps


@cache
def polar_express(
    steps: int, lowest: float = 1e-3, safety: float = 1.05, cushion: float = CUSHION
) -> tuple[Polynomial, ...]:
    """(a, b, c) of each step of the composition that is nearest to one on [lowest, 1].

    Every step is the optimal polynomial for what the steps before made of that interval, or of its
    part above `cushion` times its upper end, which keeps early steps from pressing the rest to one
    value. Every polynomial is taken at x / safety: singular values that rounding lifts above the
    interval would else be thrown out of it, and 1.05 is what the Gram form bears in bfloat16.

    Source: Amsel et al., arXiv 2505.16932; a safety of 1.05 in all steps is Dao-AILab's.
    """
    lower, upper, found = lowest, 1.0, list[Polynomial]()
    for _ in range(steps):
        a, b, c = optimal_quintic(max(lower, cushion * upper), upper)
        low, high = (x * (a + x * x * (b + x * x * c)) for x in (lower, upper))
        # The optimum above the cushion is centred for that part alone.
        centre = 2.0 / (low + high)
        lower, upper = centre * low, 2.0 - centre * low
        found.append((centre * a / safety, centre * b / safety**3, centre * c / safety**5))
    return tuple(found)


def optimal_quintic(lower: float, upper: float) -> Polynomial:
    """(a, b, c) of the odd quintic polynomial that is nearest to one on [lower, upper].

    Remez's exchange: the error has one size and alternating signs at the ends and at both extrema.
    Source: Amsel et al., arXiv 2505.16932.
    """
    # The limit of equal ends, where the exchange is singular.
    if isclose(lower, upper, rel_tol=5e-6):
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    signs, inner = np.array([1.0, -1.0, 1.0, -1.0]), np.array([0.75, 0.25]) * lower
    points = np.array([lower, *(inner + np.array([0.25, 0.75]) * upper), upper])
    a, b, c, error, last = 0.0, 0.0, 0.0, 0.0, -1.0
    # The error only grows, until rounding.
    while error > last:
        last = error
        system = np.stack([points, points**3, points**5, signs], axis=1)
        a, b, c, error = (float(x) for x in np.linalg.solve(system, np.ones(4)))
        spread = np.sqrt(9 * b * b - 20 * a * c) * np.array([-1.0, 1.0])
        points[1:3] = np.sqrt((spread - 3 * b) / (10 * c))
    return a, b, c


@cache
def definition_of(
    name: str, shapes: tuple[Shape, ...], static: tuple[tuple[str, Hashable], ...]
) -> tuple[Expr, tuple[Expr, ...]]:
    """The body of a named function on symbols of these shapes, and the symbols."""
    arguments = tuple(symbol(f"argument {i}", shape) for i, shape in enumerate(shapes))
    return FUNCTIONS[name](*arguments, **dict(static)), arguments


def named(definition: Callable[Concatenate[Expr, P], Expr]) -> Callable[Concatenate[Expr, P], Expr]:
    """Make calls of `definition` (nodes and static keywords in, a node out) single nodes."""
    name = definition.__name__
    if getattr(FUNCTIONS.get(name), "__module__", None) == __name__:
        raise ValueError(f"{name!r} is a named function of deepopt: choose another name")
    FUNCTIONS[name] = definition
    definition_of.cache_clear()

    def call(x: Expr, /, *args: P.args, **static: P.kwargs) -> Expr:
        nodes = [as_expr(a) for a in (x, *cast(tuple[Expr, ...], args))]
        attrs: dict[str, Hashable] = {}
        for key, value in static.items():
            if isinstance(value, Expr) or not isinstance(value, Hashable):
                raise TypeError(f"{name}({key}={value!r}): keywords are static and hashable")
            attrs[key] = value
        shapes = tuple(a.shape for a in nodes)
        body, _ = definition_of(name, shapes, tuple(sorted(attrs.items())))
        return node("call", nodes, body.shape, name=name, **attrs)

    call.__name__, call.__qualname__, call.__doc__ = name, name, definition.__doc__
    return call


def definition(call: Expr) -> tuple[Expr, tuple[Expr, ...]]:
    """What a call node stands for: a body, and the symbols in the place of its arguments."""
    shapes = tuple(arg.shape for arg in call.args)
    return definition_of(str(call["name"]), shapes, tuple(sorted(static_of(call).items())))


def static_of(call: Expr) -> dict[str, Hashable]:
    """The static keywords of a call node."""
    return {k: v for k, v in call.attrs if k != "name"}


def solve(a: Expr, b: Expr, *, lower: bool = False, upper: bool = False) -> Expr:
    """a⁻¹b for a square a of full rank; `lower` or `upper` promise that a is triangular."""
    _check_square("solve", a)
    if a.shape[:-1] != b.shape[:-1]:
        raise ValueError(f"solve of a matrix of shape {a.shape} for {b.shape}")
    if a.shape == (1, 1):
        return b / a
    return node("call", (a, b), b.shape, name="solve", lower=lower, upper=upper)


def eigenvectors(a: Expr) -> Expr:
    """The eigenvectors of a symmetric a as columns, eigenvalues ascending; signs are free."""
    _check_square("eigenvectors", a)
    return node("call", (a,), a.shape, name="eigenvectors")


def orthonormal(a: Expr) -> Expr:
    """The factor Q of a = QR for a square a, unique where a has full rank: diag R > 0."""
    _check_square("orthonormal", a)
    return node("call", (a,), a.shape, name="orthonormal")


def _check_square(name: str, a: Expr) -> None:
    if a.rank < 2 or a.shape[-2] != a.shape[-1]:
        raise ValueError(f"{name} needs a square matrix, got shape {a.shape}")


@named
def eigenbasis(a: Expr) -> Expr:
    """`eigenvectors` of a positive semi-definite a, the identity for zero.

    Taken at largest entry one and with 1e-6 on the diagonal, which changes no eigenvector and
    keeps float32 solvers from giving up on entries of very different size.
    """
    scaled = ratio(a, max_(absolute(a), (-2, -1)))
    return eigenvectors(scaled + 1e-6 * array("eye", a.shape))


@named
def eigenvalues(a: Expr, v: Expr) -> Expr:
    """The eigenvalues of a symmetric a with eigenvectors v, as a row."""
    return sum_(v * matmul(a, v), (-2,))


@named
def inverse_root(v: Expr, values: Expr, floor: Expr, *, p: int) -> Expr:
    """a^(-1/p) of the symmetric a with these eigenvectors and eigenvalues; the identity for zero.

    Eigenvalues below `floor` times the largest count as that, so that a matrix that is singular,
    or not positive semi-definite by rounding, has a root.
    """
    largest = max_(values, (-1,))
    raised = maximum(maximum(values, floor * largest), 0.0) ** (1.0 / p)
    powers = where(equal(largest, 0.0), 1.0, ratio(as_expr(1.0), raised))
    return matmul(v * powers, transpose(v))


@named
def negative_eigenvalues(values: Expr, floor: Expr) -> Expr:
    """How many eigenvalues are below -floor times the largest."""
    return sum_(where(values < -(floor * max_(absolute(values), (-1,))), 1.0, 0.0))


@named
def ratio(x: Expr, y: Expr) -> Expr:
    """x / y for y ≥ 0, and zero where y is zero."""
    return where(equal(y, 0.0), 0.0, x / where(equal(y, 0.0), 1.0, y))


@named
def mean(x: Expr) -> Expr:
    """The mean over all axes; zero for an empty array."""
    return sum_(x) * (1.0 / max(x.size, 1))


@named
def norm(x: Expr) -> Expr:
    """The Frobenius norm over all axes."""
    return sqrt(sum_(x * x))


@named
def rms(x: Expr) -> Expr:
    """The root mean square over all axes."""
    return sqrt(mean(x * x))


@named
def unit(x: Expr) -> Expr:
    """x divided by its Frobenius norm; zero stays zero.

    Holds while squares neither under- nor overflow: sizes of 1e-19 to 1e19 in float32.
    """
    return ratio(x, norm(x))


@named
def unit_rms(x: Expr) -> Expr:
    """x divided by its root mean square; zero stays zero."""
    return ratio(x, rms(x))


@named
def newton_schulz(x: Expr, *, steps: int = 5, coefficients: str = "quintic") -> Expr:
    """x with its singular values driven towards one: `steps` of an odd polynomial iteration.

    Works on the short side, so a tall matrix is the transpose of a wide one; zero stays zero.
    "cubic" converges to the polar factor; five steps of "quintic" (Jordan's Muon) map singular
    values from 0.01 to 1 of the Frobenius norm into [0.68, 1.20] and do not converge;
    every step of "polar_express" is the best after those before it: five map singular values from
    0.01 to 1 into [0.84, 1.13], eight from 0.001 within 3e-4 of one.
    Raises ValueError for what is not a matrix, and for unknown coefficients.
    """
    if x.rank != 2:
        raise ValueError(f"newton_schulz needs a matrix, got shape {x.shape}")
    tall = x.shape[0] > x.shape[1]
    y = unit(transpose(x) if tall else x)
    for a, b, c in polynomials(coefficients, steps):
        gram = matmul(y, transpose(y))
        polynomial = b * gram + c * matmul(gram, gram) if c else b * gram
        y = a * y + matmul(polynomial, y)
    return transpose(y) if tall else y
