"""Momentum: memories of the gradient that differ in structure and objective, written alike."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepopt.expr import Expr, absolute, array, reshape, sign, sqrt
from deepopt.functions import ratio, unit, unit_rms
from deepopt.kronecker import Kronecker
from deepopt.memory import MLP, Linear, Objective, Table, average, dot, l2, write
from deepopt.oracle import flaw
from deepopt.readout import (
    DEGREE_0,
    ELEMENTWISE,
    LINEAR,
    Coefficients,
    Output,
    Scale,
    read_out,
    through,
)
from deepopt.rule import (
    Memories,
    Period,
    Rate,
    Retention,
    Rule,
    Scalars,
    Slot,
    Symmetries,
    Time,
    Update,
    symmetric,
)


class HeavyBall(Rule):
    """Gradient descent with heavy-ball momentum.

    Memory: a table of the gradient's shape without keys; values gradients, dot-product objective,
    written every step at rate 1.
    lr: weight per unit of summed gradient (torch's convention: the sum grows to 1/(1 - momentum)).
    momentum: retention of the memory per step. nesterov: read the memory one step ahead.
    Shapes: any; the memory has the parameter's.
    Source: paper Eq. 10-13, 33; Nesterov 1983 in the form of Sutskever et al. 2013.
    """

    lr: Rate = 1e-2
    momentum: Retention = 0.9
    nesterov: bool = False

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m = write(dot(Table(s["momentum_buffer"]), g), retention=self.momentum).value
        d = g + self.momentum * m if self.nesterov else m
        return d, {"momentum_buffer": m}

    def symmetries(self) -> Symmetries:
        return LINEAR


class Nesterov(HeavyBall):
    """Gradient descent with Nesterov's momentum: heavy ball, read one step ahead.

    Memory: a table of the gradient's shape without keys; values gradients, dot-product objective,
    written every step at rate 1.
    lr: weight per unit of summed gradient. momentum: retention of the memory per step.
    nesterov: False is `HeavyBall`.
    Shapes: any; the memory has the parameter's.
    Source: Nesterov 1983 in the form of Sutskever et al. 2013.
    """

    nesterov: bool = True


class Signum(Rule):
    """The sign of the momentum.

    Memory: a table without keys; values gradients, dot-product objective, written every step and
    read through σ = sign (paper Eq. 52).
    lr: size of a step per coordinate. momentum: retention of the memory per step.
    Shapes: any; the memory has the parameter's.
    Source: Bernstein et al. 2018; as a memory, paper App. B (reading ours).
    """

    momentum: Retention = 0.9

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m = average(s["momentum_buffer"], g, self.momentum)
        return sign(m), {"momentum_buffer": m}

    def symmetries(self) -> Symmetries:
        return ELEMENTWISE | DEGREE_0


class PreconditionedMomentum(Rule):
    """Momentum of a preconditioned gradient: the memory maps g to the values P.

    Memory: a table; values P·g, which is the dot-product objective ⟨m gᵀ, P⟩ with gradients as keys
    and P as values; written every step.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms").
    momentum: retention α per step. rate: inner learning rate η.
    values: P. "diagonal", one over the root of an average of g², as Adam's; "kronecker",
        L^(-1/4) on the rows and R^(-1/4) on the columns, of averages of g gᵀ and gᵀg;
        "given", a matrix on the rows, such as inverse curvature.
    beta2: retention of those averages per step. eps: added to the diagonal root, in units of
        gradient. floor: least eigenvalue as a share of the largest. period: updates between
        refreshes of the roots, which are the identity before the first. block: longest side of a
        factor; longer sides are cut into equal blocks.
    output, steps, coefficients, scale: the read-out, see `readout.read_out`.
    Context: preconditioner, r × r, where it is "given".
    Shapes: parameter and memory r × c; diagonal r × c; factors k × b × b for k blocks of b. Raises
    ValueError where the parameter is not a matrix, or a given P is missing or of another shape.
    Eq. 47 as printed: output="identity", scale="none".
    Source: paper Eq. 46-47, with the α that the text names; sources of P and the scale are ours.
    """

    lr: Rate = 1e-2
    momentum: Retention = 0.9
    rate: Rate = 1.0
    values: Literal["diagonal", "kronecker", "given"] = "diagonal"
    beta2: Retention = 0.95
    eps: Rate = 1e-8
    floor: Rate = 1e-4
    period: Period = 10
    block: Period = 1024
    output: Output = "identity"
    coefficients: Coefficients = "quintic"
    steps: Period = 5
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def clocks(self) -> dict[str, int]:
        return {"root": self.period} if self.values == "kronecker" else {}

    def context(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        given = self.values == "given"
        return {"preconditioner": (shape[-2], shape[-2])} if given else {}

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        slots = {"momentum_buffer": Slot(shape)}
        if self.values == "diagonal":
            slots["exp_avg_sq"] = Slot(shape)
        if self.values == "kronecker":
            sides = Kronecker(shape, "both", self.block)
            slots |= sides.slots() | sides.slots("_root", "eye", "root")
            slots["negatives"] = Slot((1, 1), clock="root")
        return slots

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        value, memories = self._preconditioned(g, s, t)
        objective = dot(Table(s["momentum_buffer"]), value)
        m = write(objective, retention=self.momentum, rate=self.rate).value
        d = read_out(m, self.output, self.scale, self.steps, self.coefficients)
        return d, memories | {"momentum_buffer": m}

    def _preconditioned(self, g: Expr, s: Memories, t: Time) -> tuple[Expr, dict[str, Expr]]:
        correction = 1.0 - self.beta2**t.step
        match self.values:
            case "given":
                return s["preconditioner"] @ g, {}
            case "diagonal":
                v = average(s["exp_avg_sq"], g * g, self.beta2)
                return ratio(g, sqrt(v / correction) + self.eps), {"exp_avg_sq": v}
            case "kronecker":
                sides = Kronecker(g.shape, "both", self.block)
                grams = sides.averages(s, g, self.beta2)
                read = {k: x / correction for k, x in grams.items()}
                roots, memories = sides.refreshed(read, self.floor, s, t)
                return sides.apply(g, roots), grams | memories

    def symmetries(self) -> Symmetries:
        match self.values:
            case "given":
                own = symmetric("odd", "right rotation", "degree 1")
            case "diagonal":
                own = ELEMENTWISE | DEGREE_0
            case "kronecker":
                # Before the first root the memory is that of g itself, of degree one.
                own = LINEAR - {"permutation", "degree 1"}
                own = own | DEGREE_0 if self.period == 1 else own
        return through(own, self.output, self.scale)


class FeatureMomentum(Rule):
    """Momentum of a feature map of the gradient.

    Memory: a table; values φ(g), which is the dot-product objective ⟨m φ(g)ᵀ, I⟩ with φ(g) as keys;
    written every step.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms").
    momentum: retention α per step. rate: inner learning rate η.
    feature: φ. "sign_power", sign(g)·|g|^power per entry (power 0 is the sign, 1 the identity);
        "polynomial", Σₖ polynomial[k]·(g gᵀ)ᵏ g, by default a step of Newton-Schulz.
    power: its exponent. polynomial: its coefficients.
    normalize: the map of g/‖g‖, which makes it independent of the gradient's size (ours).
    output, steps, coefficients, scale: the read-out, see `readout.read_out`.
    A subclass may define another `phi`, odd and along g: an even map has no sign, so what it adds
    up does not descend. Raises ValueError for one that is not, and where the parameter is not a
    matrix.
    Shapes: parameter and memory r × c.
    Eq. 51 as printed: normalize=False, output="identity", scale="none".
    Source: paper Eq. 51; the two maps and the scale are ours.
    """

    lr: Rate = 1e-2
    momentum: Retention = 0.9
    rate: Rate = 1.0
    feature: Literal["sign_power", "polynomial"] = "sign_power"
    power: Rate = 0.5
    polynomial: Scalars = (1.5, -0.5)
    normalize: bool = True
    output: Output = "identity"
    coefficients: Coefficients = "quintic"
    steps: Period = 5
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = flaw(self.phi)
        if wrong:
            raise ValueError(f"phi of {type(self).__name__}: {wrong}. It is that of {self!r}")

    def phi(self, g: Expr) -> Expr:
        """The feature map: odd, of g's shape."""
        if self.feature == "sign_power":
            return sign(g) * absolute(g) ** self.power
        several = self.polynomial if isinstance(self.polynomial, tuple) else (self.polynomial,)
        term, total = g, several[0] * g
        for coefficient in several[1:]:
            term = g @ g.mT @ term
            total = total + coefficient * term
        return total

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        feature = self.phi(unit(g) if self.normalize else g)
        objective = dot(Table(s["momentum_buffer"]), feature)
        m = write(objective, retention=self.momentum, rate=self.rate).value
        d = read_out(m, self.output, self.scale, self.steps, self.coefficients)
        return d, {"momentum_buffer": m}

    def symmetries(self) -> Symmetries:
        own = ELEMENTWISE
        if type(self).phi is not FeatureMomentum.phi:
            own = symmetric("odd")
        elif self.feature == "polynomial":
            own = LINEAR - {"permutation", "degree 1"}
        power = self.feature == "sign_power" and (self.scale == "rms" or self.output != "identity")
        return through(own | DEGREE_0 if power or self.normalize else own, self.output, self.scale)


class DeltaMomentum(Rule):
    """Momentum that erases what it held along the new gradient before it writes it.

    Memory: a matrix with the rows of the gradient as keys and the identity as values, so that it
    should answer I to g; L2 objective; written every step.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms").
    momentum: retention α per step. rate: inner learning rate η, per squared size of the key.
    view: what a gradient is to the memory: "matrix" (keys are its rows), "flat" (one key, the
        whole tensor: only the component along g is erased) or "scalar" (one column: all of the
        memory is damped by 1/(1 + η‖g‖²)).
    solver: "prox", the exact minimiser, stable for any η and any g whose square is finite (ours, by
        the recipe of Eq. 56); "explicit", one gradient step, stable while η·σmax(g)² < 1 + α.
    decay: coefficient of the erasing term of the explicit step: "eta" as derived, or "literal" 1
        as Eq. 49 prints it, which diverges where σmax(g)² > 1 + α.
    normalize: use g/‖g‖ as key, which makes the rule independent of the gradient's size (ours).
    output: read the memory as it is, or orthogonalised (paper Eq. 52, σ = Newton-Schulz) by
        `steps` of an iteration with these `coefficients`. scale: see `readout.scaled`.
    Shapes: parameter and memory r × c. Raises ValueError where the parameter is not a matrix.
    Eq. 49 as printed: view="matrix", solver="explicit", decay="literal", normalize=False,
    output="identity", scale="none".
    Source: paper Eq. 48-49; errors of the print and stable forms in docs/notation.md.
    """

    lr: Rate = 1e-2
    momentum: Retention = 0.9
    rate: Rate = 1.0
    view: Literal["matrix", "flat", "scalar"] = "matrix"
    solver: Literal["prox", "explicit"] = "prox"
    decay: Literal["eta", "literal"] = "eta"
    normalize: bool = True
    output: Output = "newton_schulz"
    coefficients: Coefficients = "quintic"
    steps: Period = 5
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        key = unit(g) if self.normalize else g
        goal = recall(s["momentum_buffer"], key, self.view)
        if self.solver == "explicit" and self.decay == "literal":
            # Eq. 49 as printed scales what it adds by η, and what it erases by 1.
            m = reshape(write(goal, retention=self.momentum).weight.mT, g.shape)
            m = m - (1.0 - self.rate) * key
        else:
            new = write(goal, retention=self.momentum, rate=self.rate, solver=self.solver)
            m = reshape(new.weight.mT, g.shape)
        d = read_out(m, self.output, self.scale, self.steps, self.coefficients)
        return d, {"momentum_buffer": m}

    def symmetries(self) -> Symmetries:
        own = LINEAR - {"degree 1"}
        if self.view == "matrix":
            own = own - {"permutation", "transposition"}
        return through(own | DEGREE_0 if self.normalize else own, self.output, self.scale)


def recall(m: Expr, key: Expr, view: Literal["matrix", "flat", "scalar"]) -> Objective[Linear]:
    """That the memory m of gradients should answer I to the rows of a key, seen as `view` says."""
    seen = {"matrix": key.shape, "flat": (1, key.size), "scalar": (key.size, 1)}[view]
    identity = array("eye", (seen[0], seen[0]))
    return l2(Linear(reshape(m, seen).mT), identity, reshape(key, seen))


class DeepMomentum(Rule):
    """Deep momentum (DMGD): the memory of the gradient is a small network, trained as it is read.

    Memory: a residual two-layer MLP shared by the rows of the parameter; keys are the rows of the
    gradient (at RMS one), values those of a teacher; written every step by one gradient step on
    the objective, each layer's rate divided by the squared norm of its inputs.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms").
    retention: share of the network's distance from its anchor that is kept per step.
    rate: inner learning rate, per squared norm of a layer's inputs (stable below 2).
    objective: "l2" towards the values, or "dot" (unbounded: relies on retention).
    teacher: "ema", the running average of past keys; "gradient", the key itself.
    teacher_retention: retention of that average per step. width: hidden units.
    anchor: decay towards the "initial" network, or to "zero" as the paper's α m does.
    output: read the network's answer as it is, or orthogonalised (paper Eq. 52) by `steps` of an
        iteration with these `coefficients`. scale: see `readout.scaled`.
    Shapes: parameter r × c, network c × width and width × c, average of keys r × c. Raises
    ValueError where the parameter is not a matrix.
    Source: paper Eq. 50. The key, the value, sharing, initial value and normalisation are ours:
    the paper leaves them open and warns that they matter.
    """

    lr: Rate = 1e-2
    retention: Retention = 0.99
    rate: Rate = 1.0
    objective: Literal["l2", "dot"] = "l2"
    teacher: Literal["ema", "gradient"] = "ema"
    teacher_retention: Retention = 0.9
    width: Period = 32
    anchor: Literal["initial", "zero"] = "initial"
    output: Output = "newton_schulz"
    coefficients: Coefficients = "quintic"
    steps: Period = 5
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        network = network_slots(shape[-1], self.width)
        return network | ({"exp_avg": Slot(shape)} if self.teacher == "ema" else {})

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        keys = values = unit_rms(g)
        memories: dict[str, Expr] = {}
        if self.teacher == "ema":
            memories["exp_avg"] = e = average(s["exp_avg"], keys, self.teacher_retention)
            values = e / (1.0 - self.teacher_retention**t.step)
        slots = self.slots(g.shape)
        network = MLP(s["first"], s["second"])
        goal = l2(network, values, keys) if self.objective == "l2" else dot(network, values, keys)
        initial = [slots["first"].initial, slots["second"].initial]
        network = write(
            goal,
            retention=self.retention,
            rate=self.rate,
            normalize=True,
            anchor=initial if self.anchor == "initial" else None,
        )
        answer, _ = network.read(keys)
        memories |= {"first": network.first, "second": network.second}
        d = read_out(answer, self.output, self.scale, self.steps, self.coefficients)
        return d, memories

    def symmetries(self) -> Symmetries:
        return through(symmetric("odd", "degree 0"), self.output, self.scale)


def network_slots(d: int, width: int) -> dict[str, Slot]:
    """The residual network on rows of length d: it starts as the identity."""
    return {"first": Slot((d, width), "dct", 1.0), "second": Slot((width, d))}
