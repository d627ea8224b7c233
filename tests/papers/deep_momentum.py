"""Deep momentum: a residual two-layer perceptron as the memory of the gradient (Eq. 50 and 52)."""

import numpy as np

from . import common


def inner_gradients(A, B, s, v, objective) -> tuple[np.ndarray, np.ndarray]:
    """Gradients in A and B of the inner objective of m(s) = s + tanh(sA)B, for keys s, values v."""
    H = np.tanh(s @ A)
    error = {"l2": s + H @ B - v, "dot": -v}[objective]  # the derivative in m(s)
    return s.T @ ((error @ B.T) * (1 - H * H)), H.T @ error


def cosines(c, width) -> np.ndarray:
    """The first layer at the start: the first orthonormal cosines (DCT-II), then zero columns."""
    A0 = np.zeros((c, width))
    for j in range(min(c, width)):
        A0[:, j] = np.sqrt((1 if j == 0 else 2) / c) * np.cos(np.pi * (np.arange(c) + 0.5) * j / c)
    return A0


def deep_momentum(
    w0,
    gradients,
    *,
    lr,
    weight_decay=0.0,
    decoupled=True,
    every=1,
    retention=0.99,
    rate=1.0,
    objective="l2",
    teacher="ema",
    teacher_retention=0.9,
    width=32,
    anchor="initial",
    output="identity",
    coefficients="quintic",
    steps=5,
    scale="rms",
) -> common.Trajectory:
    """Return the parameters and the memories (exp_avg, first, second) after each step."""
    r, c = np.shape(w0)
    A0 = cosines(c, width)
    A_anchor = {"initial": A0, "zero": np.zeros_like(A0)}[anchor]

    def rule(w, G, memories, t):
        s = common.divide(G, common.rms(G))
        A, B = memories["first"], memories["second"]
        kept = {}
        if teacher == "ema":
            e = teacher_retention * memories["exp_avg"] + (1 - teacher_retention) * s
            kept["exp_avg"] = e
            v = e / (1 - teacher_retention**t)
        elif teacher == "gradient":
            v = s
        else:
            raise ValueError(teacher)

        dA, dB = inner_gradients(A, B, s, v, objective)
        H = np.tanh(s @ A)
        A = A_anchor + retention * (A - A_anchor) - rate * common.divide(dA, np.sum(s * s))
        B = retention * B - rate * common.divide(dB, np.sum(H * H))

        read = s + np.tanh(s @ A) @ B
        orthogonal = {"newton_schulz": True, "identity": False}[output]
        d = common.newton_schulz(read, coefficients, steps) if orthogonal else read
        return common.scale(d, scale, orthogonal), {**kept, "first": A, "second": B}

    start = {"first": A0, "second": np.zeros((width, c))}
    if teacher == "ema":
        start["exp_avg"] = np.zeros((r, c))
    return common.run(
        rule,
        start,
        w0,
        gradients,
        lr=lr,
        weight_decay=weight_decay,
        decoupled=decoupled,
        every=every,
    )
