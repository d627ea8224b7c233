"""Descent: no memory but the weights."""

from __future__ import annotations

from deepopt.expr import Expr
from deepopt.rule import Memories, Rate, Rule, Time, Update


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
        return g, {}
