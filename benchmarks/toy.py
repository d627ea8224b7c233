"""Which forms of delta momentum diverge on the paper's toy (Eq. 53): `python -m benchmarks.toy`.

ψ(r, θ) = r² + k(r − θ + a·sin(ωr))² from (−3.5, 2), over 162 settings of delta momentum and, for
comparison, heavy ball and the library's default. Writes results/toy.jsonl, the table of docs/toy.md
between its markers, and the picture there.
"""

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
LRS = (0.01, 0.1, 1.0)


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
    """What the 162 are compared with; heavy ball at every rate·lr of theirs."""
    products = sorted({round(rate * lr, 9) for rate, lr in product(RATES, LRS)})
    plain = [Setting("heavy ball", "g", "row", 1.0, lr) for lr in products]
    return plain + [Setting("default", "g/‖g‖", "row", 1.0, lr) for lr in LRS]


SHOWN = (
    ("heavy ball", "C0", Setting("heavy ball", "g", "row", 1.0, 0.01)),
    ("literal", "C3", Setting("literal", "g", "row", 0.1, 0.1)),
    ("explicit", "0.25", Setting("explicit", "g", "row", 0.01, 0.1)),
    ("explicit", "C1", Setting("explicit", "g/‖g‖", "row", 0.01, 1.0)),
    ("prox", "C2", Setting("prox", "g", "row", 0.01, 1.0)),
    ("prox", "C4", Setting("prox", "g/‖g‖", "row", 0.01, 0.1)),
)
SHOWN_STEPS = 900


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
    context = [{k: np.eye(s[0]) for k, s in rule.context(shape).items()} for shape in shapes]
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
        "| form | key | seen as | settings | diverged | reached | there at the end | fewest steps "
        "| at rate, lr |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = list(dict.fromkeys((r["form"], r["key"], r["seen"]) for r in records))
    for form, key, seen in groups:
        own = [r for r in records if (r["form"], r["key"], r["seen"]) == (form, key, seen)]
        good = sorted((r for r in own if r["reached"]), key=lambda r: r["steps"])
        best = f"{good[0]['steps']} | {good[0]['rate']:g}, {good[0]['lr']:g}" if good else "– | –"
        fell, kept = sum(r["diverged"] for r in own), sum(r["last"] < TARGET for r in good)
        counts = f"{len(own)} | {fell} | {len(good)} | {kept}"
        rows.append(f"| {form} | {key} | {seen} | {counts} | {best} |")
    return "\n".join(rows)


def totals(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Counts by form and key."""
    for form, key in dict.fromkeys((r["form"], r["key"]) for r in records):
        own = [r for r in records if (r["form"], r["key"]) == (form, key)]
        fell, got = (sum(r[k] for r in own) for k in ("diverged", "reached"))
        yield f"{form}, key {key}: {fell} of {len(own)} diverged, {got} reached"


def draw() -> None:
    """Trajectories on the landscape, and ψ against the step."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
        landscape(left, (-5.2, 3.4), (-3.4, 4.4))
        rim = [patheffects.withStroke(linewidth=2.4, foreground="white")]
        for name, colour, setting in SHOWN:
            points = path(setting.rule(), SEEN[setting.seen], SHOWN_STEPS)
            far = bool(np.abs(points[-1]).max() > FAR)
            style = "--" if far else "-"
            left.plot(*points.T, style, color=colour, lw=1.1, path_effects=rim)
            width = 0.7 if KEYS[setting.key] else 1.3
            label = f"{name}, {what(setting)}" + " (diverges)" * far
            right.plot(psi(points.T), style, color=colour, label=label, lw=width)
        left.plot(*START, "o", color="black", ms=4)
        left.annotate("start", START, (-3.7, 2.3))
        left.annotate("heavy ball: out to (10, 10)\nand back", (0.1, 3.6), color="C0")
        left.plot(0, 0, "*", color="black", ms=9)
        left.set(xlabel="r", ylabel="θ", title="Trajectories on ψ(r, θ); the star is the optimum")
        right.axhline(TARGET, color="0.5", lw=0.8, ls=":")
        right.annotate("target", (0, TARGET / 5), color="0.4")
        right.set(yscale="log", ylim=(1e-8, 1e8), xlim=(-8, SHOWN_STEPS))
        right.set(xlabel="step", title="ψ")
        right.legend(loc="upper right")
        save(figure, PICTURE)


def landscape(axes: Any, r: tuple[float, float], theta: tuple[float, float]) -> None:
    """Contours of the toy."""
    grid = np.array(np.meshgrid(np.linspace(*r, 240), np.linspace(*theta, 240)))
    levels = np.linspace(-1.5, 3.6, 13)
    axes.contourf(*grid, np.log10(psi(grid)), levels, cmap="Greys", extend="both", alpha=0.4)
    axes.set(xlim=r, ylim=theta)


def what(setting: Setting) -> str:
    """The setting's numbers."""
    if setting.form == "heavy ball":
        return f"lr {setting.lr:g}"
    return f"key {setting.key}, rate {setting.rate:g}, lr {setting.lr:g}"


def main() -> int:
    """Run everything; returns the exit status."""
    asked = references() + settings()
    records: list[dict[str, Any]] = []
    for i, setting in enumerate(asked):
        records.append(run(setting))
        print(f"\r[{i + 1}/{len(asked)}] {setting.form:12}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    RESULTS.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    print("\n".join(totals(records)))
    between(PAGE, "table", markdown(records))
    draw()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
