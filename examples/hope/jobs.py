"""Many trials one after another or side by side, each process with one thread."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.hope import study, training
from examples.hope.checkpoint import Stop
from examples.hope.study import Makers, Trial
from examples.workers import side_by_side

# What ends one trial, not the study: a full disk, a bad checkpoint, memory that ran out.
EXPECTED = (OSError, ValueError, RuntimeError, ImportError)

Tell = Callable[[Trial, int, float | None], None]  # trial, its steps done, their loss in nats


@dataclass
class Outcome:
    """Results and errors by the id of the trial; `stopped` if a signal ended the work early."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def work(
    trials: Sequence[Trial],
    out: Path,
    makers: Makers,
    *,
    jobs: int = 1,
    tell: Tell = lambda trial, step, loss: None,
    interval: float = 30.0,
) -> Outcome:
    """Do the trials in folders of `out`; those that are finished there are only read.

    Ctrl-C and SIGTERM end it after the steps under way, with checkpoints; a second one at once.
    interval: seconds between the checkpoints of a trial.
    """
    known = {trial.id(): study.finished(out / trial.id()) for trial in trials}
    results = {name: result for name, result in known.items() if result is not None}
    waiting = [t for t in {t.id(): t for t in trials}.values() if t.id() not in results]
    items = [(trial, out / trial.id(), makers, interval) for trial in waiting]
    with Stop(signal.SIGINT, signal.SIGTERM) as stop:
        done = side_by_side(
            *(items, _do, jobs),
            heard=lambda index, *said: tell(waiting[index], *said),
            stop=lambda: stop.asked,
            expected=EXPECTED,
        )
    results |= {waiting[i].id(): result for i, result in done.results.items()}
    errors = {waiting[i].id(): error for i, error in done.errors.items()}
    return Outcome(results, errors, done.stopped)


def _do(
    item: tuple[Trial, Path, Makers, float], tell: Callable[..., None], stop: Callable[[], bool]
) -> dict[str, Any] | None:
    trial, folder, makers, interval = item
    return training.run(trial, folder, makers, tell=tell, stop=stop, interval=interval)
