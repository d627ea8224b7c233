"""Nested: memories of several frequencies in one optimizer."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeVar, cast

from deepopt.expr import Expr, Number, maximum, minimum
from deepopt.functions import newton_schulz
from deepopt.memory import Table, average, dot, write
from deepopt.readout import Coefficients, Scale, over_root, scaled
from deepopt.rule import (
    Memories,
    Period,
    Periods,
    Rate,
    Retention,
    Retentions,
    Rule,
    Scalars,
    Slot,
    Time,
    Update,
)

T = TypeVar("T")


class M3(Rule):
    """Multi-scale momentum Muon: a fast memory of the gradient and any number of slow ones.

    Memory: tables without keys, values gradients, dot-product objectives. The fast one is read
    every step; slow level l adds up a chunk of period_l gradients between its ticks and is read,
    orthogonalised, at the end of the chunk for use during the next. A diagonal second moment
    divides their sum.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms").
    momentum, slow: retentions of the fast memory per step and of the slow ones per tick.
    period: steps between ticks of a slow level. weight: its weight beside the fast read-out, 1.
        slow, period and weight take one value, or a tuple with one per slow level.
    beta2: retention of the second moment per step. floor: least denominator, as a share of its RMS.
    cap: largest entry of a direction at scale "rms": where the gradient is exactly zero the
        orthogonalised read-out can spike, and its own second moment does not damp it.
    eps: added to the denominator, in units of gradient. nesterov: read the fast memory ahead.
    accumulate: "ema", or undecayed "sum"s as printed. second_moment: of the "gradient", of the
        orthogonalised "update" (as AdaMuon), or "none".
    steps, coefficients: the orthogonalising iteration. scale: see `readout.scaled`.
    Shapes: parameter and memories r × c. Raises ValueError where the parameter is not a matrix.
    literal: Algorithm 1 as printed but for its misprints (sums, raw second moment, unscaled): its
        step is 1/c for a loss times c, and shrinks as 1/√t.
    Source: paper Algorithm 1, Eq. 75. Averages, bias correction, floor, cap, Nesterov and scale are
    ours.
    """

    lr: Rate = 1e-2
    momentum: Retention = 0.9
    slow: Retentions = 0.9
    period: Periods = 16
    weight: Scalars = 0.1
    beta2: Retention = 0.95
    floor: Rate = 0.1
    cap: Rate = 10.0
    eps: Rate = 0.0
    nesterov: bool = True
    accumulate: Literal["ema", "sum"] = "ema"
    second_moment: Literal["gradient", "update", "none"] = "gradient"
    literal: bool = False
    coefficients: Coefficients = "quintic"
    steps: Period = 5
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = ("accumulate", "second_moment", "nesterov", "floor", "cap", "scale")
        changed = [k for k in fixed if getattr(self, k) != getattr(M3, k)]
        if self.literal and changed:
            k = changed[0]
            raise ValueError(f"M3(literal=True, {k}={getattr(self, k)!r}): Algorithm 1 fixes {k}")
        lengths = {len(x) for x in (self.slow, self.period, self.weight) if isinstance(x, tuple)}
        if len(lengths - {1}) > 1:
            raise ValueError(
                f"M3(slow={self.slow!r}, period={self.period!r}, weight={self.weight!r}): tuples "
                "must have one value per slow level, all of the same length"
            )

    def _levels(self) -> list[tuple[str, Number, int, Number]]:
        """(name, retention, period, weight) of each slow level."""
        several = [x for x in (self.slow, self.period, self.weight) if isinstance(x, tuple)]
        n = max(map(len, several), default=1)
        slow, period, weight = _each(self.slow, n), _each(self.period, n), _each(self.weight, n)
        names = (f"{i + 1}" for i in range(n))
        return list(zip(names, slow, period, weight, strict=True))

    def clocks(self) -> dict[str, int]:
        return {f"slow_{i}": period for i, _, period, _ in self._levels()}

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        slots = {"fast": Slot(shape)}
        for i, *_ in self._levels():
            slots |= {
                f"slow_{i}": Slot(shape, clock=f"slow_{i}"),
                f"readout_{i}": Slot(shape, clock=f"slow_{i}"),
            }
        if self.literal or self.second_moment != "none":
            slots["exp_avg_sq"] = Slot(shape)
        return slots

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        summed = self.literal or self.accumulate == "sum"
        second = "gradient" if self.literal else self.second_moment
        fast = _gather(s["fast"], g, self.momentum, summed)
        memories = {"fast": fast}
        ahead = self.nesterov and not self.literal
        u = self._orthogonal(_gather(fast, g, self.momentum, summed) if ahead else fast)
        for i, retention, _, weight in self._levels():
            chunk, readout = s[f"slow_{i}"], s[f"readout_{i}"]
            u = u + weight * readout
            # Within a chunk nothing decays; an average decays once, at the tick.
            rate = retention if summed else 1.0 - retention
            chunk = write(dot(Table(chunk), g), rate=rate).value
            memories[f"readout_{i}"] = t.when(f"slow_{i}", self._orthogonal(chunk), readout)
            kept = chunk if summed else retention * chunk
            memories[f"slow_{i}"] = t.when(f"slow_{i}", kept, chunk)
        if second == "none":
            return scaled(u, self.scale, orthogonal=True), memories
        q = g if second == "gradient" else u
        v = memories["exp_avg_sq"] = _gather(s["exp_avg_sq"], q * q, self.beta2, summed)
        if not summed:
            v = v / (1.0 - self.beta2**t.step)
        if self.literal:
            return over_root(u, v, 0.0, self.eps), memories
        d = scaled(over_root(u, v, self.floor, self.eps), self.scale, orthogonal=False)
        if self.scale == "rms":
            d = maximum(minimum(d, self.cap), 0.0 - self.cap)
        return d, memories

    def _orthogonal(self, x: Expr) -> Expr:
        return newton_schulz(x, steps=self.steps, coefficients=self.coefficients)


def _each(x: T | tuple[T, ...], n: int) -> tuple[T, ...]:
    """x for each of n levels."""
    values = cast(tuple[T, ...], x) if isinstance(x, tuple) else (x,)
    return values * n if len(values) == 1 else values


def _gather(m: Expr, value: Expr, retention: Number, summed: bool) -> Expr:
    """The memory after a value: an average, or Algorithm 1's sum, in which β is the rate."""
    return (
        write(dot(Table(m), value), rate=retention).value
        if summed
        else average(m, value, retention)
    )
