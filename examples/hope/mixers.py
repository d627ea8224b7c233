"""Layers that mix over time: self-modifying Titans, and attention in their place.

A mixer maps rows [B, T, width] and the state that the rows before have left (None at the start)
to answers [B, T, H, d] and the state after them, None unless `keep` asks for it.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples.hope.config import GENERATED, STREAMS, Config
from examples.hope.inner import Gates, InnerRule, Memories, unit

CONVOLUTION = 4  # taps


class Fused(nn.Linear):
    """Several linear maps of the same rows, next to each other; a matrix rule takes each alone."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__(inputs, count * outputs, bias=False)
        self.count = count


class ShortConvolution(nn.Module):
    """A causal convolution over the last few tokens, one filter per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.randn(CONVOLUTION, channels) * 0.3
        taps[-1] += 1.0
        self.taps = nn.Parameter(taps)  # the last one is the present token's

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows [B, T, channels] after `tail`, the rows just before them; also the new tail."""
        length = x.shape[1]
        if tail is None:
            padded = F.pad(x, (0, 0, CONVOLUTION - 1, 0))
        else:
            padded = torch.cat((tail, x), 1)
        result = padded[:, :length] * self.taps[0]
        for i in range(1, CONVOLUTION):
            result = torch.addcmul(result, padded[:, i : i + length], self.taps[i])
        # A copy: a view would keep all rows alive for as long as the tail.
        return result, padded[:, length:].clone()


class TitansState(NamedTuple):
    """What self-modifying Titans carry from one call to the next, whatever was read."""

    position: int  # tokens read
    tail: Tensor  # the convolution's last rows
    memory: Memories  # [B, H, ...]
    generators: Memories  # [B, H, G, ...]


class SelfModifyingTitans(nn.Module):
    """Memories that generate their own keys, values, learning rates and retentions (Eq. 83-88).

    Everything that enters a memory lies on the unit sphere, and with rates up to 2 the map
    αI - ηkkᵀ, through which a linear memory is erased, never expands (ours).
    """

    gated = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.rule = config, InnerRule.of(config.inner)
        width, heads = config.width, config.heads
        d = width // heads
        self.project = nn.ModuleDict(
            {name: nn.Linear(width, width, bias=False) for name in config.maps}
        )
        self.convolution = ShortConvolution(len(STREAMS) * width)
        count = len(config.adaptive) + 1  # of memories in a head; the last is "memory"
        shapes = [(d, d, d**-0.5)]
        if self.rule.structure == "mlp":
            hidden = config.memory_width
            shapes = [(d, hidden, 1.0), (hidden, d, (hidden * d) ** -0.5)]
        # Stacks [H · count, rows, columns], for rules of matrices.
        self.initial = nn.ParameterList(
            nn.Parameter(torch.randn(heads * count, rows, columns) * scale)
            for rows, columns, scale in shapes
        )
        if self.rule.fixed:
            # What stays helps to read text and hides what was learnt: half of it, at first.
            self.share = nn.Parameter(torch.full((heads, 1, d), 0.5))
        # A linear head each that turns a row into a scalar.
        self.rate = nn.Parameter(torch.randn(heads, d, 1))
        self.rate_bias = nn.Parameter(torch.zeros(heads, 1, 1))
        if config.forget:
            self.retention = nn.Parameter(torch.randn(heads, d, 1))
            self.retention_bias = nn.Parameter(torch.full((heads, 1, 1), -3.0))
        if self.rule.momentum:
            self.momentum = nn.Parameter(torch.randn(heads, d, 1))
            self.momentum_bias = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(
        self,
        x: Tensor,
        state: TitansState | None = None,
        keep: bool = False,
        report: list[Tensor] | None = None,
    ) -> tuple[Tensor, TitansState | None]:
        """Rows [B, T, width] to answers [B, T, H, d]; `report` gathers inner gradient norms."""
        config = self.config
        batch, length, _ = x.shape
        position = 0 if state is None else state.position
        rows, tail = self.streams(x, None if state is None else state.tail)
        memory, generators = self.begin(batch)
        if state is not None:
            memory = state.memory._replace(fixed=memory.fixed)
            generators = state.generators._replace(fixed=generators.fixed)
        answers = []
        for (now,), stop in pieces(position, config.slow_chunk, rows):
            ends = (position + stop) % config.slow_chunk == 0
            start = position + stop - now.shape[-2]
            # The generators that no later row asks are not written.
            last = not keep and stop == length
            work = now, memory, generators, start, last, report
            if config.checkpoint and torch.is_grad_enabled():
                found = checkpoint(self.slow_chunk, *work, use_reentrant=False)
                answer, memory, generators = cast(tuple[Tensor, Memories, Memories], found)
            else:
                answer, memory, generators = self.slow_chunk(*work)
            generators = generators.next_chunk() if ends else generators
            answers.append(answer)
        left = None
        if keep:
            carried = memory.carried(), generators.carried()
            left = TitansState(position + length, tail, *carried)
        return torch.cat(answers, 2).transpose(1, 2), left

    def slow_chunk(
        self,
        rows: Tensor,
        memory: Memories,
        generators: Memories,
        position: int,
        last: bool,
        report: list[Tensor] | None,
    ) -> tuple[Tensor, Memories, Memories]:
        """Rows [4, B, H, T, d] within one chunk of the generators: answers, memories after them."""
        rule, chunk = self.rule, self.config.chunk
        queries, keys, values, gates = self.generate(generators, rows)
        answers = []
        columns = queries, keys, values, *gates.shared(self.config.sharers(chunk))
        for (query, key, value, *gate), stop in pieces(position, chunk, *columns):
            pairs = key, self.targets(memory, value)
            if report is not None:
                report.append(self.gradient_norm(memory, *pairs))
            memory, answer = rule.write(memory, *pairs, Gates(*gate), query)
            if (position + stop) % chunk == 0:
                memory = memory.next_chunk()
            answers.append(answer)
        told = torch.cat(answers, 2)
        if rule.fixed:
            told = told - (1 - self.share) * (queries @ memory.fixed[0])
        if not last and self.config.adaptive:
            # All generators are written with the same keys and rates: one axis to broadcast.
            keys, values = keys.unsqueeze(2), values.unsqueeze(2)
            targets = self.targets(generators, values)
            if report is not None:
                report.append(self.gradient_norm(generators, keys, targets))
            gates = gates.shared(self.config.sharers(self.config.slow_chunk))
            one = (slice(None), slice(None), None)
            generators, _ = rule.write(generators, keys, targets, gates.of(one))
        return told, memory, generators

    def streams(self, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows of each of `STREAMS`, [4, B, H, T, d] on the unit sphere."""
        parts = [self.project[n](x) if n in self.project else x for n in STREAMS]
        rows, left = self.convolution(torch.cat(parts, -1), tail)
        rows = unit(rows.view(*x.shape[:2], len(STREAMS), self.config.heads, -1))
        return rows.permute(2, 0, 3, 1, 4), left

    def begin(self, batch: int) -> tuple[Memories, Memories]:
        """The meta-learnt initial states of "memory" and of the generators."""
        initial = [p.unflatten(0, (self.config.heads, -1)) for p in self.initial]
        initial = [p.expand(batch, *p.shape) for p in initial]
        memory, generators = (tuple(p[:, :, i] for p in initial) for i in (-1, slice(-1)))
        return self.rule.begin(memory), self.rule.begin(generators)

    def targets(self, memories: Memories, values: Tensor) -> Tensor:
        """What the memories should answer to the keys: v̂ = m(v), each its own (Eq. 84)."""
        if not self.config.own_values:
            return values
        own = self.rule.read(memories, values)
        return unit(own) if self.config.unit_values else own

    def generate(self, generators: Memories, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Gates]:
        """Queries, keys, values [B, H, T, d], and the gates of their rows."""
        config = self.config
        found: dict[str, Tensor] = dict(zip(GENERATED, (*rows, rows[3]), strict=True))
        if config.adaptive:
            asked = torch.stack([found[name] for name in config.adaptive], 2)
            answers = self.rule.read(generators, asked).unbind(2)
            found |= dict(zip(config.adaptive, answers, strict=True))
        cap = config.rate_cap
        rate = F.softplus(found["rate"] @ self.rate + self.rate_bias)
        rate = -torch.expm1(-rate / cap) * cap
        retention, momentum = 1.0, 1.0
        if config.forget:
            gate = found["retention"] @ self.retention + self.retention_bias
            retention = 1 - config.forget * torch.sigmoid(gate)
        if cap > 1:
            rate = rate * (1 + retention) / 2  # |α - η| ≤ 1 wherever the cap is at most 2
        if self.rule.momentum:
            momentum = torch.sigmoid(rows[3] @ self.momentum + self.momentum_bias)
            rate = rate * (1 - momentum)  # a gradient moves the memory by η in all
        value = unit(found["value"]) if config.unit_values else found["value"]
        return unit(found["query"]), unit(found["key"]), value, Gates(retention, rate, momentum)

    @torch.no_grad()
    def gradient_norm(self, memories: Memories, keys: Tensor, values: Tensor) -> Tensor:
        """The largest norm over all memories of a chunk's mean inner gradient."""
        found = self.rule.gradients(memories, keys, values)
        squares = [g.square().sum((-2, -1)) for g in found]
        return torch.stack(squares).sum(0).max().sqrt() / keys.shape[-2]


class Attention(nn.Module):
    """Softmax attention in the place of the memories: Hope-Attention. Its state grows."""

    gated = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.project = Fused(config.width, config.width, 3)
        self.convolution = ShortConvolution(3 * config.width)

    def forward(
        self, x: Tensor, state: Any = None, keep: bool = False, report: Any = None
    ) -> tuple[Tensor, Any]:
        """Rows [B, T, width] to answers [B, T, H, d]."""
        batch, length, _ = x.shape
        tail, past = (None, None) if state is None else state
        rows, tail = self.convolution(self.project(x), tail)
        q, k, v = rows.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        answers = attend(q, k, v)
        return answers.transpose(1, 2), (tail, (k, v)) if keep else None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last rows [B, H, T, d] over all rows up to each."""
    new, total = q.shape[-2], k.shape[-2]
    if new == total:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def pieces(position: int, size: int, *rows: Tensor | float) -> Iterator[tuple[list[Any], int]]:
    """Rows [..., T, d] cut where position + index is a multiple of `size`; where each piece ends.

    Numbers stand for all rows.
    """
    length = next(x.shape[-2] for x in rows if isinstance(x, Tensor))
    cuts = [0, *range(size - position % size, length, size), length]
    sizes = [stop - start for start, stop in pairwise(cuts)]
    # One split has one gradient; that of a slice is as large as the whole.
    parts = [x.split(sizes, -2) if isinstance(x, Tensor) else [x] * len(sizes) for x in rows]
    for *now, stop in zip(*parts, cuts[1:], strict=True):
        yield now, stop
