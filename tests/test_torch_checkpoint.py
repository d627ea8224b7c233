"""State of the torch binding: its names and dtypes, checkpoints, copies, and batches."""

import copy
import io
import pickle

import pytest
import torch
from cases import CASES, DEFAULTS
from models import give_context
from torch import nn

import torch_backend
import torch_backend.plain
from deepopt import Rule, rules
from torch_backend import Optimizer

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_default = pytest.mark.parametrize("rule", DEFAULTS, ids=lambda r: type(r).__name__)


def parameters(shape, count=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn((count, *shape), generator=generator, dtype=torch.float64)
    return [nn.Parameter(x.to(dtype)) for x in data]


def run(optimizer, start, stop):
    """Steps start + 1 to stop, whose gradients depend on their number only."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = g.to(p.dtype)
        give_context(optimizer, step)
        optimizer.step()


def saved(thing):
    """Through a file, as plain tensors and numbers."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def values(optimizer):
    """Parameters and state, to compare bit by bit."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    states = [[optimizer.state[p][k] for k in sorted(optimizer.state[p])] for p in params]
    return [*params, *(x for state in states for x in state)]


def same(one, two):
    a, b = values(one), values(two)
    return len(a) == len(b) and all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True)
    )


def resumed(optimizer, make):
    """A new optimizer over equal parameters, with the saved state."""
    params = [nn.Parameter(p.detach().clone()) for g in optimizer.param_groups for p in g["params"]]
    new = make(params)
    new.load_state_dict(saved(optimizer.state_dict()))
    return new


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@each_case
def test_state_is_a_flat_dict_of_wide_tensors(case, dtype):
    optimizer = Optimizer(parameters(case.shape, dtype=dtype), case.rule)
    run(optimizer, 0, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p in optimizer.param_groups[0]["params"]:
        state = optimizer.state[p]
        slots = case.rule.all_slots(case.shape)
        assert set(state) == {"step", *slots}
        assert all(type(x) is torch.Tensor and not x.requires_grad for x in state.values())
        assert state["step"].dtype == torch.float32 and state["step"].shape == ()
        assert {state[k].dtype for k in slots} <= {wide}
        assert {k: tuple(state[k].shape) for k in slots} == {k: s.shape for k, s in slots.items()}


@each_case
def test_a_run_can_stop_after_any_step(case):
    """The rule's whole period, with stagger, so that a save falls on both sides of every tick."""
    rule = case.rule.with_values({"stagger": True})
    period = rule.every * max([1, *rule.clocks().values()])

    def make(params: list[nn.Parameter]) -> Optimizer:
        return Optimizer(params, rule)

    straight = make(parameters(case.shape))
    for step in range(period + 2):
        broken = resumed(straight, make) if step else make(parameters(case.shape))
        run(straight, step, step + 1)
        run(broken, step, step + 1)
        assert same(straight, broken), step
    run(straight, period + 2, 2 * period + 2)
    run(broken, period + 2, 2 * period + 2)
    assert same(straight, broken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@each_default
def test_dtypes_survive_a_checkpoint(rule, dtype):
    optimizer = Optimizer(parameters((4, 4), dtype=dtype), rule)
    run(optimizer, 0, 3)
    again = resumed(optimizer, lambda params: Optimizer(params, rule))
    assert same(optimizer, again)
    run(optimizer, 3, 5)
    run(again, 3, 5)
    assert same(optimizer, again)


@each_default
def test_a_loaded_state_is_a_copy(rule):
    optimizer = Optimizer(parameters((4, 4)), rule)
    run(optimizer, 0, 2)
    state = optimizer.state_dict()
    other = Optimizer(parameters((4, 4)), rule)
    other.load_state_dict(state)
    before = copy.deepcopy(state)
    run(other, 2, 4)
    for key, kept in before["state"].items():
        assert all(torch.equal(kept[k], state["state"][key][k]) for k in kept)
    assert state["param_groups"] == before["param_groups"]


def test_loading_ones_own_state_changes_nothing():
    optimizer = torch_backend.M3(parameters((4, 4)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    run(optimizer, 0, 2)
    before = [x.clone() for x in values(optimizer)]
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    assert all(map(torch.equal, before, values(optimizer)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
@each_default
def test_the_whole_object_can_be_copied(rule, how):
    optimizer = getattr(torch_backend, type(rule).__name__)(
        [("a.weight", parameters((6, 4))[0]), ("b", parameters((3,))[0])],
        lr=torch.tensor(0.1), views={"a.*": "split:2"}, on_nonfinite="skip", maximize=True,
        fallback=rules.Lion(),
    )  # fmt: skip
    run(optimizer, 0, 3)
    optimizer.skipped_steps = 7
    match how:
        case "deepcopy":
            other = copy.deepcopy(optimizer)
        case "pickle":
            other = pickle.loads(pickle.dumps(optimizer))
        case _:
            file = io.BytesIO()
            torch.save(optimizer, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
    assert type(other) is type(optimizer) and same(optimizer, other)
    assert other.on_nonfinite == "skip" and other.skipped_steps == 7
    assert str(other.routing) == str(optimizer.routing) and repr(other) == repr(optimizer)
    before = [x.clone() for x in values(other)]
    run(optimizer, 3, 5)
    assert all(map(torch.equal, before, values(other)))
    run(other, 3, 5)
    assert same(optimizer, other)
    for x in (optimizer, other):
        x.add_param_group({"params": [("a.more", parameters((4, 4))[0])]})
        run(x, 5, 6)
    assert same(optimizer, other)


def test_a_pickle_without_a_newer_hyperparameter_gets_its_default():
    optimizer = torch_backend.M3(parameters((3, 3)), floor=0.5)
    state = optimizer.__getstate__()
    state["param_groups"] = [dict(optimizer.param_groups[0])]
    del state["param_groups"][0]["floor"]
    optimizer.__setstate__(state)
    assert optimizer.param_groups[0]["floor"] == rules.M3().floor


# Batches


@each_case
def test_a_batch_equals_one_by_one(case, monkeypatch):
    def final(cap: int, together: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(torch_backend.plain, "BATCH", {"cpu": cap})
        params = parameters(case.shape, count=5, dtype=torch.float64)
        groups = [params] if together else [[p] for p in params]
        optimizers = [Optimizer(g, case.rule, fused=False) for g in groups]
        for step in range(9):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for optimizer in optimizers:
                give_context(optimizer, step)
                optimizer.step()
        return [x for optimizer in optimizers for x in values(optimizer)[: len(groups[0])]]

    alone = final(1 << 18, together=False)
    for cap in (1 << 18, 1, 2 * alone[0].numel()):
        for a, b in zip(final(cap, together=True), alone, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_batches_keep_to_their_cap(monkeypatch):
    sizes = []
    real = torch.cat

    def spy(tensors, *args):
        sizes.append(len(tensors))
        return real(tensors, *args)

    monkeypatch.setattr(torch_backend.plain, "BATCH", {"cpu": 3 * 16})
    optimizer = torch_backend.Muon(parameters((4, 4), count=7), fused=False)
    monkeypatch.setattr(torch, "cat", spy)
    run(optimizer, 0, 1)
    assert set(sizes) == {3}
    assert all(optimizer.state[p]["step"] == 1 for p in optimizer.param_groups[0]["params"])


# Checkpoints of torch's own optimizers

OURS = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2), torch_backend.AdamW),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.2), torch_backend.AdamW),
    "HeavyBall": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.2),
        torch_backend.HeavyBall,
    ),
    "Nesterov": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
        torch_backend.HeavyBall,
    ),
    "Nesterov by name": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
        torch_backend.Nesterov,
    ),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2), torch_backend.SGD),
    "Adam by name": (
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.2),
        torch_backend.Adam,
    ),
    "RAdam": (
        lambda p: torch.optim.RAdam(p, lr=0.1, betas=(0.8, 0.95), weight_decay=0.2),
        torch_backend.RAdam,
    ),
    "NAdam": (
        lambda p: torch.optim.NAdam(p, lr=0.1, betas=(0.8, 0.95), weight_decay=0.2),
        torch_backend.NAdam,
    ),
    "AMSGrad": (
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, amsgrad=True),
        torch_backend.AMSGrad,
    ),
}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_a_checkpoint_of_torch_continues_equal(name, foreach):
    theirs, ours = OURS[name]
    one = theirs(parameters((5, 3)))
    for group in one.param_groups:
        group["foreach"] = foreach
    run(one, 0, 5)
    two = resumed(one, ours)
    (group,) = two.param_groups
    assert "foreach" not in group and "dampening" not in group
    assert group["lr"] == 0.1 and group["decoupled"] is (name in ("AdamW", "AMSGrad"))
    run(one, 5, 15)
    run(two, 5, 15)
    pairs = zip(one.param_groups[0]["params"], group["params"], strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) <= 1e-6
    balls = (torch_backend.HeavyBall, torch_backend.Nesterov)
    assert ("momentum" in group) is (ours in balls)


def test_a_python_number_is_a_step_too():
    theirs = torch.optim.AdamW(parameters((2, 2)))
    run(theirs, 0, 2)
    state = theirs.state_dict()
    state["state"][0]["step"] = 2
    ours = torch_backend.AdamW(parameters((2, 2)))
    ours.load_state_dict(state)
    assert next(iter(ours.state.values()))["step"] == torch.tensor(2.0)


def _checkpoint(optimizer: torch.optim.Optimizer) -> dict:
    run(optimizer, 0, 2)
    return saved(optimizer.state_dict())


def _two_groups() -> Optimizer:
    return Optimizer([{"params": [p]} for p in parameters((3, 3))])


def _with(state: dict, **changes: object) -> dict:
    state["param_groups"][0].update(changes)
    return state


# What is wrong, the checkpoint, the optimizer that is to load it.
WRONG = {
    r"group 0 of the checkpoint was stepped by 'Lion'; in this optimizer it is stepped by 'Muon'": (
        lambda: _checkpoint(torch_backend.Lion(parameters((3, 3)))),
        torch_backend.Muon,
    ),
    "the checkpoint has memories .'exp_avg', 'exp_avg_sq'. for parameter 0 of group 0; Lion": (
        lambda: _checkpoint(torch.optim.AdamW(parameters((3, 3)))),
        torch_backend.Lion,
    ),
    r"exp_avg for parameter 0 of group 0 has shape \(4, 3\); it should be \(3, 3\)": (
        lambda: _checkpoint(torch_backend.AdamW(parameters((4, 3)))),
        torch_backend.AdamW,
    ),
    "the checkpoint has 2 parameter groups, this optimizer has 1": (
        lambda: _checkpoint(_two_groups()),
        torch_backend.AdamW,
    ),
    "group 0 of the checkpoint has 1 parameters, this optimizer's has 2": (
        lambda: _checkpoint(torch_backend.AdamW(parameters((3, 3), count=1))),
        torch_backend.AdamW,
    ),
    "the checkpoint has memories .'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'. for": (
        lambda: _with(
            _checkpoint(torch.optim.AdamW(parameters((3, 3)), amsgrad=True)), amsgrad=False
        ),
        torch_backend.AdamW,
    ),
    "the checkpoint has amsgrad=True; AdamW has not": (
        lambda: _checkpoint(torch.optim.AdamW(parameters((3, 3)), amsgrad=True)),
        torch_backend.AdamW,
    ),
    "the checkpoint has dampening=0.5; HeavyBall has not": (
        lambda: _checkpoint(torch.optim.SGD(parameters((3, 3)), momentum=0.9, dampening=0.5)),
        torch_backend.HeavyBall,
    ),
    "the checkpoint has momentum=0.9; SGD has not": (
        lambda: torch.optim.SGD(parameters((3, 3)), momentum=0.9).state_dict(),
        torch_backend.SGD,
    ),
    r"SGD\(lr=-1.0\) must be a finite number >= 0": (
        lambda: _with(_checkpoint(torch_backend.SGD(parameters((3, 3)))), lr=-1.0),
        torch_backend.SGD,
    ),
    "was seen as 'split:3'; in this optimizer it is seen as 'flatten'": (
        lambda: _checkpoint(
            torch_backend.Muon([{"params": parameters((3, 3)), "seen_as": "split:3"}])
        ),
        torch_backend.Muon,
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_checkpoint_is_refused_and_nothing_changes(words):
    checkpoint, make = WRONG[words]
    optimizer = make(parameters((3, 3)))
    run(optimizer, 0, 3)
    before = [x.clone() for x in values(optimizer)]
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(checkpoint())
    assert all(map(torch.equal, before, values(optimizer)))
    assert optimizer.state_dict()["param_groups"] == groups
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_memories_narrower_than_the_arithmetic_are_kept_so():
    theirs = torch.optim.AdamW(parameters((3, 3), dtype=torch.bfloat16))
    run(theirs, 0, 2)
    ours = resumed(theirs, torch_backend.AdamW)
    run(ours, 2, 4)
    for state in ours.state.values():
        assert state["exp_avg"].dtype == torch.bfloat16 and state["exp_avg"].isfinite().all()


class Doubled(Rule):
    """A rule of a test's own, for what the library cannot know in advance."""

    def update(self, w, g, s, t):
        return 2.0 * g, {}


Renamed = torch_backend.bind(Doubled)


def test_objects_of_a_bound_class_pickle_under_any_name():
    optimizer = Renamed(parameters((3, 3)))
    assert Renamed.__name__ == "Doubled" and Renamed.__module__ == __name__
    other = pickle.loads(pickle.dumps(optimizer))
    assert type(other) is Renamed
    assert type(copy.deepcopy(optimizer)) is Renamed


class Subclass(torch_backend.SGD):
    """Of a bound class; pickled as any class is."""


def test_objects_of_a_subclass_pickle_as_such():
    assert type(pickle.loads(pickle.dumps(Subclass(parameters((3, 3)))))) is Subclass


def test_memories_left_behind_by_a_change_of_the_rule_do_not_block_a_resume():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = torch_backend.M3([p], period=(2, 3))
    p.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.param_groups[0]["period"] = 4
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert "slow_1" in optimizer.state[p] and "slow_2" not in optimizer.state[p]
    optimizer.step()
