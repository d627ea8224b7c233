"""Processes that work side by side, one thread each, and may die without harm to the others."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
OFTEN = 0.2  # seconds until a wish to stop is noticed

# (item, tell) to a result; `tell` passes anything on to the parent.
Work = Callable[[Any, Callable[..., None]], Any]


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
) -> Done:
    """Do the items in `jobs` processes that live on from one item to the next; one is this one.

    heard, finished: are called here, with the index of the item. A process that dies takes the
    item it had with it, as an error, and another takes its place. `stop` ends all at once.
    """
    if jobs == 1:
        return _in_turn(items, work, heard, finished, stop)
    done, waiting = Done(), list(range(len(items)))
    # A forked torch may hang on locks that another thread of its parent held.
    context = multiprocessing.get_context("spawn")
    idle: list[tuple[Connection, Any]] = []
    busy: dict[Connection, tuple[Any, int]] = {}
    try:
        while waiting or busy:
            if stop():
                done.stopped = True
                break
            while waiting and len(busy) < jobs:
                if not idle:
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_worker, args=(theirs, work), daemon=True)
                    process.start()
                    theirs.close()
                    idle.append((ours, process))
                connection, process = idle.pop()
                index = waiting.pop(0)
                busy[connection] = process, index
                with contextlib.suppress(OSError):  # it died idle: the next wait notices
                    connection.send(items[index])
            for connection in wait(list(busy), timeout=OFTEN):
                assert isinstance(connection, Connection)
                process, index = busy[connection]
                try:
                    kind, *said = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    connection.close()
                    del busy[connection]
                    done.errors[index] = _death(process.exitcode)
                    continue
                if kind == "said":
                    heard(index, *said)
                    continue
                del busy[connection]
                idle.append((connection, process))
                if kind == "error":
                    done.errors[index] = said[0]
                else:
                    done.results[index] = said[0]
                    finished(index, said[0])
    finally:
        for connection, process in [*idle, *((c, p) for c, (p, _) in busy.items())]:
            connection.close()
            process.terminate()
            process.join()
    return done


class _Stopped(Exception):
    pass


def _in_turn(
    items: Sequence[Any],
    work: Work,
    heard: Callable[..., None],
    finished: Callable[[int, Any], None],
    stop: Callable[[], bool],
) -> Done:
    """The items in this process, which is stopped where an item tells something."""
    import torch

    done, threads = Done(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index, item in enumerate(items):

            def tell(*said: Any, index: int = index) -> None:
                heard(index, *said)
                if stop():
                    raise _Stopped

            try:
                result = work(item, tell)
            except _Stopped:
                done.stopped = True
                break
            except Exception as error:  # of a user's task: the study goes on
                done.errors[index] = f"{type(error).__name__}: {error}"
            else:
                done.results[index] = result
                finished(index, result)
    finally:
        torch.set_num_threads(threads)
    return done


def _death(code: int | None) -> str:
    how = f"was killed by signal {-code}" if code and code < 0 else f"ended with status {code}"
    return f"its process {how}; the same command tries again"


def _worker(connection: Connection, work: Work) -> None:
    # Ctrl-C reaches every process of a terminal; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            item = connection.recv()
            try:
                result = work(item, lambda *said: connection.send(("said", *said)))
            except Exception as error:  # of a user's task: the study goes on
                connection.send(("error", f"{type(error).__name__}: {error}"))
            else:
                connection.send(("result", result))
