"""The sign of the gradient, SignSGD, and of its moving average, Signum."""

import numpy as np

from . import common


def sign_sgd(w0, gradients, **frame) -> common.Trajectory:
    """Return the parameters and the (empty) memories after each step."""

    def rule(w, G, memories, t):
        return np.sign(G), {}

    return common.run(rule, {}, w0, gradients, **frame)


def signum(w0, gradients, *, momentum=0.9, **frame) -> common.Trajectory:
    """Return the parameters and the memories (momentum_buffer) after each step."""

    def rule(w, G, memories, t):
        m = common.average(memories["momentum_buffer"], G, momentum)
        return np.sign(m), {"momentum_buffer": m}

    return common.run(rule, {"momentum_buffer": np.zeros(np.shape(w0))}, w0, gradients, **frame)
