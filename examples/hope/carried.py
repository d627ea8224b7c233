"""What a model carries along a stream, cut from its graph, and as plain data for a file.

A state is a list of tensors, numbers and tuples, named or not, as `LanguageModel.stream` returns.
Where a tuple occurs twice it stays one object: the memories tell by that whether a chunk has begun.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def detached(state: Any) -> Any:
    """The same state, through which no gradient flows back."""
    return _rebuilt(state, lambda x: x.detach() if isinstance(x, Tensor) else x, named=True)


def plain(state: Any) -> Any:
    """The state without named tuples, which `torch.load(weights_only=True)` reads."""
    return _rebuilt(state, lambda x: x, named=False)


def named(values: Any, like: Any) -> Any:
    """What `plain` made `values` of; `like` is any state of the same model.

    Raises ValueError where the two are not built alike.
    """
    return _named(values, like, {})


def _rebuilt(state: Any, leaf: Callable[[Any], Any], named: bool) -> Any:
    known: dict[int, Any] = {}

    def rebuild(x: Any) -> Any:
        if not isinstance(x, list | tuple):
            return leaf(x)
        if id(x) not in known:
            parts = [rebuild(part) for part in x]
            known[id(x)] = _like(x, parts) if named else _like((), parts)
        return known[id(x)]

    return rebuild(state)


def _named(values: Any, like: Any, known: dict[int, Any]) -> Any:
    if not isinstance(like, list | tuple):
        if type(values) is not type(like):
            raise ValueError(f"the carried state has {values!r} where this model has {like!r}")
        return values
    if not isinstance(values, tuple) or len(values) != len(like):
        raise ValueError(f"the carried state is not that of this model: no {type(like).__name__}")
    if id(values) not in known:
        parts = [_named(value, part, known) for value, part in zip(values, like, strict=True)]
        known[id(values)] = _like(like, parts)
    return known[id(values)]


def _like(sequence: Any, parts: list[Any]) -> Any:
    """The parts as a sequence of the same type."""
    make = getattr(type(sequence), "_make", type(sequence))
    return make(parts)
