"""The numbers of a step in optax, against NumPy on what the step is given and gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import stream

from deepopt import rules
from jax_backend import metrics, scale_by_rule, transform

RULE = rules.M3(lr=0.1, weight_decay=0.1, period=3, steps=1)
compiled = jax.jit(metrics, static_argnums=0)
SHAPES = {"a": (4, 6), "b": (5,), "c": (2, 3, 4)}


def after(tx, steps):
    """Parameters, and the state after steps, and the next gradients."""
    both = {k: stream(shape, steps + 1, i) for i, (k, shape) in enumerate(SHAPES.items())}
    w, g = ({k: jnp.asarray(x[i], "float32") for k, x in both.items()} for i in (0, 1))
    state, update = tx.init(w), jax.jit(tx.update)
    for i in range(steps):
        updates, state = update({k: x[i] for k, x in g.items()}, state, w)
        w = optax.apply_updates(w, updates)
    return w, state, {k: x[steps] for k, x in g.items()}


def flat(tree, names):
    return np.concatenate([np.asarray(tree[k], np.float64).ravel() for k in names])


def rms(tree, names):
    return np.sqrt(np.mean(flat(tree, names) ** 2))


def cosine(memory, g, names):
    m, g = flat(memory, names), flat(g, names)
    return m @ g / np.linalg.norm(m) / np.linalg.norm(g)


def test_they_are_of_each_rule():
    tx = transform(RULE)
    w, state, g = after(tx, 4)
    updates, _ = jax.jit(tx.update)(g, state, w)
    g["a"] = g["a"].at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
    bad = compiled(tx, g, state, w)
    assert bad["0/M3/nonfinite"] == 2 and bad["1/AdamW/nonfinite"] == 0
    g["a"] = after(tx, 4)[2]["a"]
    found = compiled(tx, g, state, w)
    own = state.inner_states["rule"].inner_state.slots
    rest = state.inner_states["fallback"].inner_state.slots
    expected = {
        "0/M3/update_rms": rms(updates, "ac"),
        "0/M3/weight_rms": rms(w, "ac"),
        "0/M3/nonfinite": 0,
        **{f"0/M3/alignment/{k}": cosine(own[k], g, "ac") for k in ("fast", "slow_1", "readout_1")},
        "0/M3/phase/slow_1": 1,
        "1/AdamW/update_rms": rms(updates, "b"),
        "1/AdamW/weight_rms": rms(w, "b"),
        "1/AdamW/nonfinite": 0,
        "1/AdamW/alignment/exp_avg": cosine(rest["exp_avg"], g, "b"),
    }
    assert found.keys() == bad.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == () and found[name].dtype == jnp.float32
        assert float(found[name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_of_one_direction_with_clocks_and_missing_gradients():
    tx = scale_by_rule(rules.AdamW(every=3))
    w, state, g = after(tx, 5)
    del w["c"], g["c"]
    slots = {k: {n: x for n, x in tree.items() if n != "c"} for k, tree in state.slots.items()}
    state, g["b"] = state._replace(slots=slots), None
    found = compiled(tx, g, state)
    updates, _ = jax.jit(tx.update)(g, state)
    assert found["0/AdamW/phase/every"] == 2
    assert float(found["0/AdamW/update_rms"]) == pytest.approx(rms(updates, "a"), rel=1e-5)
    assert "0/AdamW/weight_rms" not in found
    cos = cosine(slots["gradient_sum"], g, "a")
    assert float(found["0/AdamW/alignment/gradient_sum"]) == pytest.approx(cos, rel=1e-5)


def test_zeros_are_aligned_with_nothing():
    tx = transform(rules.HeavyBall())
    w = {"a": jnp.ones((2, 3))}
    (cosine,) = (x for k, x in metrics(tx, w, tx.init(w), w).items() if "alignment" in k)
    assert cosine == 0


def test_rules_in_a_chain_and_a_partition_are_numbered():
    parts = {"x": transform(rules.Lion()), "y": transform(RULE)}
    labels = {"a": "y", "b": "x", "c": "x"}
    tx = optax.chain(optax.clip(1.0), optax.partition(parts, labels), optax.scale(2.0))
    w, state, g = after(tx, 1)
    found = {k for k in jax.eval_shape(lambda: metrics(tx, g, state, w)) if "rms" in k}
    assert found == {f"{x}/{y}_rms" for x in ("0/Lion", "1/M3") for y in ("update", "weight")}


def test_beside_the_step_nothing_is_computed_twice_and_nothing_unasked():
    tx = transform(RULE)
    w, state, g = after(tx, 0)

    def products(step):
        return jax.jit(step).lower(g, state, w).compile().as_text().count(" dot(")

    both = lambda *x: (tx.update(*x), metrics(tx, *x))  # noqa: E731
    assert products(both) == products(tx.update) > 0
    assert "is_finite" not in str(jax.make_jaxpr(tx.update)(g, state, w))
    assert "is_finite" in str(jax.make_jaxpr(both)(g, state, w))


@pytest.mark.parametrize("wrapped", [jax.jit, lambda f: f])
@pytest.mark.parametrize(
    "tx",
    [
        optax.apply_if_finite(transform(RULE), 3),
        optax.MultiSteps(transform(RULE), 2).gradient_transformation(),
        optax.adam(0.1),
    ],
)
def test_steps_out_of_sight_are_refused(tx, wrapped):
    w = {"a": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"metrics sees no step of a rule here.*apply_if_finite"):
        wrapped(lambda: metrics(tx, w, tx.init(w), w))()
