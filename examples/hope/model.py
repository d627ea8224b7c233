"""Hope: a sequence model whose memories rewrite themselves, above a chain of slower MLPs.

Nested Learning (arXiv 2512.24695), §8. What the memories do at every token is one step of an
optimizer, so it is not written down here: `deepopt.memory` derives it from the objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepopt.expr import Expr
from deepopt.grad import grad
from deepopt.memory import MLP, l2, read_along, write
from torch_backend.algebra import lift

# The memories of a head that generate; "memory" itself, the sixth of the paper's set, is kept apart.
GENERATORS = ("key", "value", "rate", "retention")
CONVOLUTION = 4  # taps


# The inner learning rule. In every function: first [d, width], second [width, d], the parameters of
# the residual two-layer memory; keys, values, queries [chunk, d]; retention, rate [chunk, 1].


def _read(first: Expr, second: Expr, keys: Expr) -> Expr:
    return MLP(first, second).read(keys)[0]


def _written(
    first: Expr, second: Expr, keys: Expr, values: Expr, retention: Expr, rate: Expr
) -> tuple[Expr, ...]:
    """The memory after one delta gradient descent step per token, gradients at the chunk's start."""
    objective = l2(MLP(first, second), values, keys)
    return write(
        objective,
        retention=retention,
        rate=rate,
        solver="sequential",
        delta=True,
        normalize=True,
    ).parameters


def _answers(
    first: Expr,
    second: Expr,
    keys: Expr,
    values: Expr,
    retention: Expr,
    rate: Expr,
    queries: Expr,
) -> Expr:
    """What the memory answers to each query, read just before the token of its row is written."""
    objective = l2(MLP(first, second), values, keys)
    return read_along(
        objective, queries, retention=retention, rate=rate, delta=True, normalize=True
    )


def _answers_and_written(*arguments: Expr) -> tuple[Expr, ...]:
    return _answers(*arguments), *_written(*arguments[:-1])


def _gradients(first: Expr, second: Expr, keys: Expr, values: Expr) -> tuple[Expr, ...]:
    return tuple(grad(l2(MLP(first, second), values, keys).loss, [first, second]))


# The same functions of tensors, with any batch axes in front.
read = lift(_read)
written = lift(_written)
answers = lift(_answers)
answers_and_written = lift(_answers_and_written)
gradients = lift(_gradients)


@dataclass(frozen=True)
class Config:
    """Sizes of a model.

    chunk, slow_chunk: tokens between the writes of "memory" and of the generators; the second is a
        multiple of the first.
    periods: optimizer steps between the updates of each CMS level, highest frequency first.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    memory_width: int = 32
    chunk: int = 16
    slow_chunk: int = 64
    periods: tuple[int, ...] = (1, 2, 4)
    cms_width: int = 256
    variant: Literal["titans", "attention"] = "titans"
    vocabulary: int = 256

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.chunk < 1 or self.slow_chunk % self.chunk:
            raise ValueError(f"slow_chunk {self.slow_chunk} is no multiple of chunk {self.chunk}")
        if self.variant not in ("titans", "attention"):
            raise ValueError(f"variant {self.variant!r}: choose 'titans' or 'attention'")


class ShortConvolution(nn.Module):
    """A causal convolution over the last few tokens, one filter per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.randn(CONVOLUTION, channels) * 0.3
        taps[-1] += 1.0
        self.taps = nn.Parameter(taps)  # the last one is the present token's

    def forward(self, x: Tensor) -> Tensor:  # [B, T, channels]
        length = x.shape[1]
        padded = F.pad(x, (0, 0, CONVOLUTION - 1, 0))
        result = padded[:, :length] * self.taps[0]
        for i in range(1, CONVOLUTION):
            result = torch.addcmul(result, padded[:, i : i + length], self.taps[i])
        return result


class SelfModifyingTitans(nn.Module):
    """Memories that generate their own keys, values, learning rates and retentions.

    Everything that enters a memory lies on the unit sphere, values included. With rates of exact
    delta steps no write can then grow a memory without bound (ours).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, heads, hidden = config.width // config.heads, config.heads, config.memory_width
        self.heads, self.chunk, self.slow_chunk = heads, config.chunk, config.slow_chunk
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.convolution = ShortConvolution(4 * config.width)
        count = len(GENERATORS) + 1  # the last is "memory"
        self.first = nn.Parameter(torch.randn(heads, count, d, hidden))
        self.second = nn.Parameter(torch.randn(heads, count, hidden, d) / (hidden * d) ** 0.5)
        # One linear head each that turns the answer of M_rate, M_retention into a scalar.
        self.rate = nn.Parameter(torch.randn(heads, d, 1))
        self.rate_bias = nn.Parameter(torch.zeros(heads, 1, 1))
        self.retention = nn.Parameter(torch.randn(heads, d, 1))
        self.retention_bias = nn.Parameter(torch.full((heads, 1, 1), -3.0))

    def forward(self, x: Tensor, report: list[Tensor] | None = None) -> Tensor:  # [B, T, width]
        batch, length, width = x.shape
        # [B, T, 4, H, d] -> [4, B, H, T, d]
        rows = self.convolution(torch.cat((self.query(x), x, x, x), -1))
        rows = rows.view(batch, length, 4, self.heads, -1).permute(2, 0, 3, 1, 4)
        rows = unit(rows)
        queries, generators = rows[0], rows[1:].movedim(0, 2)  # [B, H, 3, T, d]
        # the rate and the retention are generated from the same rows
        generators = torch.cat((generators, generators[:, :, 2:]), 2)

        split = (len(GENERATORS), 1)
        first, memory_first = self.first.split(split, 1)
        second, memory_second = self.second.split(split, 1)
        state = (first.expand(batch, -1, -1, -1, -1), second.expand(batch, -1, -1, -1, -1))
        memory = (
            memory_first.squeeze(1).expand(batch, -1, -1, -1),
            memory_second.squeeze(1).expand(batch, -1, -1, -1),
        )
        outputs = []
        for start in range(0, length, self.slow_chunk):
            stop = min(start + self.slow_chunk, length)
            keys, values, rate, retention = self.generate(*state, generators[..., start:stop, :])
            for begin in range(start, stop, self.chunk):
                end = min(begin + self.chunk, stop)
                part = slice(begin - start, end - start)
                targets = unit(read(*memory, values[..., part, :]))
                arguments = (
                    *memory,
                    keys[..., part, :],
                    targets,
                    retention[..., part, :],
                    rate[..., part, :],
                )
                if report is not None:
                    report.append(gradient_norm(*arguments[:4]))
                if end < length:
                    answer, *new = answers_and_written(*arguments, queries[..., begin:end, :])
                    memory = (new[0], new[1])
                else:
                    answer = answers(*arguments, queries[..., begin:end, :])
                outputs.append(answer)
            if stop < length:
                keys, values = keys.unsqueeze(2), values.unsqueeze(2)
                targets = unit(read(*state, values))
                if report is not None:
                    report.append(gradient_norm(*state, keys, targets))
                state = written(*state, keys, targets, retention.unsqueeze(2), rate.unsqueeze(2))
        return torch.cat(outputs, 2).transpose(1, 2)  # [B, T, H, d]

    def generate(self, first: Tensor, second: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Keys, values [B, H, T, d], rates in (0, 1) and retentions in (0.9, 1) [B, H, T, 1]."""
        key, value, rate, retention = read(first, second, x).unbind(2)
        rate = F.softplus(rate @ self.rate + self.rate_bias)
        rate = -torch.expm1(-rate)
        retention = 1 - 0.1 * torch.sigmoid(retention @ self.retention + self.retention_bias)
        return unit(key), unit(value), rate, retention


class Attention(nn.Module):
    """Softmax attention in the place of the memories: Hope-Attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.project = nn.Linear(config.width, 3 * config.width, bias=False)
        self.convolution = ShortConvolution(3 * config.width)

    def forward(self, x: Tensor, report: list[Tensor] | None = None) -> Tensor:  # [B, T, width]
        batch, length, _ = x.shape
        rows = self.convolution(self.project(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = rows.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Level(nn.Module):
    """One MLP of a continuum memory system."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Block(nn.Module):
    """A mixer over time with an output gate, then the chain of levels."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width)
        mixer = SelfModifyingTitans if config.variant == "titans" else Attention
        self.mixer = mixer(config)
        self.head_norm = nn.RMSNorm(config.width // config.heads)
        self.gate = nn.Linear(config.width, config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.levels = nn.ModuleList(Level(config.width, config.cms_width) for _ in config.periods)

    def forward(self, x: Tensor, report: list[Tensor] | None = None) -> Tensor:
        inputs = self.norm(x)
        mixed = self.head_norm(self.mixer(inputs, report)).flatten(2)
        x = x + self.out(mixed * F.silu(self.gate(inputs)))
        for level in self.levels:
            x = level(x)
        return x


class Hope(nn.Module):
    """A causal language model over bytes: tokens [B, T] to logits [B, T, vocabulary]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=0.2 / config.width**0.5)

    def forward(self, tokens: Tensor, report: list[Tensor] | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, report)
        return self.head(self.norm(x))

    def cms_levels(self) -> list[tuple[int, list[nn.Parameter]]]:
        """(period, parameters of that level in all blocks), highest frequency first."""
        levels: list[tuple[int, list[nn.Parameter]]] = []
        for i, period in enumerate(self.config.periods):
            parameters = [p for block in self.blocks for p in block.levels[i].parameters()]
            levels.append((period, parameters))
        return levels


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length one; short ones, up to 1e-6, stay short."""
    return F.normalize(x, dim=-1, eps=1e-6)


@torch.no_grad()
def gradient_norm(first: Tensor, second: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The largest norm over all memories of the mean inner gradient of a chunk."""
    squares = [g.square().sum((-2, -1)) for g in gradients(first, second, keys, values)]
    return torch.stack(squares).sum(0).max().sqrt() / keys.shape[-2]
