"""Momentum of preconditioned gradients, m <- momentum * m + rate * P(g) (Eq. 46-47)."""

import numpy as np

from . import common, kronecker


def preconditioned_momentum(
    w0,
    gradients,
    *,
    context=None,
    momentum=0.9,
    rate=1.0,
    values="diagonal",
    beta2=0.999,
    eps=1e-8,
    floor=1e-6,
    period=1,
    block=1024,
    output="identity",
    scale="none",
    steps=5,
    coefficients="quintic",
    **frame,
) -> common.Trajectory:
    """Return the parameters and the memories (momentum_buffer and those of P) after each step.

    A diagonal P keeps exp_avg_sq, a Kronecker-factored one left, right, left_root and right_root.
    """
    shape = np.shape(w0)

    def preconditioned(G, memories, t):
        if values == "given":
            return np.asarray(context[t - 1]["preconditioner"], dtype=np.float64) @ G, {}
        if values == "diagonal":
            v = common.average(memories["exp_avg_sq"], G * G, beta2)
            return common.divide(G, np.sqrt(v / (1 - beta2**t)) + eps), {"exp_avg_sq": v}
        kept, factors = {}, {}
        for side in ("left", "right"):
            M = common.average(memories[side], kronecker.gram(G, side, block), beta2)
            root = memories[f"{side}_root"]
            if t % period == 0:
                root = kronecker.roots(M / (1 - beta2**t), 4, floor)
            kept |= {side: M, f"{side}_root": root}
            factors[side] = root
        return kronecker.between(factors, G), kept

    def rule(w, G, memories, t):
        P, kept = preconditioned(G, memories, t)
        m = momentum * memories["momentum_buffer"] + rate * P
        d = common.readout(m, output, scale, steps, coefficients)
        return d, {"momentum_buffer": m, **kept}

    start = {"momentum_buffer": np.zeros(shape)}
    if values == "diagonal":
        start["exp_avg_sq"] = np.zeros(shape)
    elif values == "kronecker":
        for side in ("left", "right"):
            start[side] = kronecker.zeros(shape, side, block)
            start[f"{side}_root"] = kronecker.identity(shape, side, block)
    elif values != "given":
        raise ValueError(values)
    return common.run(rule, start, w0, gradients, **frame)
