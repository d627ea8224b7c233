"""What Hope is compared with: Transformer++, a gated delta-rule net, Titans (memory as context).

Mixers as in `examples.hope.mixers`, in the same shell, each with a SwiGLU after it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.hope.config import EPSILON, Config
from examples.hope.inner import Gates, InnerRule, Memories, unit
from examples.hope.mixers import Fused, ShortConvolution, attend, pieces

PERSISTENT = 4  # learnt rows that every segment of Titans attends to


class SwiGLU(nn.Module):
    """x + W(silu(Ux) ⊙ Vx) of the normalised input, `cms_width` wide."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=EPSILON)
        self.up = Fused(config.width, config.cms_width, 2)
        self.down = nn.Linear(config.cms_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


def rotate(x: Tensor, position: int) -> Tensor:
    """Rotary positions (RoPE) of rows [..., T, d], the first of them at `position`."""
    half = x.shape[-1] // 2
    # Narrow types cannot count positions.
    kind = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
    rates = 10_000.0 ** (-torch.arange(half, **kind) / half)
    angles = torch.arange(position, position + x.shape[-2], **kind)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def refuse_odd(config: Config) -> None:
    """Raise ValueError where `rotate` would find a channel without a partner."""
    if config.width // config.heads % 2:
        raise ValueError(
            f"width {config.width} over {config.heads} heads: rotary positions need an even "
            "number of channels per head"
        )


class RotaryAttention(nn.Module):
    """Softmax attention with rotary positions: the mixer of Transformer++. Its state grows."""

    gated = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        refuse_odd(config)
        self.heads = config.heads
        self.project = Fused(config.width, config.width, 3)

    def forward(
        self, x: Tensor, state: Any = None, keep: bool = False, report: Any = None
    ) -> tuple[Tensor, Any]:
        """Rows [B, T, width] to answers [B, T, H, d]."""
        batch, length, _ = x.shape
        q, k, v = self.project(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        position = 0 if state is None else state[0].shape[2]
        q, k = rotate(q, position), rotate(k, position)
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        return attend(q, k, v).transpose(1, 2), (k, v) if keep else None


class GatedDelta(nn.Module):
    """A gated delta-rule net: M ← αM(I - βkkᵀ) + αβvkᵀ, read after the write.

    The linear memory of Hope with the dot objective and everything static, M starting from zero
    (Gated DeltaNet, arXiv 2412.06464, whose α does not scale what is written). β in (0, 2) lets
    the memory change sign along a key, which state tracking needs (arXiv 2411.12537).
    """

    gated = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.chunk = config.heads, config.chunk
        self.rule = InnerRule(structure="linear", objective="dot", exact=False)
        self.project = Fused(config.width, config.width, 3)
        self.convolution = ShortConvolution(3 * config.width)
        self.gates = nn.Linear(config.width, 2 * config.heads)
        nn.init.zeros_(self.gates.bias)
        # Half-lives from a few tokens to a few hundred.
        steps = torch.exp(torch.linspace(-6, -2, config.heads))
        self.decay = nn.Parameter(steps.log())

    def forward(
        self, x: Tensor, state: Any = None, keep: bool = False, report: Any = None
    ) -> tuple[Tensor, Any]:
        """Rows [B, T, width] to answers [B, T, H, d]."""
        batch, length, _ = x.shape
        tail, memory = (None, None) if state is None else state
        rows, tail = self.convolution(self.project(x), tail)
        rows = F.silu(rows).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = unit(rows[0]), unit(rows[1]), rows[2]
        rate, step = self.gates(x).view(batch, length, 2, self.heads, 1).permute(2, 0, 3, 1, 4)
        retention = torch.exp(-F.softplus(step + self.decay.view(-1, 1, 1)))
        rate = retention * 2 * torch.sigmoid(rate)
        if memory is None:
            d = v.shape[-1]
            memory = self.rule.begin((v.new_zeros(()).expand(batch, self.heads, d, d),))
        answers = []
        for (query, key, value, *gates), _ in pieces(0, self.chunk, q, k, v, retention, rate):
            memory, answer = self.rule.write(memory, key, value, Gates(*gates), query, after=True)
            memory = memory.next_chunk()
            answers.append(answer)
        return torch.cat(answers, 2).transpose(1, 2), (tail, memory) if keep else None


class SegmentsState(NamedTuple):
    """What Titans carry: rows of the convolution and of the unfinished segment, and the memory."""

    position: int
    tail: Tensor | None
    keys: Tensor  # [B, H, rows, d], two for every token
    values: Tensor
    memory: Memories


class Segments(nn.Module):
    """Titans, memory as context (arXiv 2501.00663): attention within segments and a deep memory.

    A segment attends to learnt rows, to what the memory of the segments before answers to its
    tokens, and to itself; the memory then learns from the outputs y by gradient descent with
    momentum and forgetting, and y ⊙ m(y) is the answer. Ours: a token sees its own and earlier
    answers only, and m is the memory just after y was written, so that nothing looks ahead; one
    memory a head; rates of exact steps, a segment's at most one together, also over the time that
    momentum goes on; a token forgets a tenth of the memory at most.
    """

    gated = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        refuse_odd(config)
        d, heads, hidden = config.width // config.heads, config.heads, config.memory_width
        self.heads, self.size, self.rule = (
            heads,
            config.chunk,
            InnerRule(delta=False, momentum=True),
        )
        self.project = Fused(config.width, config.width, 3)
        self.learn = Fused(config.width, config.width, 3)
        self.convolution = ShortConvolution(3 * config.width)
        self.gates = nn.Linear(config.width, 3 * heads)
        # Of rate, forgetting and momentum; forgetting starts as in Hope.
        self.gates.bias = nn.Parameter(torch.tensor([0.0, -3.0, 0.0]).repeat_interleave(heads))
        self.persistent = nn.Parameter(torch.randn(2, heads, PERSISTENT, d) * 0.3)
        first = torch.randn(heads, d, hidden)
        second = torch.randn(heads, hidden, d) / (hidden * d) ** 0.5
        self.initial = nn.ParameterList([nn.Parameter(first), nn.Parameter(second)])

    def forward(
        self, x: Tensor, state: SegmentsState | None = None, keep: bool = False, report: Any = None
    ) -> tuple[Tensor, Any]:
        """Rows [B, T, width] to answers [B, T, H, d]."""
        batch = x.shape[0]
        if state is None:
            memory = self.rule.begin(tuple(p.expand(batch, *p.shape) for p in self.initial))
            empty = x.new_zeros(batch, self.heads, 0, self.persistent.shape[-1])
            state = SegmentsState(0, None, empty, empty, memory)
        answers = []
        for (rows,), _ in pieces(state.position, self.size, x):
            answer, state = self.segment(rows, state)
            answers.append(answer)
        return torch.cat(answers, 1), state if keep else None

    def segment(self, x: Tensor, state: SegmentsState) -> tuple[Tensor, SegmentsState]:
        """Rows that lie within one segment."""
        batch, new, _ = x.shape
        rows, tail = self.convolution(self.project(x), state.tail)
        q, k, v = self.split(rows)
        memory, place = state.memory, state.position % self.size
        recalled = self.rule.read(memory, unit(q))
        q = rotate(q, place)
        # Two rows for every token: what is recalled for it, and itself.
        pair_k = torch.stack((rotate(recalled, place), rotate(k, place)), 3).flatten(2, 3)
        pair_v = torch.stack((recalled, v), 3).flatten(2, 3)
        keys, values = torch.cat((state.keys, pair_k), 2), torch.cat((state.values, pair_v), 2)
        fixed = self.persistent[:, None].expand(-1, batch, -1, -1, -1)
        total = keys.shape[2]
        seen = torch.ones(new, total // 2, dtype=torch.bool, device=x.device)
        seen = seen.tril(total // 2 - new).repeat_interleave(2, 1)
        seen = F.pad(seen, (PERSISTENT, 0), value=True)
        y = F.scaled_dot_product_attention(
            q, torch.cat((fixed[0], keys), 2), torch.cat((fixed[1], values), 2), attn_mask=seen
        )
        flat = y.transpose(1, 2).flatten(2)
        query, key, value = self.split(self.learn(flat))
        # In the precision of the rows: autocast would round a retention to 1.
        gates = self.gates(flat).to(x.dtype)
        gates = gates.view(batch, new, 3, self.heads, 1).permute(2, 0, 3, 1, 4)
        rate, forget, momentum = torch.sigmoid(gates)
        # All gradients of a segment are taken at its start: their sum must not overshoot.
        learnt = Gates(1 - 0.1 * forget, rate * (1 - momentum) / self.size, momentum)
        rows = unit(key), unit(value), learnt, unit(query)
        memory, answer = self.rule.write(memory, *rows, after=True)
        position = state.position + new
        if position % self.size == 0:
            memory, keys, values = memory.next_chunk(), keys[:, :, :0], values[:, :, :0]
        left = SegmentsState(position, tail, keys, values, memory)
        return (y * answer).transpose(1, 2), left

    def split(self, x: Tensor) -> Tensor:
        """[B, T, 3 width] to [3, B, H, T, d]."""
        return x.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
