"""What every rule owes on any stream of gradients: hypothesis looks for one on which it fails."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEFAULTS, difference
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from deepopt import Oracle, Rule, rules
from deepopt.oracle import canonical
from deepopt.rule import hints, scalar_names
from torch_backend import Optimizer

ANY = [(), (5,), (2, 3, 2), (0,)]
MATRICES = [(3, 4), (6, 2), (4, 4), (1, 5), (5, 1), (1, 1), (0, 3), (3, 0)]
# Exactly zero, tiny, plain and huge: their squares and fourth powers are finite.
SIZES = [0.0, 1e-15, 1e-3, 1.0, 1e15]
KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "dense": lambda g: g,
    "sparse": lambda g: g * (np.abs(g) > 1.0),
    "repeated": lambda g: np.round(g),
    "one": lambda g: np.ones_like(g),
    "dead row": lambda g: g * (np.arange(g[..., :1].size).reshape(g[..., :1].shape) > 0),
    "uneven": lambda g: g * 10.0 ** np.round(6 * g),
}


def name(rule: Rule) -> str:
    return type(rule).__name__


def shapes_of(rule: Rule) -> list[tuple[int, ...]]:
    return MATRICES if rule.domain == "matrix" else MATRICES + ANY


@dataclass(frozen=True)
class Stream:
    """What hypothesis draws and prints; the arrays follow from it."""

    sizes: tuple[float, ...]
    kind: str
    seed: int

    def arrays(self, shape: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
        rng = np.random.default_rng(self.seed)
        w = rng.standard_normal(shape)
        drawn = [np.atleast_1d(rng.standard_normal(shape)) for _ in self.sizes]
        several = zip(self.sizes, map(KINDS[self.kind], drawn), strict=True)
        return w, [(size * g).reshape(shape) for size, g in several]


def streams(least: int = 1, most: int = 6, sizes: Any = tuple(SIZES)) -> st.SearchStrategy[Stream]:
    return st.builds(
        Stream,
        st.lists(st.sampled_from(sizes), min_size=least, max_size=most).map(tuple),
        st.sampled_from(sorted(KINDS)),
        st.integers(0, 2**16),
    )


each_default = pytest.mark.parametrize("rule", DEFAULTS, ids=name)


def quick(rule: Rule, **values: Any) -> Rule:
    """The rule with clocks short enough to tick within a few steps."""
    short = {k: 3 for k in ("root", "period") if k in hints(type(rule))}
    if isinstance(rule, rules.Nest | rules.MultiFrequency):
        short["period"] = (1, 3)
    if isinstance(rule, rules.MultiFrequency):
        short["root"] = 2
    return rule.with_values({"lr": 0.05, "width": 3, **short, **values})


def bare(rule: Rule, **values: Any) -> Rule:
    return quick(rule, weight_decay=0.0, **values)


def steps(oracle: Oracle, w: np.ndarray, gradients: list[np.ndarray]) -> list[np.ndarray]:
    path = []
    for g in gradients:
        (w,) = oracle.step([w], [g])
        path.append(w)
    return path


# The oracle


@each_default
@given(stream=streams(), data=st.data())
def test_weights_and_memories_stay_finite(rule, stream, data):
    w, gradients = stream.arrays(data.draw(st.sampled_from(shapes_of(rule))))
    oracle = Oracle(quick(rule), [w])
    with np.errstate(invalid="raise", divide="raise", over="raise"):
        path = steps(oracle, w, gradients)
    assert np.isfinite(path).all()
    assert all(np.isfinite(x).all() for x in oracle.state[0].values())


@each_default
@given(stream=streams(sizes=(0.0,)), data=st.data(), eps=st.sampled_from([0.0, 1e-8]))
def test_zero_gradients_never_move(rule, stream, data, eps):
    w, gradients = stream.arrays(data.draw(st.sampled_from(shapes_of(rule))))
    for now in steps(Oracle(bare(rule, eps=eps), [w]), w, gradients):
        np.testing.assert_array_equal(now, w)


@each_default
@given(stream=streams(most=1, sizes=tuple(SIZES[1:])), data=st.data())
def test_the_first_step_descends(rule, stream, data):
    w, (g,) = stream.arrays(data.draw(st.sampled_from(shapes_of(rule))))
    assume(g.any())
    # From zero, so that no step is lost in the rounding of a weight.
    (moved,) = Oracle(bare(rule, lr=1.0, eps=0.0), [w]).step([np.zeros_like(w)], [g])
    assert np.sum(moved * (g / np.abs(g).max())) < 0


@each_default
@given(stream=streams(), data=st.data())
def test_two_runs_are_equal_and_write_nothing(rule, stream, data):
    w, gradients = stream.arrays(data.draw(st.sampled_from(shapes_of(rule))))
    before = [w.copy(), *(g.copy() for g in gradients)]
    for x in (w, *gradients):
        x.setflags(write=False)
    one, two = Oracle(quick(rule), [w]), Oracle(quick(rule), [w])
    np.testing.assert_array_equal(steps(one, w, gradients), steps(two, w, gradients))
    for k, x in one.state[0].items():
        np.testing.assert_array_equal(x, two.state[0][k])
    for x, y in zip([w, *gradients], before, strict=True):
        np.testing.assert_array_equal(x, y)


@each_default
@given(stream=streams(least=6), every=st.integers(2, 3), decay=st.sampled_from([0.0, 0.1]))
def test_every_few_steps_the_rule_sees_the_sum(rule, stream, every, decay):
    w, gradients = stream.arrays((3, 4))
    rule = quick(rule, weight_decay=decay)
    found = steps(Oracle(replace(rule, every=every), [w]), w, gradients)
    sums = [sum(gradients[i : i + every], 0.0 * w) for i in range(0, 6, every)]
    expected = np.repeat(np.stack([w, *steps(Oracle(rule, [w]), w, sums)]), every, axis=0)
    np.testing.assert_array_equal(found, expected[1:7])


# Memories that fill between the ticks of their clock: the chunk that is read at the tick.
FILLING = {
    rules.M3: {"slow_1"},
    rules.Nest: {"chunk_1"},
    rules.MultiFrequency: {"left_1", "right_1", "mass_1"},
}
CLOCKED = [
    bare(x, eps=0.0)
    for x in (
        *DEFAULTS,
        rules.PreconditionedMomentum(values="kronecker"),
        rules.Shampoo(graft="adam"),
        rules.Nest(memory=("table", "deep")),
        rules.Nest(memory=("table", "delta")),
    )
]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("rule", CLOCKED, ids=repr)
def test_memories_change_at_the_ticks_of_their_clocks(rule, every, stagger):
    rule = replace(rule, every=every, stagger=stagger)
    shape, count = (3, 4), 3
    slots, filling = rule.all_slots(shape), FILLING.get(type(rule), set()) | {"gradient_sum"}
    assert {k for k in filling - {"gradient_sum"} if k not in slots} == set()
    w = [Stream((1.0,), "dense", i).arrays(shape)[0] for i in range(count)]
    oracle, ticked = Oracle(rule, w), set()
    for step in range(1, 6 * every + 1):
        before = [dict(x) for x in oracle.state]
        gradients = [Stream((1.0,), "dense", 10 * step + i).arrays(shape)[0] for i in range(count)]
        w = oracle.step(w, gradients)
        for i in range(count):
            ticks = rule.ticks(step, index=i)
            changed = {k for k, x in oracle.state[i].items() if (x != before[i][k]).any()}
            still = {k for k, s in slots.items() if (s.clock or "every") not in ticks}
            assert not changed & (still - filling)
            ticked |= changed
    # Nothing is declared that never changes, but for a count of what a sound matrix never has.
    assert ticked == set(slots) - {"negatives"}


# The torch optimizer


def tolerance(rule: Rule) -> float:
    """Of a path, relative to the weights: AdaMuon divides what should be zero by its eps."""
    return 1e-8 if isinstance(rule, rules.AdaMuon) else 1e-12


def leaves(weights: list[np.ndarray]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(w)) for w in weights]


def stepped(optimizer: Optimizer, params: list[nn.Parameter], gradients: list[np.ndarray]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = torch.tensor(g)
    optimizer.step()


def numbers(params: list[nn.Parameter]) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for p in params]


several = st.lists(streams(4, 4, tuple(SIZES[:4])), min_size=2, max_size=4)


@each_default
@given(drawn=several)
def test_a_batch_is_each_alone(rule, drawn):
    """Parameters of one shape run as one batch, whatever their sizes."""
    rule = quick(rule)
    both = [x.arrays((3, 4)) for x in drawn]
    together = leaves([w for w, _ in both])
    batch = Optimizer(together, rule)
    alone = [leaves([w]) for w, _ in both]
    singles = [Optimizer(p, rule) for p in alone]
    for t in range(4):
        stepped(batch, together, [g[t] for _, g in both])
        for optimizer, p, (_, g) in zip(singles, alone, both, strict=True):
            stepped(optimizer, p, [g[t]])
    for a, (b,) in zip(numbers(together), map(numbers, alone), strict=True):
        assert difference(a, b) <= tolerance(rule)


@each_default
@given(drawn=several, order=st.randoms(use_true_random=False), cut=st.integers(1, 3))
def test_order_and_groups_do_not_matter(rule, drawn, order, cut):
    rule = quick(rule)
    shapes = [(3, 4), (4, 4), (3, 4), (6, 2)][: len(drawn)]
    both = [x.arrays(shape) for x, shape in zip(drawn, shapes, strict=True)]
    indices = list(range(len(both)))
    order.shuffle(indices)
    one, two = (leaves([w for w, _ in both]) for _ in range(2))
    shuffled = [two[i] for i in indices]
    parts = [x for x in (shuffled[:cut], shuffled[cut:]) if x]
    plain, split = Optimizer(one, rule), Optimizer([{"params": x} for x in parts], rule)
    for t in range(4):
        stepped(plain, one, [g[t] for _, g in both])
        stepped(split, two, [g[t] for _, g in both])
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert difference(a, b) <= tolerance(rule)


@each_default
@given(drawn=several)
def test_two_torch_runs_are_bit_equal_and_gradients_are_kept(rule, drawn):
    rule, ends = quick(rule, every=2), list[list[torch.Tensor]]()
    both = [x.arrays((3, 4)) for x in drawn]
    for _ in range(2):
        params = leaves([w for w, _ in both])
        optimizer = Optimizer(params, rule)
        for t in range(4):
            stepped(optimizer, params, [g[t] for _, g in both])
            for p, (_, g) in zip(params, both, strict=True):
                np.testing.assert_array_equal(p.grad, g[t])
        ends.append([*params, *(x for p in params for x in _state(optimizer, p))])
    assert all(map(torch.equal, *ends))


def _state(optimizer: Optimizer, p: nn.Parameter) -> list[torch.Tensor]:
    return [optimizer.state[p][k] for k in sorted(optimizer.state[p])]


def other_values(rule: Rule, scalar: str, share: float) -> Any:
    """A value of a scalar hyperparameter that it may have: a share of its own."""
    value = getattr(rule, scalar)
    return tuple(x * share for x in value) if isinstance(value, tuple) else value * share


@each_default
@given(stream=streams(6, 6, tuple(SIZES[:4])), data=st.data())
def test_schedules_of_any_scalar_equal_the_oracle(rule, stream, data):
    rule = quick(rule, weight_decay=0.1)
    names = [k for k in scalar_names(type(rule)) if k != "lr"]
    scalar = data.draw(st.sampled_from(names))
    # At a floor or an eps of nearly nothing rounding noise is divided by itself.
    shares = data.draw(st.lists(st.floats(0.5, 1.0), min_size=6, max_size=6))
    rates = data.draw(st.lists(st.floats(0.0, 0.1), min_size=6, max_size=6))
    w, gradients = stream.arrays((3, 4))
    (p,) = params = leaves([w])
    optimizer, oracle = Optimizer(params, rule), Oracle(rule, [w])
    for g, share, lr in zip(gradients, shares, rates, strict=True):
        now = {"lr": lr, scalar: other_values(rule, scalar, share)}
        optimizer.param_groups[0].update(now)
        stepped(optimizer, params, [g])
        (w,) = oracle.step([w], [g], **now)
        assert difference(p.detach(), w) <= tolerance(rule)


@each_default
@given(
    drawn=several,
    stop=st.integers(0, 4),
    every=st.integers(1, 2),
    stagger=st.booleans(),
)
def test_a_resumed_run_is_bit_equal(rule, drawn, stop, every, stagger):
    rule = quick(rule, every=every, stagger=stagger)
    both = [x.arrays((3, 4)) for x in drawn]
    params = leaves([w for w, _ in both])
    optimizer = Optimizer(params, rule)
    for t in range(4):
        if t == stop:
            again = leaves(numbers(params))
            resumed = Optimizer(again, rule)
            resumed.load_state_dict(optimizer.state_dict())
        stepped(optimizer, params, [g[t] for _, g in both])
        if t >= stop:
            stepped(resumed, again, [g[t] for _, g in both])
    if stop < 4:
        assert all(map(np.array_equal, numbers(params), numbers(again)))
        for p, q in zip(params, again, strict=True):
            assert list(optimizer.state[p]) == list(resumed.state[q])
            assert all(map(torch.equal, _state(optimizer, p), _state(resumed, q)))


@each_default
@given(stream=streams(3, 3, tuple(SIZES[:4])), data=st.data())
def test_every_shape_equals_the_oracle(rule, stream, data):
    shape = data.draw(st.sampled_from([x for x in shapes_of(rule) if np.prod(x)]))
    w, gradients = stream.arrays(shape)
    (p,) = params = leaves([w])
    optimizer, oracle = Optimizer(params, quick(rule)), Oracle(quick(rule), [w])
    for g in gradients:
        stepped(optimizer, params, [g])
        (w,) = oracle.step([w], [g])
    assert difference(p.detach(), w) <= tolerance(rule)
    for k, slot in quick(rule).slots(canonical(shape)).items():
        assert optimizer.state[p][k].numel() == oracle.state[0][k].size == np.prod(slot.shape)
