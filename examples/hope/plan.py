"""What a study is, one task × models × seeds, and how its trials become tables and a picture."""

import json
import math
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import deepopt
from deepopt import replacing
from examples.hope import figure, report, study, table, training
from examples.hope.jobs import Outcome, work
from examples.hope.study import Makers, Trial
from examples.hope.tasks import Stream
from examples.settings import processor

TUNING_SEED = 1000  # far from the seeds that are reported, 0, 1, …
GRID = (1 / math.sqrt(10), 1.0, math.sqrt(10))  # factors of the learning rate
TUNING_PARTS = 3  # of a stream, at most: a rate tuned on its end would know what comes


@dataclass(frozen=True)
class Contender:
    """A row of the table: a model with its configuration and learning rate."""

    label: str
    model: str
    settings: dict[str, Any]
    lr: float


@dataclass(frozen=True)
class Plan:
    """One task, several contenders, `seeds` trainings of each.

    steps: of a stream, on each part.
    tune: try the learning rates of `GRID` on a seed that is not reported.
    command: what the tables say that they were made by.
    """

    task: str
    options: dict[str, Any]
    contenders: Sequence[Contender]
    out: Path
    seeds: int = 3
    steps: int = 100
    batch: int = 8
    optimizer: str = "adamw"
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    quick: bool = False
    tune: bool = False
    jobs: int = 1
    restart: bool = False
    interval: float = 30.0  # seconds between checkpoints of a trial
    command: str = ""


@dataclass
class Stage:
    """Trials done for one purpose, with their outcome."""

    purpose: Literal["tuning", "report"]
    trials: list[Trial]
    outcome: Outcome = field(default_factory=Outcome)

    def rows(self) -> list[dict[str, Any]]:
        """A row per trial that came to its end, in the order of the trials."""
        results = self.outcome.results
        return [
            {
                **{"label": t.label, "purpose": self.purpose, "task": t.task, "model": t.model},
                **{"seed": t.seed, "lr": t.lr, "optimizer": t.optimizer, "batch": t.batch},
                **results[t.id()],
            }
            for t in self.trials
            if t.id() in results
        ]


def conduct(plan: Plan, makers: Makers) -> list[Stage]:
    """Do what is left of the plan, and write tables and picture of what is there."""
    task = makers.task(plan.task, plan.options)
    base = Trials(plan, makers, task)
    stages, rates, notes = [], {c.label: c.lr for c in plan.contenders}, {}
    if plan.tune:
        tuning = Stage("tuning", base.tuning())
        stages.append(tuning)
        _work(plan, makers, tuning)
        if tuning.outcome.stopped or tuning.outcome.errors:
            return stages
        rates, notes = _best(tuning.rows(), study.headline(task), task.better)
    reported = Stage("report", base.report(rates))
    stages.append(reported)
    _work(plan, makers, reported)
    _write(plan, task, stages, notes)
    return stages


class Trials:
    """Makes the trials of a plan; models that cannot be built raise before any is trained."""

    def __init__(self, plan: Plan, makers: Makers, task: study.Task | Stream) -> None:
        self._plan, self._task = plan, task
        answers = {"vocabulary": task.vocabulary, "outputs": task.outputs}
        for name in answers:
            if any(name in c.settings for c in plan.contenders):
                raise ValueError(f"{name} is given by the task, {answers[name]} here")
        self._configs = {
            c.label: makers.configure(c.model, {**answers, **c.settings}) for c in plan.contenders
        }
        if isinstance(task, Stream) and len(task.parts) < 2:
            raise ValueError(f"{plan.task} has only {task.parts}: a stream has at least two parts")
        for contender in plan.contenders:
            makers.model(contender.model, self._configs[contender.label])

    def tuning(self) -> list[Trial]:
        task = self._task
        parts = min(TUNING_PARTS, len(task.parts) - 1) if isinstance(task, Stream) else None
        return [
            self._trial(c, float(f"{c.lr * factor:.3g}"), TUNING_SEED, parts)
            for c in self._plan.contenders
            for factor in GRID
        ]

    def report(self, rates: dict[str, float]) -> list[Trial]:
        # Seed by seed, so that the time left is soon known, and pairs are complete early.
        seeds = range(self._plan.seeds)
        return [
            self._trial(c, rates[c.label], s, None) for s in seeds for c in self._plan.contenders
        ]

    def _trial(self, contender: Contender, lr: float, seed: int, parts: int | None) -> Trial:
        plan = self._plan
        return Trial(
            label=contender.label,
            task=plan.task,
            options=plan.options,
            record=self._task.record(),
            model=contender.model,
            config=self._configs[contender.label],
            lr=lr,
            steps=plan.steps,
            batch=plan.batch,
            seed=seed,
            optimizer=plan.optimizer,
            parts=parts,
            quick=plan.quick,
            device=plan.device,
            precision=plan.precision,
        )


def _work(plan: Plan, makers: Makers, stage: Stage) -> None:
    trials = {trial.id(): trial for trial in stage.trials}
    if plan.restart:
        for name in trials:
            if (plan.out / name).exists():
                with training.alone(plan.out / name):
                    shutil.rmtree(plan.out / name, ignore_errors=True)
    task = makers.task(plan.task, plan.options)
    count = {
        name: trial.steps * (len(task.parts[: trial.parts]) if isinstance(task, Stream) else 1)
        for name, trial in trials.items()
    }
    done = {name: n for name, n in count.items() if study.finished(plan.out / name)}
    progress = report.Progress(
        *(sum(count.values()), 1, sum(done.values())), units=("nats", "steps/s")
    )

    def tell(trial: Trial, step: int, loss: float | None) -> None:
        name = trial.id()
        if name not in done:  # it begins, or goes on from a checkpoint
            progress.start += step
            progress.write(f"{stage.purpose}: {trial.label}, lr {trial.lr:g}, seed {trial.seed}")
        elif done[name] == step:
            return
        done[name] = step
        progress.update(sum(done.values()), loss, f"{trial.label}, seed {trial.seed}")

    stage.outcome = work(
        *(stage.trials, plan.out, makers), jobs=plan.jobs, tell=tell, interval=plan.interval
    )
    progress.close()


def _best(
    rows: list[dict[str, Any]], headline: str, better: str
) -> tuple[dict[str, float], dict[str, str]]:
    """For each label the rate with the best score, and what was tried, in words."""
    sign = 1 if better == "higher" else -1
    rates, notes = {}, {}
    for label in dict.fromkeys(row["label"] for row in rows):
        tried = {r["lr"]: r["scores"].get(headline) for r in rows if r["label"] == label}
        good = {lr: sign * score for lr, score in tried.items() if score is not None}
        if not good:
            shown = ", ".join(f"{lr:g}" for lr in tried)
            raise ValueError(f"{label} diverged at every learning rate tried, {shown}: try --lr")
        rates[label] = max(good, key=lambda lr: good[lr])
        words = [f"{lr:g} → {'diverged' if s is None else f'{s:.3f}'}" for lr, s in tried.items()]
        edge = rates[label] in (min(tried), max(tried))
        notes[f"learning rates tried, {label}"] = ", ".join(words) + (
            "; the best is at the edge" if edge else ""
        )
    return rates, notes


def _write(
    plan: Plan, task: study.Task | Stream, stages: list[Stage], notes: dict[str, str]
) -> None:
    """results.jsonl, and if any reported trial came to its end, the tables and the picture."""
    rows, headline = stages[-1].rows(), study.headline(task)
    if not rows:
        return
    every = "".join(json.dumps(row) + "\n" for stage in stages for row in stage.rows())
    _replace(plan.out / "results.jsonl", every)
    labels = [contender.label for contender in plan.contenders]
    solved = table.SOLVED if task.better == "higher" and not isinstance(task, Stream) else None
    lines = table.lines(rows, headline, labels, solved)
    codes = {row.get("code", "") for row in rows}
    about = {
        "command": f"`{plan.command}`",
        "trials": f"{len(rows)} of {len(stages[-1].trials)} came to their end",
        "training": f"{plan.optimizer}, batch {plan.batch}, {plan.device}, {plan.precision}",
        **notes,
        **{f"settings, {x.label}": settings(x) for x in plan.contenders},
        **({"code": f"{len(codes)} versions of it made these rows"} if len(codes) > 1 else {}),
        "hardware": hardware(plan.device),
        "software": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"deepopt {deepopt.__version__}, {platform.system()}",
        "date": time.strftime("%Y-%m-%d"),
        "task": study.as_json(task.record()),
    }
    page = f"# {plan.task}\n\n{table.markdown(lines, headline, task.better, about)}"
    _replace(plan.out / "summary.md", page)
    _replace(plan.out / "summary.csv", table.csv_text(lines, headline))
    curves: dict[str, dict[int, figure.Curve]] = {}
    for row in rows:
        log = report.read(plan.out / row["id"] / "log.jsonl")
        curve = [(entry["step"], entry["loss"]) for entry in log]
        curves.setdefault(row["label"], {})[row["seed"]] = curve
    parts = task.parts if isinstance(task, Stream) else ()
    count = len({row["seed"] for row in rows})
    title = f"{plan.task}: {count} seed{'s' if count > 1 else ''}"
    figure.draw(plan.out / "plot.png", title, lines, rows, curves, headline, task.better, parts)


def settings(contender: Contender) -> str:
    """What a model was told that its name does not say."""
    return ", ".join(f"{key}={value}" for key, value in contender.settings.items()) or "none"


def hardware(device: str) -> str:
    """The processor's name, and the GPU's where one was used."""
    name = processor()
    return name if device == "cpu" else f"{torch.cuda.get_device_name(device)}, {name}"


def _replace(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
