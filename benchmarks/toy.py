"""Which forms of delta momentum diverge on the paper's toy (Eq. 53): `python -m benchmarks.toy`.

ψ(r, θ) = r² + k(r − θ + a·sin(ωr))² from (−3.5, 2), over 162 settings of delta momentum and, for
comparison, heavy ball and the library's default. Writes results/toy.jsonl, the table of docs/toy.md
between its markers, and the picture there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects

from benchmarks.figures import STYLE, between, conditions, save
from deepopt import Oracle, rules
from deepopt.oracle import Array
from deepopt.rule import Rule

RESULTS = Path("results/toy.jsonl")
PAGE = Path("docs/toy.md")
PICTURE = Path("docs/images/toy.png")

K, A, OMEGA = 10.0, 1.0, 2.0
START = np.array([-3.5, 2.0])
MOMENTUM = 0.9
STEPS = 1500
TARGET = 1e-4
FAR = 1e6

# The arrays that (r, θ) is kept in. A row is one key; a column has one key per entry of its memory
# and so one scale for all; entries are parameters, and memories, of their own.
SEEN: dict[str, list[tuple[int, int]]] = {
    "row": [(1, 2)],
    "column": [(2, 1)],
    "entries": [(1, 1), (1, 1)],
}
FORMS: dict[str, dict[str, Any]] = {
    "literal": {"solver": "explicit", "decay": "literal"},
    "explicit": {"solver": "explicit", "decay": "eta"},
    "prox": {"solver": "prox"},
}
KEYS = {"g": False, "g/‖g‖": True}
RATES = (0.01, 0.1, 1.0)
LRS = (0.001, 0.01, 0.1)


@dataclass(frozen=True)
class Setting:
    """A form of a rule on the toy."""

    form: str
    key: str
    seen: str
    rate: float
    lr: float

    def rule(self) -> Rule:
        """The rule, read as it is: lr counts in units of the memory."""
        match self.form:
            case "heavy ball":
                return rules.HeavyBall(lr=self.lr, momentum=MOMENTUM)
            case "default":
                return rules.DeltaMomentum(lr=self.lr, momentum=MOMENTUM)
            case _:
                return rules.DeltaMomentum(
                    lr=self.lr,
                    momentum=MOMENTUM,
                    rate=self.rate,
                    normalize=KEYS[self.key],
                    output="identity",
                    scale="none",
                    **FORMS[self.form],
                )


def settings() -> list[Setting]:
    """3 forms × 2 keys × 3 ways to be seen × 3 inner rates × 3 learning rates: 162."""
    return [Setting(*x) for x in product(FORMS, KEYS, SEEN, RATES, LRS)]


def references() -> list[Setting]:
    """What the 162 are compared with."""
    plain = [Setting("heavy ball", "g", "row", 1.0, lr) for lr in LRS]
    return plain + [Setting("default", "g/‖g‖", "row", 1.0, lr) for lr in LRS]


def psi(x: Array) -> Any:
    """The toy of points (r, θ) along the first axis."""
    r, theta = x
    return r**2 + K * (r - theta + A * np.sin(OMEGA * r)) ** 2


def gradient(x: Array) -> Array:
    """Its gradient at a point."""
    r, theta = x
    gap = 2 * K * (r - theta + A * np.sin(OMEGA * r))
    return np.array([2 * r + gap * (1 + A * OMEGA * np.cos(OMEGA * r)), -gap])


def path(
    rule: Rule,
    shapes: Sequence[tuple[int, int]] = ((1, 2),),
    steps: int = STEPS,
    slope: Callable[[Array], Array] = gradient,
) -> Array:
    """The points (steps + 1, 2) from the start; shorter where one is FAR away or not finite."""
    sizes = np.cumsum([a * b for a, b in shapes])[:-1]

    def parts(x: Array) -> list[Array]:
        return [p.reshape(s) for p, s in zip(np.split(x, sizes), shapes, strict=True)]

    oracle, points = Oracle(rule, parts(START)), [START]
    context = [{k: np.eye(*s) for k, s in rule.context(shape).items()} for shape in shapes]
    with np.errstate(all="ignore"):
        for _ in range(steps):
            x = points[-1]
            if not np.abs(x).max() <= FAR:
                break
            new = oracle.step(parts(x), parts(slope(x)), context)
            points.append(np.concatenate([p.ravel() for p in new]))
    return np.array(points)


def run(setting: Setting) -> dict[str, Any]:
    """The record of a setting."""
    points = path(setting.rule(), SEEN[setting.seen])
    diverged = not np.abs(points[-1]).max() <= FAR
    values = psi(points.T)
    below = np.flatnonzero(values < TARGET)
    return {
        **asdict(setting),
        "diverged": diverged,
        "diverged_at": len(points) - 1 if diverged else None,
        "reached": bool(len(below)),
        "steps": int(below[0]) if len(below) else None,
        "least": float(f"{np.nanmin(values):.3g}"),
        "last": None if diverged else float(f"{values[-1]:.3g}"),
        **conditions(),
    }


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """One row per form and key, and per way to be seen."""
    rows = [
        "| form | key | seen as | settings | diverged | reached ψ < 1e-4 | fewest steps | at rate, lr |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups = list(dict.fromkeys((r["form"], r["key"], r["seen"]) for r in records))
    for form, key, seen in groups:
        own = [r for r in records if (r["form"], r["key"], r["seen"]) == (form, key, seen)]
        good = sorted((r for r in own if r["reached"]), key=lambda r: r["steps"])
        best = f"{good[0]['steps']} | {good[0]['rate']:g}, {good[0]['lr']:g}" if good else "– | –"
        fell = sum(r["diverged"] for r in own)
        rows.append(f"| {form} | {key} | {seen} | {len(own)} | {fell} | {len(good)} | {best} |")
    return "\n".join(rows)


def totals(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Counts by form and key."""
    for form, key in dict.fromkeys((r["form"], r["key"]) for r in records):
        own = [r for r in records if (r["form"], r["key"]) == (form, key)]
        fell, got = (sum(r[k] for r in own) for k in ("diverged", "reached"))
        yield f"{form}, key {key}: {fell} of {len(own)} diverged, {got} reached"
