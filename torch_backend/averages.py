"""The averages of parameters that rules keep beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block parameters are their averages, where a rule keeps one; then as before.

    >>> with averaged(optimizer):
    ...     evaluate(model)

    Shapes: any. Memory: a copy of those parameters. Raises ValueError where none has an average.
    """
    offsets = {p: s["average_offset"] for p, s in optimizer.state.items() if "average_offset" in s}
    if not offsets:
        raise ValueError(
            "no parameter has an average; take a step by a rule that keeps one, such as "
            "deepopt.around.averaged(AdamW())"
        )
    with torch.no_grad():
        kept = {p: p.clone() for p in offsets}
        try:
            for p, offset in offsets.items():
                p.add_(offset)
            with torch.enable_grad():
                yield
        finally:
            for p, old in kept.items():
                p.copy_(old)
