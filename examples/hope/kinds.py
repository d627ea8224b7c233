"""Whether what a user gives is of the kind that is asked for."""

from dataclasses import MISSING, fields, is_dataclass
from typing import Any, cast

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
