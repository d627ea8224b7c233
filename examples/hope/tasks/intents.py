"""Class-incremental intents: which command is a spoken sentence, with new commands in each part."""

import hashlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from random import Random
from typing import Any

import torch

from examples.hope.tasks.base import (
    IGNORED,
    Answer,
    Batch,
    Batches,
    Better,
    Stream,
    accuracy,
    at_least,
    digest,
    generator,
    padded,
    part_of,
    stored,
    verdicts,
)
from examples.hope.tasks.sentences import Grammar

PACKAGE = "home-assistant-intents"
# For names, rooms and messages, which the templates leave open.
WORDS = (
    *("kitchen", "bedroom", "garage", "office", "hallway", "garden", "attic", "cellar"),
    *("desk lamp", "heater", "old radio", "front door", "milk", "bread", "apples", "soap"),
    *("dinner", "laundry", "jazz", "the news", "robot", "fountain", "printer", "piano"),
)
TRIES = 40  # sentences drawn for each that is wanted


@dataclass(frozen=True)
class Intents(Stream):
    """Commands of Home Assistant as bytes; the class is asked at the last byte of a sentence.

    Sentences are drawn from the templates of the package, `sentences` different ones of an
    intent, and none that two intents share. An intent with fewer than `least` is left out. A
    quarter of them, by hash, is held out: templates are shared between both sides, sentences are
    not. All parts share one set of outputs, and nothing says which part a sentence is of.
    """

    language: str = "en"
    length: int = 64  # bytes; longer sentences are not drawn
    sentences: int = 120
    least: int = 100
    tasks: int = 7
    order: int = 0  # seed of which intents come in which part
    joint: bool = False  # learn all parts at once: what a model could reach without a stream
    name: str = field(default="intents", init=False)
    vocabulary: int = field(default=256, init=False)
    outputs: int = field(default=0, init=False)
    parts: tuple[str, ...] = field(default=(), init=False)
    better: Better = field(default="higher", init=False)

    def __post_init__(self) -> None:
        for name, least in (("length", 16), ("sentences", 4), ("least", 4), ("tasks", 1)):
            at_least(name, getattr(self, name), least)
        classes = len(self.classes)
        if self.tasks > classes:
            raise ValueError(f"tasks = {self.tasks}: at most the {classes} intents")
        bounds = [round(i * classes / self.tasks) for i in range(self.tasks + 1)]
        parts = tuple(", ".join(self.classes[low:high]) for low, high in pairwise(bounds))
        object.__setattr__(self, "outputs", classes)
        object.__setattr__(self, "parts", parts)

    def batches(self, part: int, batch: int, seed: int) -> Batches:
        """Sentences of one part, or with `joint` of all, drawn with replacement."""
        part_of(self.parts, part)
        chosen = self._data if self.joint else self._data[part : part + 1]
        train = Batch(*(torch.cat(same) for same in zip(*(x for x, _ in chosen), strict=True)))
        return Batches(stored(train), batch, seed, {**self.record(), "part": part})

    def score(self, part: int, answer: Answer) -> float:
        """Accuracy on the held-out sentences of one part, among all classes."""
        part_of(self.parts, part)
        return accuracy(*verdicts(answer, self._data[part][1], self.outputs))

    def record(self) -> dict[str, Any]:
        data = [tensor for both in self._data for side in both for tensor in side]
        sizes = {k: v for k, v in asdict(self).items() if k not in ("parts", "better")}
        return {**sizes, PACKAGE: version(PACKAGE), "sha256": digest(*data)}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the intents, in the order of their outputs."""
        return tuple(self._sentences)

    def labelled(self, part: int) -> list[tuple[str, int]]:
        """All sentences of one part, with the output that each belongs to."""
        names = part_of(self.parts, part).split(", ")
        return [(s, self.classes.index(name)) for name in names for s in self._sentences[name]]

    @cached_property
    def _sentences(self) -> dict[str, list[str]]:
        drawn = _draw(self.language, self.length, self.sentences)
        times: dict[str, int] = {}
        for found in drawn.values():
            for sentence in found:
                times[sentence] = times.get(sentence, 0) + 1
        own = {name: [s for s in found if times[s] == 1] for name, found in drawn.items()}
        names = [name for name in sorted(own) if len(own[name]) >= self.least]
        if not names:
            raise ValueError(
                f"least = {self.least}: no intent of {self.language!r} has so many sentences of "
                f"at most {self.length} bytes among {self.sentences} drawn"
            )
        shuffle = torch.randperm(len(names), generator=generator("order", self.order))
        return {names[i]: own[names[i]] for i in shuffle.tolist()}

    @cached_property
    def _data(self) -> list[tuple[Batch, Batch]]:
        """Training and held-out rows of each part."""
        index = {name: i for i, name in enumerate(self.classes)}
        data = []
        for part in self.parts:
            sides: tuple[list[tuple[str, int]], ...] = ([], [])
            for name in part.split(", "):
                ranked = sorted(self._sentences[name], key=_rank)
                held_out = len(ranked) // 4
                sides[0].extend((sentence, index[name]) for sentence in ranked[held_out:])
                sides[1].extend((sentence, index[name]) for sentence in ranked[:held_out])
            data.append((self._rows(sides[0]), self._rows(sides[1])))
        return data

    def _rows(self, pairs: list[tuple[str, int]]) -> Batch:
        inputs, lengths = padded([sentence.encode() for sentence, _ in pairs], self.length)
        targets = torch.full(inputs.shape, IGNORED)
        classes = torch.tensor([index for _, index in pairs])
        targets.scatter_(1, lengths[:, None] - 1, classes[:, None])
        return Batch(inputs, targets)


def _draw(language: str, length: int, count: int) -> dict[str, list[str]]:
    """At most `count` different sentences of each intent, in the order they were drawn."""
    try:
        from home_assistant_intents import get_intents, get_languages
    except ImportError as error:
        raise ImportError(f"intents need a package: pip install {PACKAGE}") from error
    if language not in get_languages():
        raise ValueError(f"language {language!r}: one of {', '.join(sorted(get_languages()))}")
    source: Any = get_intents(language)
    grammar = Grammar(source.get("expansion_rules", {}), source.get("lists", {}), WORDS)
    drawn = {}
    for name, intent in source["intents"].items():
        random = Random(int.from_bytes(hashlib.sha256(f"{language} {name}".encode()).digest()[:8]))
        groups = [group["sentences"] for group in intent["data"] if group["sentences"]]
        found: dict[str, None] = {}
        for _ in range(TRIES * count if groups else 0):
            sentence = grammar.sample(random.choice(random.choice(groups)), random)
            if sentence and len(sentence.encode()) <= length:
                found[sentence] = None
            if len(found) == count:
                break
        drawn[name] = list(found)
    return drawn


def _rank(sentence: str) -> bytes:
    return hashlib.sha256(sentence.encode()).digest()
