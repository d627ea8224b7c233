"""Adam with bias correction and outer-level retention, AdamW (Eq. 105 with discounted sums)."""

import numpy as np

from . import common


def adamw(
    w0,
    gradients,
    *,
    lr,
    weight_decay=0.0,
    decoupled=True,
    every=1,
    betas=(0.9, 0.999),
    eps=1e-8,
) -> common.Trajectory:
    """Return the parameters and the memories (exp_avg, exp_avg_sq) after each step."""
    b1, b2 = betas

    def rule(w, G, memories, t):
        m = b1 * memories["exp_avg"] + (1 - b1) * G
        v = b2 * memories["exp_avg_sq"] + (1 - b2) * G * G
        m_hat = m / (1 - b1**t)
        v_hat = v / (1 - b2**t)
        d = common.divide(m_hat, np.sqrt(v_hat) + eps)
        return d, {"exp_avg": m, "exp_avg_sq": v}

    return common.run(
        rule,
        {"exp_avg": np.zeros(np.shape(w0)), "exp_avg_sq": np.zeros(np.shape(w0))},
        w0,
        gradients,
        lr=lr,
        weight_decay=weight_decay,
        decoupled=decoupled,
        every=every,
    )


def adam(w0, gradients, *, decoupled=False, stagger=False, **arguments) -> common.Trajectory:
    """Adam, with the weight decay inside the gradient."""
    return adamw(w0, gradients, decoupled=decoupled, **arguments)
