"""What lets a run be stopped and continued: checkpoints on disk and the wish to stop."""

import io
import pickle
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from deepopt import replacing


class Stop:
    """Turns the first of the `signals` into a wish to stop after the step.

    The same signal again does what it did before, so a second Ctrl-C interrupts.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self.asked = False
        self._signals = signals or (signal.SIGINT,)

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._ask) for number in self._signals}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._before[signal.Signals(number)])

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def save(path: Path, identity: dict[str, Any], state: dict[str, Any], step: int) -> None:
    """Write a checkpoint; a reader finds the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {name: thing.state_dict() for name, thing in state.items()}
    # Through memory: torch's own writer hides the system's error when the disk is full.
    buffer = io.BytesIO()
    torch.save({"identity": identity, "step": step, **parts}, buffer)
    before = path.exists()
    try:
        with replacing(path) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        kept = "; the checkpoint saved before it stays" if before else ""
        reason = f"step {step} is not saved: {error.strerror}{kept}"
        raise OSError(error.errno, reason, str(path)) from error


def load(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> int:
    """Restore a checkpoint of the same settings and data; returns the steps done."""
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: {str(path)!r} does not exist")
    saved = read(path)
    different = differences(saved["identity"], identity)
    if different:
        raise ValueError(f"{str(path)!r} belongs to another run. " + "; ".join(different))
    for name, thing in state.items():
        thing.load_state_dict(saved[name])
    return saved["step"]


def read(path: Path) -> dict[str, Any]:
    """What `save` wrote; ValueError where the file is something else or damaged."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, KeyError, EOFError, OSError, pickle.UnpicklingError) as error:
        if isinstance(error, OSError) and error.filename:  # not what torch makes of torn files
            raise
        raise ValueError(
            f"{str(path)!r} cannot be read as a checkpoint: {error or 'it ends too soon'}"
        ) from error


def refuse_to_lose(path: Path) -> None:
    """Raise ValueError where a checkpoint of an unfinished run would be overwritten."""
    if not path.exists():
        return
    saved = read(path)
    if saved["step"] < saved["identity"]["steps"]:
        raise ValueError(
            f"{str(path)!r} holds a run stopped at step {saved['step']} of "
            f"{saved['identity']['steps']}: add --resume to go on, --restart to begin again, or "
            "another --out"
        )


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Every setting in which a checkpoint's identity differs from that of this run, in words."""
    saved, here = flat(theirs), flat(ours)
    return [
        f"{key}: checkpoint {saved.get(key)}, this run {here.get(key)}"
        for key in {**saved, **here}
        if saved.get(key) != here.get(key)
    ]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, with names such as `model.width`."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
