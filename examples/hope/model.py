"""Hope: a sequence model whose memories rewrite themselves, above a chain of slower MLPs.

Nested Learning (arXiv 2512.24695), §8. What the memories do at every token is one step of an
optimizer, so it is not written down here: `deepopt.memory` derives it from the objective.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepopt.expr import Expr
from deepopt.grad import grad
from deepopt.memory import MLP, l2, read_along, write
from torch_backend.algebra import lift

# The memories of a head that generate what is written; "memory", which is read out, comes after.
GENERATORS = ("key", "value", "rate", "retention")
CONVOLUTION = 4  # taps


class State(NamedTuple):
    """The parameters of memories, one or many in the axes in front."""

    first: Tensor  # [..., d, width]
    second: Tensor  # [..., width, d]


# The inner learning rule on one chunk. first [d, width] and second [width, d] are the memory;
# keys, values, queries are [chunk, d]; retention and rate [chunk, 1].


def _read(first: Expr, second: Expr, keys: Expr) -> Expr:
    return MLP(first, second).read(keys)[0]


def _gradients(first: Expr, second: Expr, keys: Expr, values: Expr) -> tuple[Expr, ...]:
    return tuple(grad(l2(MLP(first, second), values, keys).loss, [first, second]))


def _write(
    first: Expr,
    second: Expr,
    keys: Expr,
    values: Expr,
    retention: Expr,
    rate: Expr,
    *queries: Expr,
) -> tuple[Expr, ...]:
    """The memory after a step of delta gradient descent per token, gradients at the chunk's start.

    With queries, also its answer to each row of them just before the token of that row is written.
    """
    objective = l2(MLP(first, second), values, keys)
    new = write(
        objective,
        solver="sequential",
        retention=retention,
        rate=rate,
        delta=True,
        normalize=True,
    )
    answers = [
        read_along(objective, q, retention=retention, rate=rate, delta=True, normalize=True)
        for q in queries
    ]
    return (*new.parameters, *answers)


# The same functions of tensors, with any batch axes in front.
read = lift(_read)
gradients = lift(_gradients)
write_chunk = lift(_write)


@dataclass(frozen=True)
class Config:
    """Sizes of a model.

    chunk, slow_chunk: tokens between the writes of "memory" and of the generators; the second is a
        multiple of the first.
    periods: optimizer steps between the updates of each CMS level, highest frequency first.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    memory_width: int = 32
    chunk: int = 32
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

    Everything that enters a memory lies on the unit sphere, values included; together with the
    rates of exact delta steps this bounds every write (ours).
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

    def forward(self, x: Tensor, report: list[Tensor] | None = None) -> Tensor:
        """Rows [B, T, width] to answers [B, T, H, d]; `report` gathers inner gradient norms."""
        batch, length, _ = x.shape
        rows = self.convolution(torch.cat((self.query(x), x, x, x), -1))
        rows = unit(rows.view(batch, length, 4, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # The rate and the retention are generated from the same rows. [B, H, 4, T, d]
        queries, generators = rows[0], torch.stack((rows[1], rows[2], rows[3], rows[3]), 2)

        first = self.first.expand(batch, -1, -1, -1, -1)
        second = self.second.expand(batch, -1, -1, -1, -1)
        state = State(first[:, :, :-1], second[:, :, :-1])  # of the generators
        memory = State(first[:, :, -1], second[:, :, -1])
        answers = []
        for start, stop in spans(0, length, self.slow_chunk):
            keys, values, retention, rate = self.generate(state, generators[:, :, :, start:stop])
            for begin, end in spans(start, stop, self.chunk):
                now = slice(begin - start, end - start)
                pairs = keys[:, :, now], unit(read(*memory, values[:, :, now]))
                if report is not None:
                    report.append(gradient_norm(memory, *pairs))
                rates = retention[:, :, now], rate[:, :, now]
                *new, answer = write_chunk(*memory, *pairs, *rates, queries[:, :, begin:end])
                memory = State(*new)
                answers.append(answer)
            if stop < length:
                # All generators are written with the same keys and rates: one axis to broadcast.
                keys, values, retention, rate = (
                    x.unsqueeze(2) for x in (keys, values, retention, rate)
                )
                targets = unit(read(*state, values))
                if report is not None:
                    report.append(gradient_norm(state, keys, targets))
                state = State(*write_chunk(*state, keys, targets, retention, rate))
        return torch.cat(answers, 2).transpose(1, 2)

    def generate(self, state: State, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values [B, H, T, d], retentions in (0.9, 1) and rates in (0, 1) [B, H, T, 1]."""
        key, value, rate, retention = read(*state, rows).unbind(2)
        rate = F.softplus(rate @ self.rate + self.rate_bias)
        retention = torch.sigmoid(retention @ self.retention + self.retention_bias)
        return unit(key), unit(value), 1 - 0.1 * retention, -torch.expm1(-rate)


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

    def hidden_matrices(self) -> list[Tensor]:
        """The weights of the linear maps between embedding and head, what a matrix rule is for."""
        linear = (module for module in self.blocks.modules() if isinstance(module, nn.Linear))
        return [module.weight for module in linear]

    def cms_levels(self) -> list[tuple[int, list[Tensor]]]:
        """(period, parameters of that level in all blocks), highest frequency first."""
        named = list(self.named_parameters())
        return [
            (period, [p for name, p in named if f".levels.{i}." in name])
            for i, period in enumerate(self.config.periods)
        ]


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length one; short ones, up to 1e-6, stay short."""
    return F.normalize(x, dim=-1, eps=1e-6)


def spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """start to stop cut into pieces of `size`, the last one shorter if need be."""
    return [(begin, min(begin + size, stop)) for begin in range(start, stop, size)]


@torch.no_grad()
def gradient_norm(state: State, keys: Tensor, values: Tensor) -> Tensor:
    """The largest norm over all memories of a chunk's mean inner gradient."""
    squares = [g.square().sum((-2, -1)) for g in gradients(*state, keys, values)]
    return torch.stack(squares).sum(0).max().sqrt() / keys.shape[-2]
