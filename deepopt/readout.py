"""How a memory becomes a direction: output maps and step sizes that mean the same in every rule."""

from __future__ import annotations

from math import sqrt
from typing import Literal, TypeAlias

from deepopt.expr import Expr, Number, maximum
from deepopt.expr import sqrt as square_root
from deepopt.functions import mean, newton_schulz, ratio, unit_rms

Coefficients: TypeAlias = Literal["quintic", "cubic"]
Output: TypeAlias = Literal["newton_schulz", "identity"]
Scale: TypeAlias = Literal["rms", "spectral", "none"]

# RMS of an AdamW step per coordinate and unit of lr, as Moonshot measured it for Muon.
ADAMW_RMS = 0.2


def scaled(x: Expr, scale: Scale, *, orthogonal: bool) -> Expr:
    """x at the size that `lr` is counted in.

    "rms": an entry has root mean square 0.2, AdamW's typical step, so that a tuned AdamW lr and
    weight_decay carry over; an orthogonal r × c matrix of full rank gets there by 0.2·√max(r, c)
    (torch's "match_rms_adamw"), anything else is divided by its own RMS. "spectral": times
    √max(1, r/c) (torch's "original"). "none": as it is.
    """
    rows, columns = x.shape[-2:]
    match scale:
        case "rms" if orthogonal:
            return ADAMW_RMS * sqrt(max(rows, columns)) * x
        case "rms":
            return ADAMW_RMS * unit_rms(x)
        case "spectral":
            return sqrt(max(1.0, rows / max(columns, 1))) * x
        case "none":
            return x
        case _:  # pyright: ignore[reportUnnecessaryComparison]
            raise ValueError(f"scale={scale!r} must be 'rms', 'spectral' or 'none'")


def read_out(x: Expr, output: Output, scale: Scale, steps: int, coefficients: Coefficients) -> Expr:
    """The output map σ of paper Eq. 52, identity or Newton-Schulz, and the scale."""
    if output == "identity":
        return scaled(x, scale, orthogonal=False)
    if output != "newton_schulz":
        raise ValueError(f"output={output!r} must be 'newton_schulz' or 'identity'")
    x = newton_schulz(x, steps=steps, coefficients=coefficients)
    return scaled(x, scale, orthogonal=True)


def over_root(x: Expr, v: Expr, floor: Number, eps: Number) -> Expr:
    """x / (max(√v, floor·√mean v) + eps), zero where that is zero.

    The floor bounds the step of entries whose gradient is almost always zero (ours).
    """
    return ratio(x, maximum(square_root(v), floor * square_root(mean(v))) + eps)
