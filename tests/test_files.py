"""A file that is being replaced is the old one or the new one, whenever its writer is killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from deepopt import replacing

# For each n a child saves and kills itself (SIGKILL) at its n-th write, fsync or rename; printed is
# whether a reader then finds the old save or the new one, and whether the child was killed.
HARNESS = """
import os, pathlib, signal, sys
import torch
from deepopt import replacing
from examples.hope import checkpoint

folder, alive = pathlib.Path(sys.argv[1]), 0

def moment():
    global alive
    alive -= 1
    if not alive:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(function):
    def call(*args, **kwargs):
        moment()
        done = function(*args, **kwargs)
        moment()
        return done
    return call

class Watched:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        half = bytes(data)[: len(bytes(data)) // 2]
        self.file.write(half)
        self.file.flush()
        moment()
        return len(half) + self.file.write(bytes(data)[len(half):])
    def __getattr__(self, name):
        return getattr(self.file, name)

class Thing:
    def __init__(self, i):
        self.i = i
    def state_dict(self):
        return {"i": self.i, "x": torch.full((100,), float(self.i))}

save = torch.save
os.fsync = counted(lambda _: None)  # A kill loses nothing that the system was given.
pathlib.Path.replace = counted(pathlib.Path.replace)
torch.save = lambda thing, file: save(thing, Watched(file))

def recipe(path, i):
    with replacing(path) as file:
        torch.save({"step": i, "model": Thing(i).state_dict()}, file)

def hope(path, i):
    checkpoint.save(path, {}, {"model": Thing(i)}, i)

for how in (recipe, hope):
    path = folder / how.__name__
    how(path, 0)
    for alive_for in range(1, 1000):
        before = torch.load(path, weights_only=True)["step"]
        if not (child := os.fork()):
            alive = alive_for
            how(path, before + 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = torch.load(path, weights_only=True)
        whole = bool((found["model"]["x"] == found["step"]).all())
        assert whole and found["model"]["i"] == found["step"]
        print(how.__name__, found["step"] - before, os.WIFSIGNALED(status))
        if not os.WIFSIGNALED(status):
            break
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork are POSIX")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    script = tmp_path / "harness.py"
    script.write_text(HARNESS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False, timeout=120,
        env={"PYTHONPATH": ".", "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for how in ("recipe", "hope"):
        rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith(how)]
        new = [int(found) for found, killed in rows if killed == "True"]
        # Killed at many moments: at first nothing is new, and after the rename the save is.
        assert len(new) > 10 and {*new} == {0, 1} and new == sorted(new)
        assert rows[-1] == ["1", "False"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="while writing"), replacing(path) as file:
        file.write(b"new")
        raise RuntimeError("while writing")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    with replacing(str(path)) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "a", tmp_path / "latest"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with replacing(link) as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first:
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"first")
    assert path.read_bytes() == b"first" and [*tmp_path.iterdir()] == [path]


def test_who_may_read_a_file_stays_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    with replacing(path) as file:
        file.write(b"more")
    assert path.stat().st_mode & 0o777 == 0o600
