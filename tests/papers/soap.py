"""SOAP: Adam's element-wise memory in the eigenbases of the Kronecker factors."""

import numpy as np

from . import common, kronecker


def refreshed(M: np.ndarray, Q: np.ndarray, refresh: str, damping: float) -> np.ndarray:
    """The basis Q of one factor after a step of orthogonal iteration, or the eigenvectors."""
    if refresh == "eigh":
        return np.linalg.eigh(M)[1]
    if refresh != "qr":
        raise ValueError(refresh)
    if not M.any():
        return Q
    new, triangle = np.linalg.qr((M + damping * np.trace(M) / len(M) * np.eye(len(M))) @ Q)
    return new * np.where(np.diag(triangle) < 0, -1.0, 1.0)


def soap(
    w0,
    gradients,
    *,
    betas=(0.95, 0.95),
    shampoo_beta=0.95,
    eps=1e-8,
    period=10,
    sides="both",
    block=1024,
    refresh="qr",
    damping=1e-4,
    rotate=True,
    scale="none",
    **frame,
) -> common.Trajectory:
    """Return the parameters and the memories after each step.

    They are exp_avg, exp_avg_sq, left, right, left_basis and right_basis; a side without a factor
    has none.
    """
    b1, b2 = betas
    shape, names = np.shape(w0), kronecker.sides_of(sides)

    def into(bases, x):
        """Q_L^T x Q_R."""
        flipped = {s: Q.swapaxes(1, 2) if s == "left" else Q for s, Q in bases.items()}
        return kronecker.between(flipped, x)

    def back(bases, x):
        """Q_L x Q_R^T."""
        flipped = {s: Q.swapaxes(1, 2) if s == "right" else Q for s, Q in bases.items()}
        return kronecker.between(flipped, x)

    def rule(w, G, memories, t):
        bases = {side: memories[f"{side}_basis"] for side in names}
        m = common.average(memories["exp_avg"], G, b1)
        v = common.average(memories["exp_avg_sq"], into(bases, G) ** 2, b2)
        u = common.divide(into(bases, m) / (1 - b1**t), np.sqrt(v / (1 - b2**t)) + eps)
        d = common.scale(back(bases, u), scale, orthogonal=False)

        new = {"exp_avg": m}
        squares = {}
        for side in names:
            new[side] = common.average(memories[side], kronecker.gram(G, side, block), shampoo_beta)
            Q = bases[side]
            if t % period == 0:
                pairs = zip(new[side], bases[side], strict=True)
                Q = np.stack([refreshed(M, old, refresh, damping) for M, old in pairs])
                squares[side] = (bases[side].swapaxes(1, 2) @ Q) ** 2
            new[f"{side}_basis"] = Q
        if rotate and squares:
            v = into(squares, v)
        return d, {**new, "exp_avg_sq": v}

    start = {"exp_avg": np.zeros(shape), "exp_avg_sq": np.zeros(shape)}
    for side in names:
        start[side] = kronecker.zeros(shape, side, block)
        start[f"{side}_basis"] = kronecker.identity(shape, side, block)
    return common.run(rule, start, w0, gradients, **frame)
