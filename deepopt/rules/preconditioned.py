"""Preconditioned: Kronecker memories of squared gradients, at one frequency or several."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal, TypeAlias

from deepopt.expr import Expr, Number, array, equal, reshape, sqrt, sum_, where
from deepopt.functions import eigenbasis, norm, orthonormal, ratio
from deepopt.kronecker import Kronecker, Sides
from deepopt.levels import each, level_count
from deepopt.memory import Table, average, dot, write
from deepopt.readout import DEGREES, LINEAR, Scale, scaled, through
from deepopt.rule import (
    Betas,
    Memories,
    Period,
    Periods,
    Rate,
    Retention,
    Retentions,
    Rule,
    Scalars,
    Slot,
    Symmetries,
    Time,
    Update,
    symmetric,
)
from deepopt.rules.adaptive import over

Graft: TypeAlias = Literal["none", "sgd", "adam"]


class Shampoo(Rule):
    """Momentum between the inverse roots of two averages of the gradient's Gram matrices.

    Memory: a table of the gradient, and a Kronecker memory of its square: left and right factors
    without keys, values g gᵀ and gᵀg, dot-product objectives, written every step.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms").
    momentum, beta2: retentions of the two memories per step. accumulate: "ema", averages with bias
        correction, or undecayed "sum"s as first published.
    period: updates between refreshes of the roots, which are the identity before the first.
    sides: which factors there are; with one, its power is -1/2 and not -1/4 (embeddings: "right").
    floor: least eigenvalue as a share of the largest. block: longest side of a factor; longer sides
        are cut into equal blocks.
    graft: take the norm of the step from "sgd", the average gradient's, or "adam" (with beta2 and
        `eps`, in units of gradient: lr is then the size of a step per coordinate) instead of
        `scale`; see `readout.scaled`.
    negatives, a memory of one number, counts eigenvalues below minus the floor.
    Shapes: parameter r × c; factors k × b × b for k blocks of b, and roots alike. Raises ValueError
    where the parameter is not a matrix, or a side has no equal blocks.
    Source: Gupta et al. 2018, Anil et al. 2020 (grafting); the paper by relation (App. B).
    """

    lr: Rate = 1e-2
    momentum: Retention = 0.9
    beta2: Retention = 0.95
    accumulate: Literal["ema", "sum"] = "ema"
    period: Period = 10
    sides: Sides = "both"
    floor: Rate = 1e-4
    block: Period = 1024
    graft: Graft = "none"
    eps: Rate = 1e-8
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def clocks(self) -> dict[str, int]:
        return {"root": self.period}

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        sides = Kronecker(shape, self.sides, self.block)
        return _slots(shape, sides, self.graft) | sides.slots()

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        sides = Kronecker(g.shape, self.sides, self.block)
        if self.accumulate == "ema":
            grams, correction = sides.averages(s, g, self.beta2), 1.0 - self.beta2**t.step
            read = {k: x / correction for k, x in grams.items()}
        else:
            grams = {k: write(dot(Table(s[k]), x)).value for k, x in sides.grams(g).items()}
            read = grams
        m = average(s["momentum_buffer"], g, self.momentum)
        roots, memories = sides.refreshed(read, self.floor, s, t)
        d, second = _grafted(sides.apply(m, roots), m, g, s, t, self)
        return d, grams | memories | second | {"momentum_buffer": m}

    def symmetries(self) -> Symmetries:
        # A sum weighs a Gram matrix as an average does; at scale "none" both are of degree zero.
        return _symmetries(self)


class MultiFrequency(Rule):
    """Shampoo with several Kronecker memories, each of its own frequency.

    Memory: a table of the gradient, and K Kronecker memories of its square: left and right factors
    without keys, values the Gram matrices of a chunk of `period` gradients, dot-product objectives;
    within a chunk nothing decays, at its end the memory decays once. They are added up before the
    root, as a continuum memory whose parts are independent.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms").
    momentum: retention of the gradient per step. retention: of each level per tick.
    period: updates between ticks of each level; each divides the next.
        retention, period and weight take one value, or a tuple with one per level.
    weight: of each level in the sum. weighting: "static", of levels corrected for their bias; or
        "mass", of levels as they are, so that a young one counts less.
    root: updates between refreshes of the roots, which are the identity before the first.
    sides, floor, block, graft, eps, scale: as in `Shampoo`. beta2: of the "adam" graft, per step.
    negatives, a memory of one number, counts eigenvalues below minus the floor.
    Shapes: parameter r × c; factors k × b × b for k blocks of b, for each level, and roots alike.
    Raises ValueError where the parameter is not a matrix, a side has no equal blocks, or a period
    does not divide the next.
    Source: ours, after the paper's continuum memory (Eq. 70-74) and Gupta et al. 2018.
    """

    lr: Rate = 1e-2
    momentum: Retention = 0.9
    retention: Retentions = 0.9
    period: Periods = (1, 8, 64)
    weight: Scalars = 1.0
    weighting: Literal["static", "mass"] = "static"
    root: Period = 10
    sides: Sides = "both"
    floor: Rate = 1e-4
    block: Period = 1024
    graft: Graft = "none"
    beta2: Retention = 0.95
    eps: Rate = 1e-8
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        periods = [period for _, _, period, _ in self._levels()]
        wrong = [(a, b) for a, b in pairwise(periods) if b % a]
        if wrong:
            raise ValueError(
                f"MultiFrequency(period={self.period!r}): each period must divide the next, so "
                f"that chunks nest; {wrong[0][0]} does not divide {wrong[0][1]}"
            )

    def _levels(self) -> list[tuple[str, Number, int, Number]]:
        """(suffix, retention, period, weight) of each level."""
        n = level_count(self, "retention", "period", "weight")
        names = [f"_{i}" for i in range(n)]
        columns = each(self.retention, n), each(self.period, n), each(self.weight, n)
        return list(zip(names, *columns, strict=True))

    def clocks(self) -> dict[str, int]:
        slow = {f"level{i}": period for i, _, period, _ in self._levels() if period > 1}
        return {"root": self.root} | slow

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        sides = Kronecker(shape, self.sides, self.block)
        slots = _slots(shape, sides, self.graft)
        for i, _, period, _ in self._levels():
            clock = f"level{i}" if period > 1 else None
            slots |= sides.slots(i, clock=clock)
            slots |= {f"mass{i}": Slot((1, 1), clock=clock)} if period > 1 else {}
        return slots

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        sides = Kronecker(g.shape, self.sides, self.block)
        grams, memories = sides.grams(g), dict[str, Expr]()
        masses: list[tuple[Number, Number]] = []
        levels: list[dict[str, Expr]] = []
        for i, retention, period, weight in self._levels():
            if period == 1:
                now = {k: average(s[k + i], x, retention) for k, x in grams.items()}
                memories |= {k + i: x for k, x in now.items()}
                masses.append((weight, 1.0 - retention**t.step))
            else:
                rate = (1.0 - retention) / period
                values = grams | {"mass": array("full", (1, 1))}
                now = {
                    k: write(dot(Table(s[k + i]), x), rate=rate).value for k, x in values.items()
                }
                # Within a chunk nothing decays; the memory decays once, at the tick.
                decayed = {k: t.when(f"level{i}", retention * x, x) for k, x in now.items()}
                memories |= {k + i: x for k, x in decayed.items()}
                masses.append((weight, now.pop("mass")))
            levels.append(now)
        read = {k: self._sum([x[k] for x in levels], masses) for k in grams}
        m = average(s["momentum_buffer"], g, self.momentum)
        roots, kept = sides.refreshed(read, self.floor, s, t)
        d, second = _grafted(sides.apply(m, roots), m, g, s, t, self)
        return d, memories | kept | second | {"momentum_buffer": m}

    def _sum(self, levels: list[Expr], masses: list[tuple[Number, Number]]) -> Expr:
        """The levels of one factor, added up."""
        pairs = list(zip(levels, masses, strict=True))
        if self.weighting == "static":
            parts = [weight * _by_mass(x, mass) for x, (weight, mass) in pairs]
            return sum(parts[1:], parts[0])
        parts = [weight * x for x, (weight, _) in pairs]
        shares = [weight * mass for weight, mass in masses]
        return _by_mass(sum(parts[1:], parts[0]), sum(shares[1:], shares[0]))

    def symmetries(self) -> Symmetries:
        return _symmetries(self)


class SOAP(Rule):
    """Adam in the eigenbasis of Shampoo's factors.

    Memory: tables of the gradient and, in a slowly turning basis, of its square; and a Kronecker
    memory of its square that says where the basis turns: values g gᵀ and gᵀg. Dot-product
    objectives, written every step; the basis has its own clock.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms"), or the size of a step per
        coordinate of the basis (scale "none").
    betas: retentions of the first and second moment per step. shampoo_beta: of the factors.
    eps: added to the root, in units of gradient. period: updates between refreshes of the basis,
        the identity (Adam) before the first; no step is left out.
    refresh: of the basis, "qr", one power iteration, or "eigh", all of it. damping: added to the
        factor before that iteration, as a share of its mean eigenvalue; it keeps the basis of the
        null space where it was, and the same in every backend.
    rotate: turn the second moment with the basis, as the square of the turn (ours; off, it stays as
        it is). The first moment is kept unturned, which is the same as turning it.
    sides: which factors there are (embeddings: "right"). block: longest side of a factor; longer
        sides are cut into equal blocks. scale: see `readout.scaled`.
    Shapes: parameter r × c; factors and bases k × b × b for k blocks of b. Raises ValueError where
    the parameter is not a matrix, or a side has no equal blocks.
    Source: Vyas et al. 2024; the paper by relation (App. B). Start and damping are ours.
    """

    lr: Rate = 1e-2
    betas: Betas = (0.95, 0.95)
    shampoo_beta: Retention = 0.95
    eps: Rate = 1e-8
    period: Period = 10
    refresh: Literal["qr", "eigh"] = "qr"
    damping: Rate = 1e-4
    rotate: bool = True
    sides: Sides = "both"
    block: Period = 1024
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def clocks(self) -> dict[str, int]:
        return {"basis": self.period}

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        sides = Kronecker(shape, self.sides, self.block)
        tables = {"exp_avg": Slot(shape), "exp_avg_sq": Slot(shape)}
        return tables | sides.slots() | sides.slots("_basis", "eye", "basis")

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        sides, (beta1, beta2) = Kronecker(g.shape, self.sides, self.block), self.betas
        basis = {k: s[f"{k}_basis"] for k in sides.factors}
        into = {k: x.mT for k, x in basis.items()}
        m = average(s["exp_avg"], g, beta1)
        turned = sides.apply(g, into)
        v = average(s["exp_avg_sq"], turned * turned, beta2)
        u = sides.apply(m, into) / (1.0 - beta1**t.step)
        u = over(u, sqrt(v / (1.0 - beta2**t.step)), self.eps)
        d = scaled(sides.apply(u, basis), self.scale, orthogonal=False)
        grams = sides.averages(s, g, self.shampoo_beta)
        new = {k: self._turned(grams[k], basis[k]) for k in basis}
        memories = {f"{k}_basis": t.when("basis", x, basis[k]) for k, x in new.items()}
        if self.rotate:
            turns = {k: new[k].mT @ basis[k] for k in basis}
            v = t.when("basis", sides.apply(v, {k: x * x for k, x in turns.items()}), v)
        return d, memories | grams | {"exp_avg": m, "exp_avg_sq": v}

    def _turned(self, gram: Expr, basis: Expr) -> Expr:
        """The basis after a refresh, the old one where nothing has been seen."""
        if self.refresh == "eigh":
            return eigenbasis(gram)
        identity = array("eye", gram.shape)
        mean = sum_(gram * identity, (-2, -1)) / max(gram.shape[-1], 1)
        turned = orthonormal(gram @ basis + self.damping * mean * basis)
        return where(equal(mean, 0.0), basis, turned)

    def symmetries(self) -> Symmetries:
        own = symmetric("odd", "transposition", "degree 0")
        own = own if self.sides == "both" else own - {"transposition"}
        return through(own, "identity", self.scale)


def _slots(shape: tuple[int, ...], sides: Kronecker, graft: Graft) -> dict[str, Slot]:
    """The memories beside the factors."""
    slots = {"momentum_buffer": Slot(shape), "negatives": Slot((1, 1), clock="root")}
    slots |= sides.slots("_root", "eye", "root")
    return slots | ({"exp_avg_sq": Slot(shape)} if graft == "adam" else {})


def _grafted(
    u: Expr, m: Expr, g: Expr, s: Memories, t: Time, rule: Shampoo | MultiFrequency
) -> tuple[Expr, dict[str, Expr]]:
    """u, from the memory m, at the size that the rule says, and the memory that this takes."""
    if rule.graft == "none":
        return scaled(u, rule.scale, orthogonal=False), {}
    m = m / (1.0 - rule.momentum**t.step)
    if rule.graft == "sgd":
        return u * ratio(norm(m), norm(u)), {}
    v = average(s["exp_avg_sq"], g * g, rule.beta2)
    adam = over(m, sqrt(v / (1.0 - rule.beta2**t.step)), rule.eps)
    return u * ratio(norm(adam), norm(u)), {"exp_avg_sq": v}


def _by_mass(x: Expr, mass: Number) -> Expr:
    """x / mass for factors k × b × b and a mass that is a scalar or 1 × 1."""
    if isinstance(mass, Expr) and mass.shape:
        mass = reshape(mass, (1, 1, 1))
    return x / mass


def _symmetries(rule: Shampoo | MultiFrequency) -> Symmetries:
    own = (LINEAR - {"permutation"} - DEGREES) | symmetric("degree 0")
    own = own if rule.sides == "both" else own - {"transposition"}
    if rule.graft == "adam":
        own = own - {"left rotation", "right rotation"}
    if rule.clocks()["root"] > 1 and rule.graft == "none" and rule.scale != "rms":
        # Before the first root the direction is the momentum, of degree one.
        own = own - DEGREES
    if rule.graft == "sgd":
        own = (own - DEGREES) | symmetric("degree 1")
    return through(own, "identity", "none" if rule.graft != "none" else rule.scale)
