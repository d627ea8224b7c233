"""Generalised gradient descent: a proximal step that stays near the last few weights (Eq. 59)."""

import numpy as np

from . import common


def ggd(
    w0,
    gradients,
    *,
    lr,
    weight_decay=0.0,
    decoupled=True,
    context=None,
    objective="l2",
    values="gradient",
    kappa=1.0,
    states=2,
    decay=0.5,
    inputs="last",
    **frame,
) -> common.Trajectory:
    """Return the parameters and the memories (past_1, ..., past_(states - 1)) after each step."""
    weights = [decay**i for i in range(states)]
    names = [f"past_{i}" for i in range(1, states)]

    def minimiser(anchors, g, C):
        # 0 = dF(W) + sum_i c_i (W - W_i) / lr, multiplied by lr and solved for W from the right
        total = sum(c * W for c, W in zip(weights, anchors, strict=True)) - lr * g
        if objective == "dot":
            return total / sum(weights)
        if objective != "l2":
            raise ValueError(objective)
        if {"gradient": False, "target": True}[values]:
            total = total + lr * kappa * anchors[0] @ C
        system = sum(weights) * np.eye(len(C)) + lr * kappa * C
        return np.linalg.solve(system.T, total.T).T

    def rule(w, G, memories, t):
        anchors = [w, *(w + memories[name] for name in names)]
        C = None if context is None else np.asarray(context[t - 1]["gram"], dtype=np.float64)
        if {"last": False, "first": True}[inputs]:
            W = minimiser([x.T for x in anchors], G.T, C).T
        else:
            W = minimiser(anchors, G, C)
        new = W - lr * weight_decay * w if decoupled else W
        past = {name: x - new for name, x in zip(names, anchors[: states - 1], strict=True)}
        return np.zeros_like(w), past, W - w

    return common.run(
        rule,
        {name: np.zeros(np.shape(w0)) for name in names},
        w0,
        gradients,
        lr=lr,
        weight_decay=weight_decay,
        decoupled=decoupled,
        **frame,
    )
