"""The algebra of jax arrays, and functions of `deepopt` lifted to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepopt.algebra import Arrays, Program, apply, constant_array, fold, traced
from deepopt.expr import Shape, symbol
from deepopt.functions import polynomials, unit

# Columns per row from which the Gram form has fewer operations.
GRAM_ASPECT = 1.5


class Jax(Arrays[Any]):
    """jax.numpy in one dtype; scalars that are Python numbers stay so until they meet an array."""

    sqrt: Any = staticmethod(jnp.sqrt)
    rsqrt: Any = staticmethod(jax.lax.rsqrt)
    exp: Any = staticmethod(jnp.exp)
    log: Any = staticmethod(jnp.log)
    sigmoid: Any = staticmethod(jax.nn.sigmoid)
    tanh: Any = staticmethod(jnp.tanh)
    sign: Any = staticmethod(jnp.sign)
    absolute: Any = staticmethod(jnp.abs)
    floor: Any = staticmethod(jnp.floor)
    maximum: Any = staticmethod(jnp.maximum)
    minimum: Any = staticmethod(jnp.minimum)
    where: Any = staticmethod(jnp.where)

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def constant(self, value: float) -> float:
        return value

    def array(self, kind: str, shape: Shape, value: float) -> jax.Array:
        if kind == "full":
            return jnp.full(shape, value, self.dtype)
        if kind == "eye":
            return jnp.broadcast_to(value * jnp.eye(*shape[-2:], dtype=self.dtype), shape)
        return jnp.asarray(constant_array(kind, shape, value), self.dtype)

    def matmul(self, a: Any, b: Any) -> jax.Array:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    def transpose(self, a: Any) -> jax.Array:
        return jnp.swapaxes(a, -1, -2)

    def sum(self, a: Any, axes: tuple[int, ...]) -> jax.Array:
        return jnp.sum(a, axis=axes, keepdims=True)

    def max(self, a: Any, axes: tuple[int, ...]) -> jax.Array:
        return jnp.max(a, axis=axes, keepdims=True, initial=-jnp.inf)

    def solve(self, a: Any, b: Any, lower: bool, upper: bool) -> jax.Array:
        if lower or upper:
            return self.triangular(jnp.tril(a) if lower else jnp.triu(a), b, lower)
        return jnp.linalg.solve(a, b)

    def triangular(self, a: Any, b: Any, lower: bool) -> jax.Array:
        """a⁻¹b. On CPUs by rows: jaxlib 0.10 gives batches of systems to LAPACK from threads that
        wait for each other, and two of them at once can wait for ever."""

        def by_rows(a: Any, b: Any, lower: bool) -> jax.Array:
            def row(t: Any, x: Any) -> jax.Array:
                i = t if lower else a.shape[-1] - 1 - t
                at = jax.lax.dynamic_slice_in_dim
                ai, bi = at(a, i, 1, -2), at(b, i, 1, -2)
                new = (bi - self.matmul(ai, x)) / at(ai, i, 1, -1)
                return jax.lax.dynamic_update_slice_in_dim(x, new, i, -2)

            return jax.lax.fori_loop(0, a.shape[-1], row, jnp.zeros_like(b))

        def whole(a: Any, b: Any, lower: bool) -> jax.Array:
            a = jnp.broadcast_to(a, (*b.shape[:-2], *a.shape[-2:]))
            return jax.scipy.linalg.solve_triangular(a, b, lower=lower)

        def solve(a: Any, b: Any, lower: bool) -> jax.Array:
            cpu, other = (partial(f, lower=lower) for f in (by_rows, whole))
            return jax.lax.platform_dependent(a, b, cpu=cpu, default=other)

        batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return jax.lax.custom_linear_solve(
            lambda x: self.matmul(a, x),
            jnp.broadcast_to(b, (*batch, *b.shape[-2:])),
            lambda _, b: solve(a, b, lower),
            lambda _, b: solve(self.transpose(a), b, not lower),
        )

    def eigenvectors(self, a: Any) -> jax.Array:
        known = jnp.isfinite(a).all((-2, -1), keepdims=True)
        return jnp.where(known, jnp.linalg.eigh(jnp.where(known, a, 0.0)).eigenvectors, jnp.nan)

    def orthonormal(self, a: Any) -> jax.Array:
        q, r = jnp.linalg.qr(a)
        return q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]

    def newton_schulz(self, x: Any, steps: int = 5, coefficients: str = "quintic") -> jax.Array:
        """As defined in the graph, by a program whose size does not grow with the steps.

        Wide float32 matrices take three steps on one Gram matrix r = yyᵀ, since that of (a + z)y is
        (a + z)r(a + z). Rounding grows with each, and float64 promises the definition.
        """
        rows, columns = x.shape[-2:]
        if rows > columns:
            return self.transpose(self.newton_schulz(self.transpose(x), steps, coefficients))
        known = polynomials(coefficients, steps)
        abc, quintic = jnp.asarray(known, x.dtype), any(c for *_, c in known)
        gram = x.dtype == jnp.float32 and columns >= GRAM_ASPECT * rows
        together = min(3, steps) if gram else 1

        def advance(y: Any, abc: Any) -> tuple[Any, None]:
            r, scale, q = self.matmul(y, self.transpose(y)), 1.0, None
            for i, (a, b, c) in enumerate(abc):
                z = b * r + c * self.matmul(r, r) if quintic else b * r
                q = z if q is None else scale * z + self.matmul(q, z) + a * q
                scale = scale * a
                if i + 1 < len(abc):
                    rz = self.matmul(r, z) + a * r
                    r = self.matmul(z, rz) + a * rz
            return scale * y + self.matmul(q, y), None

        y = apply(self, unit(symbol("x", (rows, columns))), [x])
        if first := steps % together:
            y, _ = advance(y, abc[:first])
        return jax.lax.scan(advance, y, abc[first:].reshape(-1, together, 3))[0]


def lift(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of graph nodes as a function of jax arrays, which jax may transform further.

    `lift(f)(*arrays, **static)`: the last two axes of each array are the matrix that f sees, any
    axes before broadcast as batch; Python numbers are scalars. f may return one node or a tuple.
    The graph is made once per shape and set of static keywords.

    >>> write_once = lift(lambda m, k, v: write(l2(Linear(m), v, k), rate=0.5).weight)
    >>> new = write_once(memory, keys, values)
    """
    programs: dict[Any, tuple[Program, bool]] = {}

    @wraps(function)
    def run(*args: Any, **static: Any) -> Any:
        arrays = [a for a in args if isinstance(a, jax.Array | np.ndarray)]
        if not arrays:
            raise TypeError(f"{function!r} was lifted to arrays, but none is among {args!r}")
        shapes = tuple(tuple(jnp.shape(a)[-2:]) for a in args)
        key = shapes, tuple(sorted(static.items()))
        if key not in programs:
            programs[key] = traced(function, shapes, **static)
        program, several = programs[key]
        inputs = {f"argument {i}": a for i, a in enumerate(args)}
        out = tuple(fold(program, Jax(jnp.result_type(*arrays)), inputs).values())
        return out if several else out[0]

    return run
