"""Languages one after another: numbers written out, or names of pictures, in each of them."""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

import torch

from examples.hope.tasks.base import (
    IGNORED,
    Answer,
    Batch,
    Batches,
    Better,
    Stream,
    at_least,
    bits,
    exact,
    first,
    generator,
    pack,
    padded,
    part_of,
    verdicts,
)

Kind = Literal["numbers", "names"]
LIMIT = 100_000  # the numbers are below
VALID_SHARE = 0.1
TONE = re.compile("[\U0001f3fb-\U0001f3ff]")  # of skin
MARK = "\ufe0f"  # asks for a picture in place of a letter; both have the same name


@dataclass(frozen=True)
class Languages(Stream):
    """A byte language model over lines of one language after another.

    "numbers" has lines `de 42 = zweiundvierzig` from num2words, "names" has lines
    `de grinsendes gesicht` from emoji, each picture once, without tones of skin. The code in
    front says which language is meant, so that what is lost is knowledge, not the guess of the
    language. A training row is packed with random lines. Numbers and pictures are held out by
    hash, the same in all languages. Scored is what comes after the code, and for numbers after
    the sign of equality, with the end of the line.
    """

    kind: Kind = "numbers"
    languages: tuple[str, ...] = ("de", "fr", "tr", "ru", "ja", "fa")
    length: int = 128  # bytes of a training row
    numbers: int = 5_000  # drawn from 0 … LIMIT − 1
    tests: int = 200  # held-out lines of a language that are scored, at most
    joint: bool = False  # learn all at once: what a model could reach without a stream
    name: str = field(default="", init=False)
    vocabulary: int = field(default=256, init=False)
    outputs: int = field(default=256, init=False)
    parts: tuple[str, ...] = field(default=(), init=False)
    better: Better = field(default="lower", init=False)

    def __post_init__(self) -> None:
        if self.kind not in ("numbers", "names"):
            raise ValueError(f"kind = {self.kind!r}: 'numbers' or 'names'")
        at_least("length", self.length, 16)
        at_least("tests", self.tests, 1)
        if not 100 <= self.numbers <= LIMIT:
            raise ValueError(f"numbers = {self.numbers}: from 100 to {LIMIT}")
        if not self.languages:
            raise ValueError("languages = (): at least one, such as 'de'")
        object.__setattr__(self, "name", f"languages-{self.kind}")
        object.__setattr__(self, "parts", self.languages)
        assert self._lines  # raises where a package or a language is missing

    def batches(self, part: int, batch: int, seed: int) -> Batches:
        """Rows of whole lines of one language, or with `joint` of all, in random order.

        The last line of a row is cut; all next bytes are asked.
        """
        own = part_of(self.parts, part)
        chosen = self.parts if self.joint else (own,)
        lines = [_line(*pair) for language in chosen for pair in self._lines[language][0]]
        table, lengths = padded(lines)
        # So many lines that the shortest fill a row.
        count = -(-(self.length + 1) // int(lengths.min()))
        reach = torch.arange(table.shape[1])

        def draw(generator: torch.Generator, batch: int) -> Batch:
            chosen = torch.randint(len(table), (batch, count), generator=generator)
            kept = reach < lengths[chosen][..., None]
            text = pack(table[chosen].flatten(1).long(), kept.flatten(1), self.length + 1, 0)
            return Batch(text[:, :-1], text[:, 1:])

        return Batches(draw, batch, seed, {**self.record(), "part": own})

    def score(self, part: int, answer: Answer) -> float:
        """Bits per byte of the held-out words of one language."""
        return bits(answer, self._test(part), self.outputs)

    def more(self, part: int, answer: Answer) -> dict[str, float]:
        """Share of held-out lines that a greedy continuation writes right, every byte of it."""
        return {"exact": exact(*verdicts(answer, self._test(part), self.outputs))}

    def record(self) -> dict[str, Any]:
        sizes = {k: v for k, v in asdict(self).items() if k not in ("parts", "better")}
        sizes["languages"] = list(self.languages)
        package = "num2words" if self.kind == "numbers" else "emoji"
        return {**sizes, package: version(package), "sha256": self._sha256}

    def _test(self, part: int) -> Batch:
        return first(self._tests[part_of(self.parts, part)], self.tests)

    @cached_property
    def _tests(self) -> dict[str, Batch]:
        return {language: _rows(held_out) for language, (_, held_out) in self._lines.items()}

    @cached_property
    def _lines(self) -> dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]]:
        """Training and held-out pairs (given, asked) of each language."""
        lines = {}
        for language in self.languages:
            pairs = self._numbers(language) if self.kind == "numbers" else _names(language)
            pairs.sort(key=lambda pair: _rank(pair[0]))
            border = sum(_rank(key) < VALID_SHARE for key, _, _ in pairs)
            asked = [(given, words) for _, given, words in pairs]
            lines[language] = (asked[border:], asked[:border])
        return lines

    def _numbers(self, language: str) -> list[tuple[str, str, str]]:
        try:
            from num2words import CONVERTER_CLASSES, num2words
        except ImportError as error:
            raise ImportError("numbers need a package: pip install num2words") from error
        if language not in CONVERTER_CLASSES:
            raise ValueError(
                f"language {language!r}: one of {', '.join(sorted(CONVERTER_CLASSES))}"
            )
        chosen = torch.randperm(LIMIT, generator=generator("numbers"))[: self.numbers].tolist()
        return [(str(n), f"{language} {n} = ", num2words(n, lang=language)) for n in chosen]

    @cached_property
    def _sha256(self) -> str:
        lines = [_line(*pair) for both in self._lines.values() for part in both for pair in part]
        return hashlib.sha256(b"".join(lines)).hexdigest()


def _names(language: str) -> list[tuple[str, str, str]]:
    try:
        import emoji
    except ImportError as error:
        raise ImportError("names need a package: pip install emoji") from error
    if language not in emoji.LANGUAGES:
        raise ValueError(f"language {language!r}: one of {', '.join(sorted(emoji.LANGUAGES))}")
    emoji.config.load_language(language)
    names: dict[str, str] = {}
    for picture, entry in sorted(emoji.EMOJI_DATA.items()):
        name = entry.get(language, "").strip(":").replace("_", " ")
        if name and not TONE.search(picture):
            names.setdefault(name, picture.replace(MARK, ""))
    return [(picture, f"{language} ", name) for name, picture in names.items()]


def _rows(pairs: list[tuple[str, str]]) -> Batch:
    text, lengths = padded([_line(*pair) for pair in pairs])
    given = torch.tensor([len(before.encode()) for before, _ in pairs])
    place = torch.arange(text.shape[1])
    asked = (place >= given[:, None]) & (place < lengths[:, None])
    targets = torch.where(asked, text.long(), IGNORED)
    return Batch(text[:, :-1], targets[:, 1:])


def _line(given: str, asked: str) -> bytes:
    return f"{given}{asked}\n".encode()


def _rank(key: str) -> float:
    """A number from 0 to below 1 that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6]) / 2**48
