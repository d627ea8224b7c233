"""A needle in a haystack: a number is told once, and asked at the end of a growing text."""

import string
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from examples.hope.data import Corpus
from examples.hope.tasks.base import (
    IGNORED,
    Answer,
    Batch,
    Batches,
    Better,
    Task,
    accuracy,
    at_least,
    digest,
    exact,
    first,
    generator,
    verdicts,
)

Kind = Literal["repeated", "text", "hexadecimal"]
SENTENCE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back. "
WORD = 5  # letters of the word that a number belongs to
LETTERS = torch.tensor(list(string.ascii_lowercase.encode()))
DIGITS = torch.tensor(list(b"0123456789abcdef"))
BEFORE, BETWEEN, AFTER = b"\nThe key of ", b" is ", b".\n"


@dataclass(frozen=True)
class Needle(Task):
    """Single needle: "The key of <word> is <digits>." somewhere, and at the end once more.

    The idea of S-NIAH-1, 2 and 3 of RULER (arXiv 2404.06654) in bytes. The haystack is a repeated
    sentence or text of the corpus; digits are decimal or hexadecimal. Half of the training rows
    carry a needle at a random place, half are plain text of the corpus, and all next bytes are
    asked; with `asked_only` every row carries a needle and only the digits at the end are asked.
    The test has text of the held-out part, and asks the digits, each with the right ones in front:
    all are the most likely ones exactly where a greedy continuation would write them all.
    """

    corpus: Corpus = field(repr=False)
    kind: Kind = "text"
    length: int = 256  # tokens of a training row
    digits: int | None = None  # by default 6, and 32 hexadecimal ones
    lengths: tuple[int, ...] = ()  # tokens of the test rows, by default 1, 2 and 4 × length
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the needle, 1 is the end
    tests: int = 20  # rows of each length and depth
    asked_only: bool = False
    name: str = field(default="", init=False)
    vocabulary: int = field(default=256, init=False)
    outputs: int = field(default=256, init=False)
    metric: str = field(default="", init=False)
    better: Better = field(default="higher", init=False)

    def __post_init__(self) -> None:
        if self.kind not in ("repeated", "text", "hexadecimal"):
            raise ValueError(f"kind = {self.kind!r}: 'repeated', 'text' or 'hexadecimal'")
        digits = (32 if self.kind == "hexadecimal" else 6) if self.digits is None else self.digits
        lengths = self.lengths or (self.length, 2 * self.length, 4 * self.length)
        at_least("digits", digits, 1)
        at_least("tests", self.tests, 1)
        at_least("length", min(self.length, *lengths), self._told(digits) + self._asked(digits))
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depth {depth}: between 0, the start, and 1, the end")
        if not self.depths:
            raise ValueError("depths = (): at least one, such as 0.5")
        if self.corpus.valid.numel() <= max(lengths):
            raise ValueError(
                f"the held-out text has {self.corpus.valid.numel()} bytes, a length of "
                f"{max(lengths)} needs at least {max(lengths) + 1}"
            )
        object.__setattr__(self, "digits", digits)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "name", f"needle-{self.kind}")
        object.__setattr__(self, "metric", f"exact@{max(lengths)}")

    def batches(self, batch: int, seed: int) -> Batches:
        return Batches(self._draw, batch, seed, self.record())

    def score(self, answer: Answer, *, quick: bool = False) -> dict[str, float]:
        """Exact match and share of right digits, per length and for each "length@depth".

        The keys are "exact@1024" and "digits@1024" for means over the depths, "1024@0.5" and
        "1024@0.5 digits" for the cells.
        """
        figures: dict[str, float] = {}
        for length in self.lengths:
            cells = []
            for depth in self.depths:
                data = self._cell(length, depth)
                data = first(data, 5) if quick else data
                asked, right = verdicts(answer, data, self.outputs)
                cells.append((exact(asked, right), accuracy(asked, right)))
                cell = f"{length}@{depth:g}"
                figures[cell], figures[f"{cell} digits"] = cells[-1]
            figures[f"exact@{length}"] = sum(cell[0] for cell in cells) / len(cells)
            figures[f"digits@{length}"] = sum(cell[1] for cell in cells) / len(cells)
        return figures

    def record(self) -> dict[str, Any]:
        sizes = {"length": self.length, "digits": self.digits, "lengths": list(self.lengths)}
        more = {"depths": list(self.depths), "tests": self.tests, "asked_only": self.asked_only}
        return {"name": self.name, **sizes, **more, "sha256": self._sha256, **self._source}

    @cached_property
    def _source(self) -> dict[str, Any]:
        return {f"corpus {key}": value for key, value in self.corpus.record().items()}

    @cached_property
    def _sha256(self) -> str:
        cells = [self._cell(length, depth) for length in self.lengths for depth in self.depths]
        return digest(*(tensor for cell in cells for tensor in cell))

    def _draw(self, generator: torch.Generator, batch: int) -> Batch:
        depth = torch.rand(batch, generator=generator)
        text = self._rows(generator, self.corpus.train, self.length, depth)
        plain = _crops(generator, self.corpus.train, batch, self.length + 1)
        carries = torch.rand(batch, 1, generator=generator) < 0.5
        if self.asked_only:
            return self._only_digits(text)
        text = torch.where(carries, text, plain)
        return Batch(text[:, :-1], text[:, 1:])

    def _cell(self, length: int, depth: float) -> Batch:
        source = generator("test", self.name, length, repr(depth))
        depths = torch.full((self.tests,), depth)
        return self._only_digits(self._rows(source, self.corpus.valid, length, depths))

    def _only_digits(self, text: Tensor) -> Batch:
        targets = text[:, 1:].clone()
        targets[:, : -self._count] = IGNORED
        return Batch(text[:, :-1], targets)

    def _rows(
        self, generator: torch.Generator, corpus: Tensor, length: int, depth: Tensor
    ) -> Tensor:
        """Texts [B, length + 1] with a needle at the depths [B], which end with its digits."""
        batch, told = len(depth), self._told(self._count)
        hay = length + 1 - told - self._asked(self._count)
        if self.kind == "repeated":
            start = torch.randint(len(SENTENCE), (batch, 1), generator=generator)
            straw = _bytes(SENTENCE)[(start + torch.arange(hay)) % len(SENTENCE)]
        else:
            straw = _crops(generator, corpus, batch, hay)
        words = LETTERS[torch.randint(len(LETTERS), (batch, WORD), generator=generator)]
        base = 16 if self.kind == "hexadecimal" else 10
        digits = DIGITS[torch.randint(base, (batch, self._count), generator=generator)]
        before, between, after = (
            _bytes(part).expand(batch, -1) for part in (BEFORE, BETWEEN, AFTER)
        )
        needle = torch.cat([before, words, between, digits, after], 1)
        question = torch.cat([before, words, between, digits], 1)
        # Places of needle and straw in the row, both in order.
        start = (depth * hay).round().long()[:, None]
        places = torch.arange(hay).expand(batch, hay)
        places = places + told * (places >= start)
        text = torch.zeros(batch, hay + told, dtype=torch.int64)
        text.scatter_(1, places, straw)
        text.scatter_(1, start + torch.arange(told), needle)
        return torch.cat([text, question], 1)

    @property
    def _count(self) -> int:
        assert self.digits is not None
        return self.digits

    @staticmethod
    def _told(digits: int) -> int:
        return len(BEFORE) + WORD + len(BETWEEN) + digits + len(AFTER)

    @staticmethod
    def _asked(digits: int) -> int:
        return len(BEFORE) + WORD + len(BETWEEN) + digits


def _crops(generator: torch.Generator, corpus: Tensor, batch: int, size: int) -> Tensor:
    starts = torch.randint(corpus.numel() - size + 1, (batch, 1), generator=generator)
    return corpus[starts + torch.arange(size)].long()


def _bytes(text: bytes) -> Tensor:
    return torch.tensor(list(text))
