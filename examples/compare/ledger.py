"""What a study has done so far: an SQLite file that survives whatever happens to the process."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

VERSION = 2  # of what rows say, and of what the tasks here are


class Ledger:
    """Results by the id of their trial; each is written once, as a whole.

    One process at a time may write: the others get an OSError at once. A process that is killed
    leaves every row that it had written, and no lock.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if path.exists():
            read(path)
        with ExitStack() as opened:
            # Without transactions of its own making; the lock is that of a second, empty database,
            # so that a report may read while a study runs.
            lock = path.with_suffix(".lock")
            with _explained(lock, "locked"):
                base = sqlite3.connect(lock, timeout=0, isolation_level=None)
                opened.enter_context(closing(base)).execute("BEGIN EXCLUSIVE")
            with _explained(path, "written"):
                self._base = sqlite3.connect(path, isolation_level=None)
                opened.enter_context(closing(self._base)).executescript(
                    "CREATE TABLE IF NOT EXISTS trials"
                    " (id TEXT PRIMARY KEY, asked TEXT, result TEXT);"
                    f"PRAGMA user_version = {VERSION}"
                )
            self._opened = opened.pop_all()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def write(self, name: str, asked: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Add a result; one that is there already stays."""
        row = name, json.dumps(asked), json.dumps(result)
        with _explained(self.path, "written"):
            self._base.execute("INSERT OR IGNORE INTO trials VALUES (?, ?, ?)", row)

    def results(self) -> dict[str, dict[str, Any]]:
        """All results by id."""
        with _explained(self.path, "read"):
            return _rows(self._base)


@contextmanager
def _explained(path: Path, done: str) -> Iterator[None]:
    """Errors of SQLite as OSError with what could not be done; ValueError where it is no ledger."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # what Python raises has none
        if code == sqlite3.SQLITE_NOTADB:
            raise ValueError(f"{str(path)!r} is no ledger: {error}") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise OSError(
                f"{str(path.parent)!r} belongs to another process that is running: wait for it, or "
                "give another --out"
            ) from error
        raise OSError(f"{str(path)!r} cannot be {done}: {error}") from error


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The results of a ledger; ValueError where it is none, or one of another version."""
    if not path.exists():
        raise FileNotFoundError(f"no study has been run in {str(path.parent)!r}")
    with _explained(path, "read"):
        # Not read-only: what a killed process left half written has to be rolled back.
        with closing(sqlite3.connect(path, isolation_level=None)) as base:
            (version,) = base.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise ValueError(
                    f"{str(path)!r} is a ledger of version {version}, and this is version "
                    f"{VERSION}: give another --out, or the code that wrote it"
                )
            tables = base.execute("SELECT name FROM sqlite_master WHERE name = 'trials'").fetchall()
            return _rows(base) if tables else {}


def _rows(base: sqlite3.Connection) -> dict[str, dict[str, Any]]:
    found = base.execute("SELECT id, asked, result FROM trials ORDER BY rowid")
    return {
        name: {**json.loads(result), "asked": json.loads(asked)} for name, asked, result in found
    }
