"""Contenders take turns: steps that should be equal are compared, then timed in random order."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.device import Setting, Watch, launches, progress, quartiles
from benchmarks.shapes import Shapes

Record = dict[str, Any]
# Steps before the first that is timed, and the least cosine to a polar factor.
WARM, STRAIGHT = 2, 0.8
# How far steps of one rule may be apart, relative to their size, by sums in another order, by
# weights that are rounded to bfloat16, and by iterations in bfloat16.
CLOSE, ROUNDED, NARROW = 1e-3, 3e-2, 1e-1


@dataclass
class Contender:
    """One of those that take turns.

    twin, tolerance: whose steps its own must equal, and how nearly, before any time counts.
    bytes, flops: what a step needs at least, bytes also as a function of the optimizer. target:
    what the row is to meet. timed: whether it takes turns at all. less: milliseconds since the last
    call that do not count, as a `Watch` gives them.
    """

    name: str
    step: Callable[[], object]
    weights: Callable[[], Sequence[Tensor]]
    optimizer: Any = None
    twin: str = ""
    tolerance: float = CLOSE
    bytes: float | Callable[[Any], float] = 0.0
    flops: float = 0.0
    target: str = ""
    timed: bool = True
    less: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)

    def moved(self) -> float:
        """Bytes of a step."""
        return self.bytes(self.optimizer) if callable(self.bytes) else self.bytes


def parameters(shapes: Shapes, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same weights and gradients at every call."""
    generator, made = torch.Generator(device).manual_seed(0), list[Tensor]()
    draw = partial(torch.randn, generator=generator, device=device)
    for shape in shapes:
        p = nn.Parameter((0.02 * draw(shape)).to(dtype))
        p.grad = draw(shape).to(dtype)
        made.append(p)
    return made


class Broken(ArithmeticError):
    """Steps that should be equal are not."""


def check_parity(contenders: Sequence[Contender], before: Sequence[Tensor]) -> None:
    """Raise Broken where the steps so far of a contender are not those of its twin."""
    named = {c.name: c for c in contenders}
    for c in contenders:
        for i, start in enumerate(before if c.twin else ()):
            mine, theirs = c.weights()[i].to(start), named[c.twin].weights()[i].to(start)
            norms = [torch.linalg.vector_norm(x.float()) for x in (mine - theirs, theirs - start)]
            apart = float(norms[0] / norms[1])
            if not apart <= c.tolerance:
                raise Broken(
                    f"steps of {c.name} for a tensor of shape {tuple(start.shape)} are "
                    f"{apart:.1e} from those of {c.twin}; parity is {c.tolerance:g}"
                )


def cosines(contenders: Sequence[Contender], before: Sequence[Tensor]) -> dict[str, float]:
    """The mean cosine of first steps to the polar factor, of one tensor of each shape.

    Raises Broken where a step points elsewhere.
    """
    found: dict[str, list[float]] = {c.name: [] for c in contenders if c.weights()}
    like = parameters([tuple(p.shape) for p in before], before[0].device.type, before[0].dtype)
    for i in {p.shape: i for i, p in enumerate(before)}.values():
        polar = polar_factor(like[i].grad)
        for c in contenders:
            if c.name in found:
                step = before[i] - c.weights()[i].to(before[i])
                cosine = torch.cosine_similarity(step.double().flatten(), polar.flatten(), dim=0)
                found[c.name].append(float(cosine))
    for name, values in found.items():
        if not min(values) > STRAIGHT:
            raise Broken(f"{name} has a cosine of {min(values):.3f} to the polar factor")
    return {name: mean(values) for name, values in found.items()}


def polar_factor(x: Any) -> Tensor:
    """UVᵀ of the singular value decomposition, from the eigenvectors of the smaller Gram matrix."""
    x = x.double()
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    polar = (vectors * values.rsqrt()) @ (vectors.mT @ wide)
    return polar if wide is x else polar.mT


@torch.no_grad()
def race(
    s: Setting, contenders: list[Contender], rounds: int, orthogonal: bool = False
) -> list[Record]:
    """A record for each; ratios are the first one's time over the row's, turn by turn."""
    shapes = [tuple(p.shape) for p in contenders[0].weights()]
    before = [p.detach() for p in parameters(shapes, s.device, contenders[0].weights()[0].dtype)]
    angles: dict[str, float] = {}
    for i in range(WARM):
        for c in contenders:
            progress(i, WARM, f"warm-up: {c.name}")
            c.step()
        if orthogonal and not i:
            angles = cosines(contenders, before)
    check_parity(contenders, before)
    del before
    timed, watch, order = [c for c in contenders if c.timed], Watch(s.device), random.Random(0)
    taken: dict[str, list[tuple[float, float]]] = {c.name: [] for c in timed}
    rounds = 3 if s.quick else rounds
    for i in range(rounds):
        for c in order.sample(timed, len(timed)):
            progress(i, rounds, c.name)
            c.less()
            whole, less = watch(c.step), c.less()
            taken[c.name].append((whole[0] - less[0], whole[1] - less[1]))
    progress(rounds, rounds, "")
    times = {name: np.array(x).T for name, x in taken.items()}
    speed = {c.name: np.array([c.moved(), c.flops]) / np.median(times[c.name][0]) for c in timed}
    yardsticks = {"GB/s": ("copy", 1e6), "TFLOP/s": ("GEMM", 1e9)}
    records: list[Record] = []
    for c in timed:
        (ms, host), first = times[c.name], times[timed[0].name]
        ratios = np.median(first / times[c.name], axis=1)
        found = {"ms": quartiles(ms), "host_ms": quartiles(host), "target": c.target or None}
        spikes = [np.percentile(x, 99) / np.median(x) for x in (ms, host)]
        found |= {"spike": spikes[0], "host_spike": spikes[1], "cosine": angles.get(c.name)}
        found |= {"ratio": ratios[0], "host_ratio": ratios[1]} if c is not timed[0] else {}
        found["us_per_tensor"] = 1e3 * np.median(host) / len(shapes)
        found["launches"] = launches(c.step) if s.device == "cuda" else None
        for rate, (unit, (yardstick, scale)) in zip(speed[c.name], yardsticks.items(), strict=True):
            if rate:
                found[unit] = rate / scale
                found[f"of {yardstick}"] = rate / speed[yardstick].max()
        digits = {k: float(f"{x:.5g}") for k, x in found.items() if isinstance(x, float)}
        known = {k: x for k, x in found.items() if x is not None}
        records.append({"row": c.name, **known, **digits})
    return records
