"""The diagonal memory of all gradients, solved by ridge regression (Eq. 100-105)."""

import numpy as np

from . import common


def diagonal_memory(
    w0, gradients, *, retention=0.99, values="root", accumulate="ema", ridge=1e-8, **frame
) -> common.Trajectory:
    """Return the parameters and the memories (cross, gram) after each step."""

    def gathered(memory, x):
        if {"ema": False, "sum": True}[accumulate]:
            return memory + x
        return common.average(memory, x, retention)

    def rule(w, G, memories, t):
        new = {"cross": gathered(memories["cross"], G), "gram": gathered(memories["gram"], G * G)}
        mass = 1.0 if accumulate == "sum" else 1 - retention**t
        C, H = new["cross"] / mass, new["gram"] / mass
        P = {"root": np.sqrt(H), "square": H}[values]
        return common.divide(P * C, H + ridge), new

    start = {"cross": np.zeros(np.shape(w0)), "gram": np.zeros(np.shape(w0))}
    return common.run(rule, start, w0, gradients, **frame)
