"""What a study asks of tasks, of streams of parts and of models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard

from torch import Tensor, nn

AVERAGE = "average"  # the headline of a stream: the mean score over all parts at its end

Answer = Callable[[Tensor], Tensor]  # tokens [B, T] to logits [B, T, outputs], on the CPU


class Batches(Protocol):
    """Endless (inputs, targets), each [B, T] int64, whose position can be saved and restored."""

    def __next__(self) -> tuple[Tensor, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """What a study asks of a task; `metric` names the headline in what `score` returns."""

    name: str
    vocabulary: int
    outputs: int
    metric: str
    better: Literal["higher", "lower"]

    def batches(self, batch: int, seed: int) -> Batches: ...

    def score(self, answer: Answer, *, quick: bool = False) -> dict[str, float]: ...

    def record(self) -> dict[str, Any]: ...


class Stream(Protocol):
    """What a study asks of parts that are learnt one after the other by the same model."""

    name: str
    vocabulary: int
    outputs: int
    parts: tuple[str, ...]
    better: Literal["higher", "lower"]

    def batches(self, part: int, batch: int, seed: int) -> Batches: ...

    def score(self, part: int, answer: Answer) -> float: ...

    def record(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Makers:
    """Where tasks (name, options) and models (name, configuration) come from."""

    task: Callable[[str, Mapping[str, Any]], Task | Stream]
    model: Callable[[str, Mapping[str, Any]], nn.Module]


def is_stream(task: Task | Stream) -> TypeGuard[Stream]:
    return hasattr(task, "parts")


def is_task(task: Task | Stream) -> TypeGuard[Task]:
    return not hasattr(task, "parts")


def headline(task: Task | Stream) -> str:
    """The name of the score that models are compared by."""
    return task.metric if is_task(task) else AVERAGE
