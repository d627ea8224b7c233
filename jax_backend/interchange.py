"""State of an optax run as a file that torch_backend reads too, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from deepopt import interchange
from deepopt.differences import refuse
from deepopt.interchange import Path, Place, Rename
from deepopt.rule import Rule, turns
from jax_backend.step import RuleState, is_absent, matrices_of
from jax_backend.transform import fallback_of

# The rule of `transform`, or that of the leaf of each name.
Rules: TypeAlias = Rule | Callable[[str], Rule]


def export_state(
    state: Any, params: Any, path: Path, rule: Rules, *, fallback: Rule | None = None
) -> None:
    """Write the state of a `transform`, alone or inside others, to a safetensors file, by name.

    Names are the paths of leaves, joined by dots. rule, fallback: those given to `transform`; or,
    for several transforms, a function that says the rule of a leaf's name. Other states (of
    schedules in a chain, say) are not written. `deepopt.interchange` says what is in the file.
    Raises ValueError where no part of the state, or more than one, is that of a leaf's rule.
    """
    parts = _Parts(state, params, rule, fallback)
    states = {
        name: {"step": np.asarray(parts.states[owners[0]].count, np.int64)}
        | {k: np.array(x, order="C").reshape(place.memories[k]) for k, x in memories.items()}
        for name, (owners, place, memories) in parts.leaves.items()
    }
    interchange.write(path, parts.places, states, "numpy")


def import_state(
    state: Any,
    params: Any,
    path: Path,
    rule: Rules,
    *,
    fallback: Rule | None = None,
    rename: Rename | None = None,
    transpose: Sequence[str] = (),
) -> Any:
    """The state, such as `tx.init(params)`, with what `export_state` of a backend wrote.

    rule, fallback: as in `export_state`. rename: what the file's names are here, as a mapping or a
    function. transpose: patterns of names here whose matrices are stored the other way round in the
    file, as those of torch's linear layers are for flax's kernels.
    Raises one ValueError that lists all that does not fit; among it parameters of one rule with
    different numbers of steps, which optax counts once.
    """
    parts = _Parts(state, params, rule, fallback)
    found = interchange.read(path, "numpy", parts.places, rename, transpose)
    wrong = list[str]()
    counts: list[dict[int, str]] = [{} for _ in parts.states]
    for name, (owners, _, memories) in parts.leaves.items():
        for i in owners:
            counts[i].setdefault(int(found[name].get("step", 0)), name)
        for k, like in memories.items() if found[name] else ():
            memories[k] = value = _like(found[name][k], like)
            if value.dtype != found[name][k].dtype:
                wrong.append(f"{name}: {k} is {found[name][k].dtype}; set jax_enable_x64")
    for steps in counts:
        if len(steps) > 1:
            text = ", ".join(f"{n} of {name}" for n, name in steps.items())
            wrong.append(f"optax counts the steps of a rule once, and the file has {text}")
    refuse(f"{str(path)!r} does not fit this state", wrong)
    return parts.rebuilt([next(iter(steps), None) for steps in counts])


def _like(x: Any, like: Any) -> jax.Array:
    """A saved memory in the shape of a leaf, and where that is."""
    return jax.device_put(jnp.asarray(x).reshape(like.shape), getattr(like, "sharding", None))


class _Parts:
    """The parts of a state that are of rules.

    leaves: by name the indices of the parts (several only where there are no memories), the place,
    and the memories, which may be replaced.
    """

    def __init__(self, state: Any, params: Any, rule: Rules, fallback: Rule | None) -> None:
        is_part = lambda x: isinstance(x, RuleState)  # noqa: E731
        self._all, self._outer = jax.tree.flatten(state, is_leaf=is_part)
        self.states = [x for x in self._all if is_part(x)]
        paths, self._tree = jax.tree_util.tree_flatten_with_path(params)
        self._values = [
            {k: self._tree.flatten_up_to(x) for k, x in part.slots.items()} for part in self.states
        ]
        named = [(jax.tree_util.keystr(p, simple=True, separator="."), x) for p, x in paths]
        rules = [_rule_of(name, x, rule, fallback) for name, x in named]
        owners = [self._owners(j, name, rules[j]) for j, (name, _) in enumerate(named)]
        self.leaves: dict[str, tuple[list[int], Place, dict[str, Any]]] = {}
        for i in range(len(self.states)):
            mine = [j for j, several in enumerate(owners) if several[0] == i]
            turn = turns([jnp.shape(named[j][1]) for j in mine])
            for n, j in zip(turn, mine, strict=True):
                count, seen = matrices_of(rules[j], jnp.shape(named[j][1]))
                memories = {k: x[j] for k, x in self._values[i].items()}
                self.leaves[named[j][0]] = owners[j], Place(rules[j], count, seen, n), memories
        self._order = [name for name, _ in named]

    @property
    def places(self) -> Mapping[str, Place]:
        return {name: place for name, (_, place, _) in self.leaves.items()}

    def _owners(self, leaf: int, name: str, rule: Rule) -> list[int]:
        """The part that steps a leaf; where its rule has no memories, all parts without them."""
        names = set(rule.all_slots((1, 1)))
        able = [
            i
            for i, values in enumerate(self._values)
            if set(values) == names and not any(is_absent(x[leaf]) for x in values.values())
        ]
        if not able or (names and len(able) > 1):
            raise ValueError(
                f"{len(able)} parts of the state keep {sorted(names)} of {name}, as "
                f"{type(rule).__name__} does; there must be one: are rule and fallback those of "
                "the transform, and is the state of these params?"
            )
        if len({int(self.states[i].count) for i in able}) > 1:
            raise ValueError(f"rules without memories differ in steps, and {name} may be of any")
        return able

    def rebuilt(self, counts: Sequence[int | None]) -> Any:
        """The state with the memories of `leaves` and these counts; None keeps one."""
        for name, (owners, _, memories) in self.leaves.items():
            for k, x in memories.items():
                self._values[owners[0]][k][self._order.index(name)] = x
        new = iter(
            RuleState(
                part.count if count is None else jnp.asarray(count, part.count.dtype),
                {k: self._tree.unflatten(x) for k, x in values.items()},
            )
            for part, values, count in zip(self.states, self._values, counts, strict=True)
        )
        return self._outer.unflatten(
            [next(new) if isinstance(x, RuleState) else x for x in self._all]
        )


def _rule_of(name: str, leaf: Any, rule: Rules, fallback: Rule | None) -> Rule:
    """The rule of a leaf, as `transform` chooses it."""
    if not isinstance(rule, Rule):
        return rule(name)
    matrix = rule.domain == "any" or jnp.ndim(leaf) > 1
    return rule if matrix else fallback_of(rule, fallback)
