"""The living definition: every rule in float64 NumPy, one plain step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import numpy as np

from deepopt.algebra import Arrays, constant_array, fold
from deepopt.expr import Shape
from deepopt.rule import Rule, check_hyperparameters, checked_rule, trace

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

    def solve(self, a: Any, b: Any, lower: bool, upper: bool) -> Any:
        return cast(Any, np.linalg.solve(a, b))


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
        self, parameters: Sequence[Any], gradients: Sequence[Any], **scalars: Any
    ) -> list[Array]:
        """The parameters after one step; `scalars` (such as lr) stand in for the rule's own."""
        shapes = [np.shape(w) for w in parameters], [np.shape(g) for g in gradients]
        if shapes[0] != shapes[1] or len(parameters) != len(self.state):
            raise ValueError(
                f"parameters of shapes {shapes[0]} and gradients of shapes {shapes[1]} for an "
                f"oracle of {len(self.state)} parameters"
            )
        check_hyperparameters(type(self.rule), scalars)
        rule = replace(self.rule, **scalars)
        values: Mapping[str, float] = rule.scalars()
        count = self.count + 1
        result: list[Array] = []
        state: list[dict[str, Array]] = []
        for i, (w, g, s) in enumerate(zip(parameters, gradients, self.state, strict=True)):
            w = np.asarray(w, np.float64)
            shape = canonical(w.shape)
            program = trace(rule, shape, rule.ticks(count, index=i))
            inputs = {"w": w.reshape(shape), "g": np.asarray(g, np.float64).reshape(shape)}
            out = fold(program, NUMPY, {**inputs, **s, **values, "step": float(count)})
            out.pop("direction", None)
            update = out.pop("update", None)
            result.append(w if update is None else w + update.reshape(w.shape))
            state.append(s | {name: np.array(value) for name, value in out.items()})
        self.count, self.state = count, state
        return result


def canonical(shape: Sequence[int]) -> Shape:
    """The shape a program sees for a parameter: a 0-d array is one entry."""
    return tuple(shape) or (1,)
