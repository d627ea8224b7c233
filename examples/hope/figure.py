"""The results of a study as a picture: loss curves, scores with intervals, forgetting."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepopt import replacing
from examples.hope.report import BASELINES, GRID, INK, MUTED, TRAIN, VALID
from examples.hope.table import Line, Row

COLORS = (TRAIN, VALID, *BASELINES[1:], BASELINES[0])
Curve = Sequence[tuple[int, float | None]]  # steps and mean losses in nats since the one before
CELL = re.compile(r"(\d+)@([0-9.]+)")  # the name of a score at a length and a depth


@dataclass(frozen=True)
class Map:
    """Scores of one model in rows and columns, with their names."""

    values: list[list[float]]
    down: list[str]
    across: list[str]
    said: str


def draw(
    path: Path,
    title: str,
    table: Sequence[Line],
    rows: Sequence[Row],
    curves: Mapping[str, Mapping[int, Curve]],
    headline: str,
    better: Literal["higher", "lower"],
    parts: Sequence[str] = (),
) -> None:
    """Loss curves (label, seed) at the left, scores at the right.

    Below, for a stream, its R; for scores named "length@depth", length against depth.
    parts: names of the parts of a stream.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install matplotlib") from error

    matrices = {x.label: _stream(rows, x.label, parts) if parts else _cells(x) for x in table}
    matrices = {label: found for label, found in matrices.items() if found.values}
    # Heights in inches: what is below the two panels comes in lines of four.
    below = -(-len(matrices) // 4) * 3.4
    height = max(4.6, 1.9 + 0.42 * len(table))
    figure = Figure(
        figsize=(11.5, height + below), dpi=110, facecolor="white", layout="constrained"
    )
    top: Any = figure
    bottom: Any = None
    if matrices:
        halves: Any = figure.subfigures(2, 1, height_ratios=(height, below))
        top, bottom = halves
    left, right = top.subplots(1, 2, width_ratios=(1.25, 1))
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, weight="bold", color=INK)
    colors = {line.label: COLORS[i % len(COLORS)] for i, line in enumerate(table)}
    _losses(left, curves, colors)
    _scores(right, table, rows, headline, better, colors)
    if bottom is not None:
        _maps(bottom, matrices, better)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _losses(axes: Any, curves: Mapping[str, Mapping[int, Curve]], colors: dict[str, str]) -> None:
    from matplotlib.ticker import NullLocator

    positive = []
    for label, of_label in curves.items():
        by_step: dict[int, list[float]] = {}
        for curve in of_label.values():
            there = [(step, loss) for step, loss in curve if loss is not None]
            if not there:
                continue
            axes.plot(*zip(*there, strict=True), color=colors[label], alpha=0.3, linewidth=0.7)
            for step, loss in there:
                by_step.setdefault(step, []).append(loss)
            positive += [loss for _, loss in there if loss > 0]
        # The mean is that of all seeds, so it ends where the first of them diverged.
        full = max((len(losses) for losses in by_step.values()), default=0)
        means = [(s, sum(x) / full) for s, x in sorted(by_step.items()) if len(x) == full]
        if means:
            axes.plot(*zip(*means, strict=True), color=colors[label], linewidth=2.0, label=label)
    if positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("training loss (nats): seeds and their mean", **_heading())
    axes.set_xlabel("step", color=INK)
    axes.margins(x=0.01)
    if len(colors) > 1 and positive:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9.5)
    _bare(axes)


def _scores(
    axes: Any,
    table: Sequence[Line],
    rows: Sequence[Row],
    headline: str,
    better: str,
    colors: dict[str, str],
) -> None:
    for place, line in enumerate(table):
        color, result = colors[line.label], line.scores.get(headline)
        values = [r["scores"].get(headline) for r in rows if r["label"] == line.label]
        values = [value for value in values if value is not None]
        axes.plot(
            *(values, [place] * len(values)),
            **{"linestyle": "", "marker": "o", "markersize": 5, "color": color, "alpha": 0.45},
        )
        style = {"marker": "D", "markersize": 8, "capsize": 5, "linewidth": 2, "color": color}
        if result is not None and result.mean is not None:
            axes.errorbar(result.mean, place, xerr=result.half, markeredgecolor="white", **style)
    said = [f"{x.label}\n{_said(x, headline)}" for x in table]
    axes.set_yticks(range(len(table)), said, fontsize=9.5)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.set_title(f"{headline} ({better} is better), 95 % interval", **_heading())
    _bare(axes)
    for text, line in zip(axes.get_yticklabels(), table, strict=True):
        text.set_color(colors[line.label])


def _said(line: Line, headline: str) -> str:
    """The score in words, with the trainings that came to none."""
    score = f"{line.scores[headline]}" if headline in line.scores else ""
    diverged = f"{line.diverged} diverged" if line.diverged else ""
    return ", ".join(filter(None, (score, diverged)))


def _maps(figure: Any, maps: dict[str, Map], better: str) -> None:
    values = [x for each in maps.values() for row in each.values for x in row]
    columns = min(4, len(maps))
    grid = figure.subplots(-(-len(maps) // columns), columns, squeeze=False)
    low, high = min(values), max(values)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    shades = "Blues" if better == "higher" else "Blues_r"  # dark is good
    for axes, (label, each) in zip(grid.flat, maps.items(), strict=False):
        axes.imshow(each.values, cmap=shades, vmin=low, vmax=high, aspect="auto")
        tilt = {"rotation": 45, "ha": "right"} if max(map(len, each.across)) > 4 else {}
        axes.set_xticks(range(len(each.across)), each.across, fontsize=8, **tilt)
        axes.set_yticks(range(len(each.down)), each.down, fontsize=8)
        axes.set_title(f"{label}\n{each.said}", **_heading(9.5))
        axes.tick_params(colors=MUTED, length=0)
        axes.spines[:].set_visible(False)
        for i, row in enumerate(each.values):
            for j, value in enumerate(row):
                share = (value - low) / (high - low) if high > low else 0.0
                dark = share > 0.55 if better == "higher" else share < 0.45
                ink = "white" if dark else INK
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=ink)


def _stream(rows: Sequence[Row], label: str, parts: Sequence[str]) -> Map:
    """The mean R over the seeds that finished."""
    all_of = [r["matrix"] for r in rows if r["label"] == label and r["status"] == "finished"]
    size = range(len(all_of[0]) if all_of else 0)
    values = [[sum(m[i][j] for m in all_of) / len(all_of) for j in size] for i in size]
    short = [part if len(part) <= 10 else f"{part[:9]}…" for part in parts[: len(values)]]
    names = [f"{i} {part}" for i, part in enumerate(short, 1)]
    return Map(values, names, names, "score on (across) after training on (down)")


def _cells(line: Line) -> Map:
    """Means over seeds of the scores that have a length and a depth."""
    found: dict[int, dict[float, float]] = {}
    for name, score in line.scores.items():
        match = CELL.fullmatch(name)
        if match and score.mean is not None:
            found.setdefault(int(match[1]), {})[float(match[2])] = score.mean
    depths = sorted({depth for row in found.values() for depth in row})
    full = {length: row for length, row in sorted(found.items()) if len(row) == len(depths)}
    values = [[row[depth] for depth in depths] for row in full.values()]
    return Map(
        values, [*map(str, full)], [f"{x:g}" for x in depths], "length (down), depth (across)"
    )


def _heading(size: float = 11) -> dict[str, Any]:
    return {"loc": "left", "fontsize": size, "color": INK}


def _bare(axes: Any) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=MUTED)
