"""Rules of deepopt as optax gradient transformations: state, clocks and aliases."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from math import lcm, prod
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from deepopt.algebra import fold
from deepopt.expr import Shape
from deepopt.oracle import canonical
from deepopt.rule import Rule, scalar_names, trace
from deepopt.rules import AdamW
from jax_backend.algebra import Jax

ScalarOrSchedule: TypeAlias = float | jax.Array | Callable[[Any], Any]

# Longest cycle of clocks that is searched for the combinations that really tick together.
CYCLE = 1 << 14


class RuleState(NamedTuple):
    """Steps taken, and each memory as a tree of the parameters' structure."""

    count: jax.Array
    slots: dict[str, Any]


def scale_by_rule(rule: Rule, **scalars: Any) -> optax.GradientTransformationExtraArgs:
    """The direction of a rule, in the manner of `optax.scale_by_adam`: no lr and no weight decay.

    Chain it with `optax.scale_by_learning_rate`. `scalars` are schedules (functions of the step,
    from 0), arrays or tracers in the place of the rule's hyperparameters of those names. With
    decoupled=False and a weight decay the update needs params. Raises ValueError, when
    initialised, for leaves that the rule cannot take.
    """
    return _transformation(rule, "direction", scalars)


def transform(
    rule: Rule,
    *,
    fallback: Rule | None = None,
    mask: Any = None,
    **scalars: Any,
) -> optax.GradientTransformationExtraArgs:
    """A rule as a whole optimizer: lr and weight decay applied, other leaves by the fallback.

    rule: its own values hold where `scalars` has none; see `scale_by_rule` for what those may be.
    fallback: for leaves with fewer than two axes under a matrix rule; AdamW with the rule's lr,
        weight decay and `every` by default. Three axes are a stack of matrices; with more, all but
        the last are rows, as in a flax convolution. Embeddings and heads look like matrices: give
        them another rule by `optax.partition`.
    mask: which leaves weight decay applies to, as in `optax.adamw`.
    """
    if rule.domain == "any":
        return _transformation(rule, "update", scalars, mask)
    other = fallback or AdamW(lr=rule.lr, weight_decay=rule.weight_decay, every=rule.every)
    shared = {k: v for k, v in scalars.items() if fallback is None and k in ("lr", "weight_decay")}

    def labels(tree: Any) -> Any:
        return jax.tree.map(lambda x: "rule" if jnp.ndim(x) > 1 else "fallback", tree)

    return optax.partition(
        {
            "rule": _transformation(rule, "update", scalars, mask),
            "fallback": _transformation(other, "update", shared, mask),
        },
        labels,
    )


def _transformation(
    rule: Rule, output: str, scalars: Mapping[str, Any], mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    unknown = set(scalars) - set(scalar_names(type(rule)))
    if unknown:
        raise TypeError(
            f"{type(rule).__name__} has no scalar hyperparameter {sorted(unknown)}; "
            f"it has {list(scalar_names(type(rule)))}"
        )

    def init(params: optax.Params) -> RuleState:
        def start(name: str) -> Any:
            return jax.tree.map(lambda p: _start(rule, name, p), params)

        jax.tree.map(lambda p: rule.check(canonical(jnp.shape(p)), "a leaf"), params)
        return RuleState(jnp.zeros([], jnp.int32), {name: start(name) for name in _names(rule)})

    def update(
        updates: optax.Updates, state: RuleState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, RuleState]:
        del extra
        if params is None and (output == "update" or not rule.decoupled):
            raise ValueError(optax.NO_PARAMS_MSG if hasattr(optax, "NO_PARAMS_MSG") else _NO_PARAMS)
        values = _values(rule, scalars, state.count)
        count = optax.safe_increment(state.count)
        leaves, structure = jax.tree.flatten(updates)
        weights = structure.flatten_up_to(params) if params is not None else leaves
        memories = {k: structure.flatten_up_to(v) for k, v in state.slots.items()}
        decays = _decays(mask, params, structure, len(leaves))
        results = [
            _leaf(
                rule,
                output,
                w,
                g,
                {k: v[i] for k, v in memories.items()},
                values if decays[i] else {**values, "weight_decay": 0.0},
                count,
                i,
            )
            for i, (w, g) in enumerate(zip(weights, leaves, strict=True))
        ]
        new = structure.unflatten([d for d, _ in results])
        slots = {k: structure.unflatten([s[k] for _, s in results]) for k in state.slots}
        return new, RuleState(count, slots)

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


_NO_PARAMS = "this transformation needs the current value of params: call update(..., params=params)"


def _decays(mask: Any, params: Any, structure: Any, n: int) -> list[bool]:
    if mask is None:
        return [True] * n
    return structure.flatten_up_to(mask(params) if callable(mask) else mask)


def _values(rule: Rule, scalars: Mapping[str, Any], count: jax.Array) -> dict[str, Any]:
    """The scalar inputs at this step: schedules called, tuples flattened."""

    def at(value: Any) -> Any:
        return value(count) if callable(value) else value

    now = {
        k: tuple(map(at, v)) if isinstance(v, tuple | list) else at(v) for k, v in scalars.items()
    }
    return rule.scalars(**now)


def _seen(rule: Rule, shape: Shape) -> Shape:
    """The shape a leaf is stepped in: matrices (with a leading axis of a stack) for a matrix rule."""
    if rule.domain == "any" or len(shape) <= 3:
        return canonical(shape)
    return prod(shape[:-1]), shape[-1]


def _traced_shape(rule: Rule, shape: Shape) -> Shape:
    return shape[-2:] if rule.domain == "matrix" else shape


def _names(rule: Rule) -> list[str]:
    return list(rule.all_slots((1, 1) if rule.domain == "matrix" else (1,)))


def _arithmetic(x: Any) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _start(rule: Rule, name: str, p: Any) -> jax.Array:
    """The initial memory of a leaf, which may be an abstract value or sharded."""
    seen = _seen(rule, jnp.shape(p))
    slot = rule.all_slots(_traced_shape(rule, seen))[name]
    dtype = _arithmetic(p)
    if slot.kind == "full" and slot.shape == _traced_shape(rule, seen):
        return jnp.full_like(p, slot.value, dtype=dtype)
    batch = seen[:-2] if rule.domain == "matrix" else ()
    return jnp.broadcast_to(jnp.asarray(slot.start(), dtype), (*batch, *slot.shape))


@lru_cache(maxsize=None)
def _variants(rule: Rule) -> tuple[frozenset[str], ...]:
    """Every set of clocks that can tick together."""
    periods = [rule.every * period for period in rule.clocks().values()] or [rule.every]
    cycle = lcm(*periods)
    if cycle <= CYCLE:
        found = {rule.ticks(step) for step in range(1, cycle + 1)}
    else:
        due = {frozenset({"every"})}
        for name in rule.clocks():
            due |= {x | {name} for x in due}
        found = due | ({frozenset[str]()} if rule.every > 1 else set[frozenset[str]]())
    return tuple(sorted(found, key=sorted))


def _chosen(rule: Rule, count: jax.Array, index: int) -> jax.Array:
    """The position in `_variants` of the clocks that tick at this count (`Rule.ticks` on arrays)."""
    phase = index if rule.stagger else 0
    due = count % rule.every == 0
    ticking = {name: due & ((count // rule.every + phase) % period == 0) for name, period in rule.clocks().items()}
    ticking["every"] = due
    matches = [
        jnp.stack([ticking[c] == (c in variant) for c in ticking]).all() for variant in _variants(rule)
    ]
    return jnp.argmax(jnp.stack(matches))


def _leaf(
    rule: Rule,
    output: str,
    w: Any,
    g: Any,
    memories: dict[str, Any],
    values: Mapping[str, Any],
    count: jax.Array,
    index: int,
) -> tuple[jax.Array, dict[str, Any]]:
    """The update and the new memories of one leaf, in the leaf's dtype and the memories' own."""
    dtype = _arithmetic(g)
    seen = _seen(rule, g.shape)
    shape = _traced_shape(rule, seen)
    slots = rule.all_slots(shape)
    batch = seen[: len(seen) - len(shape)]
    cast_values = {k: v if isinstance(v, float | int) else jnp.asarray(v, dtype) for k, v in values.items()}
    inputs = {"w": w.astype(dtype).reshape(seen), "g": g.astype(dtype).reshape(seen)}
    inputs |= {k: m.astype(dtype).reshape(*batch, *slots[k].shape) for k, m in memories.items()}
    inputs["step"] = count.astype(dtype)

    def run(ticking: frozenset[str]) -> Callable[[dict[str, Any]], Any]:
        program = trace(rule, shape, ticking)

        def branch(given: dict[str, Any]) -> Any:
            out = fold(program, Jax(dtype), {**given, **cast_values})
            zero = jnp.zeros(seen, dtype)
            new = {k: jnp.asarray(out.get(k, given[k]), dtype) for k in memories}
            new = {k: jnp.broadcast_to(v, given[k].shape) for k, v in new.items()}
            return jnp.asarray(out.get(output, zero), dtype), new

        return branch

    variants = _variants(rule)
    if prod(seen) == 0:
        return g, memories
    if len(variants) == 1:
        new, after = run(variants[0])(inputs)
    else:
        branches = [run(v) for v in variants]
        new, after = jax.lax.switch(_chosen(rule, count, index), branches, inputs)
    kept = {k: after[k].reshape(m.shape).astype(m.dtype) for k, m in memories.items()}
    return new.reshape(g.shape).astype(g.dtype), kept


def alias(rule: type[Rule], name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The optax-style constructor of a rule: learning_rate first, every hyperparameter by name."""
    names = {f.name: f for f in fields(rule)}

    def make(
        learning_rate: ScalarOrSchedule = names["lr"].default,
        *,
        mask: Any = None,
        fallback: Rule | None = None,
        **hyperparameters: Any,
    ) -> optax.GradientTransformationExtraArgs:
        given = {"lr": learning_rate, **hyperparameters}
        unknown = set(given) - set(names)
        if unknown:
            raise TypeError(f"{name} has no hyperparameter {sorted(unknown)}; it has {sorted(names)}")
        dynamic = {k: v for k, v in given.items() if _is_dynamic(v)}
        static = {k: v for k, v in given.items() if k not in dynamic}
        extra: dict[str, Any] = {"fallback": fallback} if rule.domain == "matrix" else {}
        return transform(_lengths(rule, static, dynamic), mask=mask, **extra, **dynamic)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            "learning_rate",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=names["lr"].default,
            annotation=ScalarOrSchedule,
        ),
        *(inspect.Parameter(k, keyword, default=f.default) for k, f in names.items() if k != "lr"),
        inspect.Parameter("mask", keyword, default=None),
        inspect.Parameter("fallback", keyword, default=None),
    ]
    make.__name__ = make.__qualname__ = name
    make.__doc__ = rule.__doc__
    make.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return make


def _is_dynamic(value: Any) -> bool:
    """Whether a hyperparameter is a schedule, an array or a tracer, or a tuple with one."""
    if isinstance(value, tuple):
        return any(map(_is_dynamic, value))
    return callable(value) or isinstance(value, jax.Array)


def _lengths(rule: type[Rule], static: dict[str, Any], dynamic: dict[str, Any]) -> Rule:
    """The rule with placeholders for what comes at run time, tuples at their lengths."""
    default = rule()
    places = {
        k: tuple(0.0 if _is_dynamic(x) else x for x in v) if isinstance(v, tuple) else getattr(default, k)
        for k, v in dynamic.items()
    }
    return rule(**{**static, **places})
