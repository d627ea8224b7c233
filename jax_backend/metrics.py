"""What a step is about to do, in a few numbers: a step tried out, and nothing kept of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepopt.rule import turns
from deepopt.signs import signed_memories
from jax_backend.step import ASKED, Tried, arithmetic, seen, trace_state


def metrics(
    tx: optax.GradientTransformation, updates: Any, state: Any, params: Any = None, **extra: Any
) -> dict[str, jax.Array]:
    """Numbers to log, for each rule i inside tx under "{i}/{rule}/", in the order they step.

    All else is given as to `tx.update`, which is tried out; beside the step itself in one `jax.jit`
    it is not computed twice. A rule without gradients is left out.
    update_rms: root mean square of what the rule makes of its gradients, in the end what is added
        to the weights; of the direction for `scale_by_rule`.
    weight_rms: of its weights, where params are given. nonfinite: NaN and Inf entries of gradients.
    alignment/{memory}: cosine of a memory and the gradient, before the step, for memories of the
        weights' shape that are odd in the gradient; 0 where either is zero.
    phase/{clock}: steps since the clock last ticked, of the rule's first leaf.
    Raises ValueError where tx has no rule, or steps it inside a conditional or a loop
    (`optax.apply_if_finite`, `optax.MultiSteps`): give the transformation inside, and its state.
    """
    asked: list[Tried] = []
    update = optax.with_extra_args_support(tx).update
    update(updates, state, params, **extra, **{ASKED: asked})
    tried = [x for x in asked if any(g is not None for _, g, *_ in x.leaves)]
    if not asked or any(x.trace != trace_state() for x in asked):
        raise ValueError(
            "metrics sees no step of a rule here; where it is inside a conditional or a loop, as "
            "that of optax.apply_if_finite or optax.MultiSteps, give the transformation inside"
        )
    return {
        f"{i}/{type(x.rule).__name__}/{name}": jnp.asarray(value, jnp.float32)
        for i, x in enumerate(tried)
        for name, value in _numbers(x).items()
    }


def _numbers(tried: Tried) -> dict[str, Any]:
    leaves = [x for x in tried.leaves if x[1] is not None]
    known = [w for w, *_ in tried.leaves if w is not None]
    found: dict[str, Any] = {"update_rms": _rms([u for u in tried.updates if u is not None])}
    if known:
        found["weight_rms"] = _rms(known)
    found["nonfinite"] = sum(jnp.sum(~jnp.isfinite(g)) for _, g, *_ in leaves)
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    for _, g, memories, _ in leaves:
        for name in signed_memories(tried.rule, seen(tried.rule, jnp.shape(g))[1]):
            pairs.setdefault(name, []).append((g, memories[name].reshape(jnp.shape(g))))
    found |= {f"alignment/{name}": _cosine(both) for name, both in pairs.items()}
    return found | _phases(tried)


def _phases(tried: Tried) -> dict[str, Any]:
    """Steps since each clock ticked, of the first leaf."""
    rule = tried.rule
    shapes = [() if g is None else jnp.shape(g) for _, g, *_ in tried.leaves]
    turn = turns(shapes)[0] if rule.stagger else 0
    clocks = {"every": 1} if rule.every > 1 else {}
    steps, rest = tried.count // rule.every + turn, tried.count % rule.every
    clocks |= rule.clocks()
    return {f"phase/{k}": steps % n * rule.every + rest for k, n in clocks.items()}


def _squares(xs: Iterable[Any]) -> Any:
    return sum(jnp.sum(jnp.square(jnp.asarray(x, arithmetic(x)))) for x in xs)


def _rms(xs: list[Any]) -> Any:
    return jnp.sqrt(_squares(xs) / max(1, sum(jnp.size(x) for x in xs)))


def _cosine(pairs: list[tuple[Any, Any]]) -> Any:
    """Of the first and the second members, each as one vector; 0 where either is zero."""
    dot = sum(jnp.sum(jnp.asarray(g, arithmetic(g)) * m) for g, m in pairs)
    size = jnp.sqrt(_squares(g for g, _ in pairs)) * jnp.sqrt(_squares(m for _, m in pairs))
    return dot / jnp.where(size == 0, 1.0, size)
