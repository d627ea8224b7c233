"""Delta gradient descent, on whole batches and with a coefficient on its decay term (Eq. 56-57)."""

import numpy as np

from . import common


def dgd(
    w0, gradients, *, lr, context=None, kappa=1.0, solver="exact", inputs="last", **frame
) -> common.Trajectory:
    """Return the parameters and the (empty) memories after each step."""

    def direction(w, g, C):
        decay = kappa * w @ C
        if solver == "explicit":
            return g + decay
        if solver == "unit":
            return (g + decay) / (1 + lr * kappa)
        if solver == "neurips":
            return g + common.divide(decay, lr)
        if solver == "exact":
            # 0 = g + kappa W C + (W - w) / lr, solved for W from the right
            system = np.eye(len(C)) + lr * kappa * C
            W = np.linalg.solve(system.T, (w - lr * g).T).T
            return common.divide(w - W, lr)
        raise ValueError(solver)

    def rule(w, G, memories, t):
        C = np.asarray(context[t - 1]["gram"], dtype=np.float64)
        if {"last": False, "first": True}[inputs]:
            return direction(w.T, G.T, C).T, {}
        return direction(w, G, C), {}

    return common.run(rule, {}, w0, gradients, lr=lr, **frame)
