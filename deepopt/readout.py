"""How a memory becomes a direction: output maps and step sizes that mean the same in every rule."""

from __future__ import annotations

from math import sqrt
from typing import Literal, TypeAlias

from deepopt.expr import Expr, Number, maximum, minimum, sign
from deepopt.expr import sqrt as square_root
from deepopt.functions import mean, newton_schulz, ratio, unit_rms
from deepopt.rule import Symmetries, symmetric

Coefficients: TypeAlias = Literal["quintic", "cubic", "polar_express"]
Output: TypeAlias = Literal["newton_schulz", "identity", "sign", "rms"]
Scale: TypeAlias = Literal["rms", "spectral", "none"]

# RMS of an AdamW step per coordinate and unit of lr, as Moonshot measured it for Muon.
ADAMW_RMS = 0.2
# Largest entry of a direction at scale "rms", in its unit, where it is not orthogonal.
CAP = 10.0


def scaled(x: Expr, scale: Scale, *, orthogonal: bool, cap: Number = CAP) -> Expr:
    """x at the size that `lr` is counted in.

    "rms": an entry has root mean square 0.2, AdamW's typical step, so that a tuned AdamW lr and
    weight_decay carry over; an orthogonal r × c matrix of full rank gets there by 0.2·√max(r, c)
    (torch's "match_rms_adamw"), anything else is divided by its own RMS and its entries bounded by
    `cap` (ours): a step is 0.2·√n in one entry where the n - 1 others are zero. "spectral": times
    √max(1, r/c) (torch's "original"). "none": as it is.
    """
    rows, columns = x.shape[-2:]
    match scale:
        case "rms" if orthogonal:
            return ADAMW_RMS * sqrt(max(rows, columns)) * x
        case "rms":
            return maximum(minimum(ADAMW_RMS * unit_rms(x), cap), 0.0 - cap)
        case "spectral":
            return sqrt(max(1.0, rows / max(columns, 1))) * x
        case "none":
            return x
        case _:  # pyright: ignore[reportUnnecessaryComparison]
            raise ValueError(f"scale={scale!r} must be 'rms', 'spectral' or 'none'")


def read_out(x: Expr, output: Output, scale: Scale, steps: int, coefficients: Coefficients) -> Expr:
    """The output map σ of paper Eq. 52, and the scale."""
    orthogonal = output == "newton_schulz"
    return scaled(mapped(x, output, steps, coefficients), scale, orthogonal=orthogonal)


def mapped(x: Expr, output: Output, steps: int, coefficients: Coefficients) -> Expr:
    """σ(x): x itself, its sign, x at root mean square one, or x orthogonalised."""
    match output:
        case "identity":
            return x
        case "sign":
            return sign(x)
        case "rms":
            return unit_rms(x)
        case "newton_schulz":
            return newton_schulz(x, steps=steps, coefficients=coefficients)
        case _:  # pyright: ignore[reportUnnecessaryComparison]
            raise ValueError(
                f"output={output!r} must be 'newton_schulz', 'identity', 'sign' or 'rms'"
            )


# The symmetries of sums of gradients, and of functions of each entry alone.
LINEAR: Symmetries = symmetric(
    "odd", "permutation", "transposition", "left rotation", "right rotation", "degree 1"
)
ELEMENTWISE: Symmetries = symmetric("odd", "permutation", "transposition")
ROTATIONS: Symmetries = symmetric("left rotation", "right rotation")
DEGREES: Symmetries = symmetric("degree -1", "degree 0", "degree 1")
DEGREE_0: Symmetries = symmetric("degree 0")


def through(symmetries: Symmetries, output: Output, scale: Scale) -> Symmetries:
    """What of a memory's symmetries is left in its read-out."""
    left = symmetries
    if output == "sign":
        left = left - ROTATIONS
    if output == "newton_schulz":
        left = left - {"permutation"}
    if scale == "spectral":
        left = left - {"transposition"}
    if left & DEGREES and (output != "identity" or scale == "rms"):
        left = (left - DEGREES) | DEGREE_0
    return left


def over_root(x: Expr, v: Expr, floor: Number, eps: Number) -> Expr:
    """x / (max(√v, floor·√mean v) + eps), zero where that is zero.

    The floor bounds the step of entries whose gradient is almost always zero (ours).
    """
    return ratio(x, maximum(square_root(v), floor * square_root(mean(v))) + eps)
