"""Symmetries: what a rule declares holds, what it does not declare does not, and prose agrees."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
from cases import CASES, DEFAULTS, Case, stream

from deepopt import Rule, around, rules
from deepopt.readout import DEGREES, Output, Scale
from deepopt.rule import Symmetry
from deepopt.testing import violation, whole

STEPS = 12
# Long enough for the slow levels of a rule at its defaults to be read.
LONG = 20
# Eigenvectors, and Newton-Schulz near zero, amplify the rounding of a turned gradient.
TOLERANCE = 1e-8
# What breaks a symmetry does so by far more than rounding.
BROKEN = 1e-4
Map = Callable[[np.ndarray], np.ndarray]
ALL: tuple[Symmetry, ...] = get_args(Symmetry)


def bare(rule: Rule) -> Rule:
    """Without what the symmetries of a direction leave aside: weight decay and eps."""
    return rule.with_values({"weight_decay": 0.0, "eps": 0.0})


def name(rule: Rule) -> str:
    return type(rule).__name__


r = rules
OUTPUTS = get_args(Output)
SCALES = get_args(Scale)
# Switches that a symmetry hangs on, beyond those of the cases.
SWITCHED = [
    *(
        r.DeltaMomentum(view=view, output=output, scale=scale, normalize=normalize)
        for view in ("matrix", "flat", "scalar")
        for output, scale, normalize in (
            ("identity", "none", True),
            ("identity", "rms", False),
            ("sign", "spectral", True),
            ("rms", "none", False),
            ("newton_schulz", "spectral", False),
        )
    ),
    *(r.DeepMomentum(output=x, scale=s, width=3) for x in OUTPUTS for s in SCALES),
    *(r.FeatureMomentum(output=x, scale=s) for x in OUTPUTS for s in SCALES),
    *(r.FeatureMomentum(feature="polynomial", output=x, scale="none") for x in OUTPUTS),
    *(r.PreconditionedMomentum(output=x, scale=s) for x in OUTPUTS for s in SCALES),
    *(r.PreconditionedMomentum(values="kronecker", period=1, output=x) for x in OUTPUTS),
    r.PreconditionedMomentum(values="kronecker", period=3),
    *(r.Muon(scale=s) for s in SCALES),
    *(r.AdaMuon(scale=s, signed=signed) for s in SCALES for signed in (False, True)),
    *(r.M3(scale=s, second_moment=x) for s in SCALES for x in ("gradient", "update", "none")),
    *(
        cls(graft=graft, sides=sides, **{every: 1})
        for cls, every in ((r.Shampoo, "period"), (r.MultiFrequency, "root"))
        for graft in ("none", "sgd", "adam")
        for sides in ("both", "left", "right")
    ),
    *(cls(scale=s, **{k: 1}) for cls, k in ((r.Shampoo, "period"), (r.MultiFrequency, "root"))
      for s in SCALES),
    *(cls(scale=s, **{k: 3}) for cls, k in ((r.Shampoo, "period"), (r.MultiFrequency, "root"))
      for s in SCALES),
    r.Shampoo(block=2, period=1),
    r.MultiFrequency(block=2, root=1),
    *(r.SOAP(refresh=x, scale=s, period=2) for x in ("qr", "eigh") for s in SCALES),
    *(r.SOAP(sides=x, period=2) for x in ("left", "right")),
    *(
        r.Nest(memory=memory, output=output, scale=s, period=(1, 3), width=3)
        for memory in ("table", "delta", "deep", ("table", "delta"))
        for output in (*OUTPUTS, ("newton_schulz", "sign"))
        for s in ("rms", "none")
    ),
    *(
        r.Nest(output=("identity", x), period=(1, 3), scale=s)
        for x in ("sign", "newton_schulz", "rms")
        for s in SCALES
    ),
    r.AdaGrad(initial=0.1),
    *(r.DiagonalMemory(values=x, ridge=y) for x in ("root", "square") for y in (0.0, 0.1)),
    *(r.DiagonalMemory(values=x, accumulate="sum") for x in ("root", "square")),
    r.RMSProp(centered=True),
    r.GGD(objective="dot"),
]  # fmt: skip
FREE = [case for case in CASES if not case.rule.context(case.shape)]
DECLARED = [*FREE, *(Case(rule, (4, 6)) for rule in SWITCHED)]


def declared(case: Case) -> list[str]:
    """The symmetries that a rule declares for a shape: rotations are of sides of one block."""
    long = getattr(case.rule, "block", 1024) < max(case.shape)
    return sorted(s for s in case.rule.symmetries() if not (long and "rotation" in s))


@pytest.mark.parametrize("case", DECLARED, ids=str)
def test_what_is_declared_holds(case):
    # In the null space of a gradient an eigenvector is free and SOAP divides noise by noise; and
    # noise has a sign.
    noisy = getattr(case.rule, "refresh", "") == "eigh" or "sign" in str(case)
    gradients = whole(case.shape, steps=STEPS) if noisy else stream(case.shape, STEPS)[1]
    rule = bare(case.rule)
    found = {s: violation(rule, s, gradients) for s in declared(case)}
    assert {s: x for s, x in found.items() if not x <= TOLERANCE} == {}


@pytest.mark.parametrize("rule", DEFAULTS, ids=name)
def test_what_is_not_declared_does_not_hold(rule):
    gradients = whole((4, 6), steps=LONG)
    rule = bare(rule)
    found = {s: violation(rule, s, gradients) for s in ALL if s not in rule.symmetries()}
    assert {s: x for s, x in found.items() if not x >= BROKEN} == {}


@pytest.mark.parametrize("rule", [*DEFAULTS, *(x.rule for x in DECLARED)], ids=repr)
def test_no_rule_declares_two_degrees(rule):
    assert len(rule.symmetries() & DEGREES) <= 1


AROUND = {
    "cautious": around.cautious,
    "centralized": around.centralized,
    "centralized, outputs last": partial(around.centralized, outputs="last"),
    "clipped": partial(around.clipped, max_norm=0.5),
    "clipped globally": lambda rule: around.clipped_globally(rule, 0.5),
    "averaged": around.averaged,
    "schedule_free": around.schedule_free,
    "restarted": partial(around.restarted, restart_period=960),
    **{
        f"nonlinear {output}": partial(around.nonlinear, output=output)
        for output in ("identity", "sign", "rms", "newton_schulz")
    },
}


@pytest.mark.parametrize("wrapper", AROUND)
@pytest.mark.parametrize("rule", DEFAULTS, ids=name)
def test_what_a_function_around_a_rule_declares_holds(rule, wrapper):
    _, gradients = stream((4, 6), 8)
    made = bare(AROUND[wrapper](rule))
    found = {s: violation(made, s, gradients) for s in sorted(made.symmetries())}
    assert {s: x for s, x in found.items() if not x <= TOLERANCE} == {}


# What a function around gradient descent, which has all symmetries but two degrees, takes away.
LEFT = {
    "cautious": set(ALL) - {"left rotation", "right rotation", "degree -1", "degree 0"},
    "centralized": {"odd", "left rotation", "degree 1"},
    "centralized, outputs last": {"odd", "right rotation", "degree 1"},
    "clipped": {"odd", "permutation", "transposition", "left rotation", "right rotation"},
    "averaged": set(ALL) - {"degree -1", "degree 0"},
    "nonlinear sign": {"odd", "permutation", "transposition", "degree 0"},
    "nonlinear rms": set(ALL) - {"degree -1", "degree 1"},
    "nonlinear newton_schulz": {
        "odd", "transposition", "left rotation", "right rotation", "degree 0",
    },
}  # fmt: skip


@pytest.mark.parametrize("wrapper", LEFT)
def test_what_a_function_takes_away_is_gone(wrapper):
    # Momentum, as the directions of SGD never disagree with its gradients.
    rule = AROUND[wrapper](rules.HeavyBall())
    assert rule.symmetries() == LEFT[wrapper]
    gradients = whole((4, 6), steps=LONG)
    found = {s: violation(rule, s, gradients) for s in ALL if s not in LEFT[wrapper]}
    assert {s: x for s, x in found.items() if not x >= BROKEN} == {}


# Prose

# A phrase of a docstring, and the symmetry that it claims of the rule at its defaults.
CLAIMS: dict[str, Symmetry] = {
    r"must be odd": "odd",
    r"independent of the gradient's size": "degree 0",
    r"root mean square of a step": "degree 0",
    r"size of (a|the first) step per coordinate": "degree 0",
    r"(?<!; before that, )weight per unit of (summed )?gradient": "degree 1",
}


@pytest.mark.parametrize("rule", DEFAULTS, ids=name)
def test_a_docstring_claims_no_more_than_is_declared(rule):
    text = re.sub(r"\s+", " ", type(rule).__doc__)
    claimed = {s for phrase, s in CLAIMS.items() if re.search(phrase, text)}
    # RAdam begins as momentum and ends as Adam, and says so.
    if "before that, weight per unit of gradient" in text:
        assert not rule.symmetries() & DEGREES
        claimed -= DEGREES
    assert claimed <= rule.symmetries()
    assert claimed & DEGREES or not rule.symmetries() & DEGREES


def test_words_of_symmetry_stand_nowhere_else():
    """A new claim in words needs a line in CLAIMS."""
    words = r"\b(odd|(in|equi)variant|independent of|symmetr\w*|transpose)\b"
    known = {
        rules.FeatureMomentum: {"odd", "independent of"},
        rules.DeltaMomentum: {"independent of"},
    }
    for cls in rules.ALL:
        text = re.sub(r"\s+", " ", cls.__doc__)
        assert {x[0] for x in re.finditer(words, text)} == known.get(cls, set()), cls


@pytest.mark.parametrize("cls", [rules.Muon, rules.M3])
def test_the_rules_that_do_not_tell_a_matrix_from_its_transpose(cls):
    """docs/notation.md says so of them at scale "rms"."""
    assert "transposition" in cls().symmetries()
    assert "transposition" not in cls(scale="spectral").symmetries()


@pytest.mark.parametrize("cls", [rules.DeltaMomentum, rules.DeepMomentum])
def test_the_rules_that_keep_to_the_stored_rows(cls):
    assert "transposition" not in cls().symmetries()


def test_literal_m3_steps_by_one_over_c_as_its_docstring_says():
    assert "its step is 1/c for a loss times c" in re.sub(r"\s+", " ", rules.M3.__doc__)
    assert "degree -1" in rules.M3(literal=True).symmetries()


def test_a_case_is_varied_enough_to_break_what_it_can():
    """The stream of the cases tells an even rule from an odd one."""

    class Even(rules.SGD):
        def update(self, w, g, s, t):
            return g * g, {}

    _, gradients = stream((4, 6), STEPS)
    assert violation(Even(), "odd", gradients) > BROKEN
    assert violation(replace(Even(), lr=0.0), "odd", gradients) == 0.0
