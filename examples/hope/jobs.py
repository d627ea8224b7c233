"""Many trials one after another or side by side, each process with one thread."""

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from examples.hope import study, training
from examples.hope.checkpoint import Stop
from examples.hope.study import Makers, Trial

OFTEN = 0.2  # seconds between two reports of a process

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
    outcome, waiting = Outcome(), []
    for trial in {trial.id(): trial for trial in trials}.values():
        result = study.finished(out / trial.id())
        if result is None:
            waiting.append(trial)
        else:
            outcome.results[trial.id()] = result
    with Stop(signal.SIGINT, signal.SIGTERM) as stop:
        if jobs == 1 or len(waiting) < 2:
            _in_turn(waiting, out, makers, tell, interval, stop, outcome)
        else:
            _side_by_side(waiting, out, makers, jobs, tell, interval, stop, outcome)
    return outcome


def _in_turn(
    trials: list[Trial],
    out: Path,
    makers: Makers,
    tell: Tell,
    interval: float,
    stop: Stop,
    outcome: Outcome,
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for trial in trials:

            def hear(step: int, loss: float | None, trial: Trial = trial) -> None:
                tell(trial, step, loss)

            try:
                result = training.run(
                    *(trial, out / trial.id(), makers),
                    tell=hear,
                    stop=lambda: stop.asked,
                    interval=interval,
                )
            except EXPECTED as error:
                outcome.errors[trial.id()] = f"{error}"
                continue
            if result is None:
                outcome.stopped = True
                return
            outcome.results[trial.id()] = result
    finally:
        torch.set_num_threads(threads)


def _side_by_side(
    trials: list[Trial],
    out: Path,
    makers: Makers,
    jobs: int,
    tell: Tell,
    interval: float,
    stop: Stop,
    outcome: Outcome,
) -> None:
    # A forked torch may hang on locks that another thread of its parent held.
    context = multiprocessing.get_context("spawn")
    waiting, running, told = list(trials), {}, False
    try:
        while running or (waiting and not stop.asked):
            while waiting and len(running) < jobs and not stop.asked:
                trial = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_worker, args=(theirs, trial, out / trial.id(), makers, interval)
                )
                process.start()
                theirs.close()
                running[ours] = (process, trial)
            if stop.asked and not told:
                told = True
                for process, _ in running.values():
                    process.terminate()
            for connection in wait(list(running), timeout=OFTEN):
                assert isinstance(connection, Connection)
                process, trial = running[connection]
                try:
                    kind, *rest = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    connection.close()
                    del running[connection]
                    _ended(trial, process.exitcode, stop, outcome)
                    continue
                if kind == "step":
                    tell(trial, *rest)
                elif kind == "error":
                    outcome.errors[trial.id()] = rest[0]
                elif kind == "result" and rest[0] is not None:
                    outcome.results[trial.id()] = rest[0]
        left = any(trial.id() not in outcome.results for trial in trials)
        outcome.stopped = stop.asked and left
    finally:
        for process, _ in running.values():  # only where this process was interrupted itself
            process.kill()
            process.join()


def _ended(trial: Trial, code: int | None, stop: Stop, outcome: Outcome) -> None:
    """Notice a process that ended without a word."""
    # A process that was still starting when it was asked to stop dies of the signal.
    asked = stop.asked and code in (0, -signal.SIGTERM)
    if trial.id() in outcome.results or trial.id() in outcome.errors or asked:
        return
    how = f"was killed by signal {-code}" if code and code < 0 else f"ended with status {code}"
    outcome.errors[trial.id()] = f"its process {how}; the same command goes on from its checkpoint"


def _worker(
    connection: Connection, trial: Trial, folder: Path, makers: Makers, interval: float
) -> None:
    # Ctrl-C reaches every process of a terminal; the parent passes it on as SIGTERM, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    heard = 0.0

    def hear(step: int, loss: float | None) -> None:
        nonlocal heard
        if loss is None or time.monotonic() - heard >= OFTEN:
            heard = time.monotonic()
            send("step", step, loss)

    def send(*message: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is gone: `alone` ends the trial
            connection.send(message)

    with Stop(signal.SIGTERM) as stop:

        def alone() -> bool:
            return stop.asked or (parent is not None and not parent.is_alive())

        try:
            result = training.run(
                *(trial, folder, makers), tell=hear, stop=alone, interval=interval
            )
        except EXPECTED as error:
            send("error", f"{error}")
        else:
            send("result", result)
