"""What a rule promises of its optax transformation, for `deepopt.testing`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

from deepopt.rule import Rule
from deepopt.testing import PLAIN, Draw, Limits, Prove, difference, path, shapes_of, streams
from jax_backend.transform import transform


@contextmanager
def double_precision(enabled: bool = True) -> Iterator[None]:
    """jax in 64 bits inside the block; jax older than 0.8 has no context manager for it."""
    before = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_x64", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _jax_is_the_oracle(rule: Rule, limits: Limits, draw: Draw) -> None:
    shape = draw(st.sampled_from([x for x in shapes_of(rule) if np.prod(x)]))
    w, gradients = draw(streams(3, 3, PLAIN)).arrays(shape)
    expected = path(rule, w, gradients)
    with double_precision():
        tx: Any = transform(rule)

        def one(carry: Any, g: Any) -> Any:
            updates, state = tx.update(g, carry[1], carry[0])
            now = optax.apply_updates(carry[0], updates)
            return (now, state), now

        def run(w: Any, g: Any) -> Any:
            return jax.lax.scan(one, (w, tx.init(w)), g)[1]

        found = jax.jit(run)(jnp.asarray(w), jnp.asarray(np.stack(gradients)))
        apart = difference(found, np.stack(expected))
    assert apart <= limits.tolerance, f"jax and the oracle are {apart:.1e} apart"


CHECKS: dict[str, Prove] = {"jax is the oracle": _jax_is_the_oracle}
