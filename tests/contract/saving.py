"""What is written to a checkpoint, what is read from one, and what others hang on to both."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

from torch_backend import Optimizer

from .subject import (
    Subject,
    check,
    equal,
    everyone,
    everything,
    give,
    parameters,
    refused,
)

AFTER = "the steps around it are those of the other rows"


def through_a_file(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def another(s: Subject, optimizer: Optimizer, **given: Any) -> Optimizer:
    """A new optimizer over copies of the same parameters."""
    return s.make([nn.Parameter(p.detach().clone()) for p in everyone(optimizer)], **given)


@check()
def state_dict_is_deterministic(s: Subject) -> None:
    """test_state_dict_deterministic: a load goes on bit by bit; one's own load changes nothing."""
    for x in s.info.optim_inputs_func(device="cpu")[:: 5 if s.mode in "fg" else 1][
        : 1 if s.dear else None
    ]:
        one = s.make(parameters(), **x.kwargs)
        s.eager.steps(one, 3)
        two = another(s, one, **x.kwargs)
        two.load_state_dict(one.state_dict())
        equal(one, two)
        s.steps(two, 2, 3)
        s.eager.steps(one, 2, 3)
        equal(one, two)
        before = everything(one)
        one.load_state_dict(one.state_dict())
        equal(one, before)
        assert repr(one.state_dict()) == repr(one.state_dict())


@check(c=AFTER)
def weights_only(s: Subject) -> None:
    """test_save_load_equality_with_weights_only, for narrow parameters too."""
    for dtype in (torch.float32, torch.bfloat16):
        one = s.make(parameters(dtype), lr=torch.tensor(0.01))
        s.steps(one, 2)
        saved = one.state_dict()
        loaded = through_a_file(saved)
        assert repr(saved) == repr(loaded)
        two = another(s, one)
        two.load_state_dict(loaded)
        equal(one, two)


@check(c=AFTER)
def states_keep_their_dtype(s: Subject) -> None:
    """pytorch#43706: what was float32 beside bfloat16 parameters stays float32."""
    one = s.make(parameters(torch.bfloat16))
    s.steps(one, 2)
    two = another(s, one)
    two.load_state_dict(one.state_dict())
    kept = {k: x.dtype for k, x in everything(one).items()}
    assert kept == {k: x.dtype for k, x in everything(two).items()}
    assert set(kept.values()) <= {torch.bfloat16, torch.float32}
    wide = {x for (_, name), x in kept.items() if name != "p"}
    assert wide == {torch.float32}


@check(c=AFTER)
def named_parameters(s: Subject) -> None:
    """test_can_load_from_to_named_state_dict: names go along, and a load needs none; others are
    refused (docs/checkpoints.md), where torch would go by position."""
    names = [("weight", "bias"), None]
    saved: list[tuple[Optimizer, dict]] = []
    for own in names:
        params = parameters()
        one = s.make([*zip(own, params, strict=True)] if own else params)
        s.steps(one, 2)
        saved.append((one, through_a_file(one.state_dict())))
        groups = one.state_dict()["param_groups"]
        found = [x for group in groups for x in group.get("param_names", ())]
        assert sorted(found) == sorted(own or ())
    for one, state in saved:
        for own in names:
            params = parameters()
            two = s.make([*zip(own, params, strict=True)] if own else params)
            two.load_state_dict(state)
            for p, q in zip(everyone(one), everyone(two), strict=True):
                assert one.state[p].keys() == two.state[q].keys()
                assert all(torch.equal(x, two.state[q][k]) for k, x in one.state[p].items())
            s.steps(two, 1, 2)
    other = s.make([*zip(("first", "second"), parameters(), strict=True)])
    with refused(ValueError, "'weight'", "'first'"):
        other.load_state_dict(saved[0][1])


# Flags that a checkpoint of another version may lack.
LATE = ("maximize", "every", "stagger", "weight_decay", "seen_as")


@check(c=AFTER)
def older_dicts(s: Subject) -> None:
    """test_can_load_older_state_dict: flags that came later get their values of today."""
    one = s.make(parameters(), weight_decay=0.0)
    s.steps(one, 2)
    state = copy.deepcopy(one.state_dict())
    missing = [[group.pop(k, None) for k in LATE] for group in state["param_groups"]]
    assert any(x is not None for own in missing for x in own)
    two = another(s, one, weight_decay=0.0)
    two.load_state_dict(state)
    for a, b in zip(one.param_groups, two.param_groups, strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == b[k] for k in a if k != "params")
    for y in (one, two):
        s.steps(y, 2, 2)
    equal(one, two)


# Rules that are the equals of torch's optimizers, and how those are made.
THEIRS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2),
    "HeavyBall": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
}


@check(c=AFTER)
def dicts_of_torch(s: Subject) -> None:
    """A checkpoint of the rule's equal goes on as if nothing had happened; others are refused."""
    name = s.info.name
    theirs = THEIRS.get(name, torch.optim.AdamW)(parameters())
    _steps(theirs, 3)
    ours = another(s, theirs)
    before = everything(ours)
    if name not in THEIRS:
        with refused(ValueError, "the checkpoint"):
            ours.load_state_dict(theirs.state_dict())
        equal(ours, before)
        assert not ours.state
        return
    ours.load_state_dict(theirs.state_dict())
    _steps(theirs, 3, 3)
    s.steps(ours, 3, 3)
    for p, q in zip(everyone(theirs), everyone(ours), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert not {"foreach", "capturable", "differentiable", "fused"} & {*ours.param_groups[0]}


def _steps(theirs: torch.optim.Optimizer, count: int, start: int = 0) -> None:
    for i in range(start, start + count):
        give(theirs, i)
        theirs.step()


@check(c=AFTER)
def steps_that_are_numbers(s: Subject) -> None:
    """test_load_nontensor_step: Python numbers of old checkpoints count on."""
    one = s.make(parameters())
    s.steps(one, 2)
    state = copy.deepcopy(one.state_dict())
    for own in state["state"].values():
        own["step"] = float(own["step"])
    two = another(s, one)
    two.load_state_dict(state)
    for x in (one, two):
        s.steps(x, 1, 2)
    equal(one, two)
    assert {float(x["step"]) for x in two.state.values()} == {3.0}


@check(c=AFTER)
def hooks_of_state_dicts(s: Subject) -> None:
    """test_state_dict_pre_hook, …_post_hook, …_pre_post_hook"""
    optimizer = s.make(parameters())
    s.steps(optimizer, 1)
    called: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: called.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, state: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    optimizer.register_state_dict_pre_hook(lambda _: called.append("first"), prepend=True)
    saved = optimizer.state_dict()
    assert called == ["first", "before", "after"] and saved["more"] == 1


@check(c=AFTER)
def hooks_of_loads(s: Subject) -> None:
    """test_load_state_dict_pre_hook_and_prepend, …_post_hook, …_pre_post_hook"""
    one = s.make(parameters())
    s.steps(one, 1)
    two = another(s, one)
    called: list[Any] = []

    def doubled(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        called.append("before")
        groups = [{**group, "lr": group["lr"] * 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    two.register_load_state_dict_pre_hook(doubled)
    two.register_load_state_dict_pre_hook(lambda _, state: called.append("first"), prepend=True)
    steps = lambda x: {float(own["step"]) for own in x.state.values()}  # noqa: E731
    two.register_load_state_dict_post_hook(lambda x: called.append(steps(x)))
    two.register_load_state_dict_post_hook(lambda x: called.append("sooner"), prepend=True)
    rate = one.param_groups[0]["lr"]
    two.load_state_dict(one.state_dict())
    assert called == ["first", "before", "sooner", {1.0}]
    assert two.param_groups[0]["lr"] == 2 * rate and one.param_groups[0]["lr"] == rate


@check()
def foreign_keys_of_state(s: Subject) -> None:
    """What others leave in `optimizer.state` stays there, through steps and checkpoints."""
    optimizer = s.make(parameters())
    optimizer.state["test"] = 1
    s.steps(optimizer, 2)
    saved = optimizer.state_dict()
    assert saved["state"]["test"] == 1
    optimizer.load_state_dict(saved)
    assert optimizer.state["test"] == 1
    s.steps(optimizer, 1, 2)


@check(c=AFTER)
def a_model_of_torch(s: Subject) -> None:
    """test_state_dict_with_cuda_params' Conv2d and BatchNorm: a load by position or by name."""

    def make() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2, eps=1e-5))
        return net, s.make(net)

    (net, one), (twin, two) = make(), make()
    x = torch.randn(2, 4, 6, 6)
    states: list[list[Tensor]] = []
    for i in range(3):
        if i == 2:
            two.load_state_dict(through_a_file(one.state_dict()))
            twin.load_state_dict(net.state_dict())
        for model, optimizer in ((net, one), (twin, two))[: 1 if i < 2 else 2]:
            optimizer.zero_grad(set_to_none=s.mode != "g")
            model(x).square().sum().backward()
            s.step(optimizer)
            states.append([p.detach().clone() for p in everyone(optimizer)])
    equal(one, two)
