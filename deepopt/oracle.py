"""The living definition: every rule in float64 NumPy, one plain step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import numpy as np

from deepopt.algebra import Arrays, Program, constant_array, fold
from deepopt.expr import Expr, Shape, symbol
from deepopt.rule import Rule, check_hyperparameters, checked_rule, trace, turns

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class NumPy(Arrays[Any]):
    """The algebra of NumPy arrays; also what evaluates scalars on the host for other backends."""

    def constant(self, value: float) -> float:
        return value

    def array(self, kind: str, shape: Shape, value: float) -> Array:
        return constant_array(kind, shape, value)

    def sqrt(self, a: Any) -> Any:
        return np.sqrt(a)

    def rsqrt(self, a: Any) -> Any:
        return 1 / np.sqrt(a)

    def exp(self, a: Any) -> Any:
        return np.exp(a)

    def log(self, a: Any) -> Any:
        return np.log(a)

    def sigmoid(self, a: Any) -> Any:
        return 0.5 * (1 + np.tanh(0.5 * a))

    def tanh(self, a: Any) -> Any:
        return np.tanh(a)

    def sign(self, a: Any) -> Any:
        return np.sign(a)

    def absolute(self, a: Any) -> Any:
        return np.abs(a)

    def floor(self, a: Any) -> Any:
        return np.floor(a)

    def maximum(self, a: Any, b: Any) -> Any:
        return np.maximum(a, b)

    def minimum(self, a: Any, b: Any) -> Any:
        return np.minimum(a, b)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return cast(Any, np.where(condition, a, b))

    def transpose(self, a: Any) -> Any:
        return np.swapaxes(a, -1, -2)

    def sum(self, a: Any, axes: tuple[int, ...]) -> Any:
        return np.sum(a, axis=axes, keepdims=True)

    def max(self, a: Any, axes: tuple[int, ...]) -> Any:
        return np.max(a, axis=axes, keepdims=True, initial=-np.inf)

    def solve(self, a: Any, b: Any, lower: bool, upper: bool) -> Any:
        return cast(Any, np.linalg.solve(a, b))

    def eigenvectors(self, a: Any) -> Any:
        # LAPACK gives up on what is not finite; a NaN must stay one.
        known = np.isfinite(a).all((-2, -1), keepdims=True)
        v = np.linalg.eigh(np.where(known, a, 0.0)).eigenvectors
        return np.where(known, v, np.nan)

    def orthonormal(self, a: Any) -> Any:
        q, r = np.linalg.qr(a)
        return q * np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]


NUMPY = NumPy()


class Oracle:
    """A rule stepped in float64 over a list of arrays: what the other backends must equal.

    >>> w = [np.ones((4, 3))]
    >>> oracle = Oracle(SGD(lr=0.5), w)
    >>> w = oracle.step(w, [np.ones((4, 3))])

    Raises ValueError where an array is not a matrix and the rule needs one, and for gradients of
    other shapes; then nothing has changed.
    """

    def __init__(self, rule: Rule, parameters: Sequence[Any]) -> None:
        self.rule = checked_rule(rule)
        self.count = 0
        self.state: list[dict[str, Array]] = []
        for i, parameter in enumerate(parameters):
            shape = canonical(np.shape(parameter))
            rule.check(shape, f"parameter {i}")
            if rule.domain == "matrix" and len(shape) != 2:
                raise ValueError(f"parameter {i} has shape {shape}; step each matrix by itself")
            self.state.append({k: s.start() for k, s in rule.all_slots(shape).items()})

    def step(
        self,
        parameters: Sequence[Any],
        gradients: Sequence[Any],
        context: Sequence[Mapping[str, Any]] | None = None,
        **scalars: Any,
    ) -> list[Array]:
        """The parameters after one step; `scalars` (such as lr) stand in for the rule's own.

        context: for each parameter what its rule needs beyond the gradient, by name.
        """
        shapes = [np.shape(w) for w in parameters], [np.shape(g) for g in gradients]
        if shapes[0] != shapes[1] or len(parameters) != len(self.state):
            raise ValueError(
                f"parameters of shapes {shapes[0]} and gradients of shapes {shapes[1]} for an "
                f"oracle of {len(self.state)} parameters"
            )
        nothing: dict[str, Any] = {}
        given = [nothing] * len(parameters) if context is None else context
        if len(given) != len(parameters):
            raise ValueError(f"context for {len(given)} of {len(parameters)} parameters")
        check_hyperparameters(type(self.rule), scalars)
        rule = replace(self.rule, **scalars)
        values: Mapping[str, float] = rule.scalars()
        count = self.count + 1
        norm = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in gradients))
        shared = {**values, "step": float(count), "gradient_norm": norm}
        turn = turns(shapes[0])
        result: list[Array] = []
        state: list[dict[str, Array]] = []
        for i, (w, g, s, c) in enumerate(
            zip(parameters, gradients, self.state, given, strict=True)
        ):
            w = np.asarray(w, np.float64)
            shape = canonical(w.shape)
            program = trace(rule, shape, rule.ticks(count, index=turn[i]))
            inputs = {"w": w.reshape(shape), "g": np.asarray(g, np.float64).reshape(shape)}
            inputs |= {k: np.asarray(x, np.float64) for k, x in c.items()}
            bad = [k for k in c if not np.isfinite(inputs[k]).all()]
            if bad:
                raise ValueError(f"the context {bad} of parameter {i} has NaN or Inf entries")
            rule.check_context(shape, {k: x.shape for k, x in inputs.items()}, f"parameter {i}")
            out = fold(program, NUMPY, {**inputs, **s, **shared})
            out.pop("direction", None)
            update = out.pop("update", None)
            result.append(w if update is None else w + update.reshape(w.shape))
            state.append(s | {name: np.array(value) for name, value in out.items()})
        self.count, self.state = count, state
        return result


def flaw(function: Callable[[Expr], Any]) -> str:
    """Why a function of a matrix is no feature map of gradients; empty where it is one.

    Tried at one example of norm one: f(x) must be finite, of x's shape, odd and not against x.
    """
    x = np.linspace(-1.0, 1.0, 9).reshape(3, 3) + np.eye(3) / 7.0
    x = x / np.linalg.norm(x)
    body = function(symbol("g", x.shape))
    if not isinstance(body, Expr) or body.shape != x.shape:
        return f"it must give a node of the shape of g, and gave {body!r:.60}"
    with np.errstate(all="ignore"):
        plus, minus = (fold(Program({"": body}), NUMPY, {"g": s * x})[""] for s in (1.0, -1.0))
    size = np.abs(plus).max()
    if not np.isfinite(size) or size == 0:
        return "it must be finite and not zero"
    if np.abs(plus + minus).max() > 1e-9 * size:
        return "it must be odd, phi(-g) = -phi(g): what an even feature adds up does not descend"
    return "" if np.sum(plus * x) > 0 else "it must not point against g"


def canonical(shape: Sequence[int]) -> Shape:
    """The shape a program sees for a parameter: a 0-d array is one entry."""
    return tuple(shape) or (1,)
