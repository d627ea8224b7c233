"""A picture of every rule: its path on the toy, its distance on a noisy quadratic.

    python -m benchmarks.gallery

Writes docs/gallery.md and docs/images/gallery/. Learning rates are the best of a small grid for
each rule and problem; everything else is the rule's default.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.figures import STYLE, save
from benchmarks.toy import START, landscape, path, psi
from deepopt import Oracle, rules
from deepopt.oracle import Array
from deepopt.rule import Rule

PAGE = Path("docs/gallery.md")
PICTURES = Path("docs/images/gallery")
CHAPTERS: dict[str, tuple[type[Rule], ...]] = {
    "Descent": rules.DESCENT,
    "Momentum": rules.MOMENTUM,
    "Adaptive": rules.ADAPTIVE,
    "Orthogonal": rules.ORTHOGONAL,
    "Preconditioned": rules.PRECONDITIONED,
    "Nested": rules.NESTED,
}
LRS = tuple(float(f"{10 ** (k / 2):.1g}") for k in range(-8, 3))
STEPS, TAIL = 400, 40
FRAME = ((-4.6, 3.2), (-3.2, 3.4))  # of r and θ
SIDE, CONDITION, NOISE = 16, 100.0, 0.03

INTRODUCTION = f"""# Gallery

Every rule at its defaults but for `lr`, in {STEPS} steps of the float64 oracle. This page and its
pictures are generated, in about 70 s of CPU, by

    .venv/bin/python -m benchmarks.gallery

**Left: the toy of Eq. 53** ([toy.md](toy.md)), k = 10, a = 1, ω = 2, with (r, θ) as a 1 × 2 matrix;
the dot is the start, the star the optimum. DGD and GGD need a Gram of inputs: here the identity,
which makes them descend on ψ + ½·kappa·‖(r, θ)‖², of the same optimum.
**Right: a noisy quadratic**,
½ tr (W − W*) H (W − W*)ᵀ for a {SIDE} × {SIDE} matrix from zero, H of condition {CONDITION:g}
and largest eigenvalue 1, Gaussian noise of {NOISE:g} on every entry of the gradient; shown is
‖W − W*‖ / ‖W*‖. The Gram of DGD and GGD is H, so they head for W*/(1 + kappa), as they should.

`lr` is, for each rule and problem by itself, the one of
{", ".join(f"{x:g}" for x in LRS)}
with the least mean of log ψ, or of the distance, over the last {TAIL} steps; on the toy only of
those whose path stays in the picture. It is constant. A rule whose step has a constant size ends on
a circle for that reason alone, and on a 1 × 2 matrix an orthogonalised read-out is about a unit
vector. So these are portraits, not a ranking.
"""


@cache
def quadratic() -> tuple[Array, Array, Array]:
    """H, W* and the noise of every step."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(SIDE, SIDE)))[0]
    curvature = basis * np.logspace(0, -np.log10(CONDITION), SIDE) @ basis.T
    target = rng.normal(size=(SIDE, SIDE))
    return curvature, target, NOISE * rng.normal(size=(STEPS, SIDE, SIDE))


def distances(rule: Rule) -> Array:
    """‖W − W*‖ / ‖W*‖ from the start on; infinite where it is above a thousand."""
    curvature, target, noise = quadratic()
    w, found = np.zeros_like(target), [1.0]
    oracle = Oracle(rule, [w])
    context = [{k: curvature for k in rule.context(w.shape)}]
    with np.errstate(all="ignore"):
        for i in range(STEPS):
            (w,) = oracle.step([w], [(w - target) @ curvature + noise[i]], context)
            found.append(float(np.linalg.norm(w - target) / np.linalg.norm(target)))
            if not found[-1] < 1e3:
                return np.array(found[:-1] + [np.inf] * (STEPS + 1 - i))
    return np.array(found)


def heights(rule: Rule) -> Array:
    """log ψ on the toy; infinite for a path that leaves the picture."""
    points = path(rule, steps=STEPS).T
    low, high = np.transpose(FRAME)
    if (points.min(1) < low).any() or (points.max(1) > high).any():
        return np.full(STEPS + 1, np.inf)
    return np.log(np.maximum(psi(points), 1e-30))


def best(rule: Rule, curve: Callable[[Rule], Array]) -> Rule:
    """The rule at the lr of the grid whose curve ends lowest."""
    candidates = [replace(rule, lr=lr) for lr in LRS]
    return min(candidates, key=lambda r: float(curve(r)[-TAIL:].mean()))


def draw(kind: type[Rule], on_toy: Rule, on_quadratic: Rule, colour: str) -> None:
    """The two panels of a rule."""
    with plt.rc_context({**STYLE, "font.size": 7, "axes.titlesize": 8}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(6, 2.5), layout="constrained")
        landscape(left, *FRAME)
        points = path(on_toy, steps=STEPS)
        left.plot(*points.T, color="white", lw=2.8)
        left.plot(*points.T, color=colour, lw=1.4)
        left.plot(*START, "o", color="black", ms=3.5)
        left.plot(0, 0, "*", color="black", ms=7)
        left.set(xticks=[], yticks=[], title=f"{kind.__name__} on the toy, lr {on_toy.lr:g}")
        right.plot(distances(on_quadratic), color=colour, lw=1.3)
        right.set(yscale="log", ylim=(0.04, 1.5), xlim=(0, STEPS), xlabel="step")
        right.set(title=f"distance on the quadratic, lr {on_quadratic.lr:g}")
        right.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
        right.minorticks_off()
        right.grid(axis="y", lw=0.3)
        save(figure, PICTURES / f"{kind.__name__}.png", colours=48)


def sentence(kind: type[Rule]) -> str:
    """The first line of a rule's docstring, which is one sentence."""
    return (kind.__doc__ or "").split("\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw everything; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.gallery", description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="draw this rule and leave the page alone")
    args = parser.parse_args(argv)
    page, done = [INTRODUCTION], 0
    for i, (chapter, kinds) in enumerate(CHAPTERS.items()):
        page += [f"## {chapter}", "", "| rule | toy, and noisy quadratic |", "|---|---|"]
        for kind in kinds:
            done += 1
            if args.only not in (None, kind.__name__):
                continue
            progress = f"\r[{done}/{len(rules.ALL)}] {kind.__name__:24}"
            print(progress, end="", file=sys.stderr, flush=True)
            start: Any = kind()
            on_toy, on_quadratic = best(start, heights), best(start, distances)
            draw(kind, on_toy, on_quadratic, f"C{i}")
            name = kind.__name__
            page.append(
                f"| **{name}**<br>{sentence(kind)}<br>lr {on_toy.lr:g}; {on_quadratic.lr:g} "
                f"| ![{name}](images/gallery/{name}.png) |"
            )
        page.append("")
    print(file=sys.stderr)
    if args.only is None:
        PAGE.write_text("\n".join(page))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
