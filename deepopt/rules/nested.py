"""Nested: memories of several frequencies in one optimizer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias, get_args

from deepopt.expr import Expr, Number, array, sqrt
from deepopt.functions import newton_schulz, unit, unit_rms
from deepopt.levels import each, level_count
from deepopt.memory import MLP, Table, average, dot, write
from deepopt.readout import (
    DEGREE_0,
    DEGREES,
    ELEMENTWISE,
    LINEAR,
    ROTATIONS,
    Coefficients,
    Output,
    Scale,
    mapped,
    over_root,
    scaled,
    through,
)
from deepopt.rule import (
    Betas,
    Domain,
    Memories,
    Period,
    Periods,
    Rate,
    Retention,
    Retentions,
    Rule,
    Scalar,
    Scalars,
    Slot,
    Symmetries,
    Time,
    Update,
    symmetric,
)
from deepopt.rules.adaptive import over
from deepopt.rules.momentum import network_slots, recall

Kind: TypeAlias = Literal["table", "delta", "deep"]
# One value, or a tuple with one value per level.
Kinds: TypeAlias = Annotated[
    Kind | tuple[Kind, ...],
    Domain("'table', 'delta' or 'deep'", lambda x: x in get_args(Kind), False, False),
]
Outputs: TypeAlias = Annotated[
    Output | tuple[Output, ...],
    Domain(" or ".join(map(repr, get_args(Output))), lambda x: x in get_args(Output), False, False),
]


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

    def _levels(self) -> list[tuple[str, Number, int, Number]]:
        """(name, retention, period, weight) of each slow level."""
        n = level_count(self, "slow", "period", "weight")
        columns = each(self.slow, n), each(self.period, n), each(self.weight, n)
        return list(zip((f"{i + 1}" for i in range(n)), *columns, strict=True))

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
        d = over_root(u, v, self.floor, self.eps)
        return scaled(d, self.scale, orthogonal=False, cap=self.cap), memories

    def _orthogonal(self, x: Expr) -> Expr:
        return newton_schulz(x, steps=self.steps, coefficients=self.coefficients)

    def symmetries(self) -> Symmetries:
        own = LINEAR - {"permutation"}
        if self.literal:
            return symmetric("odd", "transposition", "degree -1")
        if self.second_moment != "none":
            own = own - ROTATIONS
        if self.second_moment == "gradient" and self.scale != "rms":
            return through(own - DEGREES, "newton_schulz", self.scale) | symmetric("degree -1")
        return through(own, "newton_schulz", self.scale)


class AdEMAMix(Rule):
    """Adam with a second, much slower average of the gradient beside the first.

    Memory: three tables without keys, dot-product objectives, all written every step: values
    gradients, fast and slow, and squared gradients. The rival of memories with a slower clock: it
    lengthens the memory by its retention.
    lr: size of a step per coordinate and unit of 1 + weight. betas: retentions of the fast memory
    and of the squares per step. slow: of the slow memory, which is not corrected for its bias.
    weight: of the slow memory beside the fast one, 1. eps: added to the root, in units of gradient.
    Its authors let weight and slow grow from 0 and betas[0]: give them schedules.
    Shapes: any; the memories have the parameter's.
    Source: Pagliardini et al. 2025; named by the paper beside M3 (§7.2).
    """

    lr: Rate = 1e-3
    betas: Betas = (0.9, 0.999)
    slow: Retention = 0.9999
    weight: Scalar = 5.0
    eps: Rate = 1e-8

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {k: Slot(shape) for k in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        beta1, beta2 = self.betas
        fast = average(s["exp_avg"], g, beta1)
        slow = average(s["exp_avg_slow"], g, self.slow)
        v = average(s["exp_avg_sq"], g * g, beta2)
        mixed = fast / (1.0 - beta1**t.step) + self.weight * slow
        d = over(mixed, sqrt(v / (1.0 - beta2**t.step)), self.eps)
        return d, {"exp_avg": fast, "exp_avg_slow": slow, "exp_avg_sq": v}

    def symmetries(self) -> Symmetries:
        return ELEMENTWISE | DEGREE_0


class Nest(Rule):
    """Levels of any memory, each of its own frequency, added up: compose them without a class.

    Memory: level l is, by `memory`, a "table" of the mean gradient of a chunk of `period` steps
    (dot-product objective), a "delta" memory (keys that mean at norm one, identity as values, L2
    objective, proximal) or a "deep" one (a residual network with that mean at RMS one as key and
    value, dot-product objective); written at its ticks, and, if slow, read from the next step on.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms").
    memory, retention (per tick), period (steps), weight (in the sum) and output (σ of the read-out)
        take one value, or a tuple with one per level.
    width: hidden units of a deep memory. steps, coefficients, scale: see `readout.read_out`.
    Shapes: parameter and memories r × c; networks c × width and width × c. Raises ValueError where
    the parameter is not a matrix, and for tuples of different lengths.
    Source: paper Def. 3, Eq. 35-37 (general momentum), 52, 74; the levels are those of
    `HeavyBall`, `DeltaMomentum` and `DeepMomentum`.
    """

    lr: Rate = 1e-2
    memory: Kinds = "table"
    retention: Retentions = 0.9
    period: Periods = (1, 16)
    weight: Scalars = 1.0
    output: Outputs = "newton_schulz"
    width: Period = 32
    coefficients: Coefficients = "quintic"
    steps: Period = 5
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._levels()

    def _levels(self) -> list[tuple[str, Kind, Number, int, Number, Output]]:
        """(suffix, memory, retention, period, weight, output) of each level."""
        n = level_count(self, "memory", "retention", "period", "weight", "output")
        scalars = each(self.retention, n), each(self.period, n), each(self.weight, n)
        names = [f"_{i}" for i in range(n)]
        return list(zip(names, each(self.memory, n), *scalars, each(self.output, n), strict=True))

    def clocks(self) -> dict[str, int]:
        return {f"level{i}": period for i, _, _, period, *_ in self._levels() if period > 1}

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        for i, kind, _, period, *_ in self._levels():
            deep = network_slots(shape[-1], self.width)
            own = deep if kind == "deep" else {"memory": Slot(shape)}
            own |= {k: Slot(shape) for k in ("chunk", "readout") if period > 1}
            clock = f"level{i}" if period > 1 else None
            slots |= {k + i: Slot(x.shape, x.kind, x.value, clock) for k, x in own.items()}
        return slots

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        parts, memories = list[Expr](), dict[str, Expr]()
        for i, kind, retention, period, weight, output in self._levels():
            if period == 1:
                answer, new = self._written(i, kind, g, retention, s)
                memories |= new
                read = mapped(answer, output, self.steps, self.coefficients)
            else:
                clock, chunk = f"level{i}", s["chunk" + i] + g
                answer, new = self._written(i, kind, chunk / period, retention, s)
                memories |= {k: t.when(clock, x, s[k]) for k, x in new.items()}
                memories["chunk" + i] = t.when(clock, array("full", g.shape, 0.0), chunk)
                # A slow level is read from the next step on, as in Algorithm 1.
                read = s["readout" + i]
                fresh = mapped(answer, output, self.steps, self.coefficients)
                memories["readout" + i] = t.when(clock, fresh, read)
            parts.append(weight * read)
        total = sum(parts[1:], parts[0])
        return scaled(total, self.scale, orthogonal=self._orthogonal()), memories

    def _written(
        self, i: str, kind: Kind, g: Expr, retention: Number, s: Memories
    ) -> tuple[Expr, dict[str, Expr]]:
        """The answer of a level's memory after a gradient, and the memory."""
        if kind == "table":
            m = average(s["memory" + i], g, retention)
        elif kind == "delta":
            goal = recall(s["memory" + i], unit(g), "matrix")
            m = write(goal, retention=retention, solver="prox").weight.mT
        else:
            key = unit_rms(g)
            network = MLP(s["first" + i], s["second" + i])
            initial = [x.initial for x in network_slots(g.shape[-1], self.width).values()]
            # Towards the key itself the l2 objective of a residual network has nothing to learn.
            goal = dot(network, key, key)
            network = write(goal, retention=retention, normalize=True, anchor=initial)
            return network.read(key)[0], {"first" + i: network.first, "second" + i: network.second}
        return m, {"memory" + i: m}

    def _orthogonal(self) -> bool:
        """Whether the sum is one orthogonalised read-out, whose size is known."""
        levels = self._levels()
        return len(levels) == 1 and levels[0][-1] == "newton_schulz"

    def symmetries(self) -> Symmetries:
        own, kinds = LINEAR, {*each(self.memory, 1)}
        if "delta" in kinds:
            own = own - {"permutation", "transposition"}
        if "deep" in kinds:
            own = symmetric("odd", "degree 1")
        outputs: set[Output] = {x for *_, x in self._levels()}
        parts = [through(own, output, self.scale) for output in outputs]
        left = parts[0].intersection(*parts[1:])
        # Read as they are, memories have sizes of their own, which no sum has.
        alone = len(self._levels()) == 1 or (outputs == {"identity"} and kinds == {"table"})
        return left if alone or "identity" not in outputs else left - DEGREES


def _gather(m: Expr, value: Expr, retention: Number, summed: bool) -> Expr:
    """The memory after a value: an average, or Algorithm 1's sum, in which β is the rate."""
    return (
        write(dot(Table(m), value), rate=retention).value
        if summed
        else average(m, value, retention)
    )
