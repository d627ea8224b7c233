"""State of the torch binding: its names and dtypes, checkpoints, copies, and batches."""

import copy
import functools
import io
import operator
import pickle
import random

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
from cases import CASES, DEFAULTS
from models import give_context
from torch import nn

import torch_backend
import torch_backend.plain
from deepopt import Rule, rules
from torch_backend import Optimizer
from torch_backend.checkpoint import SCHEMA

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


# What differs is listed, all of it


def everything(optimizer: Optimizer) -> list:
    """All that a refused load must leave alone."""
    state = {p: dict(s) for p, s in optimizer.state.items()}
    return copy.deepcopy([
        [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        [[list(s), *s.values()] for s in state.values()],
        [p.detach() for g in optimizer.param_groups for p in g["params"]],
        dict(optimizer.rules),
    ])  # fmt: skip


def equal(a: object, b: object) -> bool:
    """Nested lists and dicts with equal tensors of one dtype."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple | dict) and type(a) is type(b) and len(a) == len(b):
        return all(map(equal, a, b)) and (
            not isinstance(a, dict) or equal([*a.items()], [*b.items()])
        )
    return type(a) is type(b) and a == b


def layers(names: str, rule: Rule | None = None, shape: tuple[int, ...] = (4, 3)) -> Optimizer:
    """An optimizer of named matrices, one per letter, with a vector for each."""
    pairs = zip(names, parameters(shape, count=len(names)), strict=True)
    biases = zip(names, parameters((3,), count=len(names)), strict=True)
    named = [(f"{x}.weight", p) for x, p in pairs] + [(f"{x}.bias", p) for x, p in biases]
    optimizer = Optimizer(named, rule or rules.M3())
    run(optimizer, 0, 2)
    return optimizer


def test_all_differences_are_in_one_error():
    checkpoint = saved(layers("abc").state_dict())
    first, second = checkpoint["param_groups"]
    first |= {"floor": -1.0, "steps": "five"}
    second["seen_as"] = "stacked"
    optimizer = layers("abd")
    before = everything(optimizer)
    with pytest.raises(ValueError) as refused:
        optimizer.load_state_dict(checkpoint)
    for words in (
        "does not fit this optimizer in 5 ways; nothing was loaded:",
        "group 0 of the checkpoint has parameters 'c.weight' that group 0 here has not and lacks "
        "'d.weight' of group 0 here (without 'param_names'",
        "group 0 of the checkpoint: M3(floor=-1.0) must be a finite number >= 0",
        "group 0 of the checkpoint: M3(steps='five') must be an integer >= 1",
        "group 1 of the checkpoint has parameters 'c.bias'",
        "group 1 of the checkpoint was seen as 'stacked'; in this optimizer it is seen as ''",
    ):
        assert words in str(refused.value)
    assert equal(before, everything(optimizer))

    checkpoint = saved(layers("abc").state_dict())
    states = checkpoint["state"]
    states[0]["step"], states[1]["slow_1"] = torch.tensor(1.5), torch.zeros(3, 4)
    kept = sorted(set(states[2]) - {"step"})
    del states[2][kept[0]]
    states[3] |= {"exp_avg": torch.zeros(3, dtype=torch.int64), "exp_avg_sq": "none"}
    states[4] = [1, 2]
    optimizer = layers("abc")
    with pytest.raises(ValueError) as refused:
        optimizer.load_state_dict(checkpoint)
    for words in (
        "in 6 ways",
        "the checkpoint's step for a.weight is 1.5; it should be a number of steps",
        "the checkpoint's slow_1 for b.weight has shape (3, 4); it should be (4, 3)",
        f"the checkpoint has memories {kept[1:]} for c.weight; M3 keeps {kept}",
        "the checkpoint's exp_avg for a.bias has dtype torch.int64; its memories are floating",
        "the checkpoint's exp_avg_sq for a.bias is 'none'; it should be a tensor",
        "the checkpoint's state for b.bias is [1, 2], not a dict",
    ):
        assert words in str(refused.value)


def test_a_long_list_of_differences_is_cut():
    names = "abcdefghijklmnopqrstuvwxy"
    checkpoint = layers(names, rules.AdamW()).state_dict()
    for state in checkpoint["state"].values():
        state["exp_avg"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"in 50 ways(.*\n){20}.*\n  and 30 more$") as refused:
        layers(names, rules.AdamW()).load_state_dict(checkpoint)
    assert str(refused.value).count("\n") == 21


def test_names_in_another_order_are_matched():
    one, two = layers("abc"), layers("cab")
    checkpoint = saved(one.state_dict())
    checkpoint["param_groups"].reverse()
    two.load_state_dict(checkpoint)
    for group in two.param_groups:
        (theirs,) = (g for g in one.param_groups if g["rule"] == group["rule"])
        assert group["param_names"] == [f"{x}.{theirs['param_names'][0][2:]}" for x in "cab"]
        known = dict(zip(theirs["param_names"], theirs["params"], strict=True))
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert equal(dict(two.state[p]), dict(one.state[known[name]]))


@pytest.mark.parametrize(
    "around", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_names_of_a_wrapped_model_are_those_of_the_model(around):
    one, two = layers("abc"), layers("abc")
    checkpoint = saved(one.state_dict())
    for group in checkpoint["param_groups"]:
        group["param_names"] = [around + name for name in group["param_names"]]
    run(two, 2, 4)
    two.load_state_dict(checkpoint)
    assert equal(everything(one)[:2], everything(two)[:2])


def test_names_are_taken_from_a_checkpoint_where_there_are_none():
    one, two = layers("ab", rules.AdamW()), Optimizer(parameters((4, 3)) + parameters((3,)))
    two.load_state_dict(one.state_dict())
    assert two.param_groups[0]["param_names"] == one.param_groups[0]["param_names"]
    del two.param_groups[0]["param_names"]
    one.load_state_dict(two.state_dict())
    assert one.param_groups[0]["param_names"] == ["a.weight", "b.weight", "a.bias", "b.bias"]


# Schemas


@pytest.mark.parametrize("given", [SCHEMA + 1, 10**6])
def test_a_newer_schema_is_refused(given):
    optimizer = layers("a")
    checkpoint = saved(optimizer.state_dict())
    for group in checkpoint["param_groups"]:
        group["schema"] = given
    before = everything(optimizer)
    with pytest.raises(ValueError, match=rf"has schema {given}, and this .* reads up to {SCHEMA}"):
        optimizer.load_state_dict(checkpoint)
    assert equal(before, everything(optimizer))


@pytest.mark.parametrize("given", [[-1, -1], ["1", "1"], [0, 1], [True, True], [None, None]])
def test_a_schema_that_is_none_is_refused(given):
    optimizer = layers("a")
    checkpoint = saved(optimizer.state_dict())
    for group, schema in zip(checkpoint["param_groups"], given, strict=True):
        group["schema"] = schema
    with pytest.raises(ValueError, match="the groups of the checkpoint say schema "):
        optimizer.load_state_dict(checkpoint)


def test_older_schemas_go_through_all_migrations_in_turn(monkeypatch):
    optimizer = layers("a")
    checkpoint = saved(optimizer.state_dict())
    seen = []

    def step(i):
        return lambda given: seen.append(i) or given

    monkeypatch.setattr(torch_backend.checkpoint, "MIGRATIONS", [step(i) for i in range(3)])
    monkeypatch.setattr(torch_backend.checkpoint, "SCHEMA", 3)
    optimizer.load_state_dict(checkpoint)
    assert seen == [1, 2] and {g["schema"] for g in optimizer.param_groups} == {3}
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [1, 2]
    for group in checkpoint["param_groups"]:
        del group["schema"]
    optimizer.load_state_dict(checkpoint)
    assert seen == [1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "given",
    [{}, {"state": {}}, {"state": {}, "param_groups": {}}, {"state": 1, "param_groups": [{}]}],
)
def test_what_is_no_checkpoint_is_refused(given):
    optimizer = layers("a")
    before = everything(optimizer)
    with pytest.raises(ValueError, match="a checkpoint is what state_dict"):
        optimizer.load_state_dict(given)
    assert equal(before, everything(optimizer))


def paths(thing: object, path: tuple = ()) -> list[tuple]:
    """Where something in nested dicts and lists can be changed."""
    items = thing.items() if isinstance(thing, dict) else enumerate(thing)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += paths(value, (*path, key))
    return found


BAD = [None, "nonsense", -1, 7, 0.5, float("nan"), (), [], {}, [1, 2]]
BAD += [torch.zeros(2, 7), torch.ones(()), torch.full((4, 3), 2)]


def test_a_load_is_whole_or_nothing():
    """Whatever is damaged, all is loaded or all is as before."""
    whole, optimizer = saved(layers("ab").state_dict()), layers("ba")
    rng, refused, before = random.Random(0), 0, everything(optimizer)
    for _ in range(150):
        checkpoint = copy.deepcopy(whole)
        for _ in range(rng.choice([1, 1, 3])):
            *path, last = rng.choice(paths(checkpoint))
            place = functools.reduce(operator.getitem, path, checkpoint)
            if isinstance(place, dict) and rng.random() < 0.5:
                del place[last]
            else:
                place[last] = copy.deepcopy(rng.choice(BAD))
        try:
            optimizer.load_state_dict(checkpoint)
        except ValueError:
            refused += 1
            assert equal(before, everything(optimizer)), checkpoint
        else:
            run(optimizer, 3, 4)
            optimizer = layers("ba")
    assert 50 < refused < 125


# torch.distributed.checkpoint, in one process


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_goes_on(flatten, old, tmp_path):
    """Nested and flattened; one of v0.1 has no schema, and is read with allow_partial_load."""
    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=flatten)

    def made(seed: int) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
        return model, Optimizer(model, rules.SOAP(lr=0.1, period=2))

    model, optimizer = made(0)
    run(optimizer, 0, 3)
    kept = dcp_state.get_optimizer_state_dict(model, optimizer, options=options)
    for group in [kept] if flatten else kept["param_groups"]:
        for key in [k for k in group if old and k.split(".")[-1] == "schema"]:
            del group[key]
    dcp.save({"optimizer": kept, "model": model.state_dict()}, checkpoint_id=tmp_path)

    other, again = made(1)
    run(again, 5, 6)
    loaded = dcp_state.get_optimizer_state_dict(other, again, options=options)
    found = {"optimizer": loaded, "model": other.state_dict()}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=old)
    dcp.load(found, checkpoint_id=tmp_path, planner=planner)
    other.load_state_dict(found["model"])
    dcp_state.set_optimizer_state_dict(other, again, found["optimizer"], options=options)
    assert same(optimizer, again)
    for x in (optimizer, again):
        run(x, 3, 5)
    assert same(optimizer, again)
    assert {g["schema"] for g in again.param_groups} == {SCHEMA}


def test_keys_that_do_not_add_up_are_refused():
    optimizer = layers("ab")
    checkpoint = saved(optimizer.state_dict())
    checkpoint["param_groups"][0]["params"] = [0, 0]
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"more than once: 0, 0, 2, 3\n.*state for 1, which is"):
        optimizer.load_state_dict(checkpoint)
    assert equal(before, everything(optimizer))


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "torch's"])
def test_state_without_its_step_is_refused(theirs):
    # Bias corrections of a run that seems to begin would make its first steps far too large.
    p = nn.Parameter(torch.ones(3))
    saver = torch.optim.AdamW([p]) if theirs else torch_backend.AdamW([p])
    p.grad = torch.ones(3)
    saver.step()
    checkpoint = saver.state_dict()
    del checkpoint["state"][0]["step"]
    with pytest.raises(ValueError, match="parameter 0 of group 0 has no step"):
        torch_backend.AdamW([p]).load_state_dict(checkpoint)
