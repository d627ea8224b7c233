"""One trial: a task, an optimizer with a learning rate, a seed; and the row it leaves."""

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from examples.compare.contenders import contender
from examples.compare.problem import Problem
from examples.compare.steppers import Jax, Torch

Tell = Callable[[int, float | None], None]  # steps done, the score on the validation data


@dataclass(frozen=True)
class Trial:
    """All that a result depends on, except for the versions of the software.

    options: of the task. settings: of the optimizer, every choice made.
    steps: on each part; None for those of the problem. parts: how many are learnt; None for all.
    rest: as in `Problem`, where the study says otherwise.
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

    def id(self) -> str:
        """A name that equal trials share."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Stepper(Protocol):
    """A model in training, whichever the library."""

    optimizer_seconds: float

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


def run(trial: Trial, problem: Problem, tell: Tell = lambda step, score: None) -> dict[str, Any]:
    """Train and score; the result as JSON has it.

    A loss or a score that is not finite ends the trial as "diverged"; it has no scores.
    """
    began = time.perf_counter()
    parts = list(problem.parts)[: trial.parts]
    problem = replace(problem, parts=parts, steps=trial.steps or problem.steps)
    training = stepper(problem, trial)
    total, every = problem.total, max(1, problem.total // trial.points)
    curve, losses, step, diverged = [], [], 0, None
    matrix: dict[str, list[list[float]]] = {"validate": [], "test": []}
    wall = cpu = 0.0
    first = _score(parts[0].validate, training)
    curve.append(_point(0, first, None, wall, cpu))
    tell(0, first)
    for index, part in enumerate(parts):
        for inside in range(problem.steps):
            batch = next(part.batches)
            clocks = time.perf_counter(), time.process_time()
            loss = training.step(batch)
            wall += time.perf_counter() - clocks[0]
            cpu += time.process_time() - clocks[1]
            step += 1
            losses.append(loss)
            if not math.isfinite(loss):
                diverged = step
                break
            last = inside + 1 == problem.steps
            if step % every == 0 or last:
                score = _score(part.validate, training)
                row = _point(step, score, sum(losses) / len(losses), wall, cpu)
                if len(parts) > 1:
                    row["first"] = _score(parts[0].validate, training)
                curve.append(row)
                losses.clear()
                tell(step, score)
                if not math.isfinite(score):
                    diverged = step
                    break
        if diverged is not None:
            break
        if len(parts) > 1 or index + 1 == len(parts):
            for name in matrix:
                scores = [_score(getattr(p, name) or p.validate, training) for p in parts]
                matrix[name].append(scores)
                if not all(map(math.isfinite, scores)):
                    diverged = step
    found: dict[str, Any] = {
        "status": "finished" if diverged is None else "diverged",
        "diverged_at": diverged,
        "validate": None if diverged else _mean(matrix["validate"][-1]),
        "test": None if diverged else _mean(matrix["test"][-1]),
        "tested": all(p.test is not None for p in parts),
        "matrix": matrix if len(parts) > 1 and diverged is None else None,
        "curve": curve,
        **{"steps": step, "total": total, "metric": problem.metric, "better": problem.better},
        "parts": [part.name or f"{i + 1}" for i, part in enumerate(parts)],
        **{"seconds": wall, "cpu_seconds": cpu, "whole": time.perf_counter() - began},
        "optimizer_seconds": training.optimizer_seconds,
        "state_bytes": training.state_bytes(),
        "parameter_bytes": training.parameter_bytes(),
        "peak_bytes": training.peak_bytes(),
        "record": dict(problem.record),
        "software": software(problem.backend),
    }
    return json.loads(json.dumps(found), parse_constant=lambda name: None)


def software(backend: str) -> dict[str, str]:
    """Versions that a figure depends on."""
    found = {"python": platform.python_version(), "numpy": np.__version__}
    if backend == "torch":
        return {**found, "torch": torch.__version__}
    import jax
    import optax

    return {**found, "jax": jax.__version__, "optax": optax.__version__}


def _score(function: Callable[[Any], float], training: Stepper) -> float:
    return float(function(training.model()))


def _mean(scores: list[float]) -> float:
    return math.fsum(scores) / len(scores)


def _point(
    step: int, score: float, loss: float | None, wall: float, cpu: float
) -> dict[str, float | None]:
    return {"step": step, "validate": score, "loss": loss, "seconds": wall, "cpu_seconds": cpu}
