"""Hope: a sequence model whose memories rewrite themselves, above a chain of slower MLPs.

Nested Learning (arXiv 2512.24695), §8. The shell here is that of the baselines too.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from examples.hope.baselines import GatedDelta, RotaryAttention, Segments, SwiGLU
from examples.hope.cms import ContinuumMemory, Levels
from examples.hope.config import EPSILON, Config
from examples.hope.mixers import Attention, Fused, SelfModifyingTitans

MIXERS = {
    "titans": SelfModifyingTitans,
    "attention": Attention,
    "rotary": RotaryAttention,
    "delta": GatedDelta,
    "segments": Segments,
}


class Block(nn.Module):
    """A mixer over time, gated unless it gates itself, then the feed-forward part."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=EPSILON)
        self.mixer = MIXERS[config.mixer](config)
        self.gated = self.mixer.gated
        if self.gated:
            self.head_norm = nn.RMSNorm(config.width // config.heads, eps=EPSILON)
            self.gate = nn.Linear(config.width, config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        feed_forward = ContinuumMemory if config.feed_forward == "cms" else SwiGLU
        self.feed_forward = feed_forward(config)

    def forward(
        self, x: Tensor, state: Any = None, keep: bool = False, report: list[Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """Rows [B, T, width] to rows (Eq. 94-97), and the mixer's state."""
        inputs = self.norm(x)
        mixed, state = self.mixer(inputs, state, keep, report)
        if self.gated:
            mixed = self.head_norm(mixed).flatten(2) * F.silu(self.gate(inputs))
        else:
            mixed = mixed.flatten(2)
        x = x + self.out(mixed)
        return self.feed_forward(x), state


class LanguageModel(nn.Module):
    """A causal sequence model: tokens [B, T] to logits [B, T, outputs]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=EPSILON)
        self.head = nn.Linear(config.width, config.outputs or config.vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=0.2 / config.width**0.5)

    def forward(self, tokens: Tensor, report: list[Tensor] | None = None) -> Tensor:
        """Logits from the first token on; `report` gathers norms of inner gradients."""
        x = self.rows(tokens)
        for block in self.blocks:
            x, _ = block(x, report=report)
        return self.head(self.norm(x))

    def rows(self, tokens: Tensor) -> Tensor:
        """What the first block reads; ValueError where there is nothing to read."""
        if not tokens.shape[-1]:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: at least one in a row")
        return self.embedding(tokens)

    def stream(self, tokens: Tensor, state: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """Logits of the tokens that follow those that left `state`, and the state after them.

        Whatever the pieces, the logits are those of one call of the whole. The state of every
        mixer but attention has a fixed size.
        """
        x, states = self.rows(tokens), []
        for i, block in enumerate(self.blocks):
            x, new = block(x, None if state is None else state[i], keep=True)
            states.append(new)
        return self.head(self.norm(x)), states

    def hidden_matrices(self) -> dict[str, list[Tensor]]:
        """What a matrix rule is for, by how it should see them (`seen_as` of a parameter group).

        The linear maps between embedding and head, and stacks of matrices where memories start.
        Gates, which have a bias, are one vector a head.
        """
        found: dict[str, list[Tensor]] = {"stacked": []}
        for part in self.blocks.modules():
            found["stacked"] += getattr(part, "initial", ())
            if isinstance(part, nn.Linear) and part.bias is None:
                view = f"split:{part.count}" if isinstance(part, Fused) else "stacked"
                found.setdefault(view, []).append(part.weight)
        return found

    def continuum(self) -> list[ContinuumMemory]:
        """The continuum memory of each block; empty in a baseline."""
        return [m for m in self.blocks.modules() if isinstance(m, ContinuumMemory)]

    def cms_levels(self) -> Levels:
        """(period, parameters of that level in all blocks), highest frequency first."""
        clocks = zip(*(memory.clocks() for memory in self.continuum()), strict=True)
        return [(level[0][0], [p for _, ps in level for p in ps]) for level in clocks]

    def before_step(self) -> None:
        """Call between `backward` and the optimizer's step (nested continuum memories)."""
        for memory in self.continuum():
            memory.before_step()

    def after_step(self, step: int) -> None:
        """Call after optimizer step `step`, counted from 1 (nested continuum memories)."""
        for memory in self.continuum():
            memory.after_step(step)


Hope = LanguageModel
