"""Formal languages: at every symbol, the state of the automaton that reads along is asked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

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
    stored,
    verdicts,
)

SHORTEST = 2
PAD = 0  # the token behind the end of a string; the symbols are 1, 2, …
# Probabilities of S → (S) and S → SS in the grammar of brackets; else S is empty.
NEST, CHAIN = 0.5, 0.25


@dataclass(frozen=True)
class Formal(Task):
    """One language, by functions of this file.

    Data as in Bhattamishra et al. 2020 (arXiv 2009.11264), scored as in Irie et al. 2023 (arXiv
    2310.16076): training strings have sizes from 2 to `longest`, the test has as many new ones
    ("bin0") and some of `longest` + 1 to twice that ("bin1"). Size is the length, but for the
    languages of equal blocks it is the length of one block. `strings(generator, count, low,
    high)` draws such tokens [count, width], `states(tokens)` are the targets.

    A language with few strings of a size, all but parity and brackets, has the same ones in
    training and bin0, and of the brackets of bin0 half are (`()` alone is a seventh), of the
    strings of parity a seventh: only bin1 is unseen.
    """

    name: str
    vocabulary: int  # symbols and PAD
    outputs: int  # states
    strings: Callable[[torch.Generator, int, int, int], Tensor] = field(repr=False)
    states: Callable[[Tensor], Tensor] = field(repr=False)
    longest: int = 50
    examples: int = 10_000  # training strings
    tests: int = 2_000  # strings of each bin
    metric: str = field(default="bin1", init=False)
    better: Better = field(default="higher", init=False)

    def __post_init__(self) -> None:
        at_least("longest", self.longest, 4)

    def batches(self, batch: int, seed: int) -> Batches:
        source = generator("examples", self.name, seed)
        data = self._rows(source, self.examples, SHORTEST, self.longest)
        return Batches(stored(data), batch, seed, self.record())

    def score(self, answer: Answer, *, quick: bool = False) -> dict[str, float]:
        """Share of the strings with every state right, and of the states, in both bins."""
        figures = {}
        for name, data in zip(("bin0", "bin1"), self._bins, strict=True):
            tokens = (first(data, 200) if quick else data).inputs
            # Some languages have few strings: each is answered once, and counts as often as drawn.
            different, back = tokens.unique(dim=0, return_inverse=True)
            asked, right = verdicts(answer, self._asked(different), self.outputs)
            asked, right = asked[back], right[back]
            figures[name] = exact(asked, right)
            figures[f"{name} states"] = accuracy(asked, right)
        return figures

    def record(self) -> dict[str, Any]:
        sizes = {"longest": self.longest, "examples": self.examples, "tests": self.tests}
        data = [tensor for part in self._bins for tensor in part]
        return {"name": self.name, **sizes, "sha256": digest(*data)}

    def _rows(self, generator: torch.Generator, count: int, low: int, high: int) -> Batch:
        return self._asked(self.strings(generator, count, low, high))

    def _asked(self, tokens: Tensor) -> Batch:
        targets = torch.where(tokens == PAD, IGNORED, self.states(tokens))
        return Batch(tokens.to(torch.int8), targets.to(torch.int8))

    @cached_property
    def _bins(self) -> tuple[Batch, Batch]:
        source, high = generator("test", self.name), self.longest
        return (
            self._rows(source, self.tests, SHORTEST, high),
            self._rows(source, self.tests, high + 1, 2 * high),
        )


def parity(longest: int = 50) -> Formal:
    """Random bits, an even number of them 1: is the number of 1s so far even (1) or not (0)?

    An odd string gets one more 1, or its last bit turned where it has the largest length.
    """

    def strings(generator: torch.Generator, count: int, low: int, high: int) -> Tensor:
        sizes = torch.randint(low, high + 1, (count, 1), generator=generator)
        place = torch.arange(high)
        bits = torch.randint(2, (count, high), generator=generator) * (place < sizes)
        odd = bits.sum(1, keepdim=True) % 2
        turned = sizes.clamp_max(high - 1)  # behind the end, or at the last place there is
        bits = torch.where((place == turned) & (odd == 1), 1 - bits, bits)
        return torch.where(place < torch.where(odd == 1, turned + 1, sizes), bits + 1, PAD)

    return Formal("parity", 3, 2, strings, lambda tokens: 1 - (tokens == 2).cumsum(1) % 2, longest)


def repeated(word: str = "aa", longest: int = 50) -> Formal:
    """The word any number of times: has the prefix a whole number of words (1) or not (0)?

    The languages (aa)* and (abab)*.
    """
    if not word or longest < len(word):
        raise ValueError(f"word = {word!r}: at least one letter and at most longest = {longest}")
    letters = sorted(set(word))
    symbols = torch.tensor([1 + letters.index(letter) for letter in word])

    def strings(generator: torch.Generator, count: int, low: int, high: int) -> Tensor:
        least, most = -(-low // len(word)), high // len(word)
        words = torch.randint(least, most + 1, (count, 1), generator=generator)
        tokens = symbols.repeat(-(-high // len(word)))[:high]
        return torch.where(torch.arange(high) < words * len(word), tokens, PAD)

    def states(tokens: Tensor) -> Tensor:
        return (torch.arange(1, tokens.shape[1] + 1) % len(word) == 0).long().expand(tokens.shape)

    return Formal(f"({word})*", 1 + len(letters), 2, strings, states, longest)


def counted(letters: int = 2, longest: int = 50) -> Formal:
    """Equal blocks of each letter: what may come next?

    The languages aⁿbⁿ and aⁿbⁿcⁿ. Class 0 is "another a or the first b", then one class for each
    later letter, and the last one is the end. `longest` bounds n.
    """
    at_least("letters", letters, 2)

    def strings(generator: torch.Generator, count: int, low: int, high: int) -> Tensor:
        sizes = torch.randint(low, high + 1, (count, 1), generator=generator)
        place = torch.arange(letters * high)
        return torch.where(place < letters * sizes, 1 + place // sizes, PAD)

    def states(tokens: Tensor) -> Tensor:
        size = (tokens == 1).sum(1, keepdim=True)
        read = torch.arange(1, tokens.shape[1] + 1)
        return torch.where(tokens == 1, 0, read // size)

    name = "".join(f"{chr(ord('a') + i)}^n" for i in range(letters))
    return Formal(name, 1 + letters, letters + 1, strings, states, longest)


def shuffled(longest: int = 50) -> Formal:
    """Two words of brackets, round and square, interleaved: which of them is open?

    State 1 for round brackets, plus 2 for square ones. Tokens 1 and 2 open and close round
    brackets, 3 and 4 square ones.
    """

    def strings(generator: torch.Generator, count: int, low: int, high: int) -> Tensor:
        numbers, rows = _uniform(generator), []
        while len(rows) < count:
            one, two = _brackets(numbers, high), _brackets(numbers, high)
            size = len(one) + len(two)
            if low <= size <= high:
                row = torch.zeros(high, dtype=torch.int64)
                square = torch.randperm(size, generator=generator) < len(two)
                row[:size][~square] = torch.tensor(one, dtype=torch.int64)
                row[:size][square] = torch.tensor(two, dtype=torch.int64) + 2
                rows.append(row)
        return torch.stack(rows)

    def states(tokens: Tensor) -> Tensor:
        depths = [
            (tokens == 1 + 2 * kind).cumsum(1) - (tokens == 2 + 2 * kind).cumsum(1)
            for kind in range(2)
        ]
        return (depths[0] > 0) + 2 * (depths[1] > 0)

    return Formal("shuffle-2", 5, 4, strings, states, longest)


def _brackets(numbers: Iterator[float], most: int) -> list[int]:
    """A word of the grammar, opening 1 and closing 2; given up as soon as it is above `most`."""
    word, stack = [], [0]  # 0 stands for S
    while stack and len(word) <= most:
        if top := stack.pop():
            word.append(top)
        elif (number := next(numbers)) < NEST:
            word.append(1)
            stack += (2, 0)
        elif number < NEST + CHAIN:
            stack += (0, 0)
    return word


def _uniform(generator: torch.Generator) -> Iterator[float]:
    while True:
        yield from torch.rand(4096, generator=generator).tolist()
