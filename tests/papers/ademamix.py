"""AdEMAMix: Adam with a second, slow average of the gradients in its numerator."""

import numpy as np

from . import common


def ademamix(
    w0, gradients, *, betas=(0.9, 0.999), slow=0.9999, weight=5.0, eps=1e-8, **frame
) -> common.Trajectory:
    """Return the parameters and the memories (exp_avg, exp_avg_slow, exp_avg_sq) of each step."""
    b1, b2 = betas

    def rule(w, G, memories, t):
        m = common.average(memories["exp_avg"], G, b1)
        s = common.average(memories["exp_avg_slow"], G, slow)
        v = common.average(memories["exp_avg_sq"], G * G, b2)
        d = common.divide(m / (1 - b1**t) + weight * s, np.sqrt(v / (1 - b2**t)) + eps)
        return d, {"exp_avg": m, "exp_avg_slow": s, "exp_avg_sq": v}

    start = {name: np.zeros(np.shape(w0)) for name in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}
    return common.run(rule, start, w0, gradients, **frame)
