"""Files that are whole or absent, whatever kills the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[BinaryIO, None, None]:
    """A file to write, which takes the place of `path` when the block ends without an error.

    >>> with replacing("checkpoint.pt") as file:
    ...     torch.save(state, file)

    Until then, after an error, and after SIGKILL or a loss of power at any moment, `path` is what
    it was: what is written goes to a file beside it, is flushed to the disk, and then renamed. The
    folder must exist. A killed process leaves its unfinished `path.PID.part` behind.
    """
    # A link stays one, and what it points to is replaced.
    target = Path(path).resolve()
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":
        # The new name itself is on the disk only when its folder is.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
