"""Gradient descent, W <- W - lr * g (Eq. 1 and 30)."""

from . import common


def sgd(w0, gradients, *, lr, weight_decay=0.0, decoupled=True, every=1) -> common.Trajectory:
    """Return the parameters and the (empty) memories after each step."""

    def rule(w, G, memories, t):
        return G, {}

    return common.run(
        rule,
        {},
        w0,
        gradients,
        lr=lr,
        weight_decay=weight_decay,
        decoupled=decoupled,
        every=every,
    )
