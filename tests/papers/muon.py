"""Muon: momentum read out through the Newton-Schulz iteration (Eq. 42)."""

import numpy as np

from . import common


def muon(
    w0,
    gradients,
    *,
    lr,
    weight_decay=0.0,
    decoupled=True,
    every=1,
    momentum=0.95,
    nesterov=True,
    coefficients="quintic",
    steps=5,
    scale="rms",
) -> common.Trajectory:
    """Return the parameters and the memories (momentum_buffer) after each step."""

    def rule(w, G, memories, t):
        m = momentum * memories["momentum_buffer"] + (1 - momentum) * G
        u = momentum * m + (1 - momentum) * G if nesterov else m
        orthogonalised = common.newton_schulz(u, coefficients, steps)
        return common.scale(orthogonalised, scale, orthogonal=True), {"momentum_buffer": m}

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
