"""Adaptive: diagonal memories of the gradient and of its square, or its sign."""

from __future__ import annotations

from typing import Literal

from deepopt.expr import Expr, Number, maximum, sign, sqrt, where
from deepopt.functions import ratio
from deepopt.memory import Table, average, dot, write
from deepopt.readout import DEGREE_0, ELEMENTWISE, LINEAR
from deepopt.rule import Betas, Memories, Rate, Retention, Rule, Slot, Symmetries, Time, Update


class AdaGrad(Rule):
    """The gradient over the root of the sum of all squared gradients.

    Memory: a table without keys; values squared gradients, dot-product objective, written every
    step and never forgotten.
    lr: size of the first step per coordinate. initial: what the sum starts from, in units of
    squared gradient. eps: added to the root, in units of gradient.
    Shapes: any; the memory has the parameter's.
    Source: Duchi et al. 2011; paper Eq. 106-111 (App. B, without momentum), the diagonal case.
    """

    lr: Rate = 1e-2
    initial: Rate = 0.0
    eps: Rate = 1e-10

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"sum_sq": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        v = write(dot(Table(s["sum_sq"]), g * g)).value
        return over(g, sqrt(v + self.initial), self.eps), {"sum_sq": v}

    def symmetries(self) -> Symmetries:
        return ELEMENTWISE | DEGREE_0 if self.initial == 0 else ELEMENTWISE


class RMSProp(Rule):
    """The gradient over the root of an average of its square.

    Memory: a table without keys; values squared gradients, dot-product objective, written every
    step. `centered` subtracts the square of an average of the gradient, a second memory.
    lr: size of a step per coordinate. beta2: retention of the memories per step.
    eps: added to the root, in units of gradient.
    Shapes: any; the memories have the parameter's.
    Source: Tieleman & Hinton 2012, Graves 2013 (centered); paper App. B by relation.
    """

    lr: Rate = 1e-3
    beta2: Retention = 0.99
    eps: Rate = 1e-8
    centered: bool = False

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        slots = {"exp_avg_sq": Slot(shape)}
        return slots | ({"exp_avg": Slot(shape)} if self.centered else {})

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        v = average(s["exp_avg_sq"], g * g, self.beta2)
        memories, variance = {"exp_avg_sq": v}, v
        if self.centered:
            m = memories["exp_avg"] = average(s["exp_avg"], g, self.beta2)
            variance = maximum(v - m * m, 0.0)
        return over(g, sqrt(variance), self.eps), memories

    def symmetries(self) -> Symmetries:
        return ELEMENTWISE | DEGREE_0


class AdamW(Rule):
    """Adam with decoupled weight decay; `decoupled=False` is the first Adam.

    Memory: two tables without keys, of the same frequency and independent: values gradients and
    squared gradients, dot-product objectives, written every step (reading ours; the paper derives
    its Adam from one diagonal least-squares memory with the gradient as key: `DiagonalMemory`).
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
        memories = _moments(s, g, self.betas)
        m, v = memories.values()
        beta1, beta2 = self.betas
        root = sqrt(v) / sqrt(1.0 - beta2**t.step)
        return over(m / (1.0 - beta1**t.step), root, self.eps), memories

    def symmetries(self) -> Symmetries:
        return ELEMENTWISE | DEGREE_0


class Adam(AdamW):
    """Adam as it was first: weight decay, if any, is added to the gradient.

    Memory: as `AdamW`, two tables without keys; values gradients and squared gradients.
    lr: size of a step per coordinate. betas: retentions of the two memories per step.
    eps: added to the root of the second, in units of gradient. decoupled: True is `AdamW`.
    Shapes: any; the memories have the parameter's.
    Source: Kingma & Ba 2015; paper Eq. 100-105 (App. B).
    """

    weight_decay: Rate = 0.0
    decoupled: bool = False


class NAdam(Rule):
    """Adam with Nesterov's momentum.

    Memory: two tables without keys; values gradients and squared gradients, dot-product objectives,
    written every step; the first is read one step ahead.
    lr: size of a step per coordinate. betas: retentions of the two memories per step.
    schedule: "dozat", the momentum is betas[0] times 1 - ½·0.96^(step·momentum_decay), as in torch;
        "constant", as in optax. momentum_decay: its rate per step.
    eps: added to the root, in units of gradient.
    Shapes: any; the memories have the parameter's, and one number holds the product of momenta.
    Source: Dozat 2016; paper App. B by relation.
    """

    lr: Rate = 2e-3
    betas: Betas = (0.9, 0.999)
    eps: Rate = 1e-8
    schedule: Literal["dozat", "constant"] = "dozat"
    momentum_decay: Rate = 4e-3

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        slots = {"exp_avg": Slot(shape), "exp_avg_sq": Slot(shape)}
        if self.schedule == "dozat":
            slots["mu_product"] = Slot((1,) * len(shape), value=1.0)
        return slots

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        memories = _moments(s, g, self.betas)
        m, v = memories.values()
        beta1, beta2 = self.betas
        now = after = beta1
        done: Number = beta1**t.step
        if self.schedule == "dozat":
            now, after = (
                beta1 * (1.0 - 0.5 * 0.96 ** (step * self.momentum_decay))
                for step in (t.step, t.step + 1.0)
            )
            done = memories["mu_product"] = s["mu_product"] * now
        ahead = g * ((1.0 - now) / (1.0 - done)) + m * (after / (1.0 - done * after))
        return over(ahead, sqrt(v / (1.0 - beta2**t.step)), self.eps), memories

    def symmetries(self) -> Symmetries:
        return ELEMENTWISE | DEGREE_0


class RAdam(Rule):
    """Adam whose adaptive step is held back while its second memory is young.

    Memory: two tables without keys; values gradients and squared gradients, dot-product objectives,
    written every step; the second is read only when its variance is bounded (ρ > 5).
    lr: size of a step per coordinate; before that, weight per unit of gradient.
    betas: retentions of the two memories per step. eps: added to the root after its bias is
        corrected, in units of gradient (torch adds it before).
    Shapes: any; the memories have the parameter's. In JAX ρ is computed in float32 and loses its
    digits where betas[1] is above 0.999.
    Source: Liu et al. 2020; paper App. B by relation.
    """

    lr: Rate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: Rate = 1e-8

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"exp_avg": Slot(shape), "exp_avg_sq": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        memories = _moments(s, g, self.betas)
        m, v = memories.values()
        beta1, beta2 = self.betas
        power = beta2**t.step
        most = 2.0 / (1.0 - beta2) - 1.0
        rho = most - 2.0 * t.step * power / (1.0 - power)
        share = ratio((rho - 4.0) * (rho - 2.0) * most, (most - 4.0) * (most - 2.0) * rho)
        plain = m / (1.0 - beta1**t.step)
        held = over(plain, sqrt(v / (1.0 - power)), self.eps) * sqrt(maximum(share, 0.0))
        return where(rho > 5.0, held, plain), memories

    def symmetries(self) -> Symmetries:
        return ELEMENTWISE


class AMSGrad(Rule):
    """Adam whose second memory never shrinks.

    Memory: two tables without keys; values gradients and squared gradients, dot-product objectives,
    written every step; of the second the largest value so far is read.
    lr: size of a step per coordinate. betas: retentions of the two memories per step.
    eps: added to the root, in units of gradient. corrected: correct the bias before the largest is
    taken, as optax does; torch corrects it after.
    Shapes: any; the memories have the parameter's.
    Source: Reddi et al. 2018; paper App. B by relation.
    """

    lr: Rate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: Rate = 1e-8
    corrected: bool = False

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {k: Slot(shape) for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        memories = _moments(s, g, self.betas)
        m, v = memories.values()
        beta1, beta2 = self.betas
        correction = 1.0 - beta2**t.step
        most = maximum(s["max_exp_avg_sq"], v / correction if self.corrected else v)
        root = sqrt(most) if self.corrected else sqrt(most) / sqrt(correction)
        d = over(m / (1.0 - beta1**t.step), root, self.eps)
        return d, memories | {"max_exp_avg_sq": most}

    def symmetries(self) -> Symmetries:
        return ELEMENTWISE | DEGREE_0


class DiagonalMemory(Rule):
    """The paper's Adam: a diagonal memory that maps each gradient to a statistic of all of them.

    Memory: m with the answer m ⊙ g; keys gradients, values P, the objective Σ‖m ⊙ gᵢ - P‖² + ridge·
    ‖m‖² over all steps, solved in closed form every step: m = P ⊙ Σg / (Σg² + ridge).
    lr: size of a step per coordinate (values "root"; with "sum"s it grows as √t).
    retention: of both sums per step, one for both. accumulate: "ema", averages with bias
        correction, or undecayed "sum"s as printed.
    values: P. "root", √Σg², gives the paper's Adam; "square", Σg², gives momentum.
    ridge: λ, in units of squared gradient.
    Shapes: any; the memories have the parameter's. Squares below 1e-38 count as zero in float32.
    Source: paper Eq. 100-105 (App. B), with one sign of its slips flipped (docs/notation.md).
    """

    lr: Rate = 1e-3
    retention: Retention = 0.95
    accumulate: Literal["ema", "sum"] = "ema"
    values: Literal["root", "square"] = "root"
    ridge: Rate = 0.0

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"cross": Slot(shape), "gram": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        pairs = {"cross": g, "gram": g * g}
        if self.accumulate == "ema":
            sums = {k: average(s[k], x, self.retention) for k, x in pairs.items()}
            correction = 1.0 - self.retention**t.step
        else:
            sums = {k: write(dot(Table(s[k]), x)).value for k, x in pairs.items()}
            correction = 1.0
        cross, gram = (sums[k] / correction for k in pairs)
        values = sqrt(gram) if self.values == "root" else gram
        return ratio(values * cross, gram + self.ridge), sums

    def symmetries(self) -> Symmetries:
        if self.ridge != 0:
            return ELEMENTWISE
        return LINEAR if self.values == "square" else ELEMENTWISE | DEGREE_0


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

    def symmetries(self) -> Symmetries:
        return ELEMENTWISE | DEGREE_0


def over(x: Expr, root: Expr, eps: Number) -> Expr:
    """x / (root + eps), and zero where all are zero."""
    # Where eps is zero: squares of less underflow in float32, so the root is no root of theirs.
    return x / maximum(root + eps, 1e-19)


def _moments(s: Memories, g: Expr, betas: tuple[Number, Number]) -> dict[str, Expr]:
    """The averages of the gradient and of its square after g."""
    values = {"exp_avg": g, "exp_avg_sq": g * g}
    return {k: average(s[k], x, beta) for (k, x), beta in zip(values.items(), betas, strict=True)}
