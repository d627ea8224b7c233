"""Processes that work side by side, one thread each, and may die without harm to the others."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from examples.blame import told
from examples.hope.checkpoint import Stop

OFTEN = 0.2  # seconds until a wish to stop is noticed

# (item, tell, stop) to a result, or None where `stop()` ended it early; `tell` passes anything on
# to the parent.
Work = Callable[[Any, Callable[..., None], Callable[[], bool]], Any]
Errors = tuple[type[Exception], ...]


@dataclass
class Done:
    """What came of the items, by their index."""

    results: dict[int, Any] = field(default_factory=dict[int, Any])
    errors: dict[int, str] = field(default_factory=dict[int, str])
    stopped: bool = False


def side_by_side(
    items: Sequence[Any],
    work: Work,
    jobs: int,
    *,
    heard: Callable[..., None] = lambda index, *said: None,
    finished: Callable[[int, Any], None] = lambda index, result: None,
    stop: Callable[[], bool] = lambda: False,
    expected: Errors = (Exception,),
) -> Done:
    """Do the items in `jobs` processes that live on from one item to the next; one is this one.

    heard, finished: are called here, with the index of the item. expected: errors that end an
    item, not the work. A process that dies takes the item it had with it, as an error, and another
    takes its place. `stop` ends all items, each as soon as it asks.
    """
    done = Done()
    if jobs == 1 or len(items) < 2:
        _in_turn(done, items, work, heard, finished, stop, expected)
    else:
        _apart(done, items, work, jobs, heard, finished, stop, expected)
    done.stopped = stop() and len(done.results) + len(done.errors) < len(items)
    return done


def _in_turn(
    done: Done,
    items: Sequence[Any],
    work: Work,
    heard: Callable[..., None],
    finished: Callable[[int, Any], None],
    stop: Callable[[], bool],
    expected: Errors,
) -> None:
    """The items in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index, item in enumerate(items):
            if stop():
                break

            def tell(*said: Any, index: int = index) -> None:
                heard(index, *said)

            _note(done, index, _outcome(work, item, tell, stop, expected), finished)
    finally:
        torch.set_num_threads(threads)


def _apart(
    done: Done,
    items: Sequence[Any],
    work: Work,
    jobs: int,
    heard: Callable[..., None],
    finished: Callable[[int, Any], None],
    stop: Callable[[], bool],
    expected: Errors,
) -> None:
    """The items in processes of their own."""
    # A forked torch may hang on locks that another thread of its parent held.
    context = multiprocessing.get_context("spawn")
    waiting, told = list(range(len(items))), False
    idle: list[tuple[Connection, Any]] = []
    busy: dict[Connection, tuple[Any, int]] = {}
    try:
        while busy or (waiting and not stop()):
            while waiting and len(busy) < jobs and not stop():
                if not idle:
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_worker, args=(theirs, work, expected))
                    _start(process)
                    theirs.close()
                    idle.append((ours, process))
                connection, process = idle.pop()
                index = waiting.pop(0)
                busy[connection] = process, index
                with contextlib.suppress(OSError):  # it died idle: the next wait notices
                    connection.send(items[index])
            if stop() and not told:
                told = True
                for process, _ in busy.values():
                    process.terminate()
            for connection in wait(list(busy), timeout=OFTEN):
                assert isinstance(connection, Connection)
                process, index = busy[connection]
                try:
                    kind, *said = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    connection.close()
                    del busy[connection]
                    # One that was still starting when it was told to stop dies of the signal.
                    if not (told and process.exitcode in (0, -signal.SIGTERM)):
                        done.errors[index] = _death(process.exitcode)
                    continue
                if kind == "said":
                    heard(index, *said)
                    continue
                del busy[connection]
                idle.append((connection, process))
                _note(done, index, (kind, *said), finished)
    finally:
        for process, _ in busy.values():  # only where this process was interrupted itself
            process.kill()
        for connection, process in [*idle, *((c, p) for c, (p, _) in busy.items())]:
            connection.close()
            process.join()


def _start(process: Any) -> None:
    """Start a process that Ctrl-C does not reach, not even while it imports."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child inherits it
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)


def _outcome(
    work: Work,
    item: Any,
    tell: Callable[..., None],
    stop: Callable[[], bool],
    expected: Errors,
) -> tuple[str, Any]:
    try:
        return "result", work(item, tell, stop)
    except (*expected, SystemExit) as error:
        return "error", told(error)


def _note(
    done: Done, index: int, outcome: tuple[Any, ...], finished: Callable[[int, Any], None]
) -> None:
    kind, what = outcome
    if kind == "error":
        done.errors[index] = what
    elif what is not None:
        done.results[index] = what
        finished(index, what)


def _death(code: int | None) -> str:
    how = f"was killed by signal {-code}" if code and code < 0 else f"ended with status {code}"
    return f"its process {how}; the same command goes on"


def _worker(connection: Connection, work: Work, expected: Errors) -> None:
    # Ctrl-C reaches every process of a terminal; the parent passes it on as SIGTERM, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    with Stop(signal.SIGTERM) as stop:

        def tell(*said: Any) -> None:
            with contextlib.suppress(OSError):  # the parent is gone: `ended` ends the item
                connection.send(("said", *said))

        def ended() -> bool:
            return stop.asked or (parent is not None and not parent.is_alive())

        with contextlib.suppress(EOFError, OSError):  # the parent has no more, or is gone
            while True:
                connection.send(_outcome(work, connection.recv(), tell, ended, expected))
