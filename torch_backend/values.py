"""Hyperparameters of rules as the plain values that parameter groups hold."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from deepopt.rule import Rule, check_hyperparameters, check_scalars, hints, scalar_names

_instances: dict[tuple[Any, ...], Rule] = {}


def instance(cls: type[Rule], values: Mapping[str, Any]) -> Rule:
    """A rule with these static values; its scalars are those of the first call."""
    scalars = {k: len(v) if isinstance(v, tuple) else None for k, v in values.items()}
    key = (cls, *({**values, **{k: scalars[k] for k in scalar_names(cls)}}.values()))
    if key in _instances:
        check_scalars(cls, values)
    else:
        _instances[key] = cls(**values)
    return _instances[key]


def host(value: Any, name: str) -> Any:
    """A hyperparameter as a plain Python value."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        return value.item()
    if isinstance(value, tuple | list):
        return tuple(host(x, name) for x in value)
    if isinstance(value, bool | float | int | str) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def values_of(rule: Rule) -> dict[str, Any]:
    """The hyperparameters of a rule as plain values."""
    return {k: host(getattr(rule, k), k) for k in hints(type(rule))}


def made(cls: type[Rule], given: Mapping[str, Any], base: Rule | None = None) -> Rule:
    """The rule with the given hyperparameters; TypeError for a name that it does not have."""
    check_hyperparameters(cls, given)
    values = {k: host(v, k) for k, v in given.items()}
    return cls(**(values_of(base) if base else {}) | values)
