"""Recall of values by their keys (MQAR), with the option that some keys are written twice."""

from dataclasses import asdict, dataclass, field
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
    verdicts,
)

POWER = 0.01  # the share of a query at distance g is proportional to g^(POWER − 1)


@dataclass(frozen=True)
class Recall(Task):
    """Multi-query associative recall: pairs of key and value, then the keys once more.

    After Arora et al. 2023 (arXiv 2312.04927): keys are drawn from 1 … vocabulary/2 − 1, values
    from vocabulary/2 …, both without repetition. Each key comes back at an even distance after
    the pairs, the near ones likelier, and its value is asked there. Everywhere else is 0.
    `updates` of the keys appear a second time among the pairs, with a new value, in random order:
    the newest value is asked. Every training batch is drawn afresh.
    """

    pairs: int = 16  # different keys
    vocabulary: int = 256
    length: int = 128  # tokens
    updates: int = 0  # keys that are written twice
    tests: int = 1000  # rows of the test data
    name: str = field(default="", init=False)
    outputs: int = field(default=0, init=False)
    metric: str = field(default="accuracy", init=False)
    better: Better = field(default="higher", init=False)

    def __post_init__(self) -> None:
        at_least("pairs", self.pairs, 1)
        at_least("tests", self.tests, 1)
        if not 0 <= self.updates <= self.pairs:
            raise ValueError(f"updates = {self.updates}: between 0 and the {self.pairs} pairs")
        needed = 4 * self.pairs + 2 * self.updates
        if self.length < needed:
            raise ValueError(
                f"length = {self.length} is too short: {self.pairs} pairs, {self.updates} updates "
                f"and the queries need at least {needed}"
            )
        least = max(2 * self.pairs + 2, 2 * (self.pairs + self.updates), self.length + 1)
        if self.vocabulary < least or self.vocabulary % 2:
            raise ValueError(
                f"vocabulary = {self.vocabulary}: an even number of at least {least + least % 2}, "
                "more than the length and twice as many as keys or values"
            )
        object.__setattr__(self, "name", "overwriting" if self.updates else "mqar")
        object.__setattr__(self, "outputs", self.vocabulary)

    def batches(self, batch: int, seed: int) -> Batches:
        return Batches(self.draw, batch, seed, self.record())

    def score(self, answer: Answer, *, quick: bool = False) -> dict[str, float]:
        """Accuracy at the queries; with updates also that of updated and of untouched keys."""
        data = first(self._test, 200) if quick else self._test
        asked, right = verdicts(answer, data, self.outputs)
        figures = {"accuracy": accuracy(asked, right)}
        if self.updates:
            updated = self.updated(data.inputs)
            for name, where in (("updated", updated), ("untouched", ~updated)):
                if (asked & where).any():
                    figures[name] = accuracy(asked & where, right & where)
        return figures

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "sha256": digest(*self._test)}

    def draw(self, generator: torch.Generator, batch: int) -> Batch:
        """Fresh rows."""
        half, pairs, shown = self.vocabulary // 2, self.pairs, self.pairs + self.updates
        keys = 1 + _distinct(half - 1, pairs, batch, generator)
        values = half + _distinct(half, shown, batch, generator)
        # Entry of `keys` behind each pair [batch, shown]; the newest pair of each entry.
        order = torch.arange(pairs).expand(batch, pairs)
        if self.updates:
            again = _distinct(pairs, self.updates, batch, generator)
            shuffle = _distinct(shown, shown, batch, generator)
            order = torch.cat([order, again], 1).gather(1, shuffle)
        newest = torch.zeros(batch, pairs, dtype=torch.int64)
        newest.scatter_reduce_(1, order, torch.arange(shown).expand(batch, shown), "amax")

        inputs = torch.zeros(batch, self.length, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        inputs[:, 0 : 2 * shown : 2] = keys.gather(1, order)
        inputs[:, 1 : 2 * shown : 2] = values
        gaps = torch.arange(1, (self.length - 2 * shown) // 2 + 1)
        where = 2 * shown + 2 * _weighted(gaps ** (POWER - 1.0), pairs, batch, generator)
        inputs.scatter_(1, where, keys)
        targets.scatter_(1, where, values.gather(1, newest))
        return Batch(inputs, targets)

    def updated(self, inputs: Tensor) -> Tensor:
        """Where the token [B, T] is a key that was written twice."""
        written = inputs[:, 0 : 2 * (self.pairs + self.updates) : 2]
        return (written[:, :, None] == inputs[:, None]).sum(1) > 1

    @cached_property
    def _test(self) -> Batch:
        return self.draw(generator("test", self.name), self.tests)


def _distinct(count: int, size: int, batch: int, generator: torch.Generator) -> Tensor:
    """Rows of `size` different numbers below `count`, in random order."""
    return torch.rand(batch, count, generator=generator).argsort(1)[:, :size]


def _weighted(weights: Tensor, size: int, batch: int, generator: torch.Generator) -> Tensor:
    """Rows of `size` different indices, drawn one after another in proportion to `weights`."""
    # The largest of logarithms with Gumbel noise are such a draw, in its order.
    noise = torch.rand(batch, len(weights), generator=generator).clamp_min(1e-30)
    return (weights.log() - (-noise.log()).log()).topk(size, 1).indices
