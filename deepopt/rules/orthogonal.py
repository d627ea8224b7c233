"""Orthogonal: the memory is read with its singular values near one."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepopt.expr import Expr, sign, sqrt
from deepopt.functions import newton_schulz
from deepopt.memory import average
from deepopt.readout import LINEAR, Coefficients, Scale, read_out, scaled, through
from deepopt.rule import (
    Memories,
    Period,
    Rate,
    Retention,
    Rule,
    Slot,
    Symmetries,
    Time,
    Update,
    symmetric,
)
from deepopt.rules.adaptive import over


class Muon(Rule):
    """Momentum, orthogonalised by Newton-Schulz.

    Memory: a table without keys; values gradients, dot-product objective, written every step. The
    read-out is itself an inner optimisation towards OᵀO = I (paper Eq. 43); "cubic" is gradient
    descent on ½‖OᵀO - I‖² at rate ¼ (ours), "quintic" is Jordan's polynomial.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms"), or the spectral norm of
        a step (about lr, scale "none").
    momentum: retention per step, of an average (Jordan's and torch's convention; a sum would give
        the same direction). nesterov: read one step ahead. steps, coefficients: the iteration.
    Shapes: parameter and memory r × c. Raises ValueError where the parameter is not a matrix.
    Source: Jordan et al. 2024; paper Eq. 42. The rms scale is Moonshot's.
    """

    lr: Rate = 1e-2
    momentum: Retention = 0.9
    nesterov: bool = True
    coefficients: Coefficients = "quintic"
    steps: Period = 5
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m = average(s["momentum_buffer"], g, self.momentum)
        u = average(m, g, self.momentum) if self.nesterov else m
        d = read_out(u, "newton_schulz", self.scale, self.steps, self.coefficients)
        return d, {"momentum_buffer": m}

    def symmetries(self) -> Symmetries:
        return through(LINEAR, "newton_schulz", self.scale)


class AdaMuon(Rule):
    """Orthogonalised momentum over the root of an average of its own square.

    Memory: two tables without keys, dot-product objectives, written every step: values gradients,
    read through σ = Newton-Schulz (of their sign), and the squared entries of that read-out.
    lr: root mean square of a step is 0.2·lr per coordinate (scale "rms").
    momentum, beta2: retentions of the two memories per step. eps: added to the root, in units of
        an orthogonal matrix's entries. signed: orthogonalise the sign of the momentum.
    steps, coefficients: the orthogonalising iteration. scale: see `readout.scaled`.
    Shapes: parameter and memories r × c. Raises ValueError where the parameter is not a matrix.
    Source: Si et al. 2025; the paper compares with it in Fig. 12.
    """

    lr: Rate = 1e-2
    momentum: Retention = 0.95
    beta2: Retention = 0.95
    eps: Rate = 1e-8
    signed: bool = True
    coefficients: Coefficients = "quintic"
    steps: Period = 5
    scale: Scale = "rms"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(shape), "exp_avg_sq": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m = average(s["momentum_buffer"], g, self.momentum)
        u = sign(m) if self.signed else m
        u = newton_schulz(u, steps=self.steps, coefficients=self.coefficients)
        v = average(s["exp_avg_sq"], u * u, self.beta2)
        d = scaled(over(u, sqrt(v), self.eps), self.scale, orthogonal=False)
        return d, {"momentum_buffer": m, "exp_avg_sq": v}

    def symmetries(self) -> Symmetries:
        own = symmetric("odd", "transposition", "degree 0")
        return through(own, "newton_schulz", self.scale)
