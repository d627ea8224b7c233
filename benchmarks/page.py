"""Tables and a picture of steps for the page of performance."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.figures import STYLE, between, save
from benchmarks.race import Record
from benchmarks.report import of_run, table

THEIRS = ("torch", "optax", "heavyball", "pytorch_optimizer", "dion")


def write_page(page: Path, records: Sequence[Record]) -> None:
    """The tables between the page's markers `results`, and images/step.png beside it."""
    runs = [list(own) for _, own in groupby(sorted(records, key=of_run), key=of_run)]
    draw(runs, page.parent / "images" / "step.png")
    picture = "![Milliseconds of a step by contender](images/step.png)\n"
    between(page, "results", "\n".join([picture, *map(table, runs)]))


def draw(runs: Sequence[list[Record]], path: Path) -> None:
    """Medians and quartiles of the races, a panel for each; the first contender is ours."""
    races = [own for own in runs if "ms" in own[0]]
    with plt.rc_context(STYLE):
        rows = -(-len(races) // 2)
        figure, axes = plt.subplots(
            rows, 2, figsize=(10, 1.9 * rows), layout="constrained", squeeze=False
        )
        for own, panel in zip(races, axes.flat, strict=False):
            shown = [r for r in reversed(own) if r["row"] not in ("copy", "GEMM")]
            middle = [r["ms"][0] for r in shown]
            ends = [[abs(r["ms"][i] - r["ms"][0]) for r in shown] for i in (1, 2)]
            ours = [
                not r["row"].startswith(("torch", "optax", "heavyball", "pytorch_", "dion"))
                for r in shown
            ]
            colours = ["C0" if x else "0.7" for x in ours]
            panel.barh([r["row"] for r in shown], middle, xerr=ends, color=colours, height=0.7)
            threads = f", threads: {own[0]['threads']}" if own[0]["device"] == "cpu" else ""
            panel.set(xlabel="ms", title=f"{own[0]['section']}{threads}")
        for panel in axes.flat[len(races) :]:
            panel.axis("off")
        save(figure, path)
