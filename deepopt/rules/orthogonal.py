"""Orthogonal: the memory is read with its singular values near one."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepopt.expr import Expr
from deepopt.memory import average
from deepopt.readout import Coefficients, Scale, read_out
from deepopt.rule import Memories, Period, Rate, Retention, Rule, Slot, Time, Update


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
