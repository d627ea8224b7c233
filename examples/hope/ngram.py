"""A byte n-gram model with Witten-Bell interpolation, the reference line for the language model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MAX_ORDER = 6  # seven bytes are packed into one int64

Array = NDArray[Any]


@dataclass(frozen=True)
class _Level:
    """Counts for contexts of one length; n-grams and contexts are sorted base-256 numbers."""

    grams: Array
    counts: Array
    contexts: Array
    totals: Array  # occurrences of a context
    types: Array  # different bytes seen after a context


class WittenBell:
    """Interpolated n-gram probabilities with `order` bytes of context, counted on `train`.

    With c(h, w) counts, c(h) their sum and t(h) the number of different bytes seen after h,
    p(w | h) = (c(h, w) + t(h) p(w | h')) / (c(h) + t(h)), where h' drops the oldest byte of h and
    the recursion ends at the uniform 1/256.
    """

    def __init__(self, train: Tensor | Array, order: int = 2) -> None:
        if not 0 <= order <= MAX_ORDER:
            raise ValueError(f"order must be from 0 to {MAX_ORDER}, got {order}")
        text = np.asarray(train, dtype=np.uint8)
        if text.ndim != 1 or text.size == 0:
            raise ValueError(f"train must be a non-empty row of bytes, got shape {text.shape}")
        self.order = order
        self._levels = [_count(text, k) for k in range(min(order + 1, text.size))]

    def probabilities(self, windows: Tensor | Array) -> Array:
        """The probability of every byte given those before it in its row [..., n], same shape."""
        text = np.asarray(windows)
        result = np.full(text.shape, 1 / 256)
        for k, level in enumerate(self._levels[: text.shape[-1]]):
            grams = _grams(text, k)
            contexts = grams >> 8
            # An unseen context has t(h) = c(h) = 0 and leaves the shorter context's answer.
            types = _look_up(level.contexts, level.types, contexts)
            total = _look_up(level.contexts, level.totals, contexts) + types
            shorter = result[..., k:]
            mixed = _look_up(level.grams, level.counts, grams) + types * shorter
            result[..., k:] = np.where(total > 0, mixed / np.maximum(total, 1), shorter)
        return result

    def distribution(self, context: bytes) -> Array:
        """The probabilities of all 256 bytes after `context`."""
        rows = np.empty((256, len(context) + 1), dtype=np.uint8)
        rows[:, :-1] = np.frombuffer(context, dtype=np.uint8)
        rows[:, -1] = np.arange(256)
        return self.probabilities(rows)[:, -1]


def bits_per_byte(train: Tensor | Array, windows: Tensor | Array, order: int = 2) -> float:
    """Cost of the bytes 1, 2, ... of every window [..., length + 1], as the language model pays it.

    Only bytes of the same window serve as context, so the second byte of a window has one.
    """
    rows = np.asarray(windows)
    if rows.size == 0 or rows.shape[-1] < 2:
        raise ValueError(f"windows must hold two bytes or more a row, got shape {rows.shape}")
    return float(-np.log2(WittenBell(train, order).probabilities(rows)[..., 1:]).mean())


def _grams(text: Array, k: int) -> Array:
    """Every run of k + 1 bytes along the last axis as one number, the newest byte lowest."""
    size = text.shape[-1] - k
    grams = text[..., :size].astype(np.int64)
    for shift in range(1, k + 1):
        grams <<= 8
        grams |= text[..., shift : shift + size]
    return grams


def _count(text: Array, k: int) -> _Level:
    grams, counts = np.unique(_grams(text, k), return_counts=True)
    contexts, first = np.unique(grams >> 8, return_index=True)
    return _Level(
        grams=grams,
        counts=counts,
        contexts=contexts,
        totals=np.add.reduceat(counts, first),
        types=np.diff(first, append=grams.size),
    )


def _look_up(keys: Array, values: Array, wanted: Array) -> Array:
    index = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[index] == wanted, values[index], 0)
