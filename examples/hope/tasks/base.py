"""What a task is: endless training batches, and scores of an answering function on fixed data."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the target where nothing is asked, as in torch.nn.functional.cross_entropy
TOKENS = 16_384  # most tokens that one call of an answering function gets, if a row is not longer

# Tokens [B, T] (int64) to logits [B, T, outputs]; it moves the tokens to its own device.
Answer = Callable[[Tensor], Tensor]
Better = Literal["higher", "lower"]


class Batch(NamedTuple):
    """Rows of tokens and what is asked at each position."""

    inputs: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, IGNORED where nothing is asked


class Batches(Iterator[Batch]):
    """Endless batches of `draw(generator, batch)`; `about` says which data they come from."""

    def __init__(
        self,
        draw: Callable[[torch.Generator, int], Batch],
        batch: int,
        seed: int,
        about: Mapping[str, Any],
    ) -> None:
        at_least("batch", batch, 1)
        self._draw, self.batch = draw, batch
        self._about = {**about, "batch": batch, "seed": seed}
        # Parts that share their data must not share its order.
        own = [about["part"]] if about.get("joint") else []
        self._generator = generator("training", about["name"], seed, *own)

    def __next__(self) -> Batch:
        return self._draw(self._generator, self.batch)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, and the data and sizes it belongs to."""
        return {"generator": self._generator.get_state(), "about": dict(self._about)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; data, batch and seed must be the same."""
        theirs, ours = state["about"], self._about
        different = [
            f"{key} = {theirs.get(key)!r}, this run has {key} = {ours.get(key)!r}"
            for key in {**theirs, **ours}
            if theirs.get(key) != ours.get(key)
        ]
        if different:
            raise ValueError(
                f"cannot resume: the checkpoint was written with {'; with '.join(different)}"
            )
        self._generator.set_state(state["generator"].cpu())


class Task(ABC):
    """Data to train on and a score of what was learnt.

    `metric` names the headline figure in what `score` returns, `better` its direction.
    """

    name: str
    vocabulary: int
    outputs: int
    metric: str
    better: Better

    @abstractmethod
    def batches(self, batch: int, seed: int) -> Batches:
        """Endless training batches, the same for the same seed."""

    @abstractmethod
    def score(self, answer: Answer, *, quick: bool = False) -> dict[str, float]:
        """Figures on test data that depend on no seed of the training; `quick` uses fewer rows."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What identifies the data in a log; figures compare only where the records agree."""


class Stream(ABC):
    """Parts to be learnt one after another, each with its own training and held-out data."""

    name: str
    vocabulary: int
    outputs: int
    parts: tuple[str, ...]
    better: Better
    joint: bool = False  # all parts are learnt at once, as a bracket of what a stream could reach

    @abstractmethod
    def batches(self, part: int, batch: int, seed: int) -> Batches:
        """Endless training batches of one part, the same for the same seed."""

    @abstractmethod
    def score(self, part: int, answer: Answer) -> float:
        """The figure of one part on its held-out data."""

    def more(self, part: int, answer: Answer) -> dict[str, float]:
        """Other figures of one part, of which the mean over all parts is told at the end."""
        return {}

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What identifies the data in a log; figures compare only where the records agree."""


def generator(*names: str | int) -> torch.Generator:
    """A private generator of its own for every sequence of names and seeds."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    # The generator of the CPU uses 32 bits of its seed.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError where the size called `name` is too small."""
    if not value >= least:
        raise ValueError(f"{name} = {value}: at least {least}")


def part_of(parts: tuple[str, ...], part: int) -> str:
    """The name of the part with that index."""
    if not 0 <= part < len(parts):
        raise ValueError(f"part {part}: there are parts 0 to {len(parts) - 1}, {', '.join(parts)}")
    return parts[part]


def stored(data: Batch) -> Callable[[torch.Generator, int], Batch]:
    """A drawing function over fixed rows, with replacement."""

    def draw(generator: torch.Generator, batch: int) -> Batch:
        rows = torch.randint(len(data.inputs), (batch,), generator=generator)
        return Batch(data.inputs[rows].long(), data.targets[rows].long())

    return draw


def first(data: Batch, count: int) -> Batch:
    """The first `count` rows."""
    return Batch(data.inputs[:count], data.targets[:count])


def pack(pieces: Tensor, kept: Tensor, length: int, fill: int) -> Tensor:
    """The kept entries of pieces [B, N], moved to the left and cut or filled to [B, length]."""
    place = kept.cumsum(1) - 1
    # What is not kept, or comes after the end, goes to a last column that is cut off.
    place = torch.where(kept & (place < length), place, length)
    packed = pieces.new_full((len(pieces), length + 1), fill)
    return packed.scatter_(1, place, pieces)[:, :length]


def padded(rows: list[bytes], width: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as one table [N, width] (uint8, filled with 0), and their lengths [N]."""
    width = max(width, *map(len, rows))
    table = bytearray(b"".join(row.ljust(width, b"\0") for row in rows))
    lengths = torch.tensor([len(row) for row in rows])
    return torch.frombuffer(table, dtype=torch.uint8).view(-1, width), lengths


def digest(*data: Tensor) -> str:
    """SHA-256 over shapes and values."""
    total = hashlib.sha256()
    for tensor in data:
        total.update(repr(tuple(tensor.shape)).encode() + tensor.long().numpy().tobytes())
    return total.hexdigest()


def verdicts(answer: Answer, data: Batch, outputs: int) -> tuple[Tensor, Tensor]:
    """Where something is asked [B, T], and where the most likely answer is the right one."""
    guesses = [logits.argmax(-1).cpu() for logits in _logits(answer, data, outputs)]
    asked = data.targets != IGNORED
    return asked, asked & (torch.cat(guesses) == data.targets)


def accuracy(asked: Tensor, right: Tensor) -> float:
    """Share of the asked positions that were answered right."""
    return right.sum().item() / asked.sum().item()


def exact(asked: Tensor, right: Tensor) -> float:
    """Share of the rows in which every asked position was answered right."""
    return (right == asked).all(1).double().mean().item()


def bits(answer: Answer, data: Batch, outputs: int) -> float:
    """Mean negative log2 probability of the targets, over all asked positions."""
    total, start = 0.0, 0
    for logits in _logits(answer, data, outputs):
        targets = data.targets[start : start + len(logits)].long().flatten()
        start += len(logits)
        loss = F.cross_entropy(
            logits.flatten(0, 1).float().cpu(), targets, ignore_index=IGNORED, reduction="sum"
        )
        total += loss.item()
    return total / math.log(2) / (data.targets != IGNORED).sum().item()


@torch.no_grad()
def _logits(answer: Answer, data: Batch, outputs: int) -> Iterator[Tensor]:
    rows = max(1, TOKENS // data.inputs.shape[1])
    for start in range(0, len(data.inputs), rows):
        inputs = data.inputs[start : start + rows].long()
        logits = answer(inputs)
        if logits.shape != (*inputs.shape, outputs):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for tokens of shape "
                f"{tuple(inputs.shape)}: {(*inputs.shape, outputs)} is asked for"
            )
        yield logits
