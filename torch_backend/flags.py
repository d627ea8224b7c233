"""Which flags of an optimizer go together: how a step is taken, in torch's words."""

from __future__ import annotations


def wants_kernels(fused: bool | None, foreach: bool | None, differentiable: bool) -> bool:
    """Whether a step may take kernels; `foreach` asks for a form of the plain path."""
    return not differentiable and (bool(fused) or (fused is None and foreach is None))


def refuse_contradictions(
    fused: bool | None, foreach: bool | None, differentiable: bool, capturable: bool, rounding: str
) -> None:
    """Raise RuntimeError, with torch's texts, or ValueError for flags that exclude each other."""
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for name, flag in (("fused", fused), ("foreach", foreach)):
        if flag and differentiable:
            raise RuntimeError(f"`{name}` does not support `differentiable`")
    if wants_kernels(fused, foreach, differentiable):
        return
    flags = {"differentiable": differentiable or None, "fused": fused, "foreach": foreach}
    without = next(f"{k}={v}" for k, v in flags.items() if v is not None)
    if rounding != "nearest":
        raise ValueError(f"rounding={rounding!r} needs kernels, and {without}")
    if capturable:
        raise ValueError(f"capturable=True needs kernels, and {without}")
