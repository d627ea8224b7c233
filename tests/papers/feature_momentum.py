"""Momentum of a feature of the gradient, m <- momentum * m + rate * phi(g) (Eq. 51)."""

import numpy as np

from . import common


def feature_momentum(
    w0,
    gradients,
    *,
    momentum=0.9,
    rate=1.0,
    feature="sign_power",
    power=0.5,
    polynomial=(1.5, -0.5),
    normalize=True,
    output="identity",
    scale="none",
    steps=5,
    coefficients="quintic",
    **frame,
) -> common.Trajectory:
    """Return the parameters and the memories (momentum_buffer) after each step."""

    def phi(g):
        if feature == "identity":
            return g
        if feature == "sign_power":
            return np.sign(g) * np.power(np.abs(g), power, out=np.zeros(g.shape), where=g != 0)
        if feature == "polynomial":
            term, total = g, np.zeros(g.shape)
            for c in polynomial:
                total = total + c * term
                term = g @ g.T @ term
            return total
        raise ValueError(feature)

    def rule(w, G, memories, t):
        key = common.divide(G, common.frob(G)) if normalize else G
        m = momentum * memories["momentum_buffer"] + rate * phi(key)
        d = common.readout(m, output, scale, steps, coefficients)
        return d, {"momentum_buffer": m}

    return common.run(rule, {"momentum_buffer": np.zeros(np.shape(w0))}, w0, gradients, **frame)
