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
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = {p: optimizer.state[p] for p in params if p in optimizer.state}
    offsets = {p: s["average_offset"] for p, s in states.items() if "average_offset" in s}
    if not offsets:
        raise ValueError(
            "no parameter has an average; take a step by a rule that keeps one, such as "
            "deepopt.around.averaged(AdamW())"
        )
    kept = {p: p.detach().clone() for p in offsets}
    try:
        with torch.no_grad():
            for p, offset in offsets.items():
                p.add_(offset)
        yield
    finally:
        with torch.no_grad():
            for p, old in kept.items():
                p.copy_(old)
