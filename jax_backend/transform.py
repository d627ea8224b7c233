"""What users call: rules of deepopt as optax gradient transformations, and aliases of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepopt.algebra import Program
from deepopt.rule import Rule, check_hyperparameters, checked_rule, scalar_names, trace
from deepopt.rules import DESCENT, SGD, AdamW
from jax_backend.step import RuleState, Stepper, is_absent

# What the default fallback takes from the rule.
SHARED = ("lr", "weight_decay", "every")


def scale_by_rule(rule: Rule, **hyperparameters: Any) -> optax.GradientTransformationExtraArgs:
    """The direction of a rule, in the manner of `optax.scale_by_adam`: no lr and no weight decay.

    Chain it with `optax.add_decayed_weights` and `optax.scale_by_learning_rate`.
    hyperparameters: in place of the rule's own. Those that are symbols in the rule may be schedules
        (functions of the step, from 0), arrays or tracers, and tuples of such.
    With decoupled=False the decay is part of the direction. Context is given as in `transform`.
    Raises ValueError for a rule without a direction, and at init for leaves that it cannot take.
    """
    known, later = _resolved(rule, hyperparameters)
    whole = trace(known, (2, 2), frozenset({"every", *known.clocks()})).outputs
    rest = Program({k: x for k, x in whole.items() if k != "update"})
    if "direction" not in whole or "lr" in rest.inputs:
        raise ValueError(
            f"scale_by_rule({known!r}): it has no direction that a later lr could scale, or keeps "
            "what its own lr does; use transform"
        )
    return _optax(Stepper(known, later, "direction"))


def transform(
    rule: Rule, *, fallback: Rule | None = None, mask: Any = None, **hyperparameters: Any
) -> optax.GradientTransformationExtraArgs:
    """A rule as a whole optimizer: lr and weight decay applied, other leaves by the fallback.

    fallback: for leaves with fewer than two axes under a matrix rule; by default AdamW, or SGD
        for a rule of descent, with its lr, weight decay and `every`. Matrices are taken as
        they are stored, three axes as a stack of them; with more, all but the last are rows, as in
        a flax convolution. Embeddings and heads look like matrices: give them another rule by
        `optax.partition`.
    mask: which leaves weight decay applies to, as in `optax.adamw`.
    hyperparameters: as in `scale_by_rule`.
    Params are needed unless the weight decay is the number 0 and the rule does not read them.
    Context is an extra argument of each update, by name a tree like params with anything (None) at
    leaves of the fallback: `tx.update(grads, state, params, context={"gram": tree})`; ValueError
    where it is missing or of another shape. A norm of all gradients is of all updates given here.
    """
    known, later = _resolved(rule, hyperparameters)
    own = _optax(Stepper(known, later, "update", mask))
    if rule.domain == "any":
        if fallback is not None:
            raise TypeError(f"{type(rule).__name__} takes every leaf, so {fallback=} has no use")
        return own
    other = fallback_of(known, fallback)
    others = {k: v for k, v in later.items() if k in SHARED and fallback is None}
    parts = optax.partition(
        {"rule": own, "fallback": _optax(Stepper(other, others, "update", mask))},
        lambda tree: jax.tree.map(lambda x: "rule" if jnp.ndim(x) > 1 else "fallback", tree),
    )

    def update(updates: Any, *args: Any, **extra: Any) -> Any:
        return parts.update(updates, *args, **{"gradients": updates, **extra})

    return optax.GradientTransformationExtraArgs(parts.init, update)


def fallback_of(rule: Rule, fallback: Rule | None) -> Rule:
    """The rule of leaves that a matrix rule cannot take."""
    default = SGD() if isinstance(rule, DESCENT) else AdamW()
    shared = {k: getattr(rule, k) for k in SHARED} if fallback is None else {}
    return checked_rule(fallback or default, "fallback").with_values(shared)


def averaged(params: Any, state: Any) -> Any:
    """The averaged weights of rules inside `deepopt.around.averaged` or `schedule_free`.

    Other leaves stay as they are; ValueError for a state without averages.
    """
    states = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, RuleState))
    slots = [x.slots for x in states if isinstance(x, RuleState) and "average_offset" in x.slots]
    if not slots:
        raise ValueError("the state has no memory average_offset; see deepopt.around.averaged")
    add = lambda x, p: p if is_absent(x) else (p + x).astype(p.dtype)  # noqa: E731
    for own in slots:
        params = jax.tree.map(add, own["average_offset"], params, is_leaf=is_absent)
    return params


def alias(rule: type[Rule], name: str) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The optax-style constructor of a rule: learning_rate first, all else by keyword.

    Under `optax.inject_hyperparams`, integers and functions for `mask` belong in `static_args`.
    """
    default = rule()

    def make(learning_rate: Any = default.lr, **options: Any) -> Any:
        if "lr" in options:
            raise TypeError(f"{name}(lr=...): it is called learning_rate here")
        return transform(default, lr=learning_rate, **options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{rule.__doc__}\n    learning_rate is the lr; otherwise as `transform`."
    make.__signature__ = _signature(default)  # pyright: ignore[reportFunctionMemberAccess]
    return make


def _signature(rule: Rule) -> inspect.Signature:
    """What an alias takes: learning_rate, the hyperparameters and the options of `transform`."""
    new, rate, options = inspect.Parameter, optax.ScalarOrSchedule, inspect.signature(transform)
    first = new("learning_rate", new.POSITIONAL_OR_KEYWORD, default=rule.lr, annotation=rate)
    rest: list[inspect.Parameter] = []
    for f in fields(rule):
        value = getattr(rule, f.name)
        if type(value) is int and f.name not in scalar_names(type(rule)):
            # A NumPy integer, unlike a Python one, is not traced by optax.inject_hyperparams.
            value = np.int64(value)
        if f.name != "lr":
            rest.append(new(f.name, new.KEYWORD_ONLY, default=value, annotation=f.type))
    names = ("mask", "fallback") if rule.domain == "matrix" else ("mask",)
    return inspect.Signature([first, *rest, *(options.parameters[k] for k in names)])


def _optax(stepper: Stepper) -> optax.GradientTransformationExtraArgs:
    return optax.GradientTransformationExtraArgs(stepper.init, stepper.update)


def _resolved(rule: Rule, given: Mapping[str, Any]) -> tuple[Rule, dict[str, Any]]:
    """The rule with what is known now (its own values elsewhere), and what is known at run time."""
    check_hyperparameters(type(checked_rule(rule)), given)
    known: dict[str, Any] = {}
    later: dict[str, Any] = {}
    for name, value in given.items():
        value = value.item() if isinstance(value, np.generic | np.ndarray) else value
        value = tuple(value) if isinstance(value, list) else value
        own = getattr(rule, name)
        own = own[0] if isinstance(own, tuple) else own
        several = value if isinstance(value, tuple) else (value,)
        now = tuple(own if callable(x) or isinstance(x, jax.Array) else x for x in several)
        known[name] = now if isinstance(value, tuple) else now[0]
        if any(x is not y for x, y in zip(now, several, strict=True)):
            later[name] = value
            if name not in scalar_names(type(rule)):
                raise TypeError(
                    f"{type(rule).__name__}({name}={value!r}) must be known when the rule is "
                    f"traced; with optax.inject_hyperparams, name {name!r} in static_args"
                )
    return replace(rule, **known), later
