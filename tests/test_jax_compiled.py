"""What XLA makes of a step: fusions, donated arrays, conditionals, and batches of matrices."""

import re
from collections import Counter
from itertools import pairwise
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import DEFAULTS, difference, double_precision, stream

from deepopt import rules
from deepopt.algebra import Program, fold
from deepopt.expr import symbol
from deepopt.functions import newton_schulz
from jax_backend import algebra, together, transform
from jax_backend.algebra import Jax

LEAVES = {"a": (48, 40), "b": (40, 24), "c": (48, 40)}
ELEMENTWISE = [r.with_values({"weight_decay": 0.1}) for r in DEFAULTS if r.domain == "any"]
MATRICES = [r.with_values({"period": 2, "root": 2}) for r in DEFAULTS if r.domain == "matrix"]
ACCUMULATING = [rules.AdamW(every=2), rules.Shampoo(every=2), rules.M3(period=(2, 3), stagger=True)]
named = {"ids": lambda r: type(r).__name__}
# Of matrices with entries near one. A step enlarges what rounding did to a small singular value
# 3.4-fold: 500-fold by five steps, or three after a restart that squared it.
ROUNDING = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 2.0**-7}


class Plain(Jax):
    """The definition of newton_schulz, folded."""

    newton_schulz: Any = None


def compiled(tx: optax.GradientTransformationExtraArgs) -> tuple[str, int]:
    """The optimized HLO of a step with weights and state donated, and how many arrays they are."""
    w = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in LEAVES.items()}
    state = jax.eval_shape(tx.init, w)

    def step(w, state, g):
        updates, state = tx.update(g, state, w)
        return optax.apply_updates(w, updates), state

    run = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
    return run.lower(w, state, w).compile().as_text(), len(jax.tree.leaves((w, state)))


def written(text: str) -> Counter[str]:
    """The instructions of the entry computation that write an array of a leaf's size."""
    entry = re.sub(r"/\*.*?\*/", "", text[text.index("\nENTRY") :])
    found = re.findall(r"^  (?:ROOT )?%\S+ = (\(.*?\)|\S+) ([\w-]+)\(", entry, re.MULTILINE)
    least, counted = min(map(prod, LEAVES.values())), Counter[str]()
    for kind, op in found:
        sizes = [prod(map(int, n.split(","))) for n in re.findall(r"\[([\d,]+)\]", kind)]
        if op not in ("parameter", "tuple", "get-tuple-element") and max(sizes, default=0) >= least:
            counted[op] += 1
    return counted


def arrays(tx: optax.GradientTransformationExtraArgs) -> int:
    """How many arrays of a leaf's size there are in weights and state."""
    w = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in LEAVES.items()}
    return sum(x.size > 1 for x in jax.tree.leaves((w, jax.eval_shape(tx.init, w))))


def equations(jaxpr: Any) -> list[Any]:
    """All equations of a jaxpr and of those inside."""
    found = [*jaxpr.eqns]
    for eqn in jaxpr.eqns:
        inner = [x for v in eqn.params.values() for x in (v if isinstance(v, tuple) else (v,))]
        bodies = [getattr(x, "jaxpr", x) for x in inner]
        found += [e for x in bodies if hasattr(x, "eqns") for e in equations(x)]
    return found


def traced(tx: optax.GradientTransformationExtraArgs, w: Any) -> list[Any]:
    return equations(jax.make_jaxpr(tx.update)(w, tx.init(w), w).jaxpr)


def stacks(found: list[Any]) -> list[tuple[int, ...]]:
    """The shapes of what these equations join, but for a few scalars."""
    own = [e.outvars[0].aval for e in found if e.primitive.name in ("concatenate", "stack")]
    return [x.shape for x in own if x.size > 24]


# Fusion and donation.


@pytest.mark.parametrize("rule", ELEMENTWISE, **named)
def test_an_elementwise_step_is_one_fusion_for_each_array_that_it_writes(rule):
    """On GPUs XLA joins those of a leaf; on CPUs its fusions have one result each."""
    found = written(compiled(transform(rule))[0])
    # XLA's CPU compiler copies what is read beside being written, if not by one fusion.
    copies = written(compiled(optax.lion(0.1, weight_decay=0.1))[0])["copy"]
    allowed = copies if isinstance(rule, rules.Lion) else 0
    assert found.pop("copy", 0) <= allowed <= len(LEAVES)
    assert set(found) == {"fusion"}
    assert len(LEAVES) <= found["fusion"] <= arrays(transform(rule))


@pytest.mark.parametrize("rule", ELEMENTWISE, **named)
def test_elementwise_leaves_are_not_stacked(rule):
    w = {k: jnp.ones(shape) for k, shape in LEAVES.items()}
    found = traced(transform(rule), w)
    assert not stacks(found)
    assert not {"dot_general", "scan", "while", "cond"} & {e.primitive.name for e in found}


@pytest.mark.parametrize("rule", [*ELEMENTWISE, *MATRICES, *ACCUMULATING], **named)
def test_weights_and_state_are_donated(rule):
    text, n = compiled(transform(rule))
    header = text[: text.index("\n")]
    aliased = {int(i) for i in re.findall(r"\((\d+), \{\}, m\w+-alias\)", header)}
    assert aliased == set(range(n))


# Conditionals.


def test_a_conditional_holds_only_what_depends_on_its_clocks():
    w = {k: jnp.ones(shape) for k, shape in LEAVES.items()}
    (cond,) = [e for e in traced(transform(rules.M3()), w) if e.primitive.name == "cond"]
    # The slow memory and its read-out.
    assert len(cond.outvars) == 2 * len(w)
    accumulating = written(compiled(transform(rules.AdamW(every=3)))[0])
    # The sum of gradients, and the weights; all else is written in place by the branches.
    assert accumulating == {"fusion": 2 * len(LEAVES), "conditional": 1}
    # The slow read-out is both read by the step and replaced.
    assert written(compiled(transform(rules.M3()))[0])["copy"] <= len(LEAVES)


# Newton-Schulz.


def spectrum(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Matrices whose singular values fall as 1/k."""
    u, s, v = np.linalg.svd(np.random.default_rng(seed).standard_normal(shape), False)
    return u / np.arange(1, s.shape[-1] + 1) @ v


def orthogonal(x: Any, name: str, steps: int, own: type[Jax] = Jax) -> Any:
    x = jnp.asarray(x)
    call = newton_schulz(symbol("x", x.shape[-2:]), steps=steps, coefficients=name)
    return jax.jit(lambda x: fold(Program({"": call}), own(x.dtype), {"x": x})[""])(x)


SIZES = [(40, 160), (160, 40), (32, 32), (3, 24, 30), (2, 3, 12, 18), (1, 5), (4, 1)]


@pytest.mark.parametrize("name", ["cubic", "quintic"])
@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_in_float64_it_is_the_definition(name, steps):
    with double_precision():
        for shape in SIZES:
            x = spectrum(shape)
            found = orthogonal(x, name, steps)
            assert found.dtype == jnp.float64
            assert difference(found, orthogonal(x, name, steps, Plain)) <= 1e-12


@pytest.mark.parametrize("name", ["cubic", "quintic"])
@pytest.mark.parametrize("steps", [2, 3, 5, 8])
@pytest.mark.parametrize("shape", [(40, 60), (160, 40), (3, 16, 128)])
def test_the_gram_form_rounds_like_the_definition(monkeypatch, name, steps, shape):
    x = spectrum(shape)
    with double_precision():
        exact = np.asarray(orthogonal(x, name, steps, Plain))
    x = x.astype("float32")
    found = orthogonal(x, name, steps)
    assert difference(orthogonal(x, name, steps, Plain), exact) <= ROUNDING["float32"]
    assert difference(found, exact) <= ROUNDING["float32"]
    monkeypatch.setattr(algebra, "GRAM_ASPECT", np.inf)
    assert not np.array_equal(found, orthogonal(x, name, steps))


def test_zero_stays_zero_and_what_is_not_finite_stays_in_its_matrix():
    for shape in ((5, 8, 16), (5, 16, 8), (5, 8, 8)):
        x = spectrum(shape).astype("float32")
        clean = orthogonal(x, "quintic", 5)
        x[1], x[3, 0, 0] = 0.0, np.nan
        found = orthogonal(x, "quintic", 5)
        assert not found[1].any() and np.isnan(found[3]).all()
        for i in (0, 2, 4):
            assert difference(found[i], clean[i]) <= 1e-6


@pytest.mark.parametrize("shape", [(4, 12), (12, 4), (2, 5, 5)])
def test_derivatives_are_those_of_the_definition(shape):
    def loss(x, own):
        return jnp.sum(jnp.cos(orthogonal(x, "quintic", 4, own) * weights))

    weights, x = np.random.default_rng(1).standard_normal(shape), spectrum(shape)
    with double_precision():
        exact = jax.grad(loss)(x, Plain)
        assert difference(jax.grad(loss)(x, Jax), exact) <= 1e-11
    weights, x = weights.astype("float32"), x.astype("float32")
    assert difference(jax.grad(loss)(x, Jax), exact) <= 1e-3


def test_a_step_can_be_differentiated():
    tx = transform(rules.Muon(lr=0.1))
    g, along = ({k: spectrum((6, 12), i + j) for i, k in enumerate("ab")} for j in (0, 2))

    def loss(g):
        updates, _ = tx.update(g, tx.init(g), g)
        return sum(jnp.sum(jnp.sin(9 * x)) for x in jax.tree.leaves(updates))

    with double_precision():
        forward, back = jax.jvp(loss, (g,), (along,))[1], jax.grad(loss)(g)
        assert difference(sum(np.sum(back[k] * along[k]) for k in g), forward) <= 1e-10
        assert abs(forward) > 1e-3


@pytest.mark.parametrize("shape", [(64, 64), (64, 128)])
def test_a_program_does_not_grow_with_the_steps(shape):
    def size(steps: int) -> int:
        x, ns = jnp.ones(shape), Jax(jnp.float32).newton_schulz
        text = jax.jit(ns, static_argnums=(1, 2)).lower(x, steps, "quintic").compile().as_text()
        return text.count("\n")

    # Both begin with two steps of their own in the Gram form, and go on in a loop.
    assert size(17) <= 1.1 * size(8)
    assert size(12) <= 1.1 * size(5)


def test_one_compilation_serves_a_schedule():
    tx = transform(rules.M3(period=2), lr=lambda k: 0.1 * 0.5**k, momentum=lambda k: 0.9 - 0.1 * k)
    w = {k: jnp.asarray(spectrum(shape), "float32") for k, shape in LEAVES.items()}
    state, sizes, traces = tx.init(w), [], []

    @jax.jit
    def step(g, state):
        traces.append(1)
        return tx.update(g, state, g)

    for _ in range(4):
        updates, state = step(w, state)
        sizes.append(float(jnp.linalg.norm(updates["a"])))
    assert len(traces) == 1
    assert all(y < 0.7 * x for x, y in pairwise(sizes))


# Batches.


MIXED = {
    "a": ((4, 6), "float32"),
    "b": ((4, 6), "float64"),
    "c": ((5,), "float32"),
    "d": ((4, 6), "float32"),
    "e": ((6, 4), "float32"),
    "f": ((2, 4, 6), "float32"),
    "g": ((4, 6), "bfloat16"),
    "h": ((4, 6), "float32"),
    "i": ((2, 2, 6), "float64"),
    "j": ((2, 4, 6), "float32"),
}
MASK = dict.fromkeys(MIXED, True) | {"h": False, "none": None}


@pytest.mark.parametrize("rule", [r for r in MATRICES if hasattr(r, "steps")], **named)
def test_leaves_together_are_each_leaf_alone(monkeypatch, rule):
    """Of mixed shapes and dtypes, some without gradient, masked, or spared from weight decay."""
    with double_precision():
        w, g = {}, {}
        for seed, (k, (shape, dtype)) in enumerate(MIXED.items()):
            own, path = stream(shape, 3, seed)
            w[k], g[k] = jnp.asarray(own, dtype), jnp.asarray(path, dtype)
        w["none"] = None
        decayed = {k: k not in ("d", "j") for k in MIXED} | {"none": None}
        given = {"lr": 0.05, "weight_decay": 0.1, "mask": decayed}
        found = stepped(optax.masked(transform(rule, **given), MASK), w, g)
        monkeypatch.setattr(together, "LARGEST_BATCH", 0)
        alone = stepped(optax.masked(transform(rule, **given), MASK), w, g)
    for k, (_, dtype) in MIXED.items():
        assert found[k].dtype == dtype and difference(alone[k], w[k]) > 1e-3
        assert difference(found[k], alone[k]) <= ROUNDING[dtype], k


def stepped(tx: optax.GradientTransformationExtraArgs, w: Any, g: Any) -> Any:
    """The parameters after all gradients, by name."""
    state, step = tx.init(w), jax.jit(tx.update)
    for i in range(len(next(iter(g.values())))):
        updates, state = step({k: g[k][i] if k in g else None for k in w}, state, w)
        w = optax.apply_updates(w, updates)
    return w


def loops(tx: optax.GradientTransformationExtraArgs, w: Any) -> list[tuple[int, ...]]:
    """The shapes on which the iteration runs."""
    scans = [e for e in traced(tx, w) if e.primitive.name == "scan"]
    return sorted(e.outvars[0].aval.shape for e in scans)


def test_matrices_alike_are_orthogonalised_as_one_batch(monkeypatch):
    kinds = {"a": (4, 6), "b": (3, 6), "c": (4, 6), "d": (2, 4, 6), "e": (4, 6), "f": (2, 4, 6)}
    w = {k: jnp.ones(shape) for k, shape in kinds.items()} | {"g": jnp.ones((4, 6), "bfloat16")}
    assert loops(transform(rules.Muon()), w) == [(2, 2, 4, 6), (3, 6), (4, 4, 6)]
    # Fast and slow read-outs; the slow ones are in a branch of their own.
    batches = [(2, 2, 4, 6), (3, 6), (4, 4, 6)]
    assert loops(transform(rules.M3()), w) == sorted(2 * batches)
    monkeypatch.setattr(together, "LARGEST_BATCH", 3 * 4 * 6 * 4)
    assert loops(transform(rules.Muon()), w) == [(2, 4, 6), (2, 4, 6), (3, 4, 6), (3, 6), (4, 6)]


def test_only_what_is_orthogonalised_is_stacked():
    w = {k: jnp.ones((4, 6)) for k in "abc"}
    assert stacks(traced(transform(rules.AdaMuon()), w)) == [(3, 4, 6)]
