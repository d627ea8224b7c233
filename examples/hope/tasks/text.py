"""Plain language modelling: the next byte of a corpus, held out by document."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from examples.hope import data
from examples.hope.tasks.base import Answer, Batch, Batches, Better, Task, at_least, bits


@dataclass(frozen=True)
class Text(Task):
    """Bits per byte on fixed windows of the held-out documents; training takes random crops."""

    corpus: data.Corpus = field(repr=False)
    length: int = 128  # bytes
    tests: int = 256  # windows, evenly spread
    name: str = field(default="text", init=False)
    vocabulary: int = field(default=256, init=False)
    outputs: int = field(default=256, init=False)
    metric: str = field(default="bits_per_byte", init=False)
    better: Better = field(default="lower", init=False)

    def __post_init__(self) -> None:
        at_least("tests", self.tests, 1)
        for part in (self.corpus.train, self.corpus.valid):
            data.windows(part, 1, self.length, 1)  # raises where the text is too small

    def batches(self, batch: int, seed: int) -> Batches:
        text, length = self.corpus.train, self.length

        def draw(generator: torch.Generator, batch: int) -> Batch:
            starts = torch.randint(text.numel() - length, (batch, 1), generator=generator)
            crops = text[starts + torch.arange(length + 1)].long()
            return Batch(crops[:, :-1], crops[:, 1:])

        return Batches(draw, batch, seed, self.record())

    def score(self, answer: Answer, *, quick: bool = False) -> dict[str, float]:
        """Bits per byte; `quick` takes every eighth window."""
        chosen = Batch(*(part[:: 8 if quick else 1] for part in self._test))
        return {"bits_per_byte": bits(answer, chosen, self.outputs)}

    def record(self) -> dict[str, Any]:
        sizes = {"length": self.length, "tests": self.tests}
        return {"name": self.name, **sizes, **self.corpus.record()}

    @cached_property
    def _test(self) -> Batch:
        crops = data.windows(self.corpus.valid, self.tests, self.length, 1)[0]
        return Batch(crops[:, :-1], crops[:, 1:])
