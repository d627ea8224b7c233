"""The algebra of jax arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from deepopt.algebra import Arrays, constant_array
from deepopt.expr import Shape


class Jax(Arrays[Any]):
    """jax.numpy in one dtype; scalars that are Python numbers stay so until they meet an array."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def constant(self, value: float) -> float:
        return value

    def array(self, kind: str, shape: Shape, value: float) -> jax.Array:
        if kind == "full":
            return jnp.full(shape, value, self.dtype)
        return jnp.asarray(constant_array(kind, shape, value), self.dtype)

    def sqrt(self, a: Any) -> Any:
        return jnp.sqrt(a)

    def rsqrt(self, a: Any) -> Any:
        return jax.lax.rsqrt(a)

    def exp(self, a: Any) -> Any:
        return jnp.exp(a)

    def log(self, a: Any) -> Any:
        return jnp.log(a)

    def sigmoid(self, a: Any) -> Any:
        return jax.nn.sigmoid(a)

    def tanh(self, a: Any) -> Any:
        return jnp.tanh(a)

    def sign(self, a: Any) -> Any:
        return jnp.sign(a)

    def absolute(self, a: Any) -> Any:
        return jnp.abs(a)

    def maximum(self, a: Any, b: Any) -> Any:
        return jnp.maximum(a, b)

    def minimum(self, a: Any, b: Any) -> Any:
        return jnp.minimum(a, b)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return jnp.where(condition, a, b)

    def matmul(self, a: Any, b: Any) -> Any:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    def transpose(self, a: Any) -> Any:
        return jnp.swapaxes(a, -1, -2)

    def sum(self, a: Any, axes: tuple[int, ...]) -> Any:
        return jnp.sum(a, axis=axes, keepdims=True)

    def solve(self, a: Any, b: Any, lower: bool, upper: bool) -> Any:
        if lower or upper:
            return jax.scipy.linalg.solve_triangular(a, b, lower=lower)
        return jnp.linalg.solve(a, b)
