"""Arrays over eight virtual devices; tests/test_jax_sharding.py runs this file in such a process.

One rule of each kind of state by default, all of them under `-m integrations`.
"""

import re
import warnings
from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import DEFAULTS, TOLERANCE, difference, double_precision, stream
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from test_optax_contract import CONTEXTUAL, KWARGS, each, run

import jax_backend
from deepopt import Rule, around, rules
from jax_backend import metrics, scale_by_rule, state_sharding, transform

with warnings.catch_warnings():
    # Its table calls optax's own noisy_sgd in a way that optax warns of.
    warnings.filterwarnings("ignore", "Specifying a key will be required", UserWarning)
    from optax._src import sharding_test

STEPS = 3
# Slow clocks that tick within a few steps, two inner steps to compile.
SEEN = {"lr": 0.05, "weight_decay": 0.1, "period": 2, "root": 2, "steps": 2}
LAYOUT: dict[str, tuple[tuple[int, ...], P]] = {
    "both": ((4, 6), P("x", "y")),
    "conv": ((2, 1, 4, 6), P("y", None, "x")),
    "pair": ((4, 6), P("x", "y")),
    "stack": ((4, 2, 6), P("x", None, "y")),
    "tall": ((16, 2), P(("x", "y"))),
    "vector": ((4,), P("y")),
}
SHAPES = {k: shape for k, (shape, _) in LAYOUT.items()}
SPECS = {k: spec for k, (_, spec) in LAYOUT.items()}
COMPILED: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def _devices_and_compilations():
    assert jax.device_count() == 8
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: COMPILED.append(name)
    )


@cache
def mesh(kind: str) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(getattr(AxisType, kind),) * 2)


def on(kind: str, tree: Any, specs: Any = SPECS) -> Any:
    """Arrays by name, sharded."""
    return {k: jax.device_put(x, NamedSharding(mesh(kind), specs[k])) for k, x in tree.items()}


def given(dtype: str) -> tuple[Any, list[Any]]:
    """Parameters, and the gradients of each step, by name."""
    both = {k: stream(shape, STEPS, i) for i, (k, shape) in enumerate(SHAPES.items())}
    w = {k: jnp.asarray(w, dtype) for k, (w, _) in both.items()}
    return w, [{k: jnp.asarray(g[i], dtype) for k, (_, g) in both.items()} for i in range(STEPS)]


def stepped(tx: Any, w: Any, gradients: list[Any], init: Any = None, **options: Any) -> Any:
    """Parameters and state after these gradients, which compile one step."""

    def step(w, state, g):
        updates, state = tx.update(g, state, w)
        return optax.apply_updates(w, updates), state

    step, state = jax.jit(step, **options), (init or tx.init)(w)
    types = jax.tree.map(jax.typeof, (w, state))
    COMPILED.clear()
    for g in gradients:
        w, state = step(w, state, g)
        assert jax.tree.map(jax.typeof, (w, state)) == types
    assert sum("backend_compile" in name for name in COMPILED) == 1
    return w, state


def assert_placed(tree: Any, shardings: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(shardings)
    for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim), (x.sharding, s)


def _id(x: Any) -> str:
    return x if isinstance(x, str) else type(x).__name__


def cases(*spread: type[Rule]) -> Any:
    """Every rule in float64 and some in float32, all but the spread for the longer run."""
    known = [r.with_values(SEEN) for r in DEFAULTS]
    wide = each(known, [r for r in known if type(r) in spread])
    found = [pytest.param(*x.values, "float64", marks=x.marks) for x in wide]
    narrow = [r for r in known if isinstance(r, rules.AdamW | rules.DeltaMomentum | rules.M3)]
    found += [pytest.param(r, "float32", marks=pytest.mark.integrations) for r in narrow]
    return pytest.mark.parametrize(("rule", "dtype"), found, ids=_id)


# optax's own sharding tests.

BODIES = {
    method.__wrapped__.__name__: method.__wrapped__
    for method in vars(sharding_test.ShardingTest).values()
    if hasattr(method, "__wrapped__") and "optimizer" in method.__wrapped__.__code__.co_varnames
}


def test_there_are_bodies():
    assert len(BODIES) >= 3


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", each(KWARGS, ("sgd", "nadam", "muon", "dgd")))
def test_sharding(monkeypatch, name, body):
    # They skip themselves in a jax older than 0.7.2, and compare versions as texts.
    monkeypatch.setattr(jax, "__version__", "9")
    tx = getattr(jax_backend, name)(**KWARGS[name])
    if name in CONTEXTUAL and "abstract" not in body:
        with pytest.raises(ValueError, match=r"needs the gram of the leaf at params"):
            run(sharding_test.ShardingTest, BODIES[body], tx)
    else:
        run(sharding_test.ShardingTest, BODIES[body], tx)


# Steps.


def assert_same(found: Any, alone: Any, dtype: str) -> None:
    """The parameters, and the kinds of memories: the signs of eigenvectors are free."""
    for x, y in zip(jax.tree.leaves(found[0]), jax.tree.leaves(alone[0]), strict=True):
        assert difference(x, y) <= TOLERANCE[dtype]
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(state)] for _, state in (found, alone)]
    assert kinds[0] == kinds[1]


@cases(rules.AdamW, rules.M3)
def test_a_step_on_an_explicit_mesh_is_that_of_one_device(rule, dtype):
    with double_precision(dtype == "float64"):
        tx, (w, g) = transform(rule), given(dtype)
        sharded = on("Explicit", w)
        found = stepped(tx, sharded, [on("Explicit", x) for x in g])
        assert_placed(found[0], {k: x.sharding for k, x in sharded.items()})
        assert_placed(found[1], state_sharding(tx, sharded))
        assert_same(found, stepped(tx, w, g), dtype)


@cases(rules.Muon)
def test_the_compiler_may_shard_a_step(rule, dtype):
    with double_precision(dtype == "float64"):
        tx, (w, g) = transform(rule), given(dtype)
        sharded = on("Auto", w)
        shardings = {k: x.sharding for k, x in sharded.items()}
        places = shardings, state_sharding(tx, sharded)
        found = stepped(
            tx,
            sharded,
            [on("Auto", x) for x in g],
            init=jax.jit(tx.init, out_shardings=places[1]),
            in_shardings=(*places, shardings),
            out_shardings=places,
        )
        assert_placed(found, places)
        assert_same(found, stepped(tx, w, g), dtype)


@pytest.mark.integrations
def test_without_jit_it_is_the_same():
    w, g = given("float32")
    tx, sharded = transform(rules.Muon(lr=0.05, steps=2)), on("Explicit", w)
    for own in (tx, optax.inject_hyperparams(jax_backend.muon, static_args="steps")(0.05, steps=2)):
        with jax.set_mesh(mesh("Explicit")):
            updates, state = own.update(on("Explicit", g[0]), own.init(sharded), sharded)
        alone, _ = tx.update(g[0], tx.init(w), w)
        assert_placed(updates, {k: x.sharding for k, x in sharded.items()})
        assert_placed(state, state_sharding(own, sharded))
        assert_same((updates, ()), (alone, ()), "float32")


@pytest.mark.integrations
def test_a_norm_and_a_context_are_of_all_devices():
    w, g = given("float32")
    w, g = ({k: x[k] for k in ("both", "vector")} for x in (w, g[0]))
    gram = jnp.diag(jnp.arange(1.0, 7.0))
    placed = jax.device_put(gram, NamedSharding(mesh("Explicit"), P("y")))
    for tx in (transform(around.clipped_globally(rules.Muon(), 0.1)), transform(rules.DGD())):
        alone, _ = tx.update(g, tx.init(w), w, context={"gram": {"both": gram, "vector": None}})
        sharded, context = on("Explicit", w), {"gram": {"both": placed, "vector": None}}
        found, _ = tx.update(on("Explicit", g), tx.init(sharded), sharded, context=context)
        assert_same((found, ()), (alone, ()), "float32")


@pytest.mark.integrations
def test_metrics_are_of_all_devices():
    w, g = given("float32")
    tx, sharded = transform(rules.M3(steps=2)), on("Explicit", w)
    numbers = jax.jit(metrics, static_argnums=0)
    alone = numbers(tx, g[0], tx.init(w), w)
    found = numbers(tx, on("Explicit", g[0]), tx.init(sharded), sharded)
    assert found.keys() == alone.keys()
    for name, x in found.items():
        assert abs(x - alone[name]) <= TOLERANCE["float32"], name


def test_memories_stay_where_they_are_put():
    tx = scale_by_rule(rules.SOAP(period=4))
    w = on("Explicit", {"tall": given("float32")[0]["tall"]})["tall"]
    state = tx.init(w)
    rows = NamedSharding(mesh("Explicit"), P(None, "x", None))
    state = state._replace(slots=state.slots | {"left": jax.device_put(state.slots["left"], rows)})
    _, after = jax.jit(tx.update)(w, state)
    assert_placed(after, jax.tree.map(lambda x: x.sharding, state))
    assert not after.slots["left"].sharding.is_fully_replicated


# Exchanges.

EXCHANGES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def exchanges(tx: Any, shapes: list[tuple[int, ...]], spec: P) -> Counter[str]:
    """What the devices exchange in a step, by kind."""
    sharding = NamedSharding(mesh("Explicit"), spec)
    w = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]
    state = jax.eval_shape(tx.init, w)
    text = jax.jit(tx.update).lower(w, state, w).compile().as_text()
    return Counter(re.findall(rf"({EXCHANGES})(?:-start)?\(", text))


def test_matrices_are_exchanged_twice():
    tx = transform(rules.Muon(steps=2))
    assert exchanges(tx, [(8, 16)] * 3, P("x")) == {"all-to-all": 2}
    # One alone is computed by every device, from one gather.
    assert exchanges(tx, [(8, 16)], P("x")) == {"all-gather": 1}


@pytest.mark.integrations
@pytest.mark.parametrize(
    ("shape", "spec", "found"),
    [
        ((8, 16), P("x"), {"all-to-all": 2}),
        ((8, 16), P(None, ("x", "y")), {"all-to-all": 2}),
        ((8, 16), P("x", "y"), {"all-to-all": 4}),
        # Whole matrices stay where they are.
        ((8, 8, 16), P("x"), {}),
        ((8, 16), P(), {}),
    ],
)
def test_exchanges_go_by_the_axes_that_matrices_are_sharded_along(shape, spec, found):
    assert exchanges(transform(rules.Muon()), [shape] * 5, spec) == found


# The sharding of a state.


@pytest.mark.parametrize("name", each(KWARGS))
def test_an_abstract_state_has_the_types_that_state_sharding_says(name):
    tx = getattr(jax_backend, name)(**KWARGS[name])
    for kind in ("Explicit", "Auto"):
        w = {
            k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh(kind), SPECS[k]))
            for k, s in SHAPES.items()
        }
        state, found = jax.eval_shape(tx.init, w), state_sharding(tx, w)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        specs = state_sharding(tx, w, SPECS)
        for x, s, spec in zip(*map(jax.tree.leaves, (state, found, specs)), strict=True):
            assert s.mesh == mesh(kind) and s.spec == spec
            types = {P(*x.sharding.spec)} if x.sharding and kind == "Explicit" else set()
            assert types <= {spec}
        assert any(s.spec != P(*[None] * len(s.spec)) for s in jax.tree.leaves(found)) or not [
            x for x in jax.tree.leaves(state) if x.ndim
        ]


def test_of_a_foreign_transformation_and_of_one_device():
    w = on("Auto", given("float32")[0])
    tx = optax.chain(optax.clip(1.0), optax.adam(0.1))
    found = state_sharding(tx, w)
    assert found[1][0].mu == found[1][0].nu
    for k, s in found[1][0].mu.items():
        assert s.is_equivalent_to(w[k].sharding, w[k].ndim)
    assert found[1][0].count.spec == P()
    one = SingleDeviceSharding(jax.devices()[3])
    assert {*jax.tree.leaves(state_sharding(tx, w, one))} == {one}
    assert {*jax.tree.leaves(state_sharding(transform(rules.M3()), w, one))} == {one}


@pytest.mark.parametrize("given", [None, {"a": P("x"), "b": "x"}])
def test_what_is_no_sharding_is_refused(given):
    w = {"a": jnp.ones((4, 4)), "b": jax.ShapeDtypeStruct((4,), jnp.float32)}
    words = (
        rf"params\['b'\] has sharding={'None' if given is None else repr('x')}; expected a Named"
    )
    with pytest.raises(ValueError, match=words):
        state_sharding(transform(rules.AdamW()), w, given)
