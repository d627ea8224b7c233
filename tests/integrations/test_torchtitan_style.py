"""torchtitan's container style: an optimizer per part of a model, checkpointed as one by name.

torchtitan itself is not needed: this is the shape of its containers of optimizers, in short.
"""

import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small import lines, loss_of, make, parameters, same, steps
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from deepopt import rules
from torch_backend import Optimizer

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninit"),
]

# The first pattern that a name matches says its rule.
PATTERNS = {
    r"^(tokens|positions|project)\.": rules.AdamW(lr=1e-2),
    r"(bias|norm|before|after)": rules.AdamW(lr=1e-2, weight_decay=0.0),
    r"": rules.M3(lr=1e-2, weight_decay=0.1, period=2),
}
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def grouped(part: nn.Module) -> list[dict]:
    """A group per rule, of (name, parameter) pairs."""
    groups: dict[str, list] = {}
    for name, p in part.named_parameters():
        pattern = next(x for x in PATTERNS if re.search(x, name))
        groups.setdefault(pattern, []).append((name, p))
    return [{"params": pairs, "rule": PATTERNS[k]} for k, pairs in groups.items()]


class Container(Stateful):
    """One optimizer for each part of a model, as pipelines have it; one state for all of them."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts
        self.optimizers = [Optimizer(grouped(part)) for part in parts]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict:
        pairs = zip(self.parts, self.optimizers, strict=True)
        flat = [get_optimizer_state_dict(m, o, options=OPTIONS) for m, o in pairs]
        return {k: v for each in flat for k, v in each.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, state_dict, options=OPTIONS)


class First(nn.Module):
    """The stage of a pipeline that has the embeddings; names are those of the whole."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.tokens, self.positions = whole.tokens, whole.positions


class Last(nn.Module):
    """The stage that has everything else."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.blocks, self.norm, self.project = whole.blocks, whole.norm, whole.project


def made() -> tuple[nn.Module, Container]:
    model = make()
    return model, Container([First(model), Last(model)])


def train(model: nn.Module, container: Container, batches) -> list[float]:
    losses = []
    for batch in batches:
        container.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        container.step()
        losses.append(float(loss.detach()))
    return losses


def test_patterns_are_rules_and_groups_have_names():
    model, container = made()
    losses = train(model, container, lines(8))
    assert losses[-1] < losses[0]
    assert [steps(x) for x in container.optimizers] == [{8.0}, {8.0}]
    groups = [group for x in container.optimizers for group in x.param_groups]
    routed = {name: group["rule"] for group in groups for name in group["param_names"]}
    matrices = {f"blocks.0.{x}.weight" for x in ("qkv", "out", "up", "down")}
    assert {name for name, rule in routed.items() if rule == "M3"} == matrices
    assert set(routed) == {name for name, _ in model.named_parameters()}


def test_saved_by_name_and_loaded_into_new_parts(tmp_path):
    """What asks for the state makes it, by a step at lr 0, and moves nothing."""
    model, container = made()
    train(model, container, lines(8)[:3])
    saved = {"model": model.state_dict(), "optimizer": container.state_dict()}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)

    again, loaded = made()
    before = {name: p.detach().clone() for name, p in again.named_parameters()}
    empty = {"model": again.state_dict(), "optimizer": loaded.state_dict()}
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
    lrs = {group["lr"] for x in loaded.optimizers for group in x.param_groups}
    assert lrs == {1e-2}
    dcp.load(empty, checkpoint_id=tmp_path, no_dist=True)
    again.load_state_dict(empty["model"])
    loaded.load_state_dict(empty["optimizer"])
    assert [steps(x) for x in loaded.optimizers] == [{3.0}, {3.0}]
    assert train(model, container, lines(8)[3:]) == train(again, loaded, lines(8)[3:])
    assert same(model, again) and parameters(loaded.optimizers[0])
