"""Files that are whole or absent, whatever kills the process that writes them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[BinaryIO, None, None]:
    """A file to write, which takes the place of `path` when the block ends without an error.

    >>> with replacing("checkpoint.pt") as file:
    ...     torch.save(state, file)

    Until then, after an error, and after SIGKILL or a loss of power at any moment, `path` is what
    it was: what is written goes to a file beside it, is flushed to the disk, and then renamed. Of
    several writers the last to end wins. The folder must exist. Who may read the file stays as it
    was. A killed process leaves its unfinished `path.*.part` behind.
    """
    # A link stays one, and what it points to is replaced.
    target = Path(path).resolve()
    part = target.with_name(f"{target.name}.{uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            if target.exists():
                shutil.copymode(target, part)
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
