"""What a rule may say, and the errors for what it may not."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cases import DEFAULTS

from deepopt import (
    Oracle,
    Rate,
    Retention,
    Rule,
    Scalar,
    Slot,
    describe,
    latex,
    rule,
    rules,
)
from deepopt.expr import where
from deepopt.rule import trace, turns
from jax_backend import scale_by_rule, transform


@pytest.mark.parametrize("cls", rules.ALL, ids=lambda r: r.__name__)
@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf"), "fast", True, None])
def test_a_bad_lr_is_quoted(cls, lr):
    with pytest.raises(
        ValueError, match=rf"{cls.__name__}\(lr={lr!r}\) must be a finite number >= 0"
    ):
        cls(lr=lr)


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (rules.HeavyBall, {"momentum": 1.0}, r"momentum=1.0\) must be a number in \[0, 1\)"),
        (rules.HeavyBall, {"momentum": -0.1}, r"momentum=-0.1\) must be a number in \[0, 1\)"),
        (
            rules.AdamW,
            {"betas": (0.9, 1.5)},
            r"betas=\(0.9, 1.5\)\) must be 2 numbers, each a number in",
        ),
        (rules.AdamW, {"betas": 0.9}, r"betas=0.9\) must be 2 numbers"),
        (rules.AdamW, {"decoupled": 1}, r"decoupled=1\) must be of type bool"),
        (rules.M3, {"period": 0}, r"period=0\) must be an integer >= 1, or a tuple of such"),
        (rules.M3, {"period": 1.5}, r"period=1.5\) must be an integer >= 1"),
        (rules.M3, {"slow": ()}, r"slow=\(\)\) must be a number in \[0, 1\), or a tuple"),
        (rules.M3, {"slow": (0.9, 0.8), "period": (1, 2, 3)}, "one value per level"),
        (rules.M3, {"accumulate": "mean"}, "accumulate='mean'\\) must be one of 'ema', 'sum'"),
        (rules.M3, {"literal": True, "scale": "spectral"}, "Algorithm 1 fixes scale"),
        (rules.Muon, {"coefficients": "septic"}, "must be one of 'quintic', 'cubic'"),
        (rules.SGD, {"every": 0}, r"every=0\) must be an integer >= 1"),
        (rules.SGD, {"weight_decay": -1}, r"weight_decay=-1\) must be a finite number >= 0"),
    ],
)
def test_bad_hyperparameters_are_quoted(cls, given, message):
    with pytest.raises(ValueError, match=message):
        cls(**given)


def test_numpy_numbers_and_fractions_are_numbers():
    w = [np.ones(3)]
    for lr in (np.float32(0.5), np.float64(0.5), Fraction(1, 2), 0.5):
        (got,) = Oracle(rules.SGD(lr=lr), w).step(w, w)
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, 0.5)


@pytest.mark.parametrize("default", DEFAULTS, ids=lambda r: type(r).__name__)
def test_a_change_of_a_scalar_never_retraces(default):
    first = trace(default, (4, 4), frozenset({"every"}))
    values = {
        k: 0.123
        for k in rule.scalar_names(type(default))
        if not isinstance(getattr(default, k), tuple)
    }
    changed = default.with_values(values)
    assert changed != default
    assert trace(changed, (4, 4), frozenset({"every"})) is first


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("default", DEFAULTS, ids=lambda r: type(r).__name__)
def test_zero_gradients_move_nothing(default, eps):
    w = [np.ones((4, 3))]
    oracle = Oracle(default.with_values({"weight_decay": 0.0, "eps": eps}), w)
    for _ in range(20):
        (now,) = oracle.step(w, [np.zeros((4, 3))])
        np.testing.assert_array_equal(now, w[0])


class Base(Rule):
    """A rule to vary."""

    def update(self, w, g, s, t):
        return g, {}


def run(made: Rule, **scalars: Any):
    w = [np.ones((2, 2))]
    return Oracle(made, w).step(w, w, **scalars)


def test_a_rule_that_says_something_impossible_is_told_so():
    class Named(Base):
        def slots(self, shape):
            return {"update": Slot(shape)}

    class Field(Base):
        g: Scalar = 1.0

    class Both(Base):
        keep: Retention = 0.5

        def slots(self, shape):
            return {"keep": Slot(shape)}

    class Clocked(Base):
        def clocks(self):
            return {"slow": 0}

    class Every(Base):
        def clocks(self):
            return {"every": 4}

    class Stopped(Base):
        def slots(self, shape):
            return {"m": Slot(shape, clock="slwo")}

    class Misspelt(Base):
        def update(self, w, g, s, t):
            return t.when("slo", g, g), {}

    class Bare(Base):
        def update(self, w, g, s, t):
            return g

    class Number(Base):
        def update(self, w, g, s, t):
            return 0.0, {}

    class Shape(Base):
        def update(self, w, g, s, t):
            return g, {"m": g}

    class Forgetful(Base):
        def slots(self, shape):
            return {"m": Slot(shape)}

        def update(self, w, g, s, t):
            return g + s["m"], {}

    class Unknown(Base):
        def update(self, w, g, s, t):
            return s["mm"], {}

    class Float(Base):
        keep: float = 0.5

    class Branch(Base):
        keep: Retention = 0.0

        def update(self, w, g, s, t):
            return (g if self.keep == 0 else w), {}

    for cls, error, message in [
        (Named, ValueError, r"\['update'\] names two things"),
        (Field, ValueError, r"\['g'\] names two things"),
        (Both, ValueError, r"\['keep'\] names two things"),
        (Clocked, ValueError, "periods must be >= 1"),
        (Every, ValueError, "'every' is taken"),
        (Stopped, ValueError, "a slot has clock {'slwo'}"),
        (Misspelt, ValueError, "there is no clock 'slo'"),
        (Bare, TypeError, r"must return \(direction"),
        (Number, TypeError, r"must return \(direction"),
        (Shape, ValueError, "returned memory 'm'"),
        (Forgetful, ValueError, r"does not return \['m'\]"),
        (Unknown, KeyError, "no memory 'mm'; slots"),
        (Float, ValueError, "annotated Scalar, Rate or Retention"),
        (Branch, TypeError, "branched at test_rule.py"),
    ]:
        with pytest.raises(error, match=message):
            clock_free = cls()
            trace(clock_free, (2, 2), frozenset({"every"}))


def test_a_domain_is_any_or_matrix():
    with pytest.raises(ValueError, match="domain='matrx' must be 'any' or 'matrix'"):

        class Matrx(Base):
            domain = "matrx"


@pytest.mark.parametrize("what", [rules.M3, "m3", None])
def test_a_class_or_a_name_is_not_a_rule(what):
    for take in (describe, latex, lambda r: Oracle(r, [np.ones((2, 2))]), transform, scale_by_rule):
        with pytest.raises(TypeError, match="must be a rule of deepopt"):
            take(what)


def test_where_is_how_a_rule_branches():
    class Chooser(Base):
        keep: Rate = 0.0

        def update(self, w, g, s, t):
            return where(g > 0.5, g, 0.0) * (1.0 - self.keep), {}

    np.testing.assert_array_equal(run(Chooser(lr=0.5))[0], 0.5)


def test_the_oracle_refuses_and_keeps_its_state():
    w = [np.ones((4, 3)), np.ones((4, 3))]
    oracle = Oracle(rules.HeavyBall(), w)
    with pytest.raises(ValueError, match=r"shapes \[\(4, 3\), \(3, 4\)\]"):
        oracle.step(w, [np.ones((4, 3)), np.ones((3, 4))])
    assert oracle.count == 0
    assert not oracle.state[0]["momentum_buffer"].any()
    with pytest.raises(TypeError, match="lrr"):
        oracle.step(w, w, lrr=9.0)
    with pytest.raises(ValueError, match="lr=nan"):
        oracle.step(w, w, lr=float("nan"))
    with pytest.raises(ValueError, match=r"M3 needs matrices; parameter 0 has shape \(3,\)"):
        Oracle(rules.M3(), [np.ones(3)])
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(2, 3, 4\)"):
        Oracle(rules.M3(), [np.ones((2, 3, 4))])


def test_slow_work_is_dealt_out_by_its_cost():
    layer = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), *[(8192, 2048)] * 3]
    shapes = layer * 16
    turn = turns(shapes)
    assert sorted(turn) == list(range(len(shapes)))
    assert turns([(3, 3), (5,), (), (2, 2), (3, 3)]) == [0, 2, 4, 3, 1]

    def spread(place: Sequence[int]) -> float:
        load = [0.0] * 10
        for i, (rows, columns) in enumerate(shapes):
            load[place[i] % 10] += rows * columns * min(rows, columns)
        return max(load) / min(load)

    assert spread(turn) < 1.16 < spread(range(len(shapes)))


def test_ticks_are_at_the_ends_of_periods_and_staggered_by_position():
    made = rules.M3(period=(2, 6), weight=0.1)
    both = {step for step in range(1, 13) if {"slow_1", "slow_2"} <= made.ticks(step)}
    assert both == {6, 12}
    spread = rules.M3(period=4, stagger=True)
    for step in range(1, 9):
        assert sum("slow_1" in spread.ticks(step, index=i) for i in range(4)) == 1
    slow = rules.M3(period=2, every=3)
    assert [s for s in range(1, 13) if "slow_1" in slow.ticks(s)] == [6, 12]
    assert [s for s in range(1, 7) if "every" in slow.ticks(s)] == [3, 6]
