"""State of optimizers by parameter name, in files of safetensors that every backend reads.

A file has a tensor "<parameter>/step" and one "<parameter>/<memory>" for each memory of the rule,
of shape (count, *slot) where the rule sees the parameter as matrices. Its metadata are JSON:
"format", the "rules" with their hyperparameters, and of each of the "parameters" which rule it has
and how that sees it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from importlib import import_module
from math import lcm, prod
from os import PathLike
from typing import Any, TypeAlias, cast

from deepopt.differences import refuse, several
from deepopt.expr import Shape
from deepopt.files import replacing
from deepopt.rule import Rule, scalar_names

FORMAT = 1
Path: TypeAlias = str | PathLike[str]
# What the names of a file are called here: those that it does not mention keep theirs.
Rename: TypeAlias = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True)
class Place:
    """A parameter as its rule keeps memories of it.

    seen: what the rule sees, `count` of them, or 0 where it takes the parameter as it is. turn:
    that of `turns`, which matters under stagger. more: what the binding may keep beside memories.
    """

    rule: Rule
    count: int
    seen: Shape
    turn: int = 0
    more: Mapping[str, Shape] = field(default_factory=dict[str, Shape])

    @property
    def memories(self) -> dict[str, Shape]:
        """The shape of each memory in a file."""
        front = (self.count,) if self.count else ()
        slots = self.rule.all_slots(self.seen)
        return {name: (*front, *slot.shape) for name, slot in slots.items()}

    @property
    def phase(self) -> int:
        """By how many updates its slow clocks are shifted."""
        return self.turn % lcm(*self.rule.clocks().values()) if self.rule.stagger else 0

    def transposed(self) -> Place:
        """The place of the transposed matrix; ValueError where its memories are no transposes."""
        turned = replace(self, seen=(*self.seen[:-2], *self.seen[:-3:-1]))
        slots = self.rule.all_slots(self.seen).values()
        alike = all(slot.shape == self.seen or prod(slot.shape) == 1 for slot in slots)
        if len(self.seen) < 2 or not alike or "transposition" not in self.rule.symmetries():
            raise ValueError(
                f"{type(self.rule).__name__} does not step a transposed matrix as it steps the "
                "matrix, or keeps memories of another shape: store both in one layout"
            )
        return turned


def write(
    path: Path,
    places: Mapping[str, Place],
    states: Mapping[str, Mapping[str, Any]],
    package: str,
) -> None:
    """Write the states of parameters, "step" and memories in the shapes of their places.

    A parameter without state has not been stepped. package: "torch" or "numpy", whose arrays these
    are. The file is whole or, after an error, as it was. Raises ImportError without safetensors.
    """
    rules = list(dict.fromkeys(place.rule for place in places.values()))
    about = {
        name: {"rule": rules.index(x.rule), "count": x.count, "seen": x.seen, "phase": x.phase}
        for name, x in places.items()
    }
    described = [
        {
            "name": type(x).__name__,
            "hyperparameters": {f.name: getattr(x, f.name) for f in fields(x)},
        }
        for x in rules
    ]
    metadata = {"format": FORMAT, "rules": described, "parameters": about}
    tensors = {f"{name}/{k}": x for name, state in states.items() for k, x in state.items()}
    data = _module(package).save(tensors, {k: json.dumps(x) for k, x in metadata.items()})
    with replacing(path) as file:
        file.write(data)


def read(
    path: Path,
    framework: str,
    places: Mapping[str, Place],
    rename: Rename | None = None,
    transpose: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """The states that a file has for these places, by name; empty where it was not stepped.

    rename: see `Rename`. transpose: patterns of names here whose matrices are the transposes of the
    file's. Raises one ValueError that lists where the file does not fit: names, rules, values that
    are no symbols, what the rules see, phases, memories.
    """
    if isinstance(transpose, str):
        raise TypeError(f"transpose={transpose!r} must be a sequence of patterns: [{transpose!r}]")
    metadata, tensors = _contents(path, framework)
    rules, wrong = metadata["rules"], list[str]()
    saved_places: dict[str, Any] = metadata["parameters"]
    about = {_renamed(name, rename): (name, x) for name, x in saved_places.items()}
    idle = [x for x in transpose if not any(fnmatch(name, x) for name in places)]
    if idle:
        wrong.append(f"transpose has {several(idle)}, which no parameter here is called")
    if not callable(rename) and (lost := [x for x in rename or () if x not in saved_places]):
        wrong.append(f"rename has {several(lost)}, which the file has not")
    if len(about) < len(saved_places):
        wrong.append(f"rename gives parameters of {str(path)!r} one name")
    for words, names in (
        ("the file has {} that this optimizer has not", [x for x in about if x not in places]),
        ("this optimizer has {} that the file has not", [x for x in places if x not in about]),
    ):
        if names:
            wrong.append(words.format(several(names)))
    states: dict[str, dict[str, Any]] = {}
    checked: set[tuple[int, Rule]] = set()
    for name, place in places.items():
        if name not in about:
            continue
        original, saved = about[name]
        turned = any(fnmatch(name, pattern) for pattern in transpose)
        if (saved["rule"], place.rule) not in checked:
            checked.add((saved["rule"], place.rule))
            wrong += [f"{name}: {x}" for x in _unlike(rules[saved["rule"]], place.rule)]
        if rules[saved["rule"]]["name"] != type(place.rule).__name__:
            continue
        prefix = f"{original}/"
        state = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
        try:
            _check(saved, state, place.transposed() if turned else place)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
        big = {k for k, x in state.items() if x.ndim > 1} if turned else set[str]()
        states[name] = {k: x.swapaxes(-1, -2) if k in big else x for k, x in state.items()}
    refuse(f"{str(path)!r} does not fit this optimizer", wrong)
    return states


def rules_of(path: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """What a file says of the rule of each parameter: its name and its hyperparameters."""
    metadata, _ = _contents(path, "numpy", tensors=False)
    kinds = [
        (rule["name"], {k: _plain(v) for k, v in rule["hyperparameters"].items()})
        for rule in metadata["rules"]
    ]
    return {name: kinds[x["rule"]] for name, x in metadata["parameters"].items()}


def _renamed(name: str, rename: Rename | None) -> str:
    return rename(name) if callable(rename) else (rename or {}).get(name, name)


def _plain(value: Any) -> Any:
    return tuple(map(_plain, cast(list[Any], value))) if isinstance(value, list) else value


def _unlike(saved: Mapping[str, Any], rule: Rule) -> list[str]:
    """Where a rule is another than the file's, or has other values that no schedule changes."""
    name = type(rule).__name__
    if saved["name"] != name:
        return [f"the file's rule is {saved['name']}, here it is {name}"]
    pairs = {
        f.name: (_plain(saved["hyperparameters"][f.name]), getattr(rule, f.name))
        for f in fields(rule)
        if f.name in saved["hyperparameters"] and f.name not in scalar_names(type(rule))
    }
    return [
        f"the file's {name} has {k}={theirs!r}, this one {k}={mine!r}"
        for k, (theirs, mine) in pairs.items()
        if theirs != mine
    ]


def _check(saved: Mapping[str, Any], state: Mapping[str, Any], place: Place) -> None:
    """Raise ValueError where a parameter's state in a file is not that of its place."""
    theirs, mine = (saved["count"], tuple(saved["seen"])), (place.count, place.seen)
    if theirs != mine:
        raise ValueError(
            f"the file's rule sees {_words(*theirs)}, here it sees {_words(*mine)}; `transpose` is "
            "for layers that are stored the other way round"
        )
    if saved["phase"] != place.phase:
        raise ValueError(
            f"its clocks are shifted by {saved['phase']} updates in the file and by {place.phase} "
            "here, since stagger goes by the order of parameters: give them in the same order"
        )
    if not state:
        return
    names, shapes = set(state) - {"step"}, place.memories
    if set(shapes) - names or names - set(shapes) - set(place.more) or "step" not in state:
        raise ValueError(
            f"the file has {sorted(state)}; {type(place.rule).__name__} keeps {sorted(shapes)}"
        )
    for name, shape in {"step": (), **shapes, **place.more}.items():
        if name in state and tuple(state[name].shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)} in the file; it should be {shape}"
            )


def _words(count: int, seen: Shape) -> str:
    shape = "×".join(map(str, seen))
    return f"{count} matrices of {shape}" if count > 1 else f"a parameter of {shape}"


def _module(name: str) -> Any:
    try:
        return import_module(f"safetensors.{name}")
    except ImportError as error:
        raise ImportError(
            "to export and import state takes the package safetensors: "
            "pip install 'nested-deepopt[safetensors]'"
        ) from error


def _contents(
    path: Path, framework: str, tensors: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata and the tensors of a file; ValueError where they are not those of `write`."""
    _module("numpy")
    safetensors: Any = import_module("safetensors")
    try:
        with safetensors.safe_open(path, framework=framework) as file:
            texts: dict[str, str] = file.metadata() or {}
            found = {k: file.get_tensor(k) for k in file.keys()} if tensors else {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} cannot be read as safetensors: {error}") from error
    if not {"format", "rules", "parameters"} <= set(texts):
        raise ValueError(f"{str(path)!r} holds no state of an optimizer; metadata: {texts!r:.200}")
    metadata: dict[str, Any] = {k: json.loads(texts[k]) for k in texts}
    if metadata["format"] > FORMAT:
        raise ValueError(
            f"{str(path)!r} has format {metadata['format']}, and this version of nested-deepopt "
            f"reads up to {FORMAT}"
        )
    return metadata, found
