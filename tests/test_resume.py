"""A run that stops and goes on from a file is the one that did not stop, in every mode."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from checkpoints.make import small
from models import give_context
from test_torch_compile import Graphs
from torch import nn

from deepopt import rules
from torch_backend import Optimizer

# Steps before and after the stop; a clock of three ticks in both.
HALF = 4


@dataclass(frozen=True)
class Mode:
    """Options of the optimizer, values of its rule, and the parameters' dtype."""

    options: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


MODES = {
    "plain": Mode({"fused": False}),
    "fused, stagger": Mode({"fused": True}, {"stagger": True}),
    "capturable": Mode({"fused": True, "capturable": True}),
    "every": Mode({}, {"every": 3}),
    "stochastic": Mode({"fused": True, "rounding": "stochastic"}, {}, torch.bfloat16),
    "exact": Mode({"fused": True, "rounding": "exact"}, {}, torch.bfloat16),
}


def made(rule: type[rules.SGD], mode: Mode) -> tuple[nn.ParameterDict, Optimizer]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"a": (4, 3), "b": (3,), "c": (4, 3)}
    model = nn.ParameterDict(
        {k: nn.Parameter(torch.randn(s, generator=rng).to(mode.dtype)) for k, s in shapes.items()}
    )
    chosen = small(rule()).with_values(mode.values)
    optimizer = Optimizer(list(model.named_parameters()), chosen, **mode.options)
    optimizer.capture = Graphs()
    return model, optimizer


def run(model: nn.ParameterDict, optimizer: Optimizer, start: int, stop: int) -> None:
    for i in range(start, stop):
        rng = torch.Generator().manual_seed(i)
        for p in model.parameters():
            g = torch.randn(p.shape, generator=rng).to(p.dtype)
            # Graphs read gradients where they were.
            p.grad = g if p.grad is None else p.grad.copy_(g)
        give_context(optimizer, i)
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", rules.ALL, ids=lambda r: r.__name__)
def test_a_stopped_run_goes_on_bit_for_bit(rule, mode):
    if MODES[mode].values.get("every") and rule().context((1, 1)):
        with pytest.raises(ValueError, match="accumulate gradients in the loop instead"):
            made(rule, MODES[mode])
        return
    straight = made(rule, MODES[mode])
    run(*straight, 0, 2 * HALF)

    model, optimizer = made(rule, MODES[mode])
    run(model, optimizer, 0, HALF)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    model, optimizer = again = made(rule, MODES[mode])
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(*again, HALF, 2 * HALF)

    for name, p in straight[0].items():
        assert torch.equal(p, model[name])
        one, two = straight[1].state[p], optimizer.state[model[name]]
        assert one["step"] == 2 * HALF and one.keys() == two.keys()
        assert all(torch.equal(x, two[k]) and x.dtype == two[k].dtype for k, x in one.items())
    if mode == "exact":
        assert all("low_half" in s for s in optimizer.state.values())
    if mode == "capturable" and not rule().context((1, 1)):
        assert optimizer.capture.replayed
