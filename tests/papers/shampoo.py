"""Shampoo: momentum between the inverse roots of its two Kronecker factors."""

import numpy as np

from . import common, kronecker


def shampoo(
    w0,
    gradients,
    *,
    momentum=0.9,
    beta2=0.99,
    accumulate="ema",
    period=1,
    sides="both",
    floor=1e-6,
    block=1024,
    graft="none",
    eps=1e-8,
    scale="rms",
    **frame,
) -> common.Trajectory:
    """Return the parameters and the memories after each step.

    They are momentum_buffer, left, right, left_root and right_root, and exp_avg_sq with Adam's
    size; a side without a factor has none.
    """
    shape, p = np.shape(w0), {"both": 4, "left": 2, "right": 2}[sides]

    def rule(w, G, memories, t):
        new = {"momentum_buffer": common.average(memories["momentum_buffer"], G, momentum)}
        factors = {}
        for side in kronecker.sides_of(sides):
            gram = kronecker.gram(G, side, block)
            if {"ema": False, "sum": True}[accumulate]:
                new[side] = read = memories[side] + gram
            else:
                new[side] = common.average(memories[side], gram, beta2)
                read = new[side] / (1 - beta2**t)
            factors[side] = memories[f"{side}_root"]
            if t % period == 0:
                factors[side] = kronecker.roots(read, p, floor)
            new[f"{side}_root"] = factors[side]
        u = kronecker.between(factors, new["momentum_buffer"])
        v = None
        if graft == "adam":
            v = new["exp_avg_sq"] = common.average(memories["exp_avg_sq"], G * G, beta2)
        filtered = new["momentum_buffer"] / (1 - momentum**t)
        sized = {"graft": graft, "beta2": beta2, "eps": eps, "scale": scale}
        return kronecker.grafted(u, filtered, v, t, **sized), new

    start = {"momentum_buffer": np.zeros(shape)}
    for side in kronecker.sides_of(sides):
        start[side] = kronecker.zeros(shape, side, block)
        start[f"{side}_root"] = kronecker.identity(shape, side, block)
    if graft == "adam":
        start["exp_avg_sq"] = np.zeros(shape)
    return common.run(rule, start, w0, gradients, **frame)
