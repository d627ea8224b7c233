"""Byte-level language models on real text: a small transformer, and Hope."""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.compare.problem import Part, Problem
from examples.compare.tasks.both import at_least
from examples.hope import data
from examples.hope.config import Config
from examples.hope.memories import RESIDUAL
from examples.hope.model import LanguageModel
from examples.hope.train import cost

REST = 3e-3  # AdamW of embeddings, head and gains
WINDOWS = 128  # of validation, and of test


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """A byte-level transformer with learned positions and an untied head."""

    def __init__(self, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(
    seed: int = 0,
    layers: int = 3,
    width: int = 96,
    heads: int = 4,
    length: int = 128,
    batch: int = 16,
    steps: int = 300,
    data: str = "",
    device: str = "cpu",
) -> Problem:
    """A small transformer on bytes of Python's sources, or of a file or folder; bits per byte."""
    at_least(layers=(layers, 1), heads=(heads, 1), length=(length, 1), batch=(batch, 1))
    if width % heads:
        raise ValueError(f"width={width}: a multiple of heads={heads}")
    return _text(GPT(layers, width, heads, length), seed, length, batch, steps, data, device)


def hope(
    seed: int = 0,
    layers: int = 2,
    width: int = 64,
    heads: int = 2,
    length: int = 128,
    batch: int = 8,
    steps: int = 300,
    data: str = "",
    device: str = "cpu",
) -> Problem:
    """Hope, whose memories rewrite themselves, on the same text; all levels at every step."""
    # Clocks of levels are the model's: here they would be one more thing that optimizers differ in.
    config = Config(
        width=width,
        layers=layers,
        heads=heads,
        memory_width=width // heads,
        cms_width=2 * width,
        periods=(1, 1, 1),
        inner=RESIDUAL,
    )
    return _text(LanguageModel(config), seed, length, batch, steps, data, device)


def _text(
    model: nn.Module, seed: int, length: int, batch: int, steps: int, source: str, device: str
) -> Problem:
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch finds no GPU here; device=cpu works")
    corpus = _corpus(source, length)
    # The two halves of the held-out text have no byte in common, whatever the length.
    half = len(corpus.valid) // 2
    count = max(1, WINDOWS // batch)
    valid, test = (
        data.windows(part, batch, length, count).to(device)
        for part in (corpus.valid[:half], corpus.valid[half:])
    )
    crops = data.batches(corpus.train, batch, length, seed)

    def batches() -> Iterator[Tensor]:
        for rows in crops:
            yield rows.to(device)

    def bits(model: Any, windows: Tensor) -> float:
        with torch.no_grad():
            return sum(cost(model, x).item() for x in windows) / len(windows) / math.log(2)

    part = Part(batches(), lambda m: bits(m, valid), lambda m: bits(m, test))
    return Problem(
        model.to(device),
        *(cost, [part], steps),
        metric="bits per byte",
        clip=1.0,
        rest=REST,
        record={**corpus.record(), "length": length, "batch": batch},
    )


@cache
def _corpus(source: str, length: int) -> data.Corpus:
    return data.load(source or None, length=length)
