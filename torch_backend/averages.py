"""The averages of parameters that rules keep beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch

# The optimizers whose parameters are averages now.
_inside: WeakSet[torch.optim.Optimizer] = WeakSet()


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block parameters are their averages, where a rule keeps one; then as before.

    >>> with averaged(optimizer):
    ...     evaluate(model)

    Shapes: any. Memory: a copy of those parameters. Raises ValueError where none has an average,
    and RuntimeError for a block, a step or a checkpoint inside of a block.
    """
    if optimizer in _inside:
        raise RuntimeError("the parameters are their averages already; leave the block first")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = {p: optimizer.state[p] for p in params if p in optimizer.state}
    offsets = {p: s["average_offset"] for p, s in states.items() if "average_offset" in s}
    if not offsets:
        raise ValueError(
            "no parameter has an average; take a step by a rule that keeps one, such as "
            "deepopt.around.averaged(AdamW())"
        )
    kept = {p: p.detach().clone() for p in offsets}
    refusals = [
        optimizer.register_step_pre_hook(_refuse),
        optimizer.register_state_dict_pre_hook(_refuse),
    ]
    _inside.add(optimizer)
    try:
        with torch.no_grad():
            for p, offset in offsets.items():
                p.add_(offset)
        yield
    finally:
        _inside.discard(optimizer)
        for refusal in refusals:
            refusal.remove()
        with torch.no_grad():
            for p, old in kept.items():
                p.copy_(old)


def _refuse(*_: Any) -> None:
    raise RuntimeError(
        "inside `averaged` a step would be lost and a checkpoint averaged twice: "
        "leave the block first"
    )
