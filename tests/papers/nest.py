"""A nest of momentum memories of several kinds and frequencies (Eq. 74)."""

import numpy as np

from . import common
from .deep_momentum import cosines, inner_gradients


def nest(
    w0,
    gradients,
    *,
    memory=("table", "delta"),
    retention=(0.9, 0.9),
    period=(1, 16),
    weight=(1.0, 0.1),
    output=("newton_schulz",),
    width=32,
    coefficients="quintic",
    steps=5,
    scale="rms",
    **frame,
) -> common.Trajectory:
    """Return the parameters and the memories after each step, levels being numbered from 0.

    A level has memory_0, or first_0 and second_0 if it is deep; and chunk_0 and readout_0 if its
    period is above 1.
    """
    shape = np.shape(w0)
    levels = list(enumerate(common.columns(memory, retention, period, weight, output)))
    A0 = cosines(shape[1], width)

    def written(kind, number, a, g, memories):
        """The answer of a memory to the gradient it was just given, and its new content."""
        if kind == "table":
            m = common.average(memories[f"memory_{number}"], g, a)
            return m, {f"memory_{number}": m}
        if kind == "delta":
            k = common.divide(g, common.frob(g))
            m = a * memories[f"memory_{number}"] + k
            m = m @ np.linalg.inv(np.eye(shape[1]) + k.T @ k)
            return m, {f"memory_{number}": m}
        s = common.divide(g, common.rms(g))
        A, B = memories[f"first_{number}"], memories[f"second_{number}"]
        dA, dB = inner_gradients(A, B, s, s, "dot")
        H = np.tanh(s @ A)
        A = A0 + a * (A - A0) - common.divide(dA, np.sum(s * s))
        B = a * B - common.divide(dB, np.sum(H * H))
        return s + np.tanh(s @ A) @ B, {f"first_{number}": A, f"second_{number}": B}

    def rule(w, G, memories, t):
        new, total = dict(memories), np.zeros(shape)
        for number, (kind, a, T, weighted, out) in levels:
            if T == 1:
                answer, kept = written(kind, number, a, G, memories)
                new |= kept
                total = total + weighted * common.readout(answer, out, "none", steps, coefficients)
                continue
            total = total + weighted * memories[f"readout_{number}"]
            chunk = memories[f"chunk_{number}"] + G
            if t % T == 0:  # read from the next step on
                answer, kept = written(kind, number, a, chunk / T, memories)
                answer = common.readout(answer, out, "none", steps, coefficients)
                new |= {**kept, f"readout_{number}": answer}
                chunk = np.zeros(shape)
            new[f"chunk_{number}"] = chunk
        orthogonal = [out for _, (*_, out) in levels] == ["newton_schulz"]
        return common.scale(total, scale, orthogonal), new

    start = {}
    for number, (kind, _, T, _, _) in levels:
        if kind == "deep":
            start |= {f"first_{number}": A0, f"second_{number}": np.zeros((width, shape[1]))}
        elif kind in ("table", "delta"):
            start[f"memory_{number}"] = np.zeros(shape)
        else:
            raise ValueError(kind)
        if T > 1:
            start |= {f"chunk_{number}": np.zeros(shape), f"readout_{number}": np.zeros(shape)}
    return common.run(rule, start, w0, gradients, **frame)
