"""One trial: a task, an optimizer with a learning rate, a seed; and the row it leaves."""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import packages_distributions, version
from typing import Any, Protocol

import numpy as np
import torch

import deepopt
from examples.blame import ROOT, of_user
from examples.compare.contenders import contender
from examples.compare.problem import Part, Problem
from examples.compare.steppers import Clock, Jax, Torch
from examples.settings import processor

Tell = Callable[[int, float | None], None]  # steps done, the score on the validation data


@dataclass(frozen=True)
class Trial:
    """All that a result depends on, except for the versions of the software.

    options: of the task. settings: of the optimizer, every choice made.
    steps: on each part; None for those of the problem. parts: how many are learnt; None for all.
    rest: as in `Problem`, where the study says otherwise.
    code: a digest of the files of one's own that make task and optimizer.
    """

    task: str
    options: Mapping[str, Any]
    optimizer: str
    settings: Mapping[str, Any]
    lr: float
    seed: int
    steps: int | None = None
    parts: int | None = None
    rest: float | str | None = None
    points: int = 20
    code: str = ""

    def id(self) -> str:
        """A name that equal trials share."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Stepper(Protocol):
    """A model in training, whichever the library."""

    clock: Clock  # of the optimizer's part of a step
    device: torch.device | None  # None for the CPU

    def step(self, batch: Any) -> float:
        """One step of the optimizer; the loss before it."""
        ...

    def model(self) -> Any:
        """What scores are asked of."""
        ...

    def state_bytes(self) -> int:
        """Of all that the optimizer keeps."""
        ...

    def parameter_bytes(self) -> int: ...

    def peak_bytes(self) -> int | None:
        """The most that was allocated on a GPU; None where there is none."""
        ...


def stepper(problem: Problem, trial: Trial) -> Stepper:
    """The model with its optimizer, at its first step."""
    chosen = contender(trial.optimizer, problem.backend)
    rest = problem.rest if trial.rest is None else trial.rest
    rest = None if rest == "same" else rest
    kind = Torch if problem.backend == "torch" else Jax
    return kind(problem, chosen, trial.lr, trial.settings, rest)  # pyright: ignore[reportArgumentType]


# What an optimizer raises where numbers leave their range.
OVERFLOW = (
    *(np.linalg.LinAlgError, FloatingPointError, OverflowError),
    torch.linalg.LinAlgError,  # pyright: ignore[reportPrivateImportUsage]
)


def run(
    trial: Trial,
    problem: Problem,
    tell: Tell = lambda step, score: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train and score; the result as JSON has it, None if `stop` ended it early.

    A loss, gradient or score that is not finite ends the trial as "diverged"; it has no scores.
    """
    began = time.perf_counter()
    parts = list(problem.parts)[: trial.parts]
    problem = replace(problem, parts=parts, steps=trial.steps or problem.steps)
    training = stepper(problem, trial)
    course = Course(problem, training, max(1, problem.total // trial.points), tell, stop)
    try:
        good = course.learn()
    except OVERFLOW as error:
        good, course.reason = False, f"{type(error).__name__}: {error}"
    if good is None:
        return None
    found: dict[str, Any] = {
        "status": "finished" if good else "diverged",
        "diverged_at": None if good else course.step,
        "reason": course.reason,
        "validate": _mean(course.matrix["validate"][-1]) if good else None,
        "test": _mean(course.matrix["test"][-1]) if good else None,
        "matrix": course.matrix if len(parts) > 1 and good else None,
        "curve": course.curve,
        **{"steps": course.step, "total": problem.total},
        "parts": [part.name or f"{i + 1}" for i, part in enumerate(parts)],
        "seconds": course.wall.total,
        "whole": time.perf_counter() - began,
        "optimizer_seconds": training.clock.total,
        "state_bytes": training.state_bytes(),
        "parameter_bytes": training.parameter_bytes(),
        "peak_bytes": training.peak_bytes(),
        "record": dict(problem.record),
        "software": software(problem.backend, trial.optimizer),
        "machine": machine(training.device),
    }
    return json.loads(json.dumps(found), parse_constant=lambda name: None)


def following(part: Part) -> Any:
    """The next batch."""
    try:
        return next(part.batches)
    except StopIteration:
        raise ValueError("the batches ended: they must be endless") from None


class Course:
    """What a training goes through: its steps, and the scores on the way and after each part."""

    def __init__(
        self,
        problem: Problem,
        training: Stepper,
        every: int,
        tell: Tell,
        stop: Callable[[], bool],
    ) -> None:
        self._problem, self._training, self._every = problem, training, every
        self._tell, self._stop = tell, stop
        self._losses: list[float] = []
        self.step, self.reason = 0, ""
        self.wall = Clock()
        self.curve: list[dict[str, float | None]] = []
        self.matrix: dict[str, list[list[float]]] = {"validate": [], "test": []}

    def learn(self) -> bool | None:
        """All parts in turn; False where something was not finite, None where it was stopped."""
        parts = self._problem.parts
        if not self._point(parts[0]):
            return False
        for index, part in enumerate(parts):
            for inside in range(1, self._problem.steps + 1):
                if self._stop():
                    return None
                batch = following(part)
                with self.wall:
                    loss = self._training.step(batch)
                self.step += 1
                self._losses.append(loss)
                if not math.isfinite(loss):
                    self.reason = "a loss or gradient is not finite"
                    return False
                border = self.step % self._every == 0 or inside == self._problem.steps
                if border and not self._point(part):
                    return False
            # After the last part alone, or for the matrix of a stream after each.
            if (len(parts) > 1 or index + 1 == len(parts)) and not self._scores():
                return False
        return True

    def _point(self, part: Part) -> bool:
        score = self._score(part.validate)
        loss = _mean(self._losses) if self._losses else None
        row = {"step": self.step, "validate": score, "loss": loss, "seconds": self.wall.total}
        if len(self._problem.parts) > 1:
            row["first"] = self._score(self._problem.parts[0].validate)
        self.curve.append(row)
        self._losses.clear()
        self._tell(self.step, score)
        return math.isfinite(score)

    def _scores(self) -> bool:
        for name, rows in self.matrix.items():
            functions = [getattr(part, name) or part.validate for part in self._problem.parts]
            rows.append([self._score(function) for function in functions])
        return all(math.isfinite(x) for rows in self.matrix.values() for x in rows[-1])

    def _score(self, function: Callable[[Any], float]) -> float:
        # What a score draws must not change what is trained on.
        with torch.random.fork_rng(devices=[]):
            score = float(function(self._training.model()))
        if not math.isfinite(score):
            self.reason = f"a score is {score}"
        return score


@cache
def software(backend: str, optimizer: str) -> dict[str, str]:
    """Versions that a figure depends on; of the code here a digest, for a version has many."""
    found = {"python": platform.python_version(), "numpy": np.__version__}
    found |= {"deepopt": deepopt.__version__, "code": code()}
    names = ["torch"] if backend == "torch" else ["jax", "optax"]
    package = optimizer.partition(":")[0].partition(".")[0]
    others = packages_distributions() if "." in optimizer and package not in names else {}
    names += [name for name in others.get(package, ()) if name not in found]
    return found | {name: version(name) for name in names}


@cache
def code() -> str:
    """A digest of the sources that studies run."""
    digest = hashlib.sha256()
    for folder in ("deepopt", "torch_backend", "jax_backend", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not of_user(str(path)):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def machine(device: torch.device | None) -> str:
    """What seconds depend on."""
    name = f"{processor()}, {os.cpu_count()} cores, one thread a trial"
    return name if device is None else f"{torch.cuda.get_device_name(device)}; {name}"


def _mean(scores: list[float]) -> float:
    return math.fsum(scores) / len(scores)
