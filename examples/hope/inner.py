"""Memories of Hope that are tensors, and what they do while they read.

What a step is stands in `examples.hope.memories`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.hope import memories as graphs
from examples.hope.memories import Learning
from torch_backend.algebra import lift

_read, _gradients, _write = map(lift, (graphs.read, graphs.gradients, graphs.write))


class Memories(NamedTuple):
    """Memories in the middle of a chunk; each tensor is [..., rows, columns] of a parameter.

    Gradients and the memories' own values are taken at `start`, the end of the chunk before.
    """

    fixed: tuple[Tensor, ...]  # what stays as it was trained; empty but for "residual"
    start: tuple[Tensor, ...]
    now: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...]  # empty without momentum

    def carried(self) -> "Memories":
        """Without what a model has anyway."""
        return self._replace(fixed=())

    def next_chunk(self) -> "Memories":
        """The same memories where a chunk ends and another starts."""
        return self._replace(start=self.now)


class Gates(NamedTuple):
    """How much of a memory a row keeps, how fast it is learnt, how much of the velocity it keeps.

    Columns [..., T, 1], or numbers for all rows.
    """

    retention: Tensor | float
    rate: Tensor
    momentum: Tensor | float = 1.0

    def of(self, index: Any) -> "Gates":
        """The same index of every column."""
        retention, momentum = (
            x[index] if isinstance(x, Tensor) else x for x in (self.retention, self.momentum)
        )
        return Gates(retention, self.rate[index], momentum)

    def shared(self, by: int) -> "Gates":
        """The same with the rate divided by a number."""
        return self if by == 1 else self._replace(rate=self.rate / by)


class InnerRule(Learning):
    """How memories that are tensors learn: `Learning`, and its steps."""

    @classmethod
    def of(cls, stated: Learning) -> "InnerRule":
        """The steps of what has been stated."""
        return cls(**vars(stated))

    def begin(self, parameters: tuple[Tensor, ...]) -> Memories:
        """Memories that have read nothing yet."""
        zeros = tuple(p.new_zeros(()).expand_as(p) for p in parameters)
        fixed, start = (parameters, zeros) if self.fixed else ((), parameters)
        return Memories(fixed, start, start, zeros if self.momentum else ())

    def read(self, memories: Memories, keys: Tensor) -> Tensor:
        """What memories answer to rows of keys [..., T, d] at the chunk's start."""
        return _read(keys, *memories.fixed, *memories.start, **vars(self))

    def write(
        self,
        memories: Memories,
        keys: Tensor,
        values: Tensor,
        gates: Gates,
        queries: Tensor | None = None,
        *,
        after: bool = False,
    ) -> tuple[Memories, Tensor]:
        """One step per row [..., T, d], and the answer to each query just before its row's step.

        The rows lie within one chunk. after: answer just after the step. Without queries the
        answer is empty.
        """
        fresh = memories.now is memories.start
        new = _write(
            *(keys, values, *gates, *memories.fixed),
            *(memories.start if fresh else (*memories.start, *memories.now)),
            *memories.velocity,
            *(() if queries is None else (queries,)),
            fresh=fresh,
            after=after,
            **vars(self),
        )
        count = len(memories.start)
        velocity = new[count : count + len(memories.velocity)]
        moved = memories._replace(now=new[:count], velocity=velocity)
        return moved, keys[..., :0, :] if queries is None else new[-1]

    def gradients(self, memories: Memories, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the objective at the chunk's start, summed over rows."""
        return _gradients(keys, values, *memories.fixed, *memories.start, **vars(self))


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length one; short ones, up to 1e-6, stay short."""
    # A product with the inverse: its gradient is a third of the work of that of F.normalize.
    return x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-6).reciprocal()
