"""Whose error it was, and whose file: what a user's own code did is told with its line."""

import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepopt

ROOT = Path(deepopt.__file__).parent.parent
HERE = Path(__file__).parent
OURS = [
    *(HERE / name for name in ("compare", "hope", "blame.py", "settings.py", "workers.py")),
    *(ROOT / name for name in ("deepopt", "torch_backend", "jax_backend")),
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")),
]
# Their words are for users.
SPOKEN = (ValueError, TypeError, ImportError, OSError)


def of_user(file: str | None) -> bool:
    """Whether it is a file of the user's: no package's, not Python's and not ours."""
    if not file or file.startswith("<"):
        return False
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & {*path.parts}
    return not installed and not any(x in (path, *path.parents) for x in OURS)


def told(error: BaseException) -> str:
    """What an error says, of which kind it is, and the last line of the user's that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [x for x in frames if of_user(x.filename)]
    if not own and isinstance(error, SPOKEN) and str(error):
        return str(error)
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    words = f": {error}" if str(error) else ""
    return f"{type(error).__name__}{words}{where}"


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Errors inside, as ValueError in words that begin with what they are of."""
    try:
        yield
    except (Exception, SystemExit) as error:  # sys.exit would end the command without a word
        raise ValueError(f"{what}: {told(error)}") from error


def folder() -> None:
    """Let a user's files be imported from the folder where the command is given."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
