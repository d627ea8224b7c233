"""How a rule sees a tensor: as itself, or as a batch of matrices; and what it keeps for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from deepopt.oracle import canonical
from deepopt.rule import Rule, Slot
from torch_backend.routing import matrices


@dataclass(frozen=True, eq=False)
class Seen:
    """How a rule sees a parameter: `count` matrices of a shape, or (count 0) its own shape.

    memories: the slot of each, and the shape that it is stored in: the parameter's own where it is
    as large, else (count, *shape), without count where that is 1.
    context: the shapes of what the rule needs beyond gradients.
    """

    count: int
    shape: tuple[int, ...]
    memories: dict[str, tuple[Slot, torch.Size]]
    context: dict[str, tuple[int, ...]]

    @property
    def largest(self) -> int:
        """The most numbers that a parameter, one of its memories or of its context has."""
        slots = [slot.shape for slot, _ in self.memories.values()]
        shapes = [self.shape, *slots, *self.context.values()]
        return (self.count or 1) * max(map(prod, shapes))

    def stack(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a parameter's memories of this shape each."""
        return (self.count, *shape) if self.count else shape

    def entry(self, name: str) -> tuple[int, ...]:
        """The shape of one matrix's part of the parameter, of a memory or of a context."""
        if name in self.context:
            return self.context[name]
        return self.memories[name][0].shape if name in self.memories else self.shape

    def dtypes(
        self, p: Tensor, state: Mapping[str, Any], wanted: torch.dtype | None
    ) -> dict[str, torch.dtype]:
        """Of a parameter's memories: as they are, or as those will be that are not there yet."""
        slots = {name: slot for name, (slot, _) in self.memories.items()}
        new = {name: stored_as(slot, p.dtype, wanted) for name, slot in slots.items()}
        return {k: state[k].dtype if k in state else x for k, x in new.items()}

    def gather(self, tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """What several parameters have of this shape each, along a first axis."""
        parts = [x.reshape(self.stack(shape)) for x in tensors]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def part(self, value: Tensor, shape: tuple[int, ...], j: int) -> Tensor:
        """The j-th parameter's part of a result; without a batch axis it is shared by all."""
        if not self.count or value.ndim <= len(shape) or len(value) <= self.count:
            return value
        return value[j * self.count : (j + 1) * self.count]


@lru_cache(maxsize=4096)
def seen_of(rule: Rule, shape: torch.Size, view: str) -> Seen:
    """How a rule sees a parameter of this shape through a view."""
    count, traced = 0, canonical(shape)
    if view:
        count, *matrix = matrices(tuple(shape), view)
        traced = tuple(matrix)
    memories: dict[str, tuple[Slot, torch.Size]] = {}
    for name, slot in rule.all_slots(traced).items():
        batch = (count,) if count > 1 else ()
        stored = shape if slot.shape == traced else torch.Size((*batch, *slot.shape))
        memories[name] = slot, stored
    return Seen(count, traced, memories, rule.context(traced))


def places_of(seen: Sequence[Seen]) -> list[int]:
    """The place of each parameter's first matrix among those of a group."""
    return list(accumulate((x.count or 1 for x in seen), initial=0))


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a step's arithmetic and state for parameters of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stored_as(slot: Slot, dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of a new memory of a parameter of this dtype, where `wanted` is the state's.

    A single number, such as a count, is as wide as the arithmetic.
    """
    return arithmetic(dtype) if wanted is None or prod(slot.shape) == 1 else wanted


def rounds_at_random(slot: Slot, dtype: torch.dtype) -> bool:
    """Whether a memory of this dtype is rounded at random, so that no small increment is lost."""
    return dtype == torch.bfloat16 and prod(slot.shape) > 1


def remember(
    p: Tensor, state: dict[str, Any], seen: Seen, wanted: torch.dtype | None = None
) -> None:
    """Make the memories that a parameter does not have yet, in the dtype that is wanted."""
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
    for name, (slot, stored) in seen.memories.items():
        if name in state:
            continue
        dtype = stored_as(slot, p.dtype, wanted)
        if stored == p.shape and slot.kind == "full":
            state[name] = torch.full_like(p, slot.value, dtype=dtype)
        else:
            start = torch.from_numpy(slot.start()).to(p.device, dtype)
            state[name] = start.expand(seen.stack(slot.shape)).reshape(stored).clone()
