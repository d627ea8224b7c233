"""Descent: no memory but the weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepopt.expr import Expr, Number, as_expr, sign, stop_gradient
from deepopt.functions import ratio
from deepopt.memory import Linear, Table, descent, dot, l2_of_moments
from deepopt.readout import DEGREE_0, ELEMENTWISE, LINEAR
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
)


class SGD(Rule):
    """Stochastic gradient descent.

    Memory: the weights alone, a linear memory with the layer's inputs as keys, minus the output
    gradients as values and the dot-product objective; written every step.
    lr: weight per unit of gradient.
    Shapes: any.
    Source: paper Eq. 1-3, 30.
    """

    lr: Rate = 1e-2

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        return _descended(w, g, self.lr), {}

    def symmetries(self) -> Symmetries:
        return LINEAR


class SignSGD(Rule):
    """The sign of the gradient.

    Memory: the weights alone; of the gradient a diagonal memory of one step, with the gradient as
    key and its size as value (paper Eq. 101 with a window of one).
    lr: size of a step per coordinate.
    Shapes: any.
    Source: Bernstein et al. 2018; as a memory, paper App. B (reading ours).
    """

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        return sign(g), {}

    def symmetries(self) -> Symmetries:
        return ELEMENTWISE | DEGREE_0


class DGD(Rule):
    """Delta gradient descent: the weights erase what they answer to an input before they learn.

    Memory: the weights, a linear memory with the layer's inputs x as keys and minus the output
    gradients as values; L2 objective, written every step.
        It is descent on the loss plus ½·kappa·‖Wx‖² with x held fixed, so kappa > 0 shrinks what
        the layer puts out; on ½‖Wx - y‖² it converges to y / (1 + kappa).
    lr: inner learning rate η, weight per unit of gradient. kappa: share of the erasing term; 1 is
        the paper's, which learns half of its targets, 0 is gradient descent.
    solver: "exact", the minimiser of objective + ‖W - W_t‖²/2η over all rows at once, stable for
        any inputs; "explicit", one gradient step, stable while η·kappa·λmax(gram) < 2; "unit",
        Eq. 57's η/(1 + η·kappa) for inputs of norm one; "neurips", the short version's erasing term
        without η, which is left out only where lr is exactly 0.
    inputs: the axis of the parameter that meets the inputs: "last" in torch, "first" in flax.
    The retention α of Eq. 88 is 1 - lr·weight_decay, inside the exact solution (αW) with
    decoupled=False.
    Context: gram, the mean over rows of xᵀx, d × d for d inputs. `torch_backend.DGD(model)` records
    it; elsewhere it is given with the gradients.
    Shapes: r × c. Raises ValueError where the parameter is not a matrix or the gram is missing.
    Source: paper Eq. 56-57, 112-121, errata in docs/notation.md; batches and kappa are ours.
    """

    lr: Rate = 1e-2
    kappa: Rate = 0.1
    solver: Literal["exact", "explicit", "unit", "neurips"] = "exact"
    inputs: Literal["last", "first"] = "last"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def context(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return _gram(shape, self.inputs)

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        memory, cross = Linear(_turned(w, self.inputs)), -_turned(g, self.inputs)
        gram = self.kappa * s["gram"]
        goal = l2_of_moments(memory, gram, cross)
        match self.solver:
            case "exact":
                d = descent(goal, self.lr, "prox")
            case "explicit":
                d = descent(goal, self.lr, "explicit")
            case "unit":
                d = descent(goal, self.lr, "explicit") / (1.0 + self.lr * self.kappa)
            case "neurips":
                d = ratio(gram @ memory.weight, as_expr(self.lr)) - cross
        return _turned(d, self.inputs), {}


class GGD(Rule):
    """Generalised gradient descent: any objective, values of its own, kept near past weights.

    Memory: the weights, a linear memory with the layer's inputs x as keys; written every step as
    argmin objective + Σᵢ decayⁱ·‖W - Wᵢ‖²/2η over the last `states` weights.
    objective: "dot" (as gradient descent) or "l2" (as delta gradient descent, exact).
    values: what the memory should answer: "gradient", minus the output gradient, as the paper, or
        "target", its answer minus the output gradient (ours), which shrinks nothing.
    lr: inner learning rate η; at 0 the weights still go to the mean of the states.
    kappa: share of the quadratic term of "l2".
    states: how many past weights, the current ones included. decay: weight of a state relative to
        the one after it. inputs: as in `DGD`.
    Context: gram for "l2", as in `DGD`.
    Shapes: parameter and past weights r × c. Raises ValueError where the parameter is not a matrix
    or the gram is missing.
    Source: paper Def. 5, Eq. 58-60; closed forms, kappa and "target" are ours.
    """

    lr: Rate = 1e-2
    objective: Literal["dot", "l2"] = "l2"
    values: Literal["gradient", "target"] = "gradient"
    kappa: Rate = 1.0
    states: Period = 2
    decay: Retention = 0.5
    inputs: Literal["last", "first"] = "last"
    domain: ClassVar[Literal["any", "matrix"]] = "matrix"

    def context(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return _gram(shape, self.inputs) if self.objective == "l2" else {}

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {f"past_{i}": Slot(shape) for i in range(1, self.states)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        # Past weights are kept relative to w, so that they start at zero.
        past = [s[f"past_{i}"] for i in range(1, self.states)]
        shares = [self.decay**i for i in range(1, self.states)]
        total = sum(shares, 1.0)
        parts = [c * x for c, x in zip(shares, past, strict=True)]
        shift = sum(parts[1:], parts[0]) / total if parts else None
        anchor, rate = w if shift is None else w + shift, self.lr / total
        if self.objective == "dot":
            d = _descended(anchor, g, rate) / total
        else:
            gram = self.kappa * s["gram"]
            cross = -_turned(g, self.inputs)
            if self.values == "target":
                cross = cross + gram @ _turned(w, self.inputs)
            goal = l2_of_moments(Linear(_turned(anchor, self.inputs)), gram, cross)
            d = _turned(descent(goal, rate, "prox"), self.inputs) / total
        return (d, {}) if shift is None else (d, {}, shift)

    def after(self, memories: Memories, change: Expr, s: Memories, t: Time) -> dict[str, Expr]:
        past = [-change, *(s[f"past_{i}"] - change for i in range(1, self.states - 1))]
        return {f"past_{i}": x for i, x in enumerate(past[: self.states - 1], 1)}


def _descended(w: Expr, g: Expr, rate: Number) -> Expr:
    """Along the dot-product objective of weights, their values held fixed whatever is in g."""
    return descent(dot(Table(w), -stop_gradient(g)), rate, "explicit")


def _turned(x: Expr, inputs: str) -> Expr:
    """As a linear memory, inputs on the first axis; and back."""
    return x.mT if inputs == "last" else x


def _gram(shape: tuple[int, ...], inputs: str) -> dict[str, tuple[int, ...]]:
    n = shape[-1] if inputs == "last" else shape[-2]
    return {"gram": (n, n)}
