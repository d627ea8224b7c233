"""Gradients that are dropped as the backward pass makes them: the same steps, less memory."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import torch_backend
from deepopt import rules
from deepopt.around import clipped, clipped_globally
from torch_backend import Optimizer, release_gradients


class Model(nn.Module):
    """Embedding, hidden matrices and a head; one matrix is used twice."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.table = nn.Embedding(9, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x)
        for _ in range(2):
            h = self.norm(h + self.down(torch.tanh(self.up(h))))
        return self.head(h)


def train(make, released: bool, steps: int = 7, width: int = 12):
    torch.manual_seed(0)
    model = Model(width)
    optimizer = make(model)
    scheduler = StepLR(optimizer, 2, 0.5)
    if released:
        release_gradients(optimizer)
    for _ in range(steps):
        x = torch.randint(9, (4, 6))
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        assert all((p.grad is None) == released for p in model.parameters())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer


OPTIMIZERS = {
    "AdamW": lambda m: torch_backend.AdamW(m.parameters(), lr=0.01),
    "routed M3": lambda m: torch_backend.M3(m, lr=0.01, period=3, stagger=True),
    "routed Muon, every 2": lambda m: torch_backend.Muon(m, lr=0.01, every=2),
    "narrow": lambda m: torch_backend.M3(m, lr=0.01, period=2, state_dtype=torch.bfloat16),
    "plain": lambda m: torch_backend.M3(m, lr=0.01, period=2, fused=False),
    "clipped": lambda m: Optimizer(m, clipped(rules.AdamW(lr=0.01), 0.1)),
    "DGD": lambda m: torch_backend.DGD(m, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_steps_are_those_of_the_ordinary_loop(make):
    """Bit for bit, with routing, clocks by parameter, schedules and a matrix that is used twice."""
    (one, theirs), (two, ours) = train(make, False), train(make, True)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)
        assert theirs.state[p].keys() == ours.state[q].keys()
        assert all(torch.equal(theirs.state[p][k], ours.state[q][k]) for k in theirs.state[p])
    assert int(next(iter(ours.state.values()))["step"]) == 7


def live(model: nn.Module, refs: list) -> int:
    """Bytes of the gradients that the parameters hold, and of those that anybody holds."""
    held = {id(g): g for p in model.parameters() if (g := p.grad) is not None}
    held |= {id(g): g for r in refs if (g := r()) is not None}
    return sum(g.numel() * g.element_size() for g in held.values())


def peak(released: bool) -> int:
    """The most bytes of gradients that live at a time, looked at whenever one has been made."""
    torch.manual_seed(0)
    model, most, refs = Model(), 0, []
    optimizer = torch_backend.M3(model, lr=0.01)

    def look(p: torch.Tensor) -> None:
        nonlocal most
        refs.append(weakref.ref(p.grad))
        most = max(most, live(model, refs))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    if released:
        release_gradients(optimizer)
    for _ in range(2):
        model(torch.randint(9, (4, 6))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return most


def test_no_more_than_one_gradient_lives():
    sizes = [4 * p.numel() for p in Model().parameters()]
    assert peak(released=False) == sum(sizes)
    assert peak(released=True) == max(sizes)


def test_hooks_can_be_removed_and_frozen_parameters_are_left_to_the_step():
    torch.manual_seed(0)
    model = Model()
    model.head.weight.requires_grad_(False)
    optimizer = torch_backend.AdamW(model.parameters(), lr=0.1)
    handle = release_gradients(optimizer)
    model.head.weight.requires_grad_(True)
    x = torch.randint(9, (4, 6))
    before = model.head.weight.detach().clone()
    model(x).square().mean().backward()
    assert [p for p in model.parameters() if p.grad is not None] == [model.head.weight]
    assert torch.equal(model.head.weight, before)
    optimizer.step()
    assert not torch.equal(model.head.weight, before)
    handle.remove()
    optimizer.zero_grad()
    steps = [float(s["step"]) for s in optimizer.state.values()]
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert steps == [float(s["step"]) for s in optimizer.state.values()]


def test_a_released_optimizer_is_no_more_than_its_owner():
    """Hooks keep no optimizer alive, and a copy has none."""
    model = Model()
    optimizer = torch_backend.AdamW(model.parameters(), lr=0.1)
    release_gradients(optimizer)
    twin = copy.deepcopy(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None and twin is not None
    model(torch.randint(9, (4, 6))).square().mean().backward()
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True))
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "rule", "said"),
    [
        ({}, clipped_globally(rules.AdamW()), "goes by the norm of all of them together"),
        ({"on_nonfinite": "skip"}, rules.AdamW(), "on_nonfinite='skip' looks at all of them"),
        ({"on_nonfinite": "raise"}, rules.AdamW(), "on_nonfinite='raise' looks at all of them"),
        ({"capturable": True}, rules.AdamW(), "capturable=True needs them to stay in place"),
    ],
    ids=["joint norm", "skip", "raise", "capturable"],
)
def test_what_needs_all_gradients_is_refused(options, rule, said):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="gradients cannot be released one by one.*" + said):
        release_gradients(Optimizer(model.parameters(), rule, **options))
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is not None
