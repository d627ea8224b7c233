"""What a rule needs beyond its own gradient in optax: contexts, the norm of all, and averages."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import contexts, difference, double_precision, scanned, stream

import jax_backend
from deepopt import Oracle, Rule, around, rules
from deepopt.expr import minimum
from deepopt.functions import ratio
from deepopt.rule import Rate
from jax_backend import averaged, scale_by_rule, transform
from jax_backend.algebra import Jax

STEPS = 4
DGD = rules.DGD(lr=0.1, weight_decay=0.1)
SHAPES = {"conv": (2, 1, 3, 4), "matrix": (4, 6), "stack": (2, 3, 5), "vector": (5,)}
CONTEXTUAL = [
    DGD,
    rules.DGD(lr=0.1, inputs="first", solver="explicit"),
    rules.GGD(lr=0.1, inputs="first", states=3),
    rules.PreconditionedMomentum(lr=0.1, values="given"),
]
NEEDED = r"DGD needs the gram of the leaf at params\['a'\], of shape "


@pytest.fixture
def x64():
    with double_precision():
        yield


def as_matrices(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stack of matrices that a leaf of this shape is."""
    return (-1, *shape[-2:]) if len(shape) < 4 else (1, -1, shape[-1])


def given(rule: Rule) -> tuple[Any, Any, Any, Any]:
    """Parameters, gradients and context of each step by name, and the path of the oracle."""
    w, g = {}, {}
    names = [*rule.context((1, 1))]
    context: dict[str, Any] = {name: {} for name in names}
    expected = {}
    for seed, (key, shape) in enumerate(SHAPES.items()):
        w[key], g[key] = stream(shape, STEPS, seed)
        if len(shape) < 2:
            # Anything: the fallback has no use for it.
            context |= {name: context[name] | {key: np.zeros((STEPS, 7))} for name in names}
            default = rules.SGD if "gram" in names else rules.AdamW
            fallback = default(lr=rule.lr, weight_decay=rule.weight_decay)
            expected[key] = stepped(fallback, w[key], g[key], [{}] * STEPS)
            continue
        matrices = w[key].reshape(as_matrices(shape))
        gradients = g[key].reshape(STEPS, *matrices.shape)
        both = [contexts(rule, matrices.shape[1:], STEPS + i)[i:] for i in range(len(matrices))]
        path = [
            stepped(rule, *x) for x in zip(matrices, gradients.swapaxes(0, 1), both, strict=True)
        ]
        expected[key] = np.stack(path, 1).reshape(STEPS, *shape)
        for name in names:
            whole = np.stack([[x[name] for x in one] for one in both], 1)
            context[name][key] = whole if len(shape) == 3 else whole[:, 0]
    return w, g, context, expected


def stepped(rule: Rule, w: np.ndarray, g: np.ndarray, context: list[Any]) -> np.ndarray:
    """The path of the oracle."""
    oracle, result = Oracle(rule, [w]), []
    for step, own in zip(g, context, strict=True):
        (w,) = oracle.step([w], [step], [own])
        result.append(w)
    return np.stack(result)


def asarrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


# Contexts.


@pytest.mark.parametrize("rule", CONTEXTUAL, ids=lambda r: str(r)[:40])
def test_a_context_reaches_every_leaf(x64, rule):
    """Through the fallback's partition, a scan and a chain, where others ignore it."""
    w, g, context, expected = given(rule)
    tx = optax.chain(optax.clip(1e9), transform(rule))
    found = scanned(tx, *asarrays((w, g, context)))
    for key, path in expected.items():
        assert difference(found[key], path) <= 1e-12, key


def test_a_context_reaches_the_parts_of_a_chain_and_masked_leaves(x64):
    rule = replace(DGD, solver="explicit")
    w, g, context, expected = given(rule)
    parts = optax.chain(
        scale_by_rule(rule),
        optax.add_decayed_weights(rule.weight_decay),
        optax.scale_by_learning_rate(rule.lr),
    )
    labels = {"conv": "plain", "matrix": "ours", "stack": "ours", "vector": "plain"}
    tx = optax.partition({"ours": parts, "plain": optax.sgd(0.1)}, labels)
    found = scanned(tx, *asarrays((w, g, context)))
    for key in ("matrix", "stack"):
        assert difference(found[key], expected[key]) <= 1e-12
    assert difference(found["conv"], w["conv"] - 0.1 * np.cumsum(g["conv"], 0)) <= 1e-12
    context["gram"] |= {"conv": None, "vector": None}
    assert difference(scanned(tx, *asarrays((w, g, context)))["stack"], expected["stack"]) <= 1e-12


@pytest.mark.parametrize(
    ("shape", "context", "words"),
    [
        (
            (4, 6),
            {},
            r"\(6, 6\): there is none.*context={'gram': .*the mean over rows of xᵀx.*flax",
        ),
        ((4, 6), {"context": {"grams": {"a": np.ones((6, 6))}}}, r"\(6, 6\): there is none"),
        ((4, 6), {"context": {"gram": {"a": None}}}, r"\(6, 6\): there is none"),
        ((4, 6), {"context": {"gram": {"a": np.ones((4, 4))}}}, r"\(6, 6\): got shape \(4, 4\)"),
        (
            (2, 4, 6),
            {"context": {"gram": {"a": np.ones((6, 6))}}},
            r"\(2, 6, 6\): got shape \(6, 6",
        ),
    ],
)
def test_a_context_that_does_not_fit_is_refused_when_traced(shape, context, words):
    w = {"a": jnp.ones(shape), "b": jnp.ones(3)}
    for values in context.get("context", {}).values():
        values["b"] = None
    tx = transform(DGD)
    state = tx.init(w)
    with pytest.raises(ValueError, match=NEEDED + words):
        jax.jit(lambda w: tx.update(w, state, w, **context))(w)


def test_leaves_that_are_not_stepped_need_no_context():
    w = {"a": jnp.ones((0, 4)), "b": jnp.ones(3), "c": None}
    tx = transform(DGD)
    updates, _ = tx.update(w, tx.init(w), w)
    assert updates["a"].shape == (0, 4) and np.all(updates["b"] < 0)


def test_a_scalar_of_a_rule_with_context_may_follow_a_schedule(x64):
    w, g = stream((4, 6), 3)
    own = contexts(DGD, (4, 6), 3)
    halved = lambda k: 0.1 * 0.5**k  # noqa: E731
    gram = np.stack([x["gram"] for x in own])
    found = scanned(jax_backend.dgd(halved), *asarrays((w, g, {"gram": gram})))
    oracle = Oracle(rules.DGD(), [w])
    for k in range(3):
        (w,) = oracle.step([w], [g[k]], [own[k]], lr=halved(k))
    assert difference(found[-1], w) <= 1e-12


# The norm of all gradients.


class Bounded(Rule):
    """Gradient descent with the norm of all gradients bounded."""

    bound: Rate = 1.0

    def update(self, w, g, s, t):
        return g * minimum(1.0, ratio(self.bound, t.norm)), {}


class BoundedMatrix(Bounded):
    """The same for matrices."""

    domain = "matrix"


@pytest.mark.parametrize("own", [Bounded, BoundedMatrix])
def test_the_norm_is_that_of_all_updates(x64, own):
    both = [stream((4, 6), 3), stream((5,), 3, 1)]
    w, g = [w for w, _ in both], [g for _, g in both]
    fallback = {"fallback": Bounded(lr=1.0)} if own is BoundedMatrix else {}
    found = scanned(transform(own(lr=1.0), **fallback), *asarrays((w, g)))
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    expected = scanned(clipped, *asarrays((w, g)))
    for x, y in zip(found, expected, strict=True):
        assert difference(x, y) <= 1e-12
    assert difference(found[1], w[1] - np.cumsum(g[1], 0)) > 1e-3


def test_the_norm_is_taken_in_float32_at_least():
    w = {"a": jnp.full((64, 64), 300.0, "float16"), "b": None}
    tx = transform(Bounded(lr=1.0))
    updates, _ = tx.update(w, tx.init(w), w)
    assert difference(updates["a"], np.full((64, 64), -1 / 64)) < 1e-3
    assert updates["a"].dtype == jnp.float16


def test_no_norm_is_taken_for_rules_that_do_not_read_it():
    w = {"a": jnp.ones((3, 4)), "b": jnp.ones(2)}
    for rule, read in ((rules.SGD(), False), (Bounded(), True)):
        tx = transform(rule)
        assert ("sqrt" in str(jax.make_jaxpr(tx.update)(w, tx.init(w), w))) == read


# Averages and moves.


@pytest.mark.parametrize(
    "rule",
    [around.averaged(rules.Muon(lr=0.1, steps=1), 0.5), around.schedule_free(rules.SGD(lr=0.1))],
)
def test_averages_are_found_in_the_state(x64, rule):
    w = {"a": stream((4, 6), 1)[0], "b": stream((5,), 1)[0], "c": None}
    params = asarrays(w)
    tx = optax.chain(optax.clip(1.0), optax.named_chain(("own", transform(rule))))
    state = tx.init(params)
    oracle, (x,) = Oracle(rule, [w["a"]]), [w["a"]]
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
        (x,) = oracle.step([x], [np.clip(x, -1, 1)])
    found = averaged(params, state)
    assert difference(found["a"], x + oracle.state[0]["average_offset"]) <= 1e-12
    assert difference(found["a"], params["a"]) > 1e-3 and found["c"] is None
    # The fallback keeps no average.
    assert (difference(found["b"], params["b"]) == 0) == (rule.domain == "matrix")


def test_averages_have_the_dtype_of_the_parameters():
    w = jnp.ones((2, 3), "bfloat16")
    tx = transform(around.averaged(rules.SGD(lr=0.5), 0.5))
    _, state = tx.update(w, tx.init(w), w)
    found = averaged(w / 2, state)
    assert found.dtype == w.dtype and difference(found, np.full((2, 3), 0.75)) == 0


def test_a_state_without_averages_is_refused():
    w = {"a": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"no memory average_offset.*around\.averaged"):
        averaged(w, transform(rules.Muon()).init(w))


@pytest.mark.parametrize(
    "rule",
    [rules.GGD(), rules.DGD(), around.schedule_free(rules.SGD()), around.averaged(rules.SGD())],
)
def test_a_move_that_lr_does_not_scale_is_no_direction(rule):
    with pytest.raises(ValueError, match=r"scale_by_rule\(.*: .* use transform"):
        scale_by_rule(rule)
    scale_by_rule(rules.GGD(states=1, objective="dot"))
    scale_by_rule(rules.DGD(solver="explicit"))


def test_params_are_needed_where_a_move_reads_them():
    class Shrinking(Rule):
        """A move towards zero."""

        def update(self, w, g, s, t):
            return g, {}, -0.5 * w

    g = jnp.ones((2, 3))
    tx = transform(Shrinking(lr=1.0))
    with pytest.raises(ValueError, match="not passing `params`"):
        tx.update(g, tx.init(g))
    assert difference(tx.update(g, tx.init(g), 4 * g)[0], np.full((2, 3), -3.0)) == 0


# Memories of any shape.


@pytest.mark.parametrize("rule", rules.ALL, ids=lambda r: r.__name__)
def test_names_of_memories_do_not_depend_on_the_shape(rule):
    for every in {1, 1 + (not rule().context((1, 1)))}:
        own = rule(every=every)
        shapes = [(4, 6), (0, 4), (1, 1)] + [(5,), (1,), (2, 3, 4)] * (rule.domain == "any")
        assert {tuple(own.all_slots(shape)) for shape in shapes} == {tuple(own.all_slots((1, 1)))}


def test_what_is_not_finite_has_no_eigenvectors():
    a = np.stack([np.eye(3), np.full((3, 3), np.nan), np.diag([1.0, np.inf, 2.0])])
    v = jax.jit(Jax(jnp.float32).eigenvectors)(a)
    assert np.array_equal(np.isnan(v).all((1, 2)), [False, True, True])
    assert np.array_equal(np.abs(v[0]), np.eye(3))


@pytest.mark.parametrize("rule", [rules.Shampoo, rules.SOAP, rules.MultiFrequency])
def test_an_inner_identity_is_no_constant_of_the_program(rule):
    tx = transform(rule(block=64))
    text = jax.jit(tx.init).lower(jax.ShapeDtypeStruct((128, 96), jnp.float32)).as_text()
    assert len(text) < 20_000
