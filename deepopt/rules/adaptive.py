"""Adaptive: diagonal memories of the gradient and of its square, or its sign."""

from __future__ import annotations

from deepopt.expr import Expr, maximum, sign, sqrt
from deepopt.memory import average
from deepopt.rule import Betas, Memories, Rate, Rule, Slot, Time, Update


class AdamW(Rule):
    """Adam with decoupled weight decay; `decoupled=False` is the first Adam.

    Memory: two tables without keys, of the same frequency and independent: values gradients and
    squared gradients, dot-product objectives, written every step (reading ours; the paper derives
    its Adam from one diagonal least-squares memory with the gradient as key).
    lr: size of a step per coordinate. betas: retentions of the two memories per step.
    eps: added to the root of the second, in units of gradient.
    Shapes: any; the memories have the parameter's.
    Source: Kingma & Ba 2015; Loshchilov & Hutter 2019; paper Eq. 100-105 (App. B).
    """

    lr: Rate = 1e-3
    weight_decay: Rate = 1e-2
    betas: Betas = (0.9, 0.999)
    eps: Rate = 1e-8

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"exp_avg": Slot(shape), "exp_avg_sq": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        beta1, beta2 = self.betas
        m = average(s["exp_avg"], g, beta1)
        v = average(s["exp_avg_sq"], g * g, beta2)
        root = sqrt(v) / sqrt(1.0 - beta2**t.step)
        # The bound is below every normal number: it makes 0/0 zero where eps is zero.
        d = m / (1.0 - beta1**t.step) / maximum(root + self.eps, 1e-38)
        return d, {"exp_avg": m, "exp_avg_sq": v}


class Lion(Rule):
    """The sign of an interpolated momentum.

    Memory: a table without keys; values gradients, dot-product objective, written every step and
    read through σ = sign after one more step at another retention.
    lr: size of a step per coordinate (about a third of AdamW's or less).
    betas: retentions of the read and of the write, per step.
    Shapes: any; the memory has the parameter's.
    Source: Chen et al. 2023; as a memory, paper App. B (reading ours).
    """

    lr: Rate = 3e-4
    betas: Betas = (0.9, 0.99)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"exp_avg": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        read, written = self.betas
        d = sign(average(s["exp_avg"], g, read))
        return d, {"exp_avg": average(s["exp_avg"], g, written)}
