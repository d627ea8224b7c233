"""A trained model that learns on while it reads: its continuum memory, on its clocks (§7)."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepopt import Rule, rules
from examples.hope import carried, train
from examples.hope.data import SEPARATOR
from examples.hope.model import LanguageModel
from torch_backend import Optimizer


class Learner:
    """Reads a stream of bytes segment by segment: first predicts, then learns (Eq. 71).

    model: is changed in place. Its self-modifying memories carry on from segment to segment, and
        only levels of its continuum memories are stepped; all else stays as it was trained.
    segment: tokens between two gradients, which do not reach back beyond it.
    periods: tokens between the updates of each level, highest frequency first, multiples of
        `segment`; by default the model's, whose unit is then a segment. A level is stepped by the
        gradient of the losses of all tokens since its last step, summed.
    levels: those that learn, 0 being the fastest: by default all, () for none.
    rule: of deepopt; what is no matrix goes to AdamW at the same lr if the rule needs matrices.
    """

    def __init__(
        self,
        model: LanguageModel,
        rule: Rule | None = None,
        *,
        segment: int = 128,
        periods: Sequence[int] | None = None,
        levels: Sequence[int] | None = None,
    ) -> None:
        self.rule: Rule = rules.AdamW(lr=1e-3) if rule is None else rule
        if segment < 1:
            raise ValueError(f"segment {segment}: at least 1 token")
        memories = model.continuum()
        own = memories[0].periods if memories else ()
        self.model, self.segment = model, segment
        self.periods = tuple(p * segment for p in own) if periods is None else tuple(periods)
        self.levels = tuple(range(len(own)) if levels is None else sorted(levels))
        if not own and levels is None:
            raise ValueError(
                "a model without continuum memory: levels=() to read, and learn nothing"
            )
        self._check(len(own))
        for memory in memories:
            memory.periods = tuple(p // segment for p in self.periods)
        model.requires_grad_(False)
        groups: list[dict[str, Any]] = []
        for i, (period, parameters) in enumerate(model.cms_levels()):
            if i in self.levels:
                params = [p.requires_grad_() for p in parameters]
                groups.append({"params": params, "rule": self.rule, "every": period})
        self.optimizer = Optimizer(groups) if groups else None
        self.read = 0  # tokens
        # A stream begins as the documents of the training text did.
        self._last = torch.tensor([SEPARATOR], device=model.embedding.weight.device)
        self._state: list[Any] | None = None

    def learn(self, tokens: Tensor | bytes) -> float:
        """Read whole segments [n × segment]; bits per byte of their predictions before learning.

        Raises ArithmeticError where a loss is not finite; the segment has then changed nothing.
        """
        if not isinstance(tokens, Tensor):
            tokens = torch.tensor(list(tokens))
        if tokens.dim() != 1 or not len(tokens) or len(tokens) % self.segment:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)}: a whole number of segments of "
                f"{self.segment} in a row"
            )
        if tokens.is_floating_point():
            raise ValueError(f"tokens of {tokens.dtype}: bytes, or whole numbers from 0 to 255")
        tokens = tokens.to(self._last)
        total = sum(self._segment(piece) for piece in tokens.split(self.segment))
        return total / len(tokens) / math.log(2)

    def generate(self, prompt: bytes, count: int, seed: int = 0) -> bytes:
        """`count` bytes after what was read and `prompt`, which may be empty; nothing is learnt."""
        begun = bytes(self._last.tolist())
        return train.generate(self.model, begun + prompt, count, seed, self._state)

    def settings(self) -> dict[str, Any]:
        """What a saved state belongs to."""
        rule = {"rule": type(self.rule).__name__, **asdict(self.rule)}
        own = {"segment": self.segment, "periods": self.periods, "levels": self.levels}
        return {**own, **rule}

    def state_dict(self) -> dict[str, Any]:
        """The whole nest: weights, optimizer with its clocks, carried memories, tokens read."""
        return {
            "settings": self.settings(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer and self.optimizer.state_dict(),
            "carried": None if self._state is None else carried.plain(self._state),
            **{"last": self._last, "read": self.read},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; ValueError that lists different settings."""
        ours, theirs = self.settings(), state["settings"]
        different = [
            f"{key}: saved {theirs.get(key)}, here {ours.get(key)}"
            for key in {**theirs, **ours}
            if theirs.get(key) != ours.get(key)
        ]
        if different:
            raise ValueError("a learner of other settings. " + "; ".join(different))
        found = None
        if state["carried"] is not None:
            _, like = self.model.stream(self._last[None])
            found = carried.named(state["carried"], like)
        self.model.load_state_dict(state["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self._state, self._last, self.read = found, state["last"].to(self._last), state["read"]

    def _segment(self, tokens: Tensor) -> float:
        """Nats of all predictions."""
        inputs = torch.cat((self._last, tokens[:-1]))[None]
        with torch.set_grad_enabled(self.optimizer is not None):
            logits, state = self.model.stream(inputs, self._state)
            loss = F.cross_entropy(logits[0], tokens, reduction="sum")
        if not loss.isfinite():
            raise ArithmeticError(
                f"the loss is {loss.item()} after {self.read} tokens: try a smaller lr than "
                f"{self.rule.lr}"
            )
        self._state, self._last = carried.detached(state), tokens[-1:]
        self.read += len(tokens)
        if self.optimizer is not None:
            loss.backward()
            self.model.before_step()
            self.optimizer.step()
            self.model.after_step(self.read // self.segment)
            self.optimizer.zero_grad()
        return loss.item()

    def _check(self, count: int) -> None:
        """Raise ValueError where clocks and levels do not fit the model's `count` levels."""
        if len(self.periods) != count or sorted(self.periods) != list(self.periods):
            raise ValueError(
                f"periods {self.periods}: one for each of the model's {count} levels, the highest "
                "frequency first"
            )
        if any(p < 1 or p % self.segment for p in self.periods):
            raise ValueError(
                f"periods {self.periods}: tokens, multiples of a segment of {self.segment}"
            )
        known = set(range(count))
        if set(self.levels) - known or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels {self.levels}: choose among {tuple(known)}, each once")
        nested = any(memory.arrangement == "nested" for memory in self.model.continuum())
        if nested and self.levels and set(self.levels) != known:
            raise ValueError(
                f"levels {self.levels}: nested levels begin again from what slower ones learn, so "
                "all of them learn, or none"
            )
