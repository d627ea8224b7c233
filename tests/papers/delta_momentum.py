"""Delta momentum with P = I, explicit (Eq. 49) or as the exact proximal minimiser of Eq. 48."""

import numpy as np

from . import common


def delta_momentum(
    w0,
    gradients,
    *,
    lr,
    weight_decay=0.0,
    decoupled=True,
    every=1,
    momentum=0.9,
    rate=1.0,
    view="matrix",
    solver="prox",
    decay="eta",
    normalize=True,
    output="newton_schulz",
    coefficients="quintic",
    steps=5,
    scale="rms",
) -> common.Trajectory:
    """Return the parameters and the memories (momentum_buffer) after each step."""

    def viewed(x):
        return {"matrix": x, "flat": x.reshape(1, -1), "scalar": x.reshape(-1, 1)}[view]

    def rule(w, G, memories, t):
        k = viewed(common.divide(G, common.frob(G)) if normalize else G)
        m = viewed(memories["momentum_buffer"])
        gram = k.T @ k
        if solver == "explicit":
            coefficient = {"eta": rate, "literal": 1.0}[decay]
            m = momentum * m - coefficient * m @ gram + rate * k
        elif solver == "prox":
            # 0 = (m k^T - I) k + (m - momentum * m_old) / rate, solved for m from the right
            system = np.eye(len(gram)) + rate * gram
            m = np.linalg.solve(system.T, (momentum * m + rate * k).T).T
        else:
            raise ValueError(solver)
        m = m.reshape(G.shape)
        d = common.readout(m, output, scale, steps, coefficients)
        return d, {"momentum_buffer": m}

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
