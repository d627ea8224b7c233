"""Momentum: memories of the gradient that differ in structure and objective, written alike."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepopt.expr import Expr, array, reshape
from deepopt.functions import unit, unit_rms
from deepopt.memory import MLP, Linear, Table, average, dot, l2, write
from deepopt.readout import Coefficients, Output, Scale, read_out
from deepopt.rule import Memories, Period, Rate, Retention, Rule, Slot, Time, Update


class HeavyBall(Rule):
    """Gradient descent with heavy-ball momentum, Nesterov's form by a switch.

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
        seen = {"matrix": g.shape, "flat": (1, g.size), "scalar": (g.size, 1)}[self.view]
        keys, memory = reshape(key, seen), Linear(reshape(s["momentum_buffer"], seen).mT)
        objective = l2(memory, array("eye", (seen[0], seen[0])), keys)
        if self.solver == "explicit" and self.decay == "literal":
            # Eq. 49 as printed scales what it adds by η, and what it erases by 1.
            erased = write(l2(memory, objective.values, keys), retention=self.momentum)
            m = erased.weight.mT - (1.0 - self.rate) * keys
        else:
            new = write(objective, retention=self.momentum, rate=self.rate, solver=self.solver)
            m = new.weight.mT
        m = reshape(m, g.shape)
        d = read_out(m, self.output, self.scale, self.steps, self.coefficients)
        return d, {"momentum_buffer": m}


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
        d = shape[-1]
        network = {
            "first": Slot((d, self.width), "dct", 1.0),
            "second": Slot((self.width, d)),
        }
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
