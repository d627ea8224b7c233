"""Lion: a linear memory read out through the sign of an interpolated state."""

import numpy as np

from . import common


def lion(
    w0,
    gradients,
    *,
    lr,
    weight_decay=0.0,
    decoupled=True,
    every=1,
    betas=(0.9, 0.99),
) -> common.Trajectory:
    """Return the parameters and the memories (exp_avg) after each step."""
    b1, b2 = betas

    def rule(w, G, memories, t):
        m = memories["exp_avg"]
        d = np.sign(b1 * m + (1 - b1) * G)
        return d, {"exp_avg": b2 * m + (1 - b2) * G}

    return common.run(
        rule,
        {"exp_avg": np.zeros(np.shape(w0))},
        w0,
        gradients,
        lr=lr,
        weight_decay=weight_decay,
        decoupled=decoupled,
        every=every,
    )
