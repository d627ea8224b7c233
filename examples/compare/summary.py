"""What a study found, as numbers: one line for each contender on each task."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.compare import registry, stats
from examples.compare.stats import Interval
from examples.compare.study import Entry, Rows, Study, mean_score
from examples.compare.trial import Trial
from examples.hope.tasks.metrics import continual

Curve = list[Mapping[str, Any]]
# Of what was not trained on a seed, because it diverged at every rate.
NOWHERE: Mapping[str, Any] = {"status": "diverged", "curve": ()}


@dataclass
class Line:
    """A contender on a task.

    test: of each seed. difference: to the reference, in pairs. steps, seconds: of each seed, to
    the reference's validation score at its end, as a share of what it took itself to be as good
    first; infinite where it never was. stream, kept: what is kept and lost of a stream, and how
    that differs from the reference's. sensitivity: see `stats.sensitivity`. tried: rates and their
    scores.
    """

    label: str
    lr: float | None
    settings: Mapping[str, Any]
    edge: bool
    test: dict[int, float]
    mean: Interval
    difference: Interval | None
    rank: float
    seeds: int  # asked for; `diverged` of them have no score
    diverged: int
    steps: dict[int, float]
    seconds: dict[int, float]
    sensitivity: float
    tried: dict[float, float | None]
    curves: list[Curve]
    matrix: list[list[float]] | None
    stream: dict[str, Interval]
    kept: dict[str, Interval]
    step_ms: float
    optimizer_ms: float
    state: float  # bytes of optimizer state per byte of parameters
    peak: float  # MB on a GPU, nan where there is none
    trials: int
    ends: list[str]  # how those ended that diverged, of all if no rate was good, else of the seeds


@dataclass
class Table:
    """All contenders on one task.

    about: what it is. training: steps, schedule and what else is the same for all. target: the
    median over seeds.
    """

    task: str
    about: str
    training: str
    metric: str
    better: str
    target: float | None
    parts: list[str]
    tested: bool
    lines: list[Line] = field(default_factory=list[Line])
    records: list[str] = field(default_factory=list[str])
    software: list[str] = field(default_factory=list[str])
    machines: list[str] = field(default_factory=list[str])
    runs: list[str] = field(default_factory=list[str])  # when the commands began that made rows


def tables(study: Study, rows: Rows) -> list[Table]:
    """The tables of all tasks of which any contender has been reported."""
    study.following(rows)
    found = []
    for label in study.problems:
        entries = [e for e in study.entries if e.task == label]
        table = _table(study, label, entries, rows)
        if any(line.test or line.diverged for line in table.lines):
            found.append(table)
    return found


def _table(study: Study, label: str, entries: Sequence[Entry], rows: Rows) -> Table:
    problem = study.problems[label]
    better, seeds = problem.better, study.plan.seeds
    done = {e.contender.label: _reported(e, rows) for e in entries}
    first = next(e for e in entries if e.contender.label == study.plan.reference)
    own = done[first.contender.label]
    ends = [r["validate"] for r in own.values() if r["validate"] is not None]
    target = statistics.median(ends) if ends and len(problem.parts) == 1 else None
    theirs = _scores(own)
    lines = []
    for entry in entries:
        name = entry.contender.label
        found = done[name]
        test = _scores(found)
        whole = dict.fromkeys(own, NOWHERE) if entry.hopeless else found
        if len(problem.parts) > 1:  # on the way through a stream a score is that of another part
            whole = {}
        plain = entry.contender.variants()[0]
        tuned: dict[float, list[Trial]] = {}
        for i, trial in entry.tuning.items():
            if trial.settings == plain and i in rows:
                tuned.setdefault(trial.lr, []).append(trial)
        tried = {lr: mean_score(trials, rows) for lr, trials in tuned.items()}
        start = next((rows[i]["curve"][0]["validate"] for i in entry.tuning if i in rows), math.nan)
        good = [r for r in found.values() if r["status"] == "finished"]
        lost = found if entry.lr is not None else {i: rows[i] for i in entry.tuning if i in rows}
        streams, others = _streams(found, better), _streams(own, better)
        matrices = [r["matrix"]["test"] for r in good if r["matrix"]]
        lines.append(
            Line(
                label=name,
                lr=entry.lr,
                settings={k: v for k, v in entry.settings.items() if k in entry.contender.choices},
                edge=entry.edge,
                test=test,
                mean=stats.interval([*test.values()]),
                difference=None if entry is first else stats.paired(test, theirs),
                rank=math.nan,
                seeds=seeds,
                diverged=seeds
                if entry.hopeless
                else sum(r["status"] == "diverged" for r in found.values()),
                steps=_reached(whole, own, better, "step"),
                seconds=_reached(whole, own, better, "seconds"),
                sensitivity=stats.sensitivity(tried, start, better) if tried else math.nan,
                tried=dict(sorted(tried.items())),
                curves=[r["curve"] for r in good],
                matrix=_mean_matrix(matrices),
                stream={k: stats.interval([*v.values()]) for k, v in streams.items()},
                kept={k: stats.paired(v, others.get(k, {})) for k, v in streams.items()},
                step_ms=_mean([1e3 * r["seconds"] / max(1, r["steps"]) for r in good]),
                optimizer_ms=_mean(
                    [1e3 * r["optimizer_seconds"] / max(1, r["steps"]) for r in good]
                ),
                state=_mean([r["state_bytes"] / r["parameter_bytes"] for r in good]),
                peak=_mean([r["peak_bytes"] / 1e6 for r in good if r["peak_bytes"]]),
                trials=sum(i in rows for i in entry.tuning) + len(found),
                ends=[_end(r) for r in lost.values() if r["status"] == "diverged"],
            )
        )
    # One that diverged on a seed comes after all that did not, however good the others are.
    whole = {x.label: x.mean.mean if len(x.test) == seeds else math.nan for x in lines}
    ranked = stats.ranks(whole, better)
    for line in lines:
        line.rank = ranked[line.label] if len(line.test) + line.diverged == seeds else math.nan
    used = [i for e in entries for i in (*e.tuning, *e.reported)]
    every = [rows[i] for i in used if i in rows]
    name, options = study.options[label]
    return Table(
        **{"task": label, "metric": problem.metric, "better": better, "target": target},
        about=_about(name, options),
        training=_training(study, label),
        parts=next((r["parts"] for r in every), []),
        tested=all(part.test is not None for part in problem.parts),
        lines=lines,
        records=sorted({_words(r["record"]) for r in every}),
        software=sorted({_words(r["software"]) for r in every}),
        machines=sorted({r["machine"] for r in every if "machine" in r}),
        runs=sorted({r["run"] for r in every if "run" in r}),
    )


def _about(name: str, options: Mapping[str, Any]) -> str:
    words = (registry.maker(name).__doc__ or name).strip().splitlines()[0].rstrip(".")
    return f"{words}, {_words(options)}" if options else words


def _training(study: Study, label: str) -> str:
    problem, plan = study.problems[label], study.plan
    steps = f"{plan.steps or problem.steps} steps"
    if len(problem.parts) > 1:
        steps += f" on each of {len(problem.parts)} parts"
    warm = f", {problem.warmup:.0%} warm-up" if problem.warmup else ""
    clip = "no clipping" if problem.clip is None else f"gradients clipped to norm {problem.clip:g}"
    rest = problem.rest if plan.rest is None else plan.rest
    others = "AdamW at the same rate for what an optimizer of matrices does not take"
    if rest not in (None, "same"):
        others = f"AdamW at {rest:g} for all but hidden matrices"
    return f"{steps}, {problem.schedule} schedule{warm}, {clip}, {others}"


def _end(row: Mapping[str, Any]) -> str:
    where = f"seed {row['asked']['seed']}, lr {row['asked']['lr']:g}"
    return f"{where}: {row['reason']} at step {row['diverged_at']}"


def overall(found: Sequence[Table]) -> dict[str, tuple[float, int, int, int]]:
    """Of each contender: mean rank, and on how many tasks it was better, worse, neither.

    Better and worse than the reference, where the interval of the difference leaves out 0; or where
    fewer or more seeds diverged than of the reference.
    """
    labels = dict.fromkeys(line.label for table in found for line in table.lines)
    summary = {}
    for label in labels:
        pairs = [(t, line) for t in found for line in t.lines if line.label == label]
        signs = [verdict(table, line) for table, line in pairs if compared(table, line)]
        ranks = _mean([line.rank for _, line in pairs if not math.isnan(line.rank)])
        summary[label] = (ranks, signs.count(1), signs.count(-1), signs.count(0))
    return summary


def profile(found: Sequence[Table]) -> dict[str, list[float]]:
    """Of each contender, its steps to target by those of the fastest, sorted; inf: not reached.

    Of all tasks but streams and all seeds that everyone trained on: a performance profile.
    """
    labels = dict.fromkeys(line.label for table in found for line in table.lines)
    ratios: dict[str, list[float]] = {label: [] for label in labels}
    for table in found:
        lines = {line.label: line.steps for line in table.lines}
        if {*lines} != {*labels}:
            continue
        for seed in set.intersection(*map(set, lines.values())):
            fastest = min(steps[seed] for steps in lines.values())
            for label, steps in lines.items():
                late = math.isinf(steps[seed])
                ratios[label].append(math.inf if late else steps[seed] / fastest)
    return {label: sorted(values) for label, values in ratios.items()}


def verdict(table: Table, line: Line) -> int:
    """1 where it is better than the reference and told apart from it, -1 where worse, else 0."""
    if line.difference is None or not compared(table, line):
        return 0
    first = reference(table)
    if line.diverged != first.diverged:
        return 1 if line.diverged < first.diverged else -1
    if not line.difference.apart:
        return 0
    lower = line.difference.mean < 0
    return 1 if lower == (table.better == "lower") else -1


def compared(table: Table, line: Line) -> bool:
    """Whether all seeds of it and of the reference are there."""
    return all(len(x.test) + x.diverged >= x.seeds for x in (line, reference(table)))


def reference(table: Table) -> Line:
    return next(x for x in table.lines if x.difference is None)


def _reported(entry: Entry, rows: Rows) -> dict[int, dict[str, Any]]:
    return {t.seed: rows[i] for i, t in entry.reported.items() if i in rows}


def _scores(found: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    return {seed: r["test"] for seed, r in found.items() if r["test"] is not None}


def _reached(
    found: Mapping[int, Mapping[str, Any]],
    reference: Mapping[int, Mapping[str, Any]],
    better: str,
    axis: str,
) -> dict[int, float]:
    """Where the reference's score at its end is first reached, to where it reaches it itself first.

    Where the reference is that good untrained there is nothing to compare.
    """
    ratios = {}
    pairs = {s: (row, reference[s]) for s, row in found.items() if s in reference}
    pairs = {s: (a, b) for s, (a, b) in pairs.items() if b["status"] == "finished"}
    for seed, (row, other) in pairs.items():
        goal = other["curve"][-1]["validate"]
        own, theirs = (stats.reached(r["curve"], goal, better, axis) for r in (row, other))
        if own is None or row["status"] == "diverged":
            ratios[seed] = math.inf
        elif own > 0 and theirs:
            ratios[seed] = own / theirs
    return ratios


def _streams(found: Mapping[int, Mapping[str, Any]], better: Any) -> dict[str, dict[int, float]]:
    """What a stream kept and lost, by name and seed."""
    names: dict[str, dict[int, float]] = {}
    for seed, row in found.items():
        if row["matrix"]:
            for name, value in continual(row["matrix"]["test"], better).items():
                names.setdefault(name, {})[seed] = value
    return names


def _mean_matrix(matrices: Sequence[list[list[float]]]) -> list[list[float]] | None:
    if not matrices:
        return None
    size = range(len(matrices[0]))
    return [[_mean([m[i][j] for m in matrices]) for j in size] for i in size]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())
