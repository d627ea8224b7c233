"""The continuum memory system: MLPs that are updated at different frequencies (§7.1, §7.3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.hope.config import EPSILON, Config

Levels = list[tuple[int, list[Tensor]]]  # (period, parameters), highest frequency first


class Level(nn.Module):
    """One MLP of a continuum memory system, with a residual connection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=EPSILON)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ContinuumMemory(nn.Module):
    """Levels of any number, in one of the paper's three arrangements.

    "sequential" (Eq. 70, 73): a chain, fastest first (Fig. 5); all starts are learnt together.
    "independent" (Eq. 74): x + Σ w_i MLP_i(x), the weights w learnt.
    "nested" (Eq. 72): the chain, in which every level but the slowest begins again, whenever the
        next slower one has been updated, from a state that this slower level learns. The paper
        differentiates through the faster level's steps; here the gradient of the start is the one
        at the faster level's present state (first order, ours), and a level that begins again
        itself keeps the start that it has learnt (ours), and what the optimizer remembers of a
        level goes on where the level begins again. Call `before_step` and `after_step`
        around the optimizer's step.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.periods, self.arrangement = config.periods, config.cms
        self.levels = nn.ModuleList(Level(config.width, config.cms_width) for _ in config.periods)
        if self.arrangement == "independent":
            self.weights = nn.Parameter(torch.ones(len(config.periods)))
        # What a level begins from belongs to the clock of the next slower one.
        nested = self.levels[:-1] if self.arrangement == "nested" else []
        self.starts = nn.ModuleList(Level(config.width, config.cms_width) for _ in nested)
        self.starts.load_state_dict(nn.ModuleList(nested).state_dict())

    def forward(self, x: Tensor) -> Tensor:
        if self.arrangement == "independent":
            changes = torch.stack([level(x) - x for level in self.levels])
            return x + torch.einsum("l,l...->...", self.weights, changes)
        for level in self.levels:
            x = level(x)
        return x

    def clocks(self) -> Levels:
        """The parameters of every level, with those that it learns for the faster one."""
        found: Levels = [
            (period, list(level.parameters()))
            for period, level in zip(self.periods, self.levels, strict=True)
        ]
        for i, start in enumerate(self.starts):
            found[i + 1][1].extend(start.parameters())
        return found

    @torch.no_grad()
    def before_step(self) -> None:
        """Give the gradient of each level to the start that it came from."""
        for level, start in zip(self.levels, self.starts, strict=False):
            for p, p0 in zip(level.parameters(), start.parameters(), strict=True):
                p0.grad = None if p.grad is None else p.grad.clone()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """After optimizer step `step` (from 1): levels whose context has ended begin again."""
        for i, start in enumerate(self.starts):
            if step % self.periods[i + 1] == 0:
                self.levels[i].load_state_dict(start.state_dict())


def stacked(mlps: Sequence[nn.Module], periods: Sequence[int]) -> Levels:
    """Ad-hoc level stacking (§7.3): the MLPs of a pre-trained model as levels of given periods.

    mlps: in order from input to output; cut into as many runs as there are periods, as equal as
        possible, the earlier ones faster (Fig. 5; the paper does not say which block is which
        level). With a learning rate of zero the model stays as it was pre-trained.
    """
    if not 1 <= len(periods) <= len(mlps):
        raise ValueError(f"{len(periods)} periods for {len(mlps)} MLPs: at least one MLP a level")
    if list(periods) != sorted(periods) or periods[0] < 1:
        raise ValueError(f"periods {tuple(periods)}: positive, the highest frequency first")
    cuts = [round(i * len(mlps) / len(periods)) for i in range(len(periods) + 1)]
    return [
        (period, [p for mlp in mlps[a:b] for p in mlp.parameters()])
        for period, a, b in zip(periods, cuts[:-1], cuts[1:], strict=True)
    ]
