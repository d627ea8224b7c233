"""The memories of Hope and what they learn, stated as graphs that every backend lifts.

Nested Learning (arXiv 2512.24695), §8. No update is written down here: the structure and the
objective are stated, and `deepopt.memory` derives the write (Eq. 88, 90, 92, 93). The functions
are of one memory and the rows of one chunk; lifted to arrays, any batch axes stand in front. The
fields of `Learning` travel as words, for torch's compiler takes no objects as keywords.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deepopt.expr import Expr, matmul
from deepopt.grad import grad
from deepopt.memory import MLP, Layer, Linear, Memory, Objective, Product, dot, l2, walk
from examples.settings import check_fields


@dataclass(frozen=True)
class Residual(Memory):
    """A matrix memory beside a map that stays: keys (n × in) read keys @ fixed + keys @ weight."""

    fixed: Expr
    weight: Expr

    @property
    def parameters(self) -> tuple[Expr, ...]:
        return (self.weight,)

    def rebuilt(self, parameters: Sequence[Expr]) -> "Residual":
        return Residual(self.fixed, *parameters)

    def read(self, keys: Expr | None, product: Product = matmul) -> tuple[Expr, tuple[Layer, ...]]:
        assert keys is not None
        learnt = product(keys, self.weight)
        return keys @ self.fixed + learnt, (Layer(self.weight, keys, learnt),)


STRUCTURES = {"mlp": MLP, "linear": Linear, "residual": Residual}
OBJECTIVES = {"l2": l2, "dot": dot}


@dataclass(frozen=True)
class Learning:
    """How the memories of a layer are built and how they learn.

    structure: "mlp", m(x) = x + W₁σ(W₂x) with σ = tanh (Eq. 89), "linear", Wx, or "residual",
        Ax + Wx (ours): the start A stays as it was trained, and only what was learnt since, W,
        is erased and forgotten. A text that is longer than those of training wears a linear
        memory's start away.
    objective: "l2", ½‖m(k) - v‖² (Eq. 93), or "dot", -⟨m(k), v⟩ (Eq. 92 with its sign mended).
    delta: delta gradient descent, which erases along k before it writes (Eq. 88); without it the
        write is gradient descent, in Hope at η over the length of the chunk.
    exact: each token has the rate of the exact delta step, η / (1 + η‖k‖²); without it η itself.
    momentum: gradients go through a velocity first (Titans). The paper's ablation counts it
        among the parts of Hope, its equations do not.
    """

    structure: Literal["mlp", "linear", "residual"] = "mlp"
    objective: Literal["l2", "dot"] = "l2"
    delta: bool = True
    exact: bool = True
    momentum: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value, choices in (
            ("structure", self.structure, tuple(STRUCTURES)),
            ("objective", self.objective, tuple(OBJECTIVES)),
        ):
            if value not in choices:
                raise ValueError(f"{name} {value!r}: choose one of {choices}")

    @property
    def count(self) -> int:
        """How many parameters a memory writes."""
        return 2 if self.structure == "mlp" else 1

    @property
    def fixed(self) -> int:
        """How many it has that stay as they are."""
        return 1 if self.structure == "residual" else 0

    def memory_of(self, parameters: tuple[Expr, ...]) -> Memory:
        """The structure with these parameters, each [rows, columns], those that stay first."""
        return STRUCTURES[self.structure](*parameters)

    def objective_of(self, parameters: tuple[Expr, ...], keys: Expr, values: Expr) -> Objective:
        """What the memory should answer to rows of keys [T, d]."""
        return OBJECTIVES[self.objective](self.memory_of(parameters), values, keys)


# What the runs here use. Keys have length one, so that with η ≤ 1 no write expands what is held,
# (αI - ηkkᵀ); cheaper than an MLP, and better at the sizes of this example (README).
RESIDUAL = Learning("residual", "dot", exact=False)


def read(keys: Expr, *parameters: Expr, **rule: Any) -> Expr:
    """What a memory answers to rows of keys [T, d]."""
    return Learning(**rule).memory_of(parameters).read(keys)[0]


def gradients(keys: Expr, values: Expr, *parameters: Expr, **rule: Any) -> tuple[Expr, ...]:
    """The gradients of the objective, summed over rows."""
    objective = Learning(**rule).objective_of(parameters, keys, values)
    return tuple(grad(objective.loss, list(objective.memory.parameters)))


def write(
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
    """One step per row: the new parameters, the new velocities and the answers to queries.

    rest: the parameters that stay, those at the start of the chunk; unless `fresh`, those before
        the first row; with momentum the velocities; then any number of queries [T, d], answered
        just before their row's step, or just after it.
    """
    rule = Learning(**stated)
    n, whole = rule.count, rule.fixed + rule.count
    start, rest = rest[:whole], rest[whole:]
    begin, rest = (None, rest) if fresh else (rest[:n], rest[n:])
    velocity, queries = (rest[:n], rest[n:]) if rule.momentum else (None, rest)
    steps = walk(
        rule.objective_of(start, keys, values),
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
