"""One rule over a tree of leaves: its state, its clocks and its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import lcm, prod
from operator import is_
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import optax

from deepopt.algebra import Program
from deepopt.expr import Shape, as_expr, symbol
from deepopt.oracle import canonical
from deepopt.rule import Rule, ticking_together, trace, turns
from jax_backend.algebra import Jax
from jax_backend.sharding import explicit, on_mesh, placed
from jax_backend.together import Part, run

# In the words of optax, which does not export them.
NO_PARAMS = (
    "You are using a transformation that requires the current value of parameters, but you are "
    "not passing `params` when calling `update`."
)

GRAM = (
    ". A gram is the mean over rows of xᵀx for the inputs x of a layer; give the rule "
    'inputs="first" for flax kernels (in, out)'
)

# The weight (None where it is unknown), gradient, and memories and context of a leaf, and the spec
# of the gradient on an explicit mesh (None off such).
Leaf: TypeAlias = tuple[Any, Any, dict[str, Any], Any]
_is_none = partial(is_, None)
# The extra argument of an update, a list, that each rule adds what it tried to.
ASKED = "deepopt_tried"


class RuleState(NamedTuple):
    """Steps taken, and each memory as a tree of the parameters' structure."""

    count: Any
    slots: dict[str, Any]


class Given(NamedTuple):
    """What a step is given: trees like the parameters, and numbers by name that are arrays."""

    updates: Any
    state: RuleState
    params: Any
    context: Mapping[str, Any]
    gradients: Any
    scalars: Mapping[str, jax.Array]


class Tried(NamedTuple):
    """A step for `metrics`: what the rule made of these leaves after `count` steps, and where."""

    rule: Rule
    leaves: list[Leaf]
    updates: list[Any]
    count: Any
    trace: Any


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
        count = jnp.zeros([], jnp.int32)
        meshed = (p for p in jax.tree.leaves(params) if explicit(p))
        return RuleState(placed(count, next(meshed, count)), slots)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        """One step; a leaf without gradient stays. gradients: all, where updates are a part."""
        scalars, context = self._scalars(state.count), extra.get("context") or {}
        arrays = {k: x for k, x in scalars.items() if isinstance(x, jax.Array)}
        gradients = extra.get("gradients", updates)
        given = Given(updates, state, params, context, gradients, arrays)
        new, after = on_mesh(partial(self._step, scalars), given)
        if ASKED in extra:
            leaves, tree = self._leaves(given, jax.tree.map(lambda _: None, updates))
            found = tree.flatten_up_to(new)
            extra[ASKED].append(Tried(self.rule, leaves, found, state.count, trace_state()))
        return new, after

    def _step(self, scalars: dict[str, Any], specs: Any, given: Given) -> tuple[Any, RuleState]:
        """scalars: as arrays they are taken from what is given. specs: of the updates."""
        leaves, tree = self._leaves(given, specs)
        updates, state = given.updates, given.state
        count = optax.safe_increment(state.count)
        scalars = scalars | {**given.scalars, "step": count}
        gradients = [g for _, g, *_ in leaves]
        work = [(own, *self._variant(count, i)) for i, own in self._phases(leaves).items()]
        shapes = {seen(self.rule, jnp.shape(gradients[i]))[1] for own, *_ in work for i in own}
        programs = [trace(self.rule, x, v) for x in shapes for _, vs, _ in work for v in vs]
        if any("gradient_norm" in program.inputs for program in programs):
            whole = jax.tree.leaves(given.gradients)
            scalars["gradient_norm"] = optax.tree.norm([x.astype(arithmetic(x)) for x in whole])
        decays = self._decays(updates, given.params)
        own = [scalars if decay else scalars | {"weight_decay": 0.0} for decay in decays]
        memories = [memories for *_, memories, _ in leaves]
        for members, variants, chosen in work:
            parts = [self._part(variants, own[i], leaves[i]) for i in members]
            for i, outputs in zip(members, run(parts, chosen), strict=True):
                gradients[i], memories[i] = outputs.pop(self.output), outputs
        slots = {k: tree.unflatten([m[k] for m in memories]) for k in state.slots}
        return tree.unflatten(gradients), RuleState(count, slots)

    def _leaves(self, given: Given, specs: Any) -> tuple[list[Leaf], Any]:
        """The leaves of a step, and their structure."""
        updates, params = given.updates, given.params
        gradients, tree = jax.tree.flatten(updates, is_leaf=_is_none)
        weights = [None] * len(gradients) if params is None else tree.flatten_up_to(params)
        for w, g in zip(weights, gradients, strict=True):
            if w is not None and g is not None and jnp.shape(w) != jnp.shape(g):
                raise ValueError(f"a leaf of shape {jnp.shape(w)} has an update of {jnp.shape(g)}")
        memories: list[dict[str, Any]] = [{} for _ in gradients]
        known = dict(given.state.slots)
        nothing = jax.tree.map(lambda _: None, updates, is_leaf=is_absent)
        for name in self.rule.context((1, 1)):
            values, checked = given.context.get(name, nothing), partial(self._context, name)
            known[name] = jax.tree.map_with_path(checked, updates, values, is_leaf=is_absent)
        for name, values in known.items():
            for memory, value in zip(memories, tree.flatten_up_to(values), strict=True):
                memory[name] = value
        own = tree.flatten_up_to(specs)
        return list(zip(weights, gradients, memories, own, strict=True)), tree

    def _start(self, path: Any, p: Any) -> dict[str, jax.Array]:
        """The initial memories of a leaf, which may be an abstract value or sharded."""
        what = f"the leaf at params{jax.tree_util.keystr(path)}"
        self.rule.check(jnp.shape(p), what)
        if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
            raise ValueError(
                f"{what} is of dtype {jnp.result_type(p)}; only real floating-point leaves can be "
                "stepped (mask integers out, view complex numbers as real)"
            )
        batch, shape = seen(self.rule, jnp.shape(p))
        dtype = arithmetic(p)
        starts: dict[str, jax.Array] = {}
        for name, slot in self.rule.all_slots(shape).items():
            if slot.kind == "full" and slot.shape == shape:
                starts[name] = jnp.full_like(p, slot.value, dtype=dtype)
            else:
                start = Jax(dtype).array(slot.kind, slot.shape, slot.value)
                starts[name] = placed(jnp.broadcast_to(start, (*batch, *slot.shape)), p)
        return starts

    def _context(self, name: str, path: Any, g: Any, x: Any) -> Any:
        """x, what the rule needs of a leaf beyond its gradient; ValueError where it is not that."""
        if is_absent(g) or not jnp.size(g):
            return g
        batch, shape = seen(self.rule, jnp.shape(g))
        needed = (*batch, *self.rule.context(shape)[name])
        if is_absent(x) or jnp.shape(x) != needed:
            got = "there is none" if is_absent(x) else f"got shape {jnp.shape(x)}"
            raise ValueError(
                f"{type(self.rule).__name__} needs the {name} of the leaf at params"
                f"{jax.tree_util.keystr(path)}, of shape {needed}: {got}; update(..., context={{"
                f"{name!r}: a tree like params}})" + GRAM * (name == "gram")
            )
        return x

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
        arrays = (g if w is None else w for w, g, *_ in leaves)
        turn = turns([() if is_absent(x) else jnp.shape(x) for x in arrays])
        for i, (_, g, *_) in enumerate(leaves):
            if g is not None and jnp.size(g):
                phases.setdefault(turn[i] % cycle, []).append(i)
        return phases

    def _variant(self, count: Any, phase: int) -> tuple[list[frozenset[str]], Any]:
        """Every set of clocks that can tick together, and the position of the one that does."""
        every = self.rule.every
        periods = {"every": every} | {k: every * n for k, n in self.rule.clocks().items()}
        variants = ticking_together(periods)
        due = {k: (count % n + phase * every) % n == 0 for k, n in periods.items()}
        matches = [jnp.stack([due[k] == (k in v) for k in due]).all() for v in variants]
        return variants, jnp.argmax(jnp.stack(matches))

    def _part(
        self, variants: Sequence[frozenset[str]], scalars: Mapping[str, Any], leaf: Leaf
    ) -> Part:
        """What is to be computed for a leaf, for each set of clocks that can tick."""
        w, g, memories, spec = leaf
        batch, shape = seen(self.rule, jnp.shape(g))
        programs = [self._program(shape, v, scalars["weight_decay"], w is None) for v in variants]
        dtype = arithmetic(g, g if w is None else w)
        slots = {name: slot.shape for name, slot in self.rule.all_slots(shape).items()}
        shapes = {"g": shape, "w": shape} | slots | self.rule.context(shape)
        arrays = {"g": g, "w": jnp.zeros_like(g) if w is None else w} | memories
        cast = partial(jnp.asarray, dtype=dtype)
        inputs = {k: cast(x) if isinstance(x, jax.Array) else x for k, x in scalars.items()}
        inputs |= {k: cast(x).reshape(*batch, *shapes[k]) for k, x in arrays.items()}
        known = {x: inputs[str(x["name"])] for p in programs for x in p.nodes if x.op == "input"}
        replaced = {self.output: g} | {k: memories[k] for k in slots}
        # The rows of more than three axes are several of these in one.
        spec = spec if jnp.shape(g) == (*batch, *shape) else None
        return Part(Jax(dtype), programs, known, replaced, jnp.shape(g), spec)

    def _program(self, shape: Shape, ticking: frozenset[str], decay: Any, alone: bool) -> Program:
        """The output that is asked for and every memory; ValueError where it needs the weights."""
        whole = trace(self.rule, shape, ticking)
        rest = Program({k: x for k, x in whole.outputs.items() if k != "update"})
        reads_weights = "w" in (rest if "direction" in whole.outputs else whole).inputs
        decays = self.output == "update" and (isinstance(decay, jax.Array) or decay != 0)
        if alone and (reads_weights or decays):
            raise ValueError(NO_PARAMS)
        kept = {k: symbol(k, slot.shape) for k, slot in self.rule.all_slots(shape).items()}
        kept |= {self.output: as_expr(0.0)}
        return Program(kept | {k: x for k, x in whole.outputs.items() if k in kept})


def seen(rule: Rule, shape: Shape) -> tuple[Shape, Shape]:
    """The batch axes of a leaf, and the shape that the rule's program is traced for."""
    if rule.domain == "any":
        return (), canonical(shape)
    if len(shape) > 3:
        shape = prod(shape[:-1]), shape[-1]
    return shape[:-2], shape[-2:]


def matrices_of(rule: Rule, shape: Shape) -> tuple[int, Shape]:
    """How many of which shape a rule sees in a leaf; 0 where it takes the leaf as it is."""
    batch, matrix = seen(rule, shape)
    return prod(batch) if rule.domain == "matrix" else 0, matrix


def arithmetic(*xs: Any) -> Any:
    """The dtype of a step's arithmetic and of the memories."""
    return jnp.promote_types(jnp.result_type(*xs), jnp.float32)


def is_absent(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def trace_state() -> Any:
    """What differs between a function and the conditionals, loops and jits inside it."""
    name = "get_opaque_trace_state"
    # jax older than 0.10 has it in its core.
    home = jax.extend.core if hasattr(jax.extend.core, name) else jax.core
    return getattr(home, name)(convention="flax")
