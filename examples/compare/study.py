"""A study: tasks × contenders, each tuned with as many trials, then seeds to report."""

import ast
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import resolve_name
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from deepopt import replacing
from examples.blame import blamed, of_user
from examples.compare import registry, search
from examples.compare.contenders import RULES, Contender, contender, imported
from examples.compare.ledger import Ledger
from examples.compare.problem import Problem
from examples.compare.registry import make_problem
from examples.compare.trial import Trial, following, run, stepper
from examples.hope.checkpoint import Stop
from examples.hope.report import Progress
from examples.workers import side_by_side

TUNING_SEED = 1000  # far from the seeds that are reported, 0, 1, …
TUNING_PARTS = 3  # of a stream: a rate tuned on its end would know what comes
HOUR = 3600.0
LEDGER = "ledger.sqlite"
PLAN = "study.json"


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    tasks: (label, name, options). optimizers: as users name them. reference: the one that others
        are compared with, the first where it is not said.
    trials: of every optimizer on every task, to find its learning rate and its choices; each is the
        mean over `tuning_seeds` trainings.
    lr: rates that are given instead, by label. drop_in: the others take the tuned rate of the
        first, and tune nothing.
    steps, rest: in place of those of the tasks. rest "same": the optimizer steps everything.
    weight_decay: of all optimizers that have such a setting and do not say their own.
    """

    tasks: Sequence[tuple[str, str, Mapping[str, Any]]]
    optimizers: Sequence[str]
    seeds: int = 5
    trials: int = 7
    tuning_seeds: int = 1
    lr: Mapping[str, float] = field(default_factory=dict[str, float])
    drop_in: bool = False
    reference: str = ""
    steps: int | None = None
    rest: float | str | None = None
    weight_decay: float | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if not self.reference:
            object.__setattr__(self, "reference", self.optimizers[0])
        if self.reference not in self.optimizers:
            raise ValueError(f"--reference {self.reference}: one of {', '.join(self.optimizers)}")

    def tuned(self) -> list[str]:
        """The optimizers whose learning rate is searched for."""
        chosen = self.optimizers[:1] if self.drop_in else self.optimizers
        return [label for label in chosen if label not in self.lr]

    def save(self, folder: Path) -> None:
        """As JSON, for the report."""
        with replacing(folder / PLAN) as file:
            file.write((json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        path = folder / PLAN
        if not path.exists():
            raise FileNotFoundError(f"{str(folder)!r} holds no study: {PLAN} is missing")
        try:
            found = json.loads(path.read_text())
            tasks = [(label, name, dict(options)) for label, name, options in found["tasks"]]
            return cls(**{**found, "tasks": tasks})
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(
                f"{str(path)!r} is no whole plan of a study ({type(error).__name__}: {error}): the "
                "command that was run there writes it again"
            ) from error


@dataclass
class Entry:
    """One contender on one task: what was tried, what was chosen, and the trials to report."""

    task: str
    contender: Contender
    code: str  # see `digest`
    tuning: dict[str, Trial] = field(default_factory=dict[str, Trial])
    reported: dict[str, Trial] = field(default_factory=dict[str, Trial])
    lr: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    edge: bool = False

    @property
    def hopeless(self) -> bool:
        """Whether it diverged at every rate that was tried, so that none was chosen."""
        return self.lr is None and self.edge


Rows = dict[str, dict[str, Any]]


def digest(task: str, one: Contender) -> str:
    """Of the files of one's own that make a task and an optimizer, "" if there is none.

    And of those that they import, so that a task that was edited is another task, whose trials are
    done anew.
    """
    made = [registry.maker(task), *([] if one.name in RULES else [imported(one.name)])]
    found: dict[str, bytes] = {}
    waiting = [x.__module__ for x in made]
    while waiting:
        name = waiting.pop()
        file = getattr(sys.modules.get(name), "__file__", None)
        if name not in found and of_user(file):
            path = Path(file or "")
            found[name] = path.read_bytes()
            waiting += _imports(found[name], name) if path.suffix == ".py" else []
    if not found:
        return ""
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()[:12]


def _imports(source: bytes, module: str) -> Iterator[str]:
    """Names that may be modules which a file imports."""
    package = getattr(sys.modules[module], "__package__", None)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            base = resolve_name(f"{dots}{node.module or ''}", package) if dots else node.module
            yield from (f"{base}", *(f"{base}.{x.name}" for x in node.names))


class Study:
    """What there is to do, given what has been done: the same for the same ledger."""

    def __init__(self, plan: Plan) -> None:
        if len(set(plan.optimizers)) < len(plan.optimizers):
            raise ValueError(f"--optimizers {' '.join(plan.optimizers)}: each once")
        self.plan = plan
        self.problems = {
            label: make_problem(name, options, TUNING_SEED) for label, name, options in plan.tasks
        }
        self.options = {label: (name, options) for label, name, options in plan.tasks}
        self.entries = [
            Entry(label, one, digest(self.options[label][0], one))
            for label, problem in self.problems.items()
            for one in (contender(x, problem.backend, plan.weight_decay) for x in plan.optimizers)
        ]
        for one, other in combinations(self.entries, 2):
            a, b = one.contender, other.contender
            if one.task == other.task and self._trained(a) == self._trained(b):
                raise ValueError(
                    f"--optimizers {a.label} {b.label}: both are {a.name} with the same settings; "
                    "each once"
                )
        unknown = [name for name in plan.lr if name not in plan.optimizers]
        if unknown:
            raise ValueError(f"--lr {unknown[0]}=…: no such row; there are {plan.optimizers}")
        for entry in self.entries:
            count = len(entry.contender.variants())
            label = entry.contender.label
            if count > 1 and (plan.drop_in or label in plan.lr or plan.trials < count + 2):
                raise ValueError(
                    f"{label} has {count} choices: --trials {count + 2} at least, of which three "
                    "are for the learning rate, and neither --drop-in nor a rate in --lr"
                )
            # It says now whether the optimizer can step the model at all.
            with blamed(f"{entry.task}, {label}"):
                stepper(self.problems[entry.task], self.trial(entry, entry.contender.lr, {}, 0))
        for label, (name, options) in self.options.items():
            entry = next(e for e in self.entries if e.task == label)
            with blamed(f"task {label}"):
                scores = [self._untrained(entry, name, options) for _ in range(2)]
            if scores[0] != scores[1] and not math.isnan(scores[0]):
                raise ValueError(
                    f"task {label}: two models of one seed have the scores {scores[0]} and "
                    f"{scores[1]}; weights and data must follow from the seed"
                )

    def _untrained(self, entry: Entry, name: str, options: Mapping[str, Any]) -> float:
        """The score of a model as trials have it, without its dropout."""
        problem = make_problem(name, options, TUNING_SEED)
        training = stepper(problem, self.trial(entry, entry.contender.lr, {}, 0))
        return problem.parts[0].validate(training.model())

    def _trained(self, one: Contender) -> tuple[Any, ...]:
        """What a contender is trained with, whatever it is called."""
        return one.kind, one.name, one.settings, one.choices, self.plan.lr.get(one.label)

    def trial(
        self, entry: Entry, lr: float, settings: Mapping[str, Any], seed: int, tuning: bool = False
    ) -> Trial:
        name, options = self.options[entry.task]
        parts = len(self.problems[entry.task].parts)
        return Trial(
            **{"task": name, "options": options, "optimizer": entry.contender.label, "lr": lr},
            **{"settings": settings or entry.contender.variants()[0], "seed": seed},
            **{"steps": self.plan.steps, "rest": self.plan.rest},
            code=entry.code,
            parts=min(TUNING_PARTS, parts - 1) if tuning and parts > 1 else None,
        )

    def following(self, rows: Rows) -> list[Trial]:
        """The trials that can be done now; none when the study is done.

        Seed by seed, so that what else a machine does slows all contenders alike.
        """
        found = [trial for entry in self.entries for trial in self._of(entry, rows)]
        found.sort(key=lambda trial: trial.seed)
        return list({trial.id(): trial for trial in found}.values())

    def _of(self, entry: Entry, rows: Rows) -> Iterator[Trial]:
        plan, one = self.plan, entry.contender
        better = self.problems[entry.task].better
        first = next(e for e in self.entries if e.task == entry.task)
        entry.tuning, entry.reported = {}, {}
        variants = one.variants()
        settings = variants[0]
        if one.label in plan.lr:
            lr = plan.lr[one.label]
        elif plan.drop_in and entry is not first:
            if first.lr is None:
                entry.lr, entry.edge = None, first.edge
                return
            lr = first.lr
        else:
            budget = plan.trials - (len(variants) - 1)
            tried: dict[float, float | None] = {}
            while len(tried) < budget:
                rates = search.following(one.lr, tried, better)[: budget - len(tried)]
                asked = self._tuning(entry, [(r, settings) for r in rates])
                if missing := _missing(entry, asked, rows):
                    yield from missing
                    return
                tried |= {x[0].lr: mean_score(x, rows) for x in asked}
            best = search.best_rate(tried, better)
            if best is None:  # it diverged everywhere: the report says so
                entry.lr, entry.edge = None, True
                return
            lr, entry.edge = best, search.at_edge(tried, better)
            if len(variants) > 1:
                asked = self._tuning(entry, [(lr, v) for v in variants])
                if missing := _missing(entry, asked, rows):
                    yield from missing
                    return
                scores = {float(i): mean_score(x, rows) for i, x in enumerate(asked)}
                settings = variants[int(search.best_rate(scores, better) or 0)]
        entry.lr, entry.settings = lr, settings
        for seed in range(plan.seeds):
            trial = self.trial(entry, lr, settings, seed)
            entry.reported[trial.id()] = trial
            if trial.id() not in rows:
                yield trial

    def _tuning(
        self, entry: Entry, points: Sequence[tuple[float, Mapping[str, Any]]]
    ) -> list[list[Trial]]:
        """The trainings that each of the points (rate, settings) is judged by."""
        seeds = range(TUNING_SEED, TUNING_SEED + self.plan.tuning_seeds)
        return [[self.trial(entry, lr, x, seed, True) for seed in seeds] for lr, x in points]

    def length(self, trial: Trial) -> int:
        """Its steps on all the parts that it learns."""
        label = next(k for k, v in self.options.items() if v == (trial.task, trial.options))
        problem = self.problems[label]
        return (trial.steps or problem.steps) * len(problem.parts[: trial.parts])

    def left(self, rows: Rows) -> list[int]:
        """How many trials each entry has still to do, at most."""
        found = []
        for entry in self.entries:
            tunes = entry.contender.label in self.plan.tuned()
            known = {**entry.tuning, **entry.reported}
            done = sum(name in rows for name in known)
            count = self.plan.seeds + (self.plan.trials * self.plan.tuning_seeds if tunes else 0)
            found.append(0 if entry.hopeless else max(0, count - done))
        return found


def _missing(entry: Entry, asked: Sequence[Sequence[Trial]], rows: Rows) -> list[Trial]:
    """Of the trials that tune an entry, those that have to be done."""
    entry.tuning |= {t.id(): t for trials in asked for t in trials}
    return [t for trials in asked for t in trials if t.id() not in rows]


def mean_score(trials: Sequence[Trial], rows: Rows) -> float | None:
    """Of the same on several seeds; None where one diverged."""
    scores = [rows[t.id()]["validate"] for t in trials]
    return None if None in scores else math.fsum(scores) / len(scores)


def estimate(study: Study, rows: Rows, jobs: int, steps: int = 3) -> float:
    """Seconds that what is left may take, from a few steps of each; about."""
    study.following(rows)
    total, threads = 0.0, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for entry, count in zip(study.entries, study.left(rows), strict=True):
            if not count:
                continue
            with blamed(f"{entry.task}, {entry.contender.label}"):
                once, scored, each, problem = _timed(study, entry, steps)
            length = (study.plan.steps or problem.steps) * len(problem.parts)
            scores = min(length, Trial.points) + 2 * len(problem.parts) ** 2
            total += count * (once + length * each + scores * scored)
    finally:
        torch.set_num_threads(threads)
    return total / min(jobs, os.cpu_count() or 1)


def _timed(study: Study, entry: Entry, steps: int) -> tuple[float, float, float, Problem]:
    """Seconds to begin, of a score and of a step; and the problem."""
    name, options = study.options[entry.task]
    began = time.perf_counter()
    problem = make_problem(name, options, TUNING_SEED)
    trial = replace(study.trial(entry, entry.contender.lr, {}, 0), steps=None)
    training = stepper(problem, trial)
    part = problem.parts[0]
    part.validate(training.model())
    training.step(following(part))  # JAX compiles, and torch allocates
    once = time.perf_counter() - began
    began = time.perf_counter()
    part.validate(training.model())
    scored = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(steps):
        training.step(following(part))
    return once, scored, (time.perf_counter() - began) / steps, problem


def work(
    trial: Trial, tell: Callable[..., None], stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """What a process does with a trial."""
    return run(trial, make_problem(trial.task, trial.options, trial.seed), tell, stop)


def conduct(study: Study, folder: Path, jobs: int) -> tuple[list[str], bool]:
    """Do what is left, round by round; what failed, and whether a signal stopped it.

    Results are in the ledger as soon as they are there.
    """
    errors: dict[str, list[str]] = {}
    with Ledger(folder / LEDGER) as ledger, Stop(signal.SIGINT, signal.SIGTERM) as stop:
        study.plan.save(folder)
        rows = ledger.results()
        study.following(rows)
        shown = Shown(study, rows)
        tried: set[str] = set()
        began = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        while not stop.asked:
            trials = [t for t in study.following(rows) if t.id() not in tried]
            if not trials:
                break
            tried |= {t.id() for t in trials}

            def finished(index: int, result: dict[str, Any], trials: list[Trial] = trials) -> None:
                trial, result = trials[index], {**result, "run": began}
                ledger.write(trial.id(), asdict(trial), result)
                rows[trial.id()] = {**result, "asked": asdict(trial)}
                shown.heard(trial, study.length(trial), result["validate"])

            def heard(
                index: int, step: int, score: float | None, trials: list[Trial] = trials
            ) -> None:
                shown.heard(trials[index], step, score)

            done = side_by_side(
                *(trials, work, jobs), heard=heard, finished=finished, stop=lambda: stop.asked
            )
            for index, error in done.errors.items():
                t = trials[index]
                trial = f"{t.task}, {t.optimizer}, lr {t.lr:g}, seed {t.seed}"
                errors.setdefault(error, []).append(trial)
        shown.progress.close()
        return [_words(*x) for x in errors.items()], stop.asked


def _words(error: str, trials: Sequence[str]) -> str:
    others = f" and {len(trials) - 1} more trials" if len(trials) > 1 else ""
    return f"{trials[0]}{others}: {error}"


class Shown:
    """Progress over all trials, in steps of optimizers."""

    def __init__(self, study: Study, rows: Rows) -> None:
        whole = [study.trial(e, e.contender.lr, {}, 0) for e in study.entries]
        lengths = map(study.length, whole)
        self._total = sum(n * count for n, count in zip(lengths, study.left(rows), strict=True))
        self._steps: dict[str, int] = {}
        self.progress = Progress(max(1, self._total), 1, units=("", "steps/s"))

    def heard(self, trial: Trial, step: int, score: float | None) -> None:
        self._steps[trial.id()] = step
        note = f"{trial.task}, {trial.optimizer}, lr {trial.lr:g}, seed {trial.seed}"
        done = min(sum(self._steps.values()), self._total)
        self.progress.update(done, score, note)
