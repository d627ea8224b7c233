"""Kronecker memories: Gram matrices of the rows and of the columns of a gradient, in blocks.

As a memory of squares, H = Σ g gᵀ of a flattened gradient is too large; L ⊗ R with L = Σ g gᵀ and
R = Σ gᵀ g stands for it. A long side is cut into equal blocks, each with a Gram matrix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from deepopt.expr import Expr, Number, Shape, as_expr, reshape, sum_
from deepopt.functions import eigenbasis, eigenvalues, inverse_root, negative_eigenvalues
from deepopt.memory import average
from deepopt.rule import Memories, Slot, Time

Sides: TypeAlias = Literal["both", "left", "right"]
Factors: TypeAlias = Mapping[str, Expr]


@dataclass(frozen=True)
class Kronecker:
    """The factors of one matrix: "left" acts on its rows, "right" on its columns.

    A factor of a side of k blocks of b has shape (k, b, b).
    """

    shape: Shape
    sides: Sides
    block: int

    @property
    def factors(self) -> dict[str, Shape]:
        """The shape of each factor. ValueError where a long side has no equal blocks."""
        rows, columns = self.shape
        sides = {"left": rows, "right": columns}
        return {k: blocks(n, self.block) for k, n in sides.items() if self.sides in (k, "both")}

    def slots(
        self, suffix: str = "", kind: str = "full", clock: str | None = None
    ) -> dict[str, Slot]:
        """A memory of each factor: zero, or the identity for kind "eye"."""
        value = float(kind == "eye")
        return {k + suffix: Slot(x, kind, value, clock) for k, x in self.factors.items()}

    def grams(self, g: Expr) -> dict[str, Expr]:
        """The Gram matrices of the blocks of rows and of columns."""
        cut = {k: self._cut(g, k) for k in self.factors}
        return {k: x @ x.mT for k, x in cut.items()}

    def apply(self, x: Expr, factors: Factors) -> Expr:
        """left x rightᵀ, blockwise; a side without a factor is left alone."""
        for side, factor in factors.items():
            rows = factor @ self._cut(x, side)
            x = reshape(rows, self.shape) if side == "left" else reshape(rows, self.shape[::-1]).mT
        return x

    def averages(self, s: Memories, g: Expr, retention: Number) -> dict[str, Expr]:
        """The averages of the Gram matrices in the memories "left" and "right", after g."""
        return {k: average(s[k], x, retention) for k, x in self.grams(g).items()}

    def refreshed(
        self, factors: Factors, floor: Number, s: Memories, t: Time
    ) -> tuple[dict[str, Expr], dict[str, Expr]]:
        """The roots to use now, new ones where the clock "root" ticks, and all that is kept."""
        new, negatives = self.roots(factors, floor)
        roots = {k: t.when("root", x, s[f"{k}_root"]) for k, x in new.items()}
        counted = t.when("root", s["negatives"] + negatives, s["negatives"])
        return roots, {f"{k}_root": x for k, x in roots.items()} | {"negatives": counted}

    def roots(self, factors: Factors, floor: Number) -> tuple[dict[str, Expr], Expr]:
        """factor^(-1/2n) of n factors, and how many eigenvalues were negative.

        Together they stand for H^(-1/2). floor: least eigenvalue, as a share of the largest.
        """
        p, least = 2 * len(factors), as_expr(floor)
        vectors = {k: eigenbasis(x) for k, x in factors.items()}
        values = {k: eigenvalues(x, vectors[k]) for k, x in factors.items()}
        roots = {k: inverse_root(vectors[k], values[k], least, p=p) for k in factors}
        counts = [sum_(negative_eigenvalues(x, least)) for x in values.values()]
        return roots, reshape(sum(counts[1:], counts[0]), (1, 1))

    def _cut(self, x: Expr, side: str) -> Expr:
        x = x if side == "left" else x.mT
        k, b, _ = blocks(x.shape[0], self.block)
        return reshape(x, (k, b, x.shape[1]))


def blocks(side: int, most: int) -> Shape:
    """(k, b, b) for a side cut into k equal blocks, as few as can be, of b ≤ most.

    Raises ValueError where the largest such b is below an eighth of that.
    """
    k = next((k for k in range(-(-side // most), side + 1) if side % max(k, 1) == 0), 1) or 1
    b = side // k
    if side > most and 8 * b < most:
        raise ValueError(
            f"a side of {side} cannot be cut into equal blocks between {-(-most // 8)} and "
            f"block={most} (the nearest is {b}): choose block={side} or more, or the other of "
            "sides='left' and 'right' alone"
        )
    return k, b, b
