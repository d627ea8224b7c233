"""Hyperparameters with one value for each level of a nest."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from deepopt.rule import Rule

T = TypeVar("T")


def each(x: T | tuple[T, ...], n: int) -> tuple[T, ...]:
    """x for each of n levels."""
    values = cast(tuple[T, ...], x) if isinstance(x, tuple) else (x,)
    return values * n if len(values) == 1 else values


def level_count(rule: Rule, *names: str) -> int:
    """How many levels the hyperparameters of these names describe.

    Raises ValueError where tuples have different lengths.
    """
    several: dict[str, Any] = {name: getattr(rule, name) for name in names}
    tuples = [cast(tuple[Any, ...], x) for x in several.values() if isinstance(x, tuple)]
    lengths = {len(x) for x in tuples}
    if len(lengths - {1}) > 1:
        given = ", ".join(f"{k}={v!r}" for k, v in several.items())
        raise ValueError(
            f"{type(rule).__name__}({given}): tuples must all have one value per level"
        )
    return max(lengths, default=1)
