"""Heavy-ball and Nesterov momentum, m <- momentum * m + g (Eq. 10 and 33)."""

import numpy as np

from . import common


def heavy_ball(
    w0,
    gradients,
    *,
    lr,
    weight_decay=0.0,
    decoupled=True,
    every=1,
    momentum=0.9,
    nesterov=False,
) -> common.Trajectory:
    """Return the parameters and the memories (momentum_buffer) after each step."""

    def rule(w, G, memories, t):
        m = momentum * memories["momentum_buffer"] + G
        d = G + momentum * m if nesterov else m
        return d, {"momentum_buffer": m}

    return common.run(
        rule,
        {"momentum_buffer": np.zeros(np.shape(w0))},
        w0,
        gradients,
        lr=lr,
        weight_decay=weight_decay,
        decoupled=decoupled,
        every=every,
    )
