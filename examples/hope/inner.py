"""What a memory of Hope does while it reads: steps of an optimizer on its own objective.

Nested Learning (arXiv 2512.24695), §8. No update is written down here: the structure and the
objective are stated, and `deepopt.memory` derives the write (Eq. 88, 90, 92, 93).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from deepopt.expr import Expr
from deepopt.grad import grad
from deepopt.memory import MLP, Linear, Memory, Objective, dot, l2, walk
from torch_backend.algebra import lift

STRUCTURES: dict[str, type[MLP] | type[Linear]] = {"mlp": MLP, "linear": Linear}
OBJECTIVES = {"l2": l2, "dot": dot}


class Memories(NamedTuple):
    """Memories in the middle of a chunk; each tensor is [..., rows, columns] of a parameter.

    Gradients and the memories' own values are taken at `start`, the end of the chunk before.
    """

    start: tuple[Tensor, ...]
    now: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...]  # empty without momentum

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


@dataclass(frozen=True)
class InnerRule:
    """How the memories of a layer are built and how they learn.

    structure: "mlp", m(x) = x + W₁σ(W₂x) with σ = tanh (Eq. 89), or "linear", Wx.
    objective: "l2", ½‖m(k) - v‖² (Eq. 93), or "dot", -⟨m(k), v⟩ (Eq. 92 with its sign mended).
    delta: delta gradient descent, which erases along k before it writes (Eq. 88); without it the
        write is gradient descent.
    exact: each token has the rate of the exact delta step, η / (1 + η‖k‖²); without it η itself.
    momentum: gradients go through a velocity first (Titans; in the paper's ablation only).
    """

    structure: Literal["mlp", "linear"] = "mlp"
    objective: Literal["l2", "dot"] = "l2"
    delta: bool = True
    exact: bool = True
    momentum: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("structure", self.structure, tuple(STRUCTURES)),
            ("objective", self.objective, tuple(OBJECTIVES)),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r}: choose one of {choices}")

    def begin(self, parameters: tuple[Tensor, ...]) -> Memories:
        """Memories that have read nothing yet."""
        still = tuple(p.new_zeros(()).expand_as(p) for p in parameters) if self.momentum else ()
        return Memories(parameters, parameters, still)

    def read(self, parameters: tuple[Tensor, ...], keys: Tensor) -> Tensor:
        """What memories answer to rows of keys [..., T, d]."""
        return _read(keys, *parameters, **vars(self))

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
            *(keys, values, *gates),
            *(memories.start if fresh else (*memories.start, *memories.now)),
            *memories.velocity,
            *(() if queries is None else (queries,)),
            fresh=fresh,
            after=after,
            **vars(self),
        )
        count = len(memories.start)
        moved = Memories(memories.start, new[:count], new[count : count + len(memories.velocity)])
        return moved, keys[..., :0, :] if queries is None else new[-1]

    def gradients(
        self, parameters: tuple[Tensor, ...], keys: Tensor, values: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradients of the objective, summed over rows."""
        return _gradients(keys, values, *parameters, **vars(self))

    def _objective(self, parameters: tuple[Expr, ...], keys: Expr, values: Expr) -> Objective:
        return OBJECTIVES[self.objective](self._memory(parameters), values, keys)

    def _memory(self, parameters: tuple[Expr, ...]) -> Memory:
        return STRUCTURES[self.structure](*parameters)

    @property
    def count(self) -> int:
        """How many parameters a memory has."""
        return 2 if self.structure == "mlp" else 1


# The rule on graphs, for one memory and the rows of one chunk, and lifted to tensors with any
# batch axes in front. Its fields travel as words, for torch's compiler takes no objects as
# keywords.


@lift
def _read(keys: Expr, *parameters: Expr, **rule: Any) -> Expr:
    return InnerRule(**rule)._memory(parameters).read(keys)[0]


@lift
def _gradients(keys: Expr, values: Expr, *parameters: Expr, **rule: Any) -> tuple[Expr, ...]:
    objective = InnerRule(**rule)._objective(parameters, keys, values)
    return tuple(grad(objective.loss, list(parameters)))


@lift
def _write(
    keys: Expr,
    values: Expr,
    retention: Expr,
    rate: Expr,
    momentum: Expr,
    /,
    *rest: Expr,
    fresh: bool,
    after: bool,
    **stated: Any,
) -> tuple[Expr, ...]:
    rule = InnerRule(**stated)
    n = rule.count
    start, rest = rest[:n], rest[n:]
    begin, rest = (None, rest) if fresh else (rest[:n], rest[n:])
    velocity, queries = (rest[:n], rest[n:]) if rule.momentum else (None, rest)
    steps = walk(
        rule._objective(start, keys, values),
        retention=retention,
        rate=rate,
        delta=rule.delta,
        normalize=rule.exact,
        begin=begin,
        momentum=momentum if rule.momentum else None,
        velocity=velocity,
    )
    return (
        *steps.memory.parameters,
        *steps.velocity,
        *(steps.read(q, after=after) for q in queries),
    )


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length one; short ones, up to 1e-6, stay short."""
    # A product with the inverse: its gradient is a third of the work of that of F.normalize.
    return x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-6).reciprocal()
