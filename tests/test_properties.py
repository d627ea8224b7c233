"""What every rule owes on any stream of gradients; and `deepopt.testing` finds what is broken."""

import random
from typing import Any, ClassVar

import pytest
from cases import DEFAULTS

from deepopt import Memories, Retention, Rule, Slot, Time, Update, average, rules
from deepopt.expr import Expr
from deepopt.rule import hints
from deepopt.testing import PURE, check, checks


def quick(rule: Rule, **values: Any) -> Rule:
    """The rule with clocks short enough to tick within a few steps."""
    short = {k: 3 for k in ("root", "period") if k in hints(type(rule))}
    if isinstance(rule, rules.Nest | rules.MultiFrequency):
        short["period"] = (1, 3)
    if isinstance(rule, rules.MultiFrequency):
        short["root"] = 2
    return rule.with_values({"lr": 0.05, "width": 3, **short, **values})


# Memories that fill between the ticks of their clock: the chunk that is read at the tick.
FILLING = {
    rules.M3: {"slow_1"},
    rules.Nest: {"chunk_1"},
    rules.MultiFrequency: {"left_1", "right_1", "mass_1"},
}
# Eigenvectors, and Newton-Schulz near zero, amplify the rounding of a turned gradient: their own
# test has streams that do not.
HARD = {rules.SOAP, rules.AdaMuon, rules.Shampoo, rules.MultiFrequency}


def promises(rule: Rule, **more: Any) -> list[Any]:
    kind = type(rule)
    # AdaMuon divides what should be zero by its eps.
    tolerance = 1e-8 if kind is rules.AdaMuon else 1e-12
    left = ["declared symmetries hold"] if kind in HARD else []
    filling = FILLING.get(kind, set())
    return checks(quick(rule), filling=filling, tolerance=tolerance, leave_out=left, **more)


# JAX compiles anew for every shape; that it is the oracle is shown for all rules elsewhere.
EVERY = [x for rule in DEFAULTS for x in promises(rule, backends=("torch",))]


@pytest.mark.parametrize("prove", EVERY, ids=str)
def test_every_rule_keeps_its_promises(prove):
    prove()


CLOCKED = (
    rules.PreconditionedMomentum(values="kronecker"),
    rules.Shampoo(graft="adam"),
    rules.Nest(memory=("table", "deep")),
    rules.Nest(memory=("table", "delta")),
)
CLOCKS = "memories change at the ticks of their clocks"


@pytest.mark.parametrize("rule", CLOCKED, ids=repr)
def test_switches_with_memories_of_their_own_keep_their_clocks(rule):
    (prove,) = (x for x in promises(rule, backends=()) if x.name == CLOCKS)
    prove()


# Rules that break a promise


class Mine(Rule):
    """A running average, as it should be."""

    kept: Retention = 0.9

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"m": Slot(shape), "old": Slot(shape, clock="slow")}

    def clocks(self) -> dict[str, int]:
        return {"slow": 3}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m = average(s["m"], g, self.kept)
        return m, {"m": m, "old": t.when("slow", m, s["old"])}


class Uphill(Mine):
    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m, new = super().update(w, g, s, t)
        return 0.0 - m, new


class Restless(Mine):
    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m, new = super().update(w, g, s, t)
        return m + 0.01 * w, new


class Divides(Mine):
    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m, new = super().update(w, g, s, t)
        return m / (m * m), new


class Early(Mine):
    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m, new = super().update(w, g, s, t)
        return m, {**new, "old": m}


class Late(Mine):
    """Breaks at the tick of its clock alone."""

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m, new = super().update(w, g, s, t)
        return t.when("slow", m + 1000.0 * w, m), new


class Vain(Mine):
    def symmetries(self):
        return frozenset({"degree 0"})


class Counted(Mine):
    """Remembers in Python what a memory should."""

    calls: ClassVar[list[int]] = []

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        self.calls.append(0)
        m, new = super().update(w, g, s, t)
        return m * (1.0 + 0.1 * len(self.calls)), new


class Random(Mine):
    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m, new = super().update(w, g, s, t)
        return m * random.random(), new


BROKEN = {
    Counted: PURE,
    Random: PURE,
    Uphill: "the first step descends",
    Restless: "zero gradients never move",
    Divides: "weights and memories stay finite",
    Early: CLOCKS,
    Late: "zero gradients never move",
    Vain: "declared symmetries hold",
}


def test_a_rule_that_keeps_its_promises_passes():
    check(Mine(lr=0.1), examples=5)


def test_a_rule_that_steps_every_few_gradients_passes():
    check(rules.AdamW(every=2), backends=(), examples=5)
    with pytest.raises(AssertionError, match="the first step descends"):
        check(Uphill(lr=0.1, every=2), backends=(), examples=15)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_promise_is_named_and_shown(kind):
    with pytest.raises(AssertionError, match=r"breaks \d+ promises") as found:
        check(kind(lr=0.1), backends=(), examples=15)
    lines = str(found.value).splitlines()
    assert any(line.startswith(f"{BROKEN[kind]}: ") for line in lines)
    assert "Draw 1: " in str(found.value)
    if BROKEN[kind] == PURE:  # nothing else was asked
        return
    check(
        kind(lr=0.1),
        backends=(),
        examples=5,
        leave_out=[line.partition(":")[0] for line in lines[1:] if line[0] != " " and ": " in line],
    )


def test_an_update_that_fails_is_told_of_once():
    class Wrong(Mine):
        def update(self, w, g, s, t):
            return s["n"], {}

    with pytest.raises(AssertionError, match="breaks 1 promises") as found:
        check(Wrong(lr=0.1), examples=5)
    assert str(found.value).count("'n'") == 1


def test_what_cannot_be_asked_is_explained():
    with pytest.raises(ValueError, match="leave_out='it descends': promises are 'update is"):
        checks(Mine(), leave_out=["it descends"])
    with pytest.raises(ValueError, match=r"DGD\(.* needs gram beside gradients"):
        checks(rules.DGD())
    with pytest.raises(ValueError, match=r"slow_1 every 16 steps, and a stream has 6"):
        checks(rules.M3())
    with pytest.raises(ValueError, match=r"backends=\('numpy',\): among"):
        checks(Mine(), backends=("numpy",))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"filling \['x'\]: memories are m, old"):
        check(Mine(), backends=(), filling={"x"}, examples=3)
