"""Pictures of a study, as SVG and PNG: curves, sensitivity, differences, and what streams lose."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from examples.compare.summary import Table, profile

# Okabe and Ito's colours, which most eyes tell apart, and dashes for those that do not.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a6d1d")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
FARTHEST = 4.0  # times the fastest, of performance profiles
PROFILED = 6  # tasks at least: a profile of fewer is a picture of these
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8ec",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "svg.fonttype": "none",
    "svg.hashsalt": "deepopt",
    "figure.constrained_layout.use": True,
}


def style(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and dash of each contender, the same in all pictures."""
    return {
        label: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % 4]}
        for i, label in enumerate(labels)
    }


def curves(
    table: Table, axis: str, looks: Mapping[str, Mapping[str, Any]], score: str = "validate"
) -> Figure:
    """The median of validation scores over seeds and their range, by step or by seconds.

    score: "validate", or of a stream "first": that of its first part all the way.
    """
    figure = Figure((5.2, 3.4))
    ax = figure.subplots()
    low, high = [], []
    for line in table.lines:
        points = [[p for p in c if score in p] for c in line.curves]
        whole = [c for c in points if c and all(p[score] is not None for p in c)]
        if not whole:
            continue
        count = min(map(len, whole))
        y = np.array([[p[score] for p in c[:count]] for c in whole])
        x = np.median([[p[axis] for p in c[:count]] for c in whole], 0)
        look = looks[line.label]
        ax.plot(x, np.median(y, 0), label=short(line.label), **look)
        if len(whole) > 1:
            ax.fill_between(x, y.min(0), y.max(0), color=look["color"], alpha=0.15, linewidth=0)
        late = y[:, count // 5 :]
        low.append(late.min())
        high.append(late.max())
    if low:
        _limit(ax, min(low), max(high))
    names = {"step": "steps", "seconds": "seconds of training"}
    of = ""
    if len(table.parts) > 1:
        of = " of part 1" if score == "first" else " of the part learnt"
    title = f"{short(table.task)}: by {names[axis]}"
    ax.set(xlabel=names[axis], ylabel=plain(table.metric) + of, title=title)
    if table.target is not None:
        ax.axhline(table.target, color="#6b7280", linewidth=0.8, linestyle=":")
    if ax.lines:
        ax.legend(frameon=False, fontsize=8)
    return figure


def sensitivity(table: Table, looks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The score at the end against the learning rate, of the trials that tuned it."""
    figure = Figure((5.2, 3.4))
    ax = figure.subplots()
    tried = [s for line in table.lines for s in line.tried.values()]
    scores = [s for s in tried if s is not None]
    lost = len(scores) < len(tried)
    for line in table.lines:
        good = {lr: s for lr, s in line.tried.items() if s is not None}
        bad = [lr for lr, s in line.tried.items() if s is None]
        look = looks[line.label]
        if good:
            ax.plot(
                [*good], [*good.values()], marker="o", markersize=3, label=short(line.label), **look
            )
        if bad and scores:
            worst = max(scores) if table.better == "lower" else min(scores)
            mark = "^" if table.better == "lower" else "v"
            ax.plot(bad, [worst] * len(bad), mark, color=look["color"], markersize=7)
    if scores:
        _limit(ax, min(scores), max(scores))
    ax.set(xscale="log", xlabel="learning rate", ylabel=plain(table.metric))
    mark = "▲" if table.better == "lower" else "▼"
    ax.set_title(f"{short(table.task)}: tuning" + (f" ({mark} diverged)" if lost else ""))
    if ax.lines:
        ax.legend(frameon=False, fontsize=8)
    return figure


def differences(found: Sequence[Table], looks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Paired differences to the reference with their intervals, as shares of its score."""
    rows = [(t, line) for t in found for line in t.lines if line.difference is not None]
    figure = Figure((6.4, 0.8 + 0.28 * max(1, len(rows))))
    ax = figure.subplots()
    for place, (table, line) in enumerate(rows):
        own = next(x for x in table.lines if x.difference is None)
        scale = abs(own.mean.mean) or 1.0
        assert line.difference is not None
        d = line.difference
        sign = 1 if table.better == "lower" else -1
        ends = sorted(100 * sign * x / scale for x in (d.low, d.high))
        if all(map(math.isfinite, ends)):
            ax.plot(ends, [place, place], color=looks[line.label]["color"], linewidth=2)
        ax.plot(100 * sign * d.mean / scale, place, "o", color=looks[line.label]["color"])
    ax.axvline(0, color="#1f2430", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [f"{short(t.task)}: {short(line.label)}" for t, line in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    first = next((x.label for t in found for x in t.lines if x.difference is None), "")
    # What halves a loss on one task must not hide one per cent on another.
    ax.set_xscale("symlog", linthresh=10, linscale=1.5)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel=f"% of its score worse than {short(first)}; left of 0: better")
    ax.set_title("Paired differences, 95 % intervals")
    return figure


def profiles(
    ratios: Mapping[str, Sequence[float]], looks: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """The share of trainings that reach the target within so many times the fastest's steps."""
    figure = Figure((5.2, 3.4))
    ax = figure.subplots()
    for label, values in ratios.items():
        shares = np.arange(len(values) + 1) / len(values)
        inside = [x for x in values if x <= FARTHEST]
        x = [1.0, *inside, FARTHEST]
        y = [0.0, *shares[1 : len(inside) + 1], shares[len(inside)]]
        ax.step(x, y, where="post", label=short(label), **looks[label])
    ax.set(xscale="log", xlim=(0.98, FARTHEST), ylim=(0, 1.03), ylabel="share of trainings")
    ax.set_xticks([1, 2, 4], ["1", "2", "4"])
    ax.minorticks_off()
    ax.set(
        xlabel="steps to target, to the fastest's", title="Performance profile (higher is better)"
    )
    ax.legend(frameon=False, fontsize=8)
    return figure


def matrices(table: Table) -> Figure:
    """Scores on each part (across) after learning each part (down)."""
    shown = [line for line in table.lines if line.matrix]
    figure = Figure((2.6 * len(shown) + 0.4, 2.9))
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)
    values = np.array([line.matrix for line in shown])
    reversed_ = "_r" if table.better == "lower" else ""
    for ax, line in zip(axes[0], shown, strict=True):
        image = ax.imshow(
            line.matrix, cmap=f"cividis{reversed_}", vmin=values.min(), vmax=values.max()
        )
        ax.set_title(short(line.label), fontsize=8)
        ax.grid(False)
        size = range(len(table.parts))
        ax.set(xticks=size, yticks=size, xlabel="score on part")
        ax.set_xticklabels([str(i + 1) for i in size])
        ax.set_yticklabels([str(i + 1) for i in size])
    axes[0, 0].set_ylabel("after part")
    figure.colorbar(image, ax=axes, shrink=0.8, label=plain(table.metric))  # pyright: ignore
    return figure


def pictures(found: Sequence[Table]) -> dict[str, Figure]:
    """All pictures by name; they are drawn under `STYLE`."""
    labels = [*dict.fromkeys(line.label for table in found for line in table.lines)]
    looks, drawn = style(labels), {}
    with mpl.rc_context(STYLE):
        if len(labels) > 1:
            drawn["differences"] = differences(found, looks)
        ratios = profile(found) if sum(len(t.parts) == 1 for t in found) >= PROFILED else {}
        if len(labels) > 1 and any(ratios.values()):
            drawn["profile"] = profiles(ratios, looks)
        for table in found:
            name = file_name(table.task)
            drawn[f"{name}-steps"] = curves(table, "step", looks)
            drawn[f"{name}-seconds"] = curves(table, "seconds", looks)
            if any(line.tried for line in table.lines):
                drawn[f"{name}-rates"] = sensitivity(table, looks)
            if any(line.matrix for line in table.lines):
                drawn[f"{name}-first"] = curves(table, "step", looks, "first")
                drawn[f"{name}-matrices"] = matrices(table)
    return drawn


def file_name(task: str) -> str:
    """The name of a task as a part of a file's."""
    return re.sub(r"[^\w.-]+", "-", task)


def short(name: str, most: int = 28) -> str:
    """A name that fits beside a picture; its end stays, where settings differ."""
    whole = len(name) <= most
    return plain(name if whole else f"{name[: most // 2]}…{name[1 - most // 2 :]}")


def plain(text: str) -> str:
    """Text of which matplotlib sets nothing as mathematics."""
    # To switch that off would be for all text, and ticks of logarithms are mathematics.
    return text.replace("$", r"\$")


def svg(figure: Figure) -> str:
    """The picture as text that can stand within a page."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().split("?>", 1)[1].split(">", 1)[1].strip()


def save(drawn: Mapping[str, Figure], folder: Path) -> None:
    """Each picture as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _limit(ax: Any, low: float, high: float) -> None:
    """Where scores span decades a logarithm, and what comes before the first fifth cut off."""
    if low > 0 and high / low > 30:
        ax.set_yscale("log")
        ax.set_ylim(low / 1.3, high * 1.3)
    else:
        room = 0.06 * ((high - low) or abs(high) or 1.0)
        ax.set_ylim(low - room, high + room)
