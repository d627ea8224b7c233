"""The results of a study as tables: means over seeds with intervals, in Markdown and CSV."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from examples.hope.tasks import metrics

SOLVED = 0.99  # the score from which on a seed counts as solved, where that is asked
Row = Mapping[str, Any]  # of results.jsonl: a result with label, seed, lr


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds; `half` is half the width of its 95 % interval by Student's t."""

    mean: float | None
    half: float | None
    count: int

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


@dataclass(frozen=True)
class Line:
    """One model in the table; `difference` is to the first one, over the seeds that both have.

    solved: how many seeds, those that diverged too, solved the task; None if that is not asked.
    step_ms, cpu_seconds: means over the trials, those that diverged too.
    """

    label: str
    lr: float
    finished: int
    diverged: int
    scores: dict[str, Estimate]
    difference: Estimate
    solved: int | None
    parameters: int
    steps: int
    step_ms: float
    cpu_seconds: float


def estimate(values: Sequence[float | None]) -> Estimate:
    """Of the values that are there; one has no interval."""
    there = [value for value in values if value is not None]
    if len(there) > 1:
        return Estimate(*metrics.mean_interval(there), len(there))
    return Estimate(there[0] if there else None, None, len(there))


def lines(
    rows: Sequence[Row], headline: str, labels: Sequence[str], solved: float | None = None
) -> list[Line]:
    """A line for each of the labels that has rows; the first label is what others differ from.

    solved: the score from which on a seed counts as solved.
    """
    first = {row["seed"]: row["scores"].get(headline) for row in rows if row["label"] == labels[0]}
    found = []
    for label in labels:
        of_label = [row for row in rows if row["label"] == label]
        if not of_label:
            continue
        good = [row for row in of_label if row["status"] == "finished"]
        names = dict.fromkeys(name for row in good for name in row["scores"])
        pairs = [(row["scores"].get(headline), first.get(row["seed"])) for row in good]
        apart = [a - b for a, b in pairs if a is not None and b is not None]
        found.append(
            Line(
                label=label,
                lr=of_label[0]["lr"],
                finished=len(good),
                diverged=len(of_label) - len(good),
                scores={n: estimate([row["scores"].get(n) for row in good]) for n in names},
                difference=estimate(apart if label != labels[0] else []),
                solved=None if solved is None else sum((s or 0) >= solved for s, _ in pairs),
                parameters=of_label[0]["parameters"],
                steps=max(row["steps"] for row in of_label),
                step_ms=statistics.fmean(row["step_ms"] for row in of_label),
                cpu_seconds=statistics.fmean(row["cpu_seconds"] for row in of_label),
            )
        )
    return found


def markdown(
    table: Sequence[Line],
    headline: str,
    better: Literal["higher", "lower"],
    about: Mapping[str, Any],
) -> str:
    """The table, all other scores below it, and what the figures depend on.

    about: name and value of each fact; a mapping among the values is written as `key: value, …`.
    """
    nothing = Estimate(None, None, 0)
    head = [
        *("model", "seeds", f"{headline} ({better} is better)", "difference to the first"),
        *("parameters", "steps", "ms/step", "CPU s", "learning rate", "diverged", "solved"),
    ]
    body = [
        [
            *(line.label, f"{line.finished}", f"{line.scores.get(headline, nothing)}"),
            *(f"{line.difference}", f"{line.parameters:,}", f"{line.steps:,}"),
            *(f"{line.step_ms:.1f}", f"{line.cpu_seconds:.1f}", f"{line.lr:g}"),
            *(f"{line.diverged}", _solved(line)),
        ]
        for line in table
    ]
    text = pipes(head, body)
    others = [name for name in _names(table) if name != headline]
    if others:
        cells = [[name, *(f"{x.scores.get(name, nothing)}" for x in table)] for name in others]
        text += "\n" + pipes(["score", *(x.label for x in table)], cells)
    text += "\nMean over seeds ± half the width of its 95 % interval (Student's t). The difference "
    text += "is the mean over the seeds that both models finished. Solved: seeds with a score of "
    text += f"at least {SOLVED}, and Wilson's 95 % interval of their share.\n\n"
    for name, value in about.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        text += f"- {name}: {value}\n"
    return text


def csv_text(table: Sequence[Line], headline: str) -> str:
    """The same numbers unrounded, a line per model; an empty field is a missing number."""
    names = _names(table)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    pairs = [x for name in names for x in (name, f"{name} half width")]
    plain = ["parameters", "steps", "step_ms", "cpu_seconds", "lr", "diverged", "solved"]
    difference = [f"{headline} difference", f"{headline} difference half width"]
    writer.writerow(["model", "seeds", *pairs, *difference, *plain])
    nothing = Estimate(None, None, 0)
    for line in table:
        estimates = [*(line.scores.get(name, nothing) for name in names), line.difference]
        numbers = [x for e in estimates for x in (e.mean, e.half)]
        rest = [getattr(line, name) for name in plain]
        writer.writerow([line.label, line.finished, *numbers, *rest])
    return out.getvalue()


def _solved(line: Line) -> str:
    if line.solved is None:
        return "–"
    count = line.finished + line.diverged
    low, high = metrics.wilson(line.solved, count)
    return f"{line.solved} of {count} ({low:.2f} to {high:.2f})"


def _names(table: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in table for name in line.scores))


def pipes(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, of names in the first column and figures in the others."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, rule, *body)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
