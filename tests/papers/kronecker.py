"""Kronecker factors: Gram matrices of the rows and of the columns, cut into diagonal blocks."""

import numpy as np

from . import common


def sides_of(sides: str) -> list[str]:
    """The sides that have a factor."""
    return {"both": ["left", "right"], "left": ["left"], "right": ["right"]}[sides]


def cut(n: int, block: int) -> int:
    """The smallest divisor k of n with n / k at most `block`."""
    return next(k for k in range(1, n + 1) if n % k == 0 and n // k <= block)


def gram(g: np.ndarray, side: str, block: int) -> np.ndarray:
    """The Gram matrices, k x b x b, of the blocks of rows (left) or of columns (right)."""
    rows = g if side == "left" else g.T
    return np.stack([x @ x.T for x in np.split(rows, cut(len(rows), block))])


def zeros(shape, side: str, block: int) -> np.ndarray:
    """A factor at the start."""
    return np.zeros_like(gram(np.zeros(shape), side, block))


def identity(shape, side: str, block: int) -> np.ndarray:
    """A root or a basis at the start."""
    start = zeros(shape, side, block)
    return start + np.eye(start.shape[-1])


def dense(blocks: np.ndarray) -> np.ndarray:
    """The block-diagonal matrix of k x b x b blocks."""
    k, b, _ = blocks.shape
    out = np.zeros((k * b, k * b))
    for i, x in enumerate(blocks):
        out[i * b : (i + 1) * b, i * b : (i + 1) * b] = x
    return out


def invroot(M: np.ndarray, p: int, floor: float) -> np.ndarray:
    """M^(-1/p) of one matrix, its eigenvalues at least floor times the largest; of 0, it is I."""
    if not M.any():
        return np.eye(len(M))
    values, vectors = np.linalg.eigh(M)
    values = np.maximum(values, floor * values[-1])
    return vectors @ np.diag(common.divide(np.ones(len(M)), values ** (1 / p))) @ vectors.T


def roots(blocks: np.ndarray, p: int, floor: float) -> np.ndarray:
    """The inverse roots of all blocks."""
    return np.stack([invroot(M, p, floor) for M in blocks])


def between(factors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """left x right, a side without a factor being untouched."""
    if "left" in factors:
        x = dense(factors["left"]) @ x
    return x @ dense(factors["right"]) if "right" in factors else x


def grafted(u, g, v, t, *, graft, beta2, eps, scale) -> np.ndarray:
    """The direction u at the size of another rule, or at its own size and scaled; v is Adam's."""
    if graft == "none":
        return common.scale(u, scale, orthogonal=False)
    if graft == "adam":
        g = common.divide(g, np.sqrt(v / (1 - beta2**t)) + eps)
    elif graft != "sgd":
        raise ValueError(graft)
    return common.divide(u * common.frob(g), common.frob(u))
