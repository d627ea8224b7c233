"""What a trial is, one training of one model on one task, and the folder that it leaves."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from deepopt import replacing
from examples.hope.tasks import Stream, Task

AVERAGE = "average"  # the headline of a stream: the mean score over all parts at its end


@dataclass(frozen=True)
class Makers:
    """Where tasks (name, options) and models (name, configuration) come from.

    configure: the whole configuration of a model (name, settings), as JSON can hold it.
    A model maps tokens [B, T] to logits [B, T, outputs], and is one for `train.make_optimizer`.
    """

    task: Callable[[str, Mapping[str, Any]], Task | Stream]
    model: Callable[[str, Mapping[str, Any]], nn.Module]
    configure: Callable[[str, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """One training: all that its result depends on, except for the versions of the software.

    label: the row of the table, no part of the identity.
    record: what identifies the task's data.
    steps: optimizer steps; for a stream, on each part.
    parts: of a stream, how many of the first parts are learnt; None for all.
    quick: whether the task may score on a part of its test data.
    """

    label: str
    task: str
    options: dict[str, Any]
    record: dict[str, Any]
    model: str
    config: dict[str, Any]
    lr: float
    steps: int
    batch: int
    seed: int
    optimizer: str = "adamw"
    clip: float = 1.0
    parts: int | None = None
    quick: bool = False
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"

    def identity(self) -> dict[str, Any]:
        """The settings as JSON has them, without the label."""
        settings = asdict(self)
        del settings["label"]
        return as_json(settings)

    def id(self) -> str:
        """The name of the trial's folder."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def finished(folder: Path) -> dict[str, Any] | None:
    """The result that a trial left in its folder, None if it has not come to its end."""
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        if "scores" not in result:
            raise ValueError("it has no scores")
        return result
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no result: {error}; delete it to repeat") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` as a whole."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def as_json(value: Any) -> Any:
    """The value as it comes back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(value))


def headline(task: Task | Stream) -> str:
    """The name of the score that models are compared by."""
    return AVERAGE if isinstance(task, Stream) else task.metric
