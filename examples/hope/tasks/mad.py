"""The six synthetic abilities of MAD: recall three ways, selective copy, compression, memory."""

from collections.abc import Callable, Mapping
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
    first,
    generator,
    pack,
    stored,
    verdicts,
)

LONGEST = 3  # tokens of a fuzzy key or value


@dataclass(frozen=True)
class Mad(Task):
    """One synthetic ability, after Poli et al. 2024 (arXiv 2403.17844), by functions of this file.

    Training draws, with replacement, from `examples` fixed rows that depend on the seed.
    The rows are written from the descriptions of the study, not by its code.
    """

    name: str
    vocabulary: int
    sizes: Mapping[str, float]
    draw: Callable[[torch.Generator, int], Batch] = field(repr=False)
    examples: int = 12_800
    tests: int = 1_280
    outputs: int = field(default=0, init=False)
    metric: str = field(default="accuracy", init=False)
    better: Better = field(default="higher", init=False)

    def __post_init__(self) -> None:
        at_least("examples", self.examples, 1)
        object.__setattr__(self, "outputs", self.vocabulary)

    def batches(self, batch: int, seed: int) -> Batches:
        data = _small(self.draw(generator("examples", self.name, seed), self.examples))
        return Batches(stored(data), batch, seed, self.record())

    def score(self, answer: Answer, *, quick: bool = False) -> dict[str, float]:
        """Accuracy at the asked positions of fresh rows."""
        data = first(self._test, 128) if quick else self._test
        return {"accuracy": accuracy(*verdicts(answer, data, self.outputs))}

    def record(self) -> dict[str, Any]:
        sizes = {"vocabulary": self.vocabulary, **self.sizes, "examples": self.examples}
        return {"name": self.name, **sizes, "tests": self.tests, "sha256": digest(*self._test)}

    @cached_property
    def _test(self) -> Batch:
        return self.draw(generator("test", self.name), self.tests)


def in_context_recall(vocabulary: int = 16, length: int = 128, examples: int = 12_800) -> Mad:
    """Pairs from a dictionary of the row; asked is the value of each key that came before.

    The lower half of the vocabulary are keys, the upper half values.
    """
    _even(vocabulary, 4)
    at_least("length", length, 4)
    sizes = {"length": length}

    def draw(generator: torch.Generator, batch: int) -> Batch:
        return _recall(generator, batch, vocabulary // 2, length)

    return Mad("in_context_recall", vocabulary, sizes, draw, examples)


def noisy_recall(
    vocabulary: int = 32,
    length: int = 128,
    noise_tokens: int = 16,
    noise: float = 0.2,
    examples: int = 12_800,
) -> Mad:
    """In-context recall where a share `noise` of the pairs is noise, with tokens of its own.

    The last `noise_tokens` of the vocabulary are noise; the rest is split into keys and values.
    """
    at_least("noise_tokens", noise_tokens, 1)
    _even(vocabulary - noise_tokens, 4)
    at_least("length", length, 4)
    if not 0 <= noise < 1:
        raise ValueError(f"noise = {noise}: a share from 0 to below 1")
    sizes = {"length": length, "noise_tokens": noise_tokens, "noise": noise}

    def draw(generator: torch.Generator, batch: int) -> Batch:
        half = (vocabulary - noise_tokens) // 2
        return _recall(generator, batch, half, length, noise_tokens, noise)

    return Mad("noisy_recall", vocabulary, sizes, draw, examples)


def fuzzy_recall(
    vocabulary: int = 16, length: int = 128, entries: int = 8, examples: int = 12_800
) -> Mad:
    """In-context recall where keys and values are sequences of one to three tokens.

    Each row has its own dictionary of `entries`. Asked are all tokens of a value whose key came
    before, each at the token in front of it.
    """
    _even(vocabulary, 4)
    at_least("entries", entries, 1)
    at_least("length", length, 4 * LONGEST)
    half = vocabulary // 2
    if entries > half:
        raise ValueError(f"entries = {entries}: at most half of the vocabulary, {half}")
    sizes = {"length": length, "entries": entries}

    def draw(generator: torch.Generator, batch: int) -> Batch:
        return _fuzzy(generator, batch, half, length, entries)

    return Mad("fuzzy_recall", vocabulary, sizes, draw, examples)


def selective_copy(
    vocabulary: int = 16, length: int = 256, copied: int = 16, examples: int = 12_800
) -> Mad:
    """Tokens strewn over blanks, a mark, then as many blanks, where they are asked in order.

    The last two of the vocabulary are the blank and the mark.
    """
    at_least("vocabulary", vocabulary, 3)
    at_least("copied", copied, 1)
    at_least("length", length, 2 * copied + 1)
    blank, mark, sizes = vocabulary - 2, vocabulary - 1, {"length": length, "copied": copied}

    def draw(generator: torch.Generator, batch: int) -> Batch:
        tokens = torch.randint(vocabulary - 2, (batch, copied), generator=generator)
        before = length - copied - 1
        order = torch.rand(batch, before, generator=generator).argsort(1)
        inputs = torch.full((batch, length), blank)
        inputs.scatter_(1, order[:, :copied].sort(1).values, tokens)
        inputs[:, before] = mark
        targets = torch.full_like(inputs, IGNORED)
        targets[:, before + 1 :] = tokens
        return Batch(inputs, targets)

    return Mad("selective_copy", vocabulary, sizes, draw, examples)


def compression(vocabulary: int = 16, length: int = 32, examples: int = 12_800) -> Mad:
    """Random tokens, then as many blanks, where they are asked in order.

    In the study a separate network rebuilds every token from the state at the last one. Here the
    model itself does it, reading blanks: a model with a state must carry all through it, but one
    with attention may look back, so its figure is one of copying, not of compression.
    """
    at_least("vocabulary", vocabulary, 3)
    at_least("length", length, 1)
    blank, sizes = vocabulary - 1, {"length": length}

    def draw(generator: torch.Generator, batch: int) -> Batch:
        tokens = torch.randint(blank, (batch, length), generator=generator)
        inputs = torch.cat([tokens, torch.full_like(tokens, blank)], 1)
        return Batch(inputs, torch.cat([torch.full_like(tokens, IGNORED), tokens], 1))

    return Mad("compression", vocabulary, sizes, draw, examples)


def memorisation(vocabulary: int = 256, length: int = 32, examples: int = 256) -> Mad:
    """Keys, each before a blank where its value is asked, from one table for all rows and seeds.

    No value is ever shown, so the weights must hold the table. The last of the vocabulary is the
    blank; the rest is split into keys and values. The test asks the same table in new rows.
    """
    at_least("vocabulary", vocabulary, 3)
    at_least("length", length, 2)
    half, sizes = (vocabulary - 1) // 2, {"length": length}
    table = half + torch.randint(half, (half,), generator=generator("table", vocabulary))

    def draw(generator: torch.Generator, batch: int) -> Batch:
        keys = torch.randint(half, (batch, length // 2), generator=generator)
        inputs = torch.full((batch, length), vocabulary - 1)
        inputs[:, 0 : length - 1 : 2] = keys
        targets = torch.full_like(inputs, IGNORED)
        targets[:, 1::2] = table[keys]
        return Batch(inputs, targets)

    return Mad("memorisation", vocabulary, sizes, draw, examples)


def _recall(
    generator: torch.Generator,
    batch: int,
    half: int,
    length: int,
    noise_tokens: int = 0,
    noise: float = 0.0,
) -> Batch:
    pairs = (length + 1) // 2
    table = half + torch.randint(half, (batch, half), generator=generator)
    keys = torch.randint(half, (batch, pairs), generator=generator)
    keys[:, -1] = keys[:, 0]  # so that every row asks something
    both = torch.stack([keys, table.gather(1, keys)], 2)  # [batch, pairs, 2]
    asked = _seen(keys)
    if noise_tokens:
        noisy = torch.rand(batch, pairs, generator=generator) < noise
        noisy[:, [0, -1]] = False
        drawn = torch.randint(noise_tokens, (batch, pairs, 2), generator=generator)
        both = torch.where(noisy[..., None], 2 * half + drawn, both)
        # A key that was replaced by noise has not been seen.
        asked = _seen(torch.where(noisy, -1 - torch.arange(pairs), keys)) & ~noisy
    nothing = torch.full_like(keys, IGNORED)
    targets = torch.stack([torch.where(asked, both[..., 1], nothing), nothing], 2)
    return Batch(both.flatten(1)[:, :length], targets.flatten(1)[:, :length])


def _fuzzy(generator: torch.Generator, batch: int, half: int, length: int, entries: int) -> Batch:
    keys, key_sizes = _motifs(generator, batch, half, entries)
    values, value_sizes = _motifs(generator, batch, half, entries)
    pairs = length // 2
    chosen = torch.randint(entries, (batch, pairs), generator=generator)
    chosen[:, 1] = chosen[:, 0]  # so that every row asks something
    both = torch.cat([keys, half + values], 2)  # [batch, entries, 2 · LONGEST]
    reach = torch.arange(LONGEST)
    kept = torch.cat([reach < key_sizes[..., None], reach < value_sizes[..., None]], 2)
    rows = torch.arange(batch)[:, None]
    tokens, kept = both[rows, chosen], kept[rows, chosen]
    asked = _seen(chosen)[..., None] & (torch.arange(2 * LONGEST) >= LONGEST)
    targets = torch.where(asked, tokens, IGNORED)
    tokens, targets, kept = tokens.flatten(1), targets.flatten(1), kept.flatten(1)
    inputs = pack(tokens, kept, length + 1, 0)
    return Batch(inputs[:, :-1], pack(targets, kept, length + 1, IGNORED)[:, 1:])


def _motifs(
    generator: torch.Generator, batch: int, tokens: int, entries: int
) -> tuple[Tensor, Tensor]:
    """Different sequences of tokens [batch, entries, LONGEST], and their lengths."""
    sizes = torch.zeros(batch, entries, dtype=torch.int64)
    motifs = torch.zeros(batch, entries, LONGEST, dtype=torch.int64)
    again = torch.arange(batch)
    while len(again):  # a row with two equal entries is drawn anew
        size = torch.randint(1, LONGEST + 1, (len(again), entries), generator=generator)
        drawn = torch.randint(tokens, (len(again), entries, LONGEST), generator=generator)
        drawn = torch.where(torch.arange(LONGEST) < size[..., None], drawn, 0)
        sizes[again], motifs[again] = size, drawn
        code = size + (LONGEST + 1) * (drawn * tokens ** torch.arange(LONGEST)).sum(2)
        again = again[(code.sort(1).values.diff(dim=1) == 0).any(1)]
    return motifs, sizes


def _seen(keys: Tensor) -> Tensor:
    """Where a key [batch, pairs] came before in its row."""
    same = keys[:, :, None] == keys[:, None]
    return same.tril(-1).any(2)


def _even(tokens: int, least: int) -> None:
    if tokens < least or tokens % 2:
        raise ValueError(f"{tokens} tokens for keys and values: an even number, at least {least}")


def _small(data: Batch) -> Batch:
    return Batch(data.inputs.short(), data.targets.short())
