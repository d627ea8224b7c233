"""What the languages of kernels share: names of values, and expressions of nodes."""

from __future__ import annotations

import keyword
import linecache
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias
from zlib import crc32

from deepopt.expr import COMPARISONS, Expr
from deepopt.kernels.plan import REDUCTIONS, Region, filling, is_filled, is_literal

# How a tensor is stored. "stochastic" and "exact" are bfloat16: rounded at random so that the mean
# is right, and, of weights, with the 16 bits that bfloat16 lacks in a tensor of their own.
Storage: TypeAlias = Literal["float64", "float32", "bfloat16", "float16", "stochastic", "exact"]
RESERVED = frozenset(
    "auto break case char const default do double enum extern float goto inline int long register "
    "restrict short signed sizeof static struct switch typedef union unsigned void volatile "
    "acc asm linux unix typeof i n lo hi at t tl entry BLOCK sums exp log sqrt tanh pow floor "
    "y0 y1 j0 j1 gamma range".split()
)
LOW = "w low"
# Variables that kernels make up themselves.
OURS = r"[acstx]\d+.*|.*_(at|in|new|wide|t|nearest)"


def salt(tensor: str) -> int:
    """What sets the random numbers that round a memory apart from those of others; 0 of weights.

    It is below 2^31, so that every language takes it for a 32-bit number.
    """
    return 0 if tensor == "w" else crc32(tensor.encode()) >> 1


def _words(tensors: Sequence[str]) -> dict[str, str]:
    """The names of tensors as those of variables: as they are where nothing else has that name."""
    words: dict[str, str] = {}
    for i, name in enumerate(tensors):
        word = re.sub(r"\W", "_", name)
        plain = re.fullmatch(r"[a-z]\w*[a-z\d]", word) and not re.fullmatch(OURS, word)
        taken = word in RESERVED or keyword.iskeyword(word) or word in words.values()
        words[name] = word if (plain or word in ("w", "g")) and not taken else f"t{i}_{word}"
    return words


class Writer(ABC):
    """Writes the nodes of one region.

    storage: of each tensor. single_precision: whether the arithmetic is in float32, else float64.
    comments: whether lines quote those of the rule; they do not in what is compiled, so that what
    one rule shares with another is compiled once.
    """

    operations: Mapping[str, str] = {}
    comment = "//"

    def __init__(
        self,
        region: Region,
        storage: Mapping[str, Storage],
        single_precision: bool = True,
        comments: bool = False,
    ) -> None:
        self.region = region
        self.storage = dict(storage)
        self.single_precision = single_precision
        self.comments = comments
        self.tensors = (*region.tensors, *([LOW] if "exact" in storage.values() else []))
        self._names: dict[Expr, str] = {x: f"s{i}" for i, x in enumerate(region.reductions)}
        self._words = _words([*region.tensors, LOW])
        self._names |= {x: self._words[name] for name, x in region.loads.items()}
        self._names |= {x: f"c{i}" for i, x in enumerate(region.parameters)}
        self._computed = 0

    @abstractmethod
    def literal(self, value: float) -> str:
        """A number in the language."""

    @abstractmethod
    def source(self) -> str:
        """The whole text."""

    def word(self, tensor: str) -> str:
        """The name of a tensor as part of variables."""
        return self._words[tensor]

    def name(self, x: Expr) -> str:
        """The variable of a node."""
        if x not in self._names:
            self._names[x] = f"x{self._computed}"
            self._computed += 1
        return self._names[x]

    def value(self, x: Expr) -> str:
        """How a node is read where it is used."""
        if is_filled(x):
            x = filling(x)
        if is_literal(x):
            value = x["value"]
            assert isinstance(value, float)
            return self.literal(value)
        if x.op in COMPARISONS and x not in self._names:
            return self.expression(x)
        return self.name(x)

    def expression(self, x: Expr) -> str:
        """What a node is computed by."""
        args = [self.value(arg) for arg in x.args]
        if x.op == "where" and not (x.args[0].op in COMPARISONS and x.args[0].shape):
            args[0] = f"({args[0]} != 0)"
        if x.op == "array":
            return self.value(x)
        return self.spelled(x, args)

    def spelled(self, x: Expr, args: Sequence[str]) -> str:
        """The operation of a node on texts."""
        return self.operations[x.op].format(*args)

    def statements(self, nodes: Sequence[Expr]) -> Iterator[tuple[str, str, str]]:
        """(variable, expression, comment) of the nodes that have a line of their own."""
        said = ""
        for x in nodes:
            known = x in self._names and (x.op in REDUCTIONS or x in self.region.loads.values())
            if known or x.op in COMPARISONS or x.op == "array":
                continue
            expression = self.expression(x)
            note = ""
            if self.comments and x.source and x.source != said:
                note, said = f"  {self.comment} {_quoted(x.source)}", x.source
            yield self.name(x), expression, note


@cache
def _quoted(source: str) -> str:
    """'file:line' with what stands there, if the file is that of a module."""
    name, _, line = source.partition(":")
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        if Path(path).name == name:
            return f"{source}  {linecache.getline(path, int(line)).strip()}"
    return source
