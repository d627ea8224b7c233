"""The contract of torch's optimizers for one rule of each kind of state, and that it can fail."""

from pathlib import Path

import pytest
import torch
from contract import __main__ as command
from contract import matrix
from contract.infos import INFOS
from contract.subject import CHECKS, everyone

import torch_backend
import torch_backend.checkpoint
import torch_backend.optimizer
import torch_backend.plain
from torch_backend import Optimizer

# No state, moments, a product of scalars, a matrix, a network, factors, clocks, a context.
KINDS = ("SGD", "AdamW", "NAdam", "DeltaMomentum", "DeepMomentum", "Shampoo", "M3", "DGD")
PAGE = Path(__file__).parent.parent / "docs" / "contract.md"


@pytest.mark.parametrize("mode", ["p", "f"])
@pytest.mark.parametrize("rule", KINDS)
def test_a_rule_keeps_the_contract(rule, mode):
    outcomes = matrix.of_rule(rule, modes=mode)
    assert len(outcomes) == len(CHECKS)
    assert not [*matrix.failures(outcomes)]


def written(optimizer, batch):
    _run(optimizer, batch)
    batch.params[0].grad.mul_(2.0)


def kept(optimizer, batch):
    _run(optimizer, batch)
    p = batch.params[0]
    optimizer.state[p]["exp_avg"] = p.grad


def cast(*given):
    groups, loaded = _checked(*given)
    for p, own in loaded.items():
        own |= {k: x.to(p.dtype) for k, x in own.items() if k != "step"}
    return groups, loaded


def hookless(optimizer, state_dict):
    optimizer.__setstate__({"param_groups": state_dict["param_groups"]})


def deaf(optimizer, closure=None):
    optimizer.take_step()


def late(optimizer, closure=None):
    kept = [p.grad.clone() for p in everyone(optimizer)]
    loss = closure() if closure else None
    for p, early in zip(everyone(optimizer), kept, strict=True):
        p.grad = early
    optimizer.take_step()
    return loss


def untold(*given):
    return None


def narrow(p, own, *rest):
    _remember(p, own, *rest)
    own["step"] = own["step"].to(p.dtype)


def counted(optimizer, *given):
    _take_step(optimizer, *given)
    for own in optimizer.state.values():
        own["step"] += 1.0


def inside(rule, shape, ticks, dtype, device, stacked, outside):
    return _compiled(rule, shape, ticks, dtype, device, True, False)


def printed(optimizer):
    return "an optimizer"


_remember, _compiled = torch_backend.plain.remember, torch_backend.plain._compiled
_take_step = Optimizer.take_step
_run, _checked = torch_backend.plain.run, torch_backend.optimizer.checked

# What is broken, by what, and the row that must turn red.
PLANTED = {
    "gradients are written": (torch_backend.optimizer, "run", written, "gradients are left alone"),
    "gradients are kept": (torch_backend.optimizer, "run", kept, "gradients are left alone"),
    "loads cast": (torch_backend.optimizer, "checked", cast, "states keep their dtype"),
    "loads call no hooks": (Optimizer, "load_state_dict", hookless, "hooks of loads"),
    "closures are ignored": (torch_backend.AdamW, "step", deaf, "closures"),
    "gradients are read too early": (torch_backend.AdamW, "step", late, "closures"),
    "flags may contradict": (torch_backend.optimizer, "refuse_contradictions", untold, "flags"),
    "steps are narrow": (torch_backend.plain, "remember", narrow, "steps are counted exactly"),
    "steps without gradients count": (Optimizer, "take_step", counted, "freeze and unfreeze"),
    "autograd's tensors are overwritten": (
        torch_backend.plain, "_compiled", inside, "gradients through a step",
    ),
    "the compiler sees no operator": (
        torch_backend.optimizer, "is_traced", lambda: False, "stateless step",
    ),
    "no text": (Optimizer, "__repr__", printed, "can be printed"),
    "copies lose attributes": (torch_backend.optimizer, "KEPT", ("_rule", "rules"), "copies"),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_violation_turns_a_cell_red(bug, monkeypatch, capsys):
    where, name, what, row = PLANTED[bug]
    arguments = ["--jobs", "0", "--rules", "AdamW", "--modes", "p", "--checks", row]
    assert command.main(arguments) == 0
    assert f"{row}  p" in capsys.readouterr().out
    monkeypatch.setattr(where, name, what)
    assert command.main(arguments) == 1
    shown = capsys.readouterr().out
    assert f"{row}  !" in shown and "0 green, 1 red" in shown


def test_a_check_that_leaves_gradients_off_is_red(monkeypatch):
    off = torch._C._set_grad_enabled
    monkeypatch.setattr(torch_backend.SGD, "step", lambda *_: off(False))
    assert "left off" in matrix.outcome("SGD", "no gradients", "p").failure
    assert torch.is_grad_enabled()


def test_the_page_shows_every_rule_and_every_row():
    text = PAGE.read_text()
    _, rest = text.split(command.BEGIN)
    shown = rest.split(command.END)[0].splitlines()
    assert [name for name in CHECKS if not any(x.startswith(f"{name} ") for x in shown)] == []
    head = shown[2 : next(i for i, x in enumerate(shown) if x.startswith(f"{matrix.ROWS[0]} "))]
    parts = zip(*map(_columns, head), strict=True)
    names = ["".join(x).replace(" ", "") for x in parts]
    assert names == [*INFOS]
    assert "0 red" in text


def _columns(line: str) -> list[str]:
    margin = max(map(len, CHECKS)) + 2
    padded = line.ljust(margin + 5 * len(INFOS))
    return [padded[margin + 5 * i : margin + 5 * i + 4] for i in range(len(INFOS))]
