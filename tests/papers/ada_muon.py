"""Muon whose orthogonalised momentum is divided by its own second moment, AdaMuon."""

import numpy as np

from . import common


def ada_muon(
    w0,
    gradients,
    *,
    momentum=0.95,
    beta2=0.95,
    eps=1e-8,
    signed=True,
    coefficients="quintic",
    steps=5,
    scale="rms",
    **frame,
) -> common.Trajectory:
    """Return the parameters and the memories (momentum_buffer, exp_avg_sq) after each step."""

    def rule(w, G, memories, t):
        m = common.average(memories["momentum_buffer"], G, momentum)
        turned = common.newton_schulz(np.sign(m) if signed else m, coefficients, steps)
        v = common.average(memories["exp_avg_sq"], turned * turned, beta2)
        d = common.divide(turned, np.sqrt(v) + eps)
        new = {"momentum_buffer": m, "exp_avg_sq": v}
        return common.scale(d, scale, orthogonal=False), new

    start = {"momentum_buffer": np.zeros(np.shape(w0)), "exp_avg_sq": np.zeros(np.shape(w0))}
    return common.run(rule, start, w0, gradients, **frame)
