"""One rule over a tree of leaves: its state, its clocks and its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from math import lcm, prod
from operator import is_
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from deepopt.algebra import Program, fold
from deepopt.expr import Shape
from deepopt.oracle import canonical
from deepopt.rule import Rule, trace
from jax_backend.algebra import Jax

# In the words of optax, which does not export them.
NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are "
    "not passing `params` when calling `update`."
)

# What would be right for a context, by its name.
RIGHT = {
    "gram": ": the mean over rows of xᵀx of the layer's inputs x; where these meet the first axis, as "
    'in flax kernels (in, out), the rule is told by inputs="first"'
}

# The weight (None where it is unknown), gradient, memories and context of a leaf.
Leaf: TypeAlias = tuple[Any, Any, dict[str, Any], dict[str, Any]]
_is_none = partial(is_, None)


class RuleState(NamedTuple):
    """Steps taken, and each memory as a tree of the parameters' structure."""

    count: Any
    slots: dict[str, Any]


@dataclass(frozen=True)
class Stepper:
    """A rule as the `init` and `update` of an optax transformation.

    scalars: hyperparameters known only at run time: schedules, arrays, or tuples with such.
    output: "direction", or "update" with lr and weight decay applied.
    mask: which leaves the weight decay of "update" applies to, as in `optax.adamw`.
    """

    rule: Rule
    scalars: Mapping[str, Any]
    output: Literal["direction", "update"]
    mask: Any = None

    def init(self, params: Any) -> RuleState:
        """Raises ValueError naming a leaf that the rule cannot take."""
        starts = jax.tree.map_with_path(self._start, params)
        slots = {
            name: jax.tree.map(lambda _, start, name=name: start[name], params, starts)
            for name in self.rule.all_slots((1, 1))
        }
        return RuleState(jnp.zeros([], jnp.int32), slots)

    def update(
        self,
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        context: Mapping[str, Any] | None = None,
        gradients: Any = None,
        **_: Any,
    ) -> tuple[Any, RuleState]:
        """One step; a leaf of params whose gradient is None stays as it is.

        context: by name, trees with the params' structure of what the rule needs beyond gradients.
        gradients: what the gradient norm is of, where these updates are only a part.
        """
        paths, tree = jax.tree.flatten_with_path(updates, is_leaf=_is_none)
        weights = [None] * len(paths) if params is None else tree.flatten_up_to(params)
        for w, (_, g) in zip(weights, paths, strict=True):
            if w is not None and g is not None and jnp.shape(w) != jnp.shape(g):
                raise ValueError(f"a leaf of shape {jnp.shape(w)} has an update of {jnp.shape(g)}")
        memories: list[dict[str, Any]] = [{} for _ in paths]
        for name, slot in state.slots.items():
            for memory, value in zip(memories, tree.flatten_up_to(slot), strict=True):
                memory[name] = value
        contexts = self._contexts(updates, context or {}, paths)
        together = zip(weights, paths, memories, contexts, strict=True)
        leaves: list[Leaf] = [(w, g, m, c) for w, (_, g), m, c in together]
        phases, variants = self._phases(leaves), ticking_together(self._periods())
        count = optax.safe_increment(state.count)
        scalars = self._scalars(state.count) | {"step": count}
        if self._reads_norm(variants, [leaves[i] for members in phases.values() for i in members]):
            scalars["gradient_norm"] = _norm(updates if gradients is None else gradients)
        decays = self._decays(updates, params)
        given = [scalars if decay else scalars | {"weight_decay": 0.0} for decay in decays]
        stepped = [(g, m) for _, g, m, _ in leaves]
        for phase, members in phases.items():
            branches = [partial(self._branch, v, [given[i] for i in members]) for v in variants]
            chosen = self._chosen(variants, count, phase)
            results = jax.lax.switch(chosen, branches, [leaves[i] for i in members])
            for i, result in zip(members, results, strict=True):
                stepped[i] = result
        slots = {k: tree.unflatten([m[k] for _, m in stepped]) for k in state.slots}
        return tree.unflatten([u for u, _ in stepped]), RuleState(count, slots)

    def _start(self, path: Any, p: Any) -> dict[str, jax.Array]:
        """The initial memories of a leaf, which may be an abstract value or sharded."""
        what = f"the leaf at params{jax.tree_util.keystr(path)}"
        self.rule.check(jnp.shape(p), what)
        if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
            raise ValueError(
                f"{what} is of dtype {jnp.result_type(p)}; only real floating-point leaves can be "
                "stepped (mask integers out, view complex numbers as real)"
            )
        batch, shape = _seen(self.rule, jnp.shape(p))
        dtype = _arithmetic(p)
        starts: dict[str, jax.Array] = {}
        for name, slot in self.rule.all_slots(shape).items():
            if slot.kind == "full" and slot.shape == shape:
                starts[name] = jnp.full_like(p, slot.value, dtype=dtype)
            else:
                start = Jax(dtype).array(slot.kind, slot.shape, slot.value)
                starts[name] = jnp.broadcast_to(start, (*batch, *slot.shape))
        return starts

    def _contexts(
        self, updates: Any, context: Mapping[str, Any], paths: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """What the rule needs of each leaf beyond its gradient; ValueError where it is not so."""
        contexts: list[dict[str, Any]] = [{} for _ in paths]
        # A leaf that optax has masked here is not masked in a context.
        every, tree = jax.tree.flatten(updates, is_leaf=lambda x: x is None or is_masked(x))
        for name in self.rule.context((1, 1)):
            whole = context.get(name)
            values = [None] * len(every) if whole is None else tree.flatten_up_to(whole)
            own = [x for u, x in zip(every, values, strict=True) if not is_masked(u)]
            for (path, g), x, found in zip(paths, own, contexts, strict=True):
                if g is None or not jnp.size(g):
                    continue
                batch, shape = _seen(self.rule, jnp.shape(g))
                needed = (*batch, *self.rule.context(shape)[name])
                if getattr(x, "shape", None) != needed:
                    got = f"got shape {x.shape}" if hasattr(x, "shape") else "there is none"
                    raise ValueError(
                        f"{type(self.rule).__name__} needs the {name} of the leaf at params"
                        f"{jax.tree_util.keystr(path)}, of shape {needed}, and {got}; give update("
                        f"..., context={{{name!r}: a tree like params}}){RIGHT.get(name, '')}"
                    )
                found[name] = x
        return contexts

    def _scalars(self, count: Any) -> dict[str, Any]:
        """The hyperparameters at this count: Python numbers, and arrays of run-time values."""

        def at(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(at, value))
            value = value(count) if callable(value) else value
            return value if isinstance(value, float | int) else jnp.reshape(value, ())

        return self.rule.scalars(**{name: at(value) for name, value in self.scalars.items()})

    def _decays(self, updates: Any, params: Any) -> list[bool]:
        """Whether weight decay applies, leaf by leaf."""
        mask = True if self.mask is None else self.mask
        if callable(mask):
            mask = mask(updates if params is None else params)
        mask = jax.tree.broadcast(mask, updates, is_leaf=_is_none)
        return jax.tree.leaves(mask, is_leaf=_is_none)

    def _phases(self, leaves: Sequence[Leaf]) -> dict[int, list[int]]:
        """The positions of the leaves whose clocks tick together, by their shift in updates."""
        cycle = lcm(*self.rule.clocks().values()) if self.rule.stagger else 1
        phases: dict[int, list[int]] = {}
        for i, (_, g, *_) in enumerate(leaves):
            if g is not None and jnp.size(g):
                phases.setdefault(i % cycle, []).append(i)
        return phases

    def _periods(self) -> dict[str, int]:
        """The clocks, "every" included, with their periods in steps."""
        every = self.rule.every
        return {"every": every} | {k: every * n for k, n in self.rule.clocks().items()}

    def _chosen(self, variants: Sequence[frozenset[str]], count: Any, phase: int) -> Any:
        """The position of the set of clocks that ticks at this count."""
        shift = phase * self.rule.every
        due = {k: (count % n + shift) % n == 0 for k, n in self._periods().items()}
        matches = [jnp.stack([due[k] == (k in v) for k in due]).all() for v in variants]
        return jnp.argmax(jnp.stack(matches))

    def _reads_norm(self, variants: Sequence[frozenset[str]], leaves: Sequence[Leaf]) -> bool:
        """Whether a program of these leaves reads the norm of all gradients."""
        shapes = {_seen(self.rule, jnp.shape(g))[1] for _, g, *_ in leaves}
        programs = [trace(self.rule, shape, v) for shape in shapes for v in variants]
        return any("gradient_norm" in program.inputs for program in programs)

    def _branch(
        self, ticking: frozenset[str], scalars: Sequence[Mapping[str, Any]], leaves: list[Leaf]
    ) -> list[tuple[Any, dict[str, Any]]]:
        """The update and the memories of each leaf after a step on which these clocks tick."""
        return [self._leaf(ticking, s, leaf) for s, leaf in zip(scalars, leaves, strict=True)]

    def _leaf(
        self, ticking: frozenset[str], scalars: Mapping[str, Any], leaf: Leaf
    ) -> tuple[Any, dict[str, Any]]:
        w, g, memories, context = leaf
        batch, shape = _seen(self.rule, jnp.shape(g))
        program, reads_weights = self._program(shape, ticking, scalars["weight_decay"])
        if w is None and reads_weights:
            raise ValueError(NO_PARAMS)
        dtype = _arithmetic(g, g if w is None else w)
        slots, needed = self.rule.all_slots(shape), self.rule.context(shape)

        def seen(x: Any, shape: Shape) -> jax.Array:
            return jnp.asarray(x, dtype).reshape(*batch, *shape)

        inputs = {
            k: jnp.asarray(x, dtype) if isinstance(x, jax.Array) else x for k, x in scalars.items()
        }
        inputs |= {k: seen(m, slots[k].shape) for k, m in memories.items()}
        inputs |= {k: seen(x, needed[k]) for k, x in context.items()}
        inputs |= {"g": seen(g, shape), "w": seen(jnp.zeros_like(g) if w is None else w, shape)}
        out = fold(program, Jax(dtype), inputs)

        def like(name: str, given: str, x: Any) -> jax.Array:
            """An output, which may lack the batch axes, in the shape and dtype of x."""
            full = jnp.broadcast_to(out.get(name, 0.0), inputs[given].shape)
            return full.reshape(jnp.shape(x)).astype(jnp.result_type(x))

        kept = {k: like(k, k, m) if k in out else m for k, m in memories.items()}
        return like(self.output, "g", g), kept

    def _program(self, shape: Shape, ticking: frozenset[str], decay: Any) -> tuple[Program, bool]:
        """The program of the output that is asked for, and whether it needs the weights."""
        whole = trace(self.rule, shape, ticking)
        moves = "update" in whole.outputs and "direction" not in whole.outputs
        if self.output == "direction" and moves:
            raise ValueError(
                f"scale_by_rule({self.rule!r}): this rule moves weights otherwise than along a "
                "direction that lr scales; use transform(rule), which applies lr and weight decay"
            )
        direction = Program({k: x for k, x in whole.outputs.items() if k != "update"})
        reads_weights = "w" in (whole if moves else direction).inputs
        if self.output == "direction":
            return direction, reads_weights
        return whole, reads_weights or isinstance(decay, jax.Array) or decay != 0


def ticking_together(periods: Mapping[str, int]) -> list[frozenset[str]]:
    """Every set of clocks that can tick together: all whose periods divide one common multiple."""
    different = set(periods.values())
    subsets = chain.from_iterable(combinations(different, n) for n in range(len(different) + 1))
    multiples = {lcm(*subset) for subset in subsets}
    sets = {frozenset(k for k, n in periods.items() if m % n == 0) for m in multiples}
    return sorted(sets, key=sorted)


def _seen(rule: Rule, shape: Shape) -> tuple[Shape, Shape]:
    """The batch axes of a leaf, and the shape that the rule's program is traced for."""
    if rule.domain == "any":
        return (), canonical(shape)
    if len(shape) > 3:
        shape = prod(shape[:-1]), shape[-1]
    return shape[:-2], shape[-2:]


def _arithmetic(*xs: Any) -> Any:
    """The dtype of a step's arithmetic and of the memories."""
    return jnp.promote_types(jnp.result_type(*xs), jnp.float32)


def _norm(gradients: Any) -> jax.Array:
    """The norm over all leaves, in the precision of the arithmetic."""
    squares = [jnp.square(jnp.asarray(g, _arithmetic(g))) for g in jax.tree.leaves(gradients)]
    return jnp.sqrt(sum(map(jnp.sum, squares), jnp.float32(0.0)))


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
