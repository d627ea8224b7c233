"""Settings that users write: their text, and whether they are of the kind that is asked for."""

import difflib
import json
import math
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

MOST = 40  # names in a hint

# The kind of a default, what may be given in its place, and how to say so.
KINDS: tuple[tuple[type, Any, str], ...] = (
    (bool, bool, "true or false"),
    (int, int, "a whole number"),
    (float, int | float, "a number"),
    (str, str, "a word"),
    (tuple, tuple, "a list, such as [1, 2]"),
)


def check(name: str, value: Any, default: Any) -> None:
    """Raise ValueError where a value is of another kind than the default of the same name."""
    if is_dataclass(default):
        if not isinstance(value, type(default)):
            raise ValueError(f"{name}={value!r}: its settings have names such as {name}.structure")
        return
    for kind, wanted, said in KINDS:
        if isinstance(default, kind):
            truth = type(value) is bool and kind is not bool  # Python's own bool is an int
            if truth or not isinstance(value, wanted):
                raise ValueError(f"{name}={value!r}: {said} is asked for")
            break
    if isinstance(default, tuple) and default:
        for x in cast(tuple[Any, ...], value):
            check(name, x, default[0])


def check_fields(thing: Any) -> None:
    """The same for every field of a dataclass that has defaults."""
    for field in fields(thing):
        made = field.default_factory
        default = field.default if made is MISSING else made()
        check(field.name, getattr(thing, field.name), default)


def row(text: str) -> tuple[str, dict[str, Any]]:
    """A row of a study, `NAME` or `NAME:SETTING=VALUE,…`, as name and settings."""
    name, _, rest = text.partition(":")
    parts = re.split(r",(?![^\[]*\])", rest) if rest else []
    return name.strip(), assignments(parts)


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Settings of the form NAME=VALUE; a value is JSON, or else text."""
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: NAME=VALUE is asked for, such as chunk=16")
        try:
            settings[key.strip()] = json.loads(value)
        except ValueError:
            settings[key.strip()] = value.strip()
    return settings


def learning_rate(shown: str, text: str) -> float:
    """A rate as a user writes it; ValueError, which begins with what is shown, where it is none."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"{shown}: a learning rate is positive, such as 3e-3")
    return rate


def processor() -> str:
    """The name of the processor, which figures in seconds depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint at what `name` may have meant."""
    spelt = {x.lower(): x for x in names}
    if not spelt:
        return "there are none"
    near = difflib.get_close_matches(name.lower(), spelt, 3, 0.5)
    if near:
        return "did you mean " + " or ".join(repr(spelt[x]) for x in near) + "?"
    return "there are " + ", ".join([*spelt.values()][:MOST]) + (", …" if len(spelt) > MOST else "")
