"""What a continual run has found: bits per byte of old and new text, as a table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepopt import replacing
from examples.hope import report
from examples.hope.learner import Learner


class Measured:
    """What a run has found, over all its interruptions."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []  # tokens read, bits per byte of old and new text
        self.bits = 0.0  # of all that was read, before it was learnt

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "bits": self.bits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.bits = list(state["rows"]), state["bits"]


def table(found: Measured, old: str, new: str) -> str:
    """Bits per byte before and after, as lines."""
    first, last = found.rows[0], found.rows[-1]
    names = {"old": old, "new": new}
    width = max(map(len, names.values()))
    lines = [f"{'bits per byte':{width}}  before   after  change"]
    lines += [
        f"{name:{width}}  {first[key]:6.3f}  {last[key]:6.3f}  {last[key] - first[key]:+6.3f}"
        for key, name in names.items()
        if key in first
    ]
    read = found.bits / last["tokens"]
    return "\n".join([*lines, f"{last['tokens']:,} tokens, before they were learnt: {read:.3f}"])


def plot(rows: Sequence[dict[str, Any]], path: Path, learner: Learner) -> None:
    """Draw bits per byte against tokens: as they were read, of the old text and of the new."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(9, 5.2), dpi=100, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    points = [(row["tokens"], row["read"]) for row in rows if row.get("read") is not None]
    tokens, read = zip(*points, strict=True)
    axes.plot(tokens, read, color=report.MUTED, alpha=0.25, linewidth=0.8)
    label = "read, before it is learnt (smoothed)"
    axes.plot(tokens, report.smooth(read), color=report.MUTED, linewidth=1.5, label=label)
    names = {"old": (report.TRAIN, "old text"), "new": (report.VALID, "new text, held out")}
    for key, (color, name) in names.items():
        seen = [(row["tokens"], row[key]) for row in rows if row.get(key) is not None]
        if seen:
            label = f"{name}: {seen[0][1]:.3f} to {seen[-1][1]:.3f}"
            axes.plot(*zip(*seen, strict=True), color=color, marker="o", markersize=4, label=label)
    levels = ", ".join(f"{learner.periods[i]:,}" for i in learner.levels)
    how = f"levels every {levels} tokens by {type(learner.rule).__name__}" if levels else "frozen"
    axes.set_title(f"Continual learning: {how}", loc="left", color=report.INK)
    axes.set_xlabel("tokens read", color=report.INK)
    axes.set_ylabel("bits per byte", color=report.INK)
    axes.grid(color=report.GRID, linewidth=0.8)
    axes.tick_params(colors=report.MUTED, length=0)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=report.INK)
    with replacing(path) as file:
        figure.savefig(file, format="png")
