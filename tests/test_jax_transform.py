"""The optax binding: state, dtypes, schedules, clocks, masks, errors, and optax's wrappers."""

import inspect
import itertools
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from cases import DEFAULTS, difference, double_precision, scanned, stream

import jax_backend
from deepopt import Oracle, Rule, rules
from deepopt.rule import scalar_names
from jax_backend import RuleState, alias, scale_by_rule, transform
from jax_backend.step import ticking_together
from torch_backend import Optimizer

SPELLED = {name.replace("_", ""): value for name, value in vars(jax_backend).items()}
ALIASES: dict[type[Rule], Any] = {rule: SPELLED[rule.__name__.lower()] for rule in rules.ALL}
# lr large enough to see, slow clocks that tick within a few steps, one inner step to compile.
SEEN = {"lr": 0.05, "weight_decay": 0.1, "decoupled": True, "period": 2, "root": 2, "steps": 1}
EVERY = [rule.with_values(SEEN) for rule in DEFAULTS]
NESTED = rules.M3(lr=0.05, slow=(0.9, 0.8), period=(2, 3), weight=(0.3, 0.2), steps=1)
SHAPES = {
    "conv": (2, 1, 3, 4),
    "empty": (0, 4),
    "matrix": (4, 6),
    "scalar": (),
    "stack": (2, 3, 5),
    "vector": (5,),
}
each_rule = pytest.mark.parametrize("rule", EVERY, ids=lambda r: type(r).__name__)
# One rule of each kind of state, for what does not depend on the rule: no memory, tables, a number,
# with a fallback, a network, blocks and roots with a clock, several clocks.
STATES = (rules.SGD, rules.AdamW, rules.NAdam, rules.Muon, rules.DeepMomentum, rules.Shampoo)
each_state = pytest.mark.parametrize(
    "rule", [r for r in EVERY if type(r) in (*STATES, rules.M3)], ids=lambda r: type(r).__name__
)
each_name = pytest.mark.parametrize("name", ["bfloat16", "float64"])


@pytest.fixture
def x64():
    with double_precision():
        yield


def streams(shapes: dict[str, tuple[int, ...]], steps: int) -> tuple[Any, Any]:
    """Parameters by name, and for each step the gradients by name."""
    both = {k: stream(shape, steps, seed) for seed, (k, shape) in enumerate(shapes.items())}
    return {k: w for k, (w, _) in both.items()}, {k: g for k, (_, g) in both.items()}


def asarrays(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def path(tx: optax.GradientTransformation, w: Any, g: Any) -> Any:
    """The parameters after each step."""
    return scanned(tx, asarrays(w), asarrays(g))


@cache
def plain(rule: Rule) -> tuple[np.ndarray, np.ndarray, Any]:
    """A matrix, its gradients and the path of a rule in float64."""
    w, g = stream((4, 6), 6)
    return w, g, path(transform(rule), w, g)


def program_of(tx: optax.GradientTransformation) -> str:
    """The text of one step on a matrix, which holds every static choice."""
    w, context = jnp.ones((4, 6)), {"gram": jnp.eye(6)}
    update = partial(tx.update, context=context)
    return str(jax.make_jaxpr(update)(w, tx.init(w), w))


def assert_same(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert difference(x, y) <= tolerance


def oracle_path(rule: Rule, w: np.ndarray, g: np.ndarray, **scalars: Any) -> np.ndarray:
    """The oracle on the matrices that a leaf is seen as."""
    shape = w.shape
    if rule.domain == "matrix" and w.ndim < 2:
        rule = rules.AdamW(lr=rule.lr, weight_decay=rule.weight_decay)
    elif rule.domain == "matrix" and w.ndim == 3:
        return np.stack([oracle_path(rule, w[i], g[:, i]) for i in range(len(w))], 1)
    elif rule.domain == "matrix" and w.ndim > 3:
        w, g = w.reshape(-1, shape[-1]), g.reshape(len(g), -1, shape[-1])
    oracle, result = Oracle(rule, [w]), []
    for k, step in enumerate(g):
        (w,) = oracle.step([w], [step], **{n: at(k) for n, at in scalars.items()})
        result.append(w.reshape(shape))
    return np.stack(result)


def states(state: Any) -> list[RuleState]:
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, RuleState))
    return [x for x in found if isinstance(x, RuleState)]


# Values and state.


@each_rule
def test_leaves_of_every_rank_equal_the_oracle(x64, rule):
    w, g = streams(SHAPES, 5)
    found = path(ALIASES[type(rule)](**given(rule)), w, g)
    for name, x in found.items():
        assert difference(x, oracle_path(rule, w[name], g[name])) <= 1e-12, name
    assert found["empty"].shape == (5, 0, 4)


def given(rule: Rule) -> dict[str, Any]:
    """The arguments by which an alias makes this rule of the list above."""
    own = {k: v for k, v in SEEN.items() if hasattr(rule, k)}
    return {"learning_rate" if k == "lr" else k: v for k, v in own.items()}


@each_rule
def test_the_state_is_a_struct_of_trees_and_counts_safely(rule):
    w = asarrays(streams(SHAPES, 1)[0])
    tx = transform(rule)
    *_, own = states(tx.init(w))
    assert own.count.dtype == jnp.int32 and own.count.shape == () and own.count == 0
    assert list(own.slots) == list(rule.slots((4, 6)))
    seen = w
    if rule.domain == "matrix":
        seen = {k: x if x.ndim > 1 else optax.MaskedNode() for k, x in w.items()}
    for slot in own.slots.values():
        assert jax.tree.structure(slot) == jax.tree.structure(seen)
    w = {"a": jnp.ones((2, 3))}
    tx = transform(rule, every=1)
    last = jnp.iinfo(jnp.int32).max
    late = jax.tree.map(
        lambda s: s._replace(count=jnp.asarray(last)) if isinstance(s, RuleState) else s,
        tx.init(w),
        is_leaf=lambda s: isinstance(s, RuleState),
    )
    after = tx.update(w, late, w)[1]
    assert [s.count for s in states(after)] == [last] * len(states(after))


@each_name
@each_rule
def test_state_and_updates_keep_their_dtypes(rule, name):
    with double_precision(name == "float64"):
        w = asarrays(streams(SHAPES, 1)[0], name)
        g = asarrays(w, "bfloat16")
        tx = transform(rule)
        state = jax.eval_shape(tx.init, w)
        assert {x.dtype for s in states(state) for x in jax.tree.leaves(s.slots)} <= {
            jnp.dtype("float64" if name == "float64" else "float32")
        }

        def step(w, g, state):
            # A branch of another dtype or weak type is an error here.
            return jax.lax.cond(True, lambda: tx.update(g, state, w), lambda: (g, state))

        for gradients in (w, g):
            updates, after = jax.eval_shape(step, w, gradients, state)
            assert after == state
            assert [x.dtype for x in jax.tree.leaves(updates)] == [
                x.dtype for x in jax.tree.leaves(gradients)
            ]


@each_rule
def test_init_takes_abstract_values(rule):
    w = asarrays(streams(SHAPES, 1)[0])
    tx = transform(rule)
    abstract = jax.eval_shape(lambda: w)
    real = jax.eval_shape(lambda: tx.init(w))
    assert jax.eval_shape(tx.init, abstract) == real
    assert jax.eval_shape(lambda: tx.init(abstract)) == real


def test_arithmetic_is_wide_enough_for_weights_and_gradients(x64):
    w, g = streams({"a": (4, 6)}, 1)
    wide = transform(rules.AdamW(lr=0.05))
    params, narrow = asarrays(w), asarrays(g, "float32")
    state = wide.init(params)
    step = jax.tree.map(lambda x: x[0], narrow)
    updates, _ = wide.update(step, state, params)
    expected, _ = wide.update(asarrays(step, "float64"), state, params)
    assert updates["a"].dtype == jnp.float32
    assert_same(updates, asarrays(expected, "float32"), 0.0)


@each_state
def test_empty_leaves_cost_nothing(rule):
    tx, w = transform(rule), jnp.ones((0, 4))
    _, outside = conditionals(tx, w)
    assert not {"mul", "sub", "dot_general"} & set(outside)


# Schedules and hyperparameters.


@pytest.mark.parametrize("rule", [*EVERY, NESTED], ids=lambda r: str(r)[:14])
def test_every_scalar_may_follow_a_schedule(x64, rule):
    """All scalars fall at once, each at its own speed; tuples element by element."""
    schedules: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for i, name in enumerate(scalar_names(type(rule))):
        own = getattr(rule, name)
        several = own if isinstance(own, tuple) else (own,)
        speeds = [0.01 * (i + 1 + 5 * j) for j in range(len(several))]
        falls = tuple(
            lambda k, x=x, v=v: x - x * v * k for x, v in zip(several, speeds, strict=True)
        )
        schedules[name] = falls if isinstance(own, tuple) else falls[0]
        together = lambda k, falls=falls: tuple(fall(k) for fall in falls)  # noqa: E731
        values[name] = together if isinstance(own, tuple) else falls[0]
    assert len(schedules) >= 2
    w, g, constant = plain(rule)
    found = path(transform(rule, **schedules), w, g)
    assert difference(found, oracle_path(rule, w, g, **values)) <= 1e-12
    assert difference(found, constant) > 1e-4


@each_state
def test_a_constant_schedule_or_array_is_the_constant(rule):
    names = ("lr", "weight_decay")
    expected = program_of(transform(rule))
    constant = {k: optax.constant_schedule(getattr(rule, k)) for k in names}
    assert program_of(transform(rule, **constant)) == expected
    number = {k: np.float64(getattr(rule, k)) for k in names}
    assert program_of(transform(rule, **number)) == expected
    w = jnp.ones((4, 6))
    (one,) = (tx.update(w, tx.init(w), w)[0] for tx in [transform(rule)])
    tx = transform(rule, **{k: jnp.asarray(getattr(rule, k)) for k in names})
    assert_same(tx.update(w, tx.init(w), w)[0], one, 1e-6)


def test_a_tuple_may_change_its_length():
    w, g = stream((4, 6), 4)
    one = rules.M3(period=2, steps=1)
    several = transform(one, slow=(lambda _: 0.9, 0.8), period=[2, 3], weight=(0.3, lambda _: 0.2))
    expected = transform(rules.M3(slow=(0.9, 0.8), period=(2, 3), weight=(0.3, 0.2), steps=1))
    assert_same(path(several, w, g), path(expected, w, g), 1e-6)
    single = transform(NESTED, slow=0.7, period=2, weight=np.float32(0.5))
    expected = transform(rules.M3(lr=0.05, slow=0.7, period=2, weight=0.5, steps=1))
    assert program_of(single) == program_of(expected)
    assert program_of(transform(NESTED, slow=lambda _: 0.7, period=2, weight=0.5)) == program_of(
        expected
    )


@each_state
def test_nothing_is_traced_twice(rule):
    """Neither on the second call nor when an injected hyperparameter changes."""
    tx = optax.inject_hyperparams(ALIASES[type(rule)])(learning_rate=0.1, weight_decay=0.2)
    w = asarrays({"a": stream((3, 4), 1)[0], "b": stream((3,), 1)[0]})
    traces = []

    @jax.jit
    def step(w, state):
        traces.append(1)
        updates, state = tx.update(w, state, w)
        return updates, state

    state = tx.init(w)
    first, _ = step(w, state)
    for name in ("learning_rate", "weight_decay"):
        state.hyperparams[name] *= 3
        updates, after = step(w, state)
        assert difference(updates["a"], first["a"]) > 0.1
    step(w, after)
    assert len(traces) == 1


def test_injected_hyperparameters_are_the_scalars():
    tx = optax.inject_hyperparams(jax_backend.m3)(1e-2)
    names = set(tx.init(jnp.ones((2, 2))).hyperparams)
    assert names == set(scalar_names(rules.M3)) - {"lr"} | {"learning_rate"}
    with pytest.raises(TypeError, match=r"M3\(period=.*'period' in static_args"):
        optax.inject_hyperparams(jax_backend.m3)(1e-2, period=4).init(jnp.ones((2, 2)))
    static = optax.inject_hyperparams(jax_backend.m3, static_args="period")(1e-2, period=4)
    assert "period" not in static.init(jnp.ones((2, 2))).hyperparams


def test_static_hyperparameters_may_be_given_too():
    expected = program_of(transform(rules.M3(period=2, nesterov=False)))
    assert program_of(transform(rules.M3(), period=2, nesterov=False)) == expected
    assert program_of(jax_backend.m3(period=np.int64(2), nesterov=False)) == expected
    assert program_of(transform(rules.M3(), period=2)) != expected


# Clocks.


def equations(jaxpr: Any) -> list[Any]:
    """All equations of a jaxpr and of the jaxprs inside, those of conditionals left out."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        if eqn.primitive.name != "cond":
            inner = [getattr(x, "jaxpr", x) for x in eqn.params.values()]
            found += [e for x in inner if hasattr(x, "eqns") for e in equations(x)]
    return found


def conditionals(tx: optax.GradientTransformation, params: Any) -> tuple[list[Any], list[Any]]:
    """The conditionals of one step, and what runs outside of them."""
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    every = equations(jaxpr)
    conds = [e for e in every if e.primitive.name == "cond"]
    return conds, [e.primitive.name for e in every if e.primitive.name != "cond"]


def products(cond: Any) -> list[int]:
    """The matrix products in each branch."""
    names = [[e.primitive.name for e in equations(b.jaxpr)] for b in cond.params["branches"]]
    return sorted(n.count("dot_general") for n in names)


def test_a_slow_branch_runs_on_its_tick_only():
    w = {"a": jnp.ones((4, 6)), "b": jnp.ones((5, 3)), "c": jnp.ones(3)}
    tx = transform(rules.M3())
    conds, outside = conditionals(tx, w)
    (cond,) = conds
    # The fast read-outs of both matrices on every step, and the slow ones, as costly, on a tick.
    fast = outside.count("dot_general")
    assert fast > 0 and products(cond) == [0, fast]
    lowered = jax.jit(tx.update).lower(w, tx.init(w), w)
    assert lowered.as_text().count("stablehlo.case") == 1
    assert " conditional(" in lowered.compile().as_text()


def test_conditionals_are_one_for_all_leaves_of_a_phase():
    w = [jnp.ones((4, 6))] * 5
    assert len(conditionals(transform(rules.M3(period=3)), w)[0]) == 1
    assert len(conditionals(transform(rules.M3(period=3, stagger=True)), w)[0]) == 3
    assert len(conditionals(transform(rules.M3(period=9, stagger=True)), w)[0]) == 5
    (cond,) = conditionals(transform(NESTED), w[:1])[0]
    # Two levels that tick together are one batch.
    assert products(cond) == [0, 3, 3, 3]
    (cond,) = conditionals(transform(rules.AdamW(every=3)), w)[0]
    work = [{e.primitive.name for e in equations(b.jaxpr)} for b in cond.params["branches"]]
    assert sorted("sqrt" in names for names in work) == [False, True]


@each_rule
def test_rules_without_clocks_have_no_conditional(rule):
    conds, _ = conditionals(transform(rule), jnp.ones((4, 6)))
    assert len(conds) == bool(rule.clocks())


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("periods", [(), (1,), (4,), (2, 3), (2, 4), (6, 4, 9), (3, 3, 1)])
def test_the_sets_of_clocks_are_those_that_tick(every, periods):
    rule = rules.M3(period=periods, every=every) if periods else rules.SGD(every=every)
    clocks = {"every": every} | {k: every * n for k, n in rule.clocks().items()}
    steps = range(1, every * int(np.lcm.reduce(periods or (1,))) + 1)
    seen = {rule.ticks(step) for step in steps}
    assert ticking_together(clocks) == sorted(seen, key=sorted)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("period", [3, (2, 3)])
def test_staggered_clocks_go_by_the_position_as_in_torch(x64, period, every):
    """Vectors in between belong to the fallback and are not counted, here as there."""
    rule = rules.M3(lr=0.05, period=period, steps=1, stagger=True, every=every)
    shapes = [(4, 6), (3,), (4, 6), (4, 6)]
    both = [stream(shape, 9, seed) for seed, shape in enumerate(shapes)]
    w, g = [w for w, _ in both], [g for _, g in both]
    found = path(transform(rule), w, g)
    params = [torch.nn.Parameter(torch.tensor(x)) for x in w]
    optimizer, result = Optimizer(params, rule), []
    for k in range(9):
        for p, x in zip(params, g, strict=True):
            p.grad = torch.tensor(x[k])
        optimizer.step()
        result.append([p.detach().numpy().copy() for p in params])
    for i in range(len(shapes)):
        assert difference(found[i], np.stack([x[i] for x in result])) <= 1e-12
    still = path(transform(rule, stagger=False), w, g)
    assert difference(found[2], still[2]) > 1e-6


# Inside jax and optax.


@each_state
def test_vmap_equals_each_run_alone(rule):
    w, g = streams({"a": (3, 4, 5), "b": (3, 6)}, 3)
    tx = transform(rule)
    w, g = asarrays(w), asarrays(jax.tree.map(lambda x: np.moveaxis(x, 1, 0), g))

    def run(w, g):
        def one(carry, g):
            updates, state = tx.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(one, (w, tx.init(w)), g)[0]

    together, alone = jax.jit(jax.vmap(run))(w, g), jax.jit(run)
    for i in range(3):
        one = alone(*jax.tree.map(lambda x, i=i: x[i], (w, g)))
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), one, 2e-5)


@each_rule
def test_the_parts_chained_are_the_whole(x64, rule):
    parts = optax.chain(
        optax.clip(1e9),
        scale_by_rule(rule),
        optax.add_decayed_weights(rule.weight_decay),
        optax.scale_by_learning_rate(rule.lr),
    )
    w, g, whole = plain(rule)
    assert_same(path(parts, w, g), whole)


@each_state
def test_multi_steps_of_sums_is_every(x64, rule):
    w, g, _ = plain(rule)
    # optax older than 0.2.8 has no dtype of its own for the sums.
    known = inspect.signature(optax.MultiSteps).parameters
    wide = {"accumulator_dtype": "float64"} if "accumulator_dtype" in known else {}
    steps = optax.MultiSteps(transform(rule), 2, False, **wide)
    found = path(steps.gradient_transformation(), w, g)
    assert_same(path(transform(rule, every=2), w, g), found)
    assert difference(found[0], w) == 0 and difference(found[1], w) > 1e-3


@each_state
def test_apply_if_finite_restores_every_memory(x64, rule):
    w, g, clean = plain(rule)
    bad = np.insert(g, [2, 5], np.nan, axis=0)
    tx = optax.apply_if_finite(transform(rule), max_consecutive_errors=3)
    assert_same(np.delete(path(tx, w, bad), [2, 6], axis=0), np.asarray(clean))


@each_state
def test_masked_partitioned_and_missing_leaves(x64, rule):
    w, g = streams({"a": (4, 6), "b": (3, 5), "c": (6,), "d": (2, 2)}, 4)
    w["none"] = g["none"] = None
    labels = {"a": "ours", "b": "theirs", "c": "ours", "none": None}
    tx = optax.partition(
        {"ours": transform(rule), "theirs": optax.sgd(0.1)}, {**labels, "d": optax.MaskedNode()}
    )
    mask = {**dict.fromkeys("abc", True), "d": False, "none": None}
    found = path(optax.masked(tx, mask), w, g)
    ours = path(transform(rule), *({k: x[k] for k in "ac"} for x in (w, g)))
    assert_same({k: found[k] for k in "ac"}, ours)
    assert_same(found["b"], w["b"] - 0.1 * np.cumsum(g["b"], 0))
    assert_same(found["d"], w["d"] + np.cumsum(g["d"], 0))
    assert found["none"] is None


@pytest.mark.parametrize("rule", [r for r in EVERY if r.domain == "any"], ids=str)
def test_a_parameter_without_gradient_stays_as_it_is(rule):
    w = {"a": jnp.ones((3, 4)), "b": jnp.ones(2)}
    tx = transform(rule, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    state = tx.init(w)
    updates, after = jax.jit(tx.update)({"a": w["a"], "b": None}, state, w)
    assert updates["b"] is None and after.count == 1
    for name, slot in after.slots.items():
        assert np.array_equal(slot["b"], state.slots[name]["b"])
        assert not np.array_equal(slot["a"], state.slots[name]["a"])
    full, _ = tx.update(w, state, w)
    assert_same(updates["a"], full["a"], 1e-6)


@each_rule
def test_map_params_finds_the_memories(rule):
    w = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 5))}
    tx = transform(rule)
    state = jax.eval_shape(tx.init, w)
    specs = {"a": jax.sharding.PartitionSpec("x"), "b": jax.sharding.PartitionSpec(None, "y")}
    mapped = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )  # fmt: skip
    *_, own = states(mapped)
    assert own.count is None
    assert own.slots == {name: specs for name in rule.slots((3, 4))}


# Weight decay.


@each_state
def test_the_mask_spares_leaves_from_weight_decay(rule):
    rule = rule.with_values({"period": 1})
    w, _ = streams({"a": (4, 6), "b": (3, 5), "c": (6,), "d": (2,)}, 1)
    w = asarrays({"x": {k: w[k] for k in "ab"}, "y": {k: w[k] for k in "cd"}})

    def one(**given: Any) -> dict[str, Any]:
        tx = transform(rule, **given)
        updates, _ = tx.update(w, tx.init(w), w)
        return updates["x"] | updates["y"]

    decayed, plain = one(), one(weight_decay=0.0)
    masks: list[tuple[Any, str]] = [
        ({"x": {"a": True, "b": False}, "y": {"c": True, "d": False}}, "bd"),
        ({"x": True, "y": False}, "cd"),
        (lambda tree: jax.tree.map(lambda x: x.shape[0] in (4, 2), tree), "bc"),
    ]
    for mask, spared in masks:
        for k, update in one(mask=mask).items():
            assert_same(update, plain[k] if k in spared else decayed[k], 0.0)
            assert difference(plain[k], decayed[k]) > 1e-3


@each_rule
def test_params_are_needed_where_they_are_read(rule):
    g, rule = jnp.ones((3, 4)), rule.with_values({"period": 1})
    with pytest.raises(ValueError) as theirs:
        tx = optax.add_decayed_weights(0.1)
        tx.update(g, tx.init(g), None)
    coupled = rule.with_values({"decoupled": False})
    needs = [
        transform(rule),
        transform(rule, weight_decay=lambda k: 0.0 * k),
        transform(coupled),
        transform(coupled, weight_decay=0.0),
        scale_by_rule(coupled),
    ]
    for tx in needs:
        with pytest.raises(ValueError) as ours:
            tx.update(g, tx.init(g))
        assert str(ours.value) == str(theirs.value)
    for tx in (transform(rule, weight_decay=0.0), scale_by_rule(rule)):
        assert_same(tx.update(g, tx.init(g))[0], tx.update(g, tx.init(g), g)[0], 0.0)


def test_the_fallback_takes_the_rest(x64):
    w, g = streams({"a": (4, 6), "b": (5,)}, 4)
    halved = lambda k: 0.1 * 0.5**k  # noqa: E731
    found = path(jax_backend.muon(halved, weight_decay=0.1), w, g)
    adamw = rules.AdamW(lr=0.1, weight_decay=0.1)
    assert difference(found["b"], oracle_path(adamw, w["b"], g["b"], lr=halved)) <= 1e-12
    lion = rules.Lion(lr=0.3)
    found = path(jax_backend.muon(halved, weight_decay=0.1, fallback=lion), w, g)
    assert difference(found["b"], oracle_path(lion, w["b"], g["b"])) <= 1e-12


# Errors and signatures.


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: jax_backend.adamw(-0.1), ValueError, r"AdamW\(lr=-0.1\) must be"),
        (lambda: jax_backend.adamw(betas=(0.9, 1.5)), ValueError, r"betas=\(0.9, 1.5\)"),
        (lambda: jax_backend.adamw(betas=(0.9, lambda _: 0.9, 0.9)), ValueError, "2 numbers"),
        (lambda: jax_backend.muon(momentum=1.0), ValueError, r"Muon\(momentum=1.0\)"),
        (lambda: jax_backend.m3(period=0), ValueError, r"M3\(period=0\) must be an integer >= 1"),
        (lambda: jax_backend.m3(slow=(lambda _: 0.9, 2.0)), ValueError, r"slow=\(0.9, 2.0\)"),
        (lambda: jax_backend.m3(scale="rsm"), ValueError, r"scale='rsm'.*'rms'"),
        (lambda: jax_backend.muon(momentun=0.9), TypeError, "'momentun'; did you mean 'momentum'"),
        (lambda: transform(rules.SGD(), xyzzy=1), TypeError, "'xyzzy'; it has"),
        (lambda: scale_by_rule(rules.SGD(), lrr=1), TypeError, "'lrr'; did you mean 'lr'"),
        (lambda: jax_backend.muon(0.1, lr=0.1), TypeError, "lr"),
        (lambda: jax_backend.m3(period=lambda _: 3), TypeError, r"M3\(period=.*must be known"),
        (lambda: transform(rules.SGD(), fallback=rules.Lion()), TypeError, "fallback=Lion"),
        (lambda: jax_backend.sgd(np.ones(2)), ValueError, "size"),
    ],
    ids=itertools.count(),
)
def test_bad_values_are_errors_at_construction(make, error, words):
    with pytest.raises(error, match=words):
        make()


@each_rule
def test_bad_leaves_are_errors_at_init(rule):
    tx = scale_by_rule(rule)
    w = {"ok": jnp.ones((2, 3)), "layer": [jnp.ones(5)]}
    if rule.domain == "matrix":
        with pytest.raises(ValueError, match=r"needs matrices; .*\['layer'\]\[0\].*\(5,\)"):
            tx.init(w)
        with pytest.raises(ValueError, match=r"params.*shape \(\)"):
            tx.init(jnp.ones(()))
        with pytest.raises(ValueError, match=r"needs matrices"):
            transform(rule, fallback=rules.Muon()).init(w)
    for dtype in ("complex64", "int32"):
        with pytest.raises(ValueError, match=rf"params\['a'\] is of dtype {dtype}"):
            transform(rule).init({"a": jnp.ones((2, 2), dtype)})
    wide = transform(rule, lr=jnp.ones(2))
    with pytest.raises(TypeError, match="reshape"):
        wide.update(jnp.ones((2, 2)), wide.init(jnp.ones((2, 2))), jnp.ones((2, 2)))


@pytest.mark.parametrize("cls", ALIASES, ids=lambda c: c.__name__)
def test_signatures_are_true(cls):
    make = ALIASES[cls]
    parameters = dict(inspect.signature(make).parameters)
    first = parameters.pop("learning_rate")
    assert first.annotation == optax.ScalarOrSchedule and first.default == cls().lr
    options = {"mask", "fallback"} if cls.domain == "matrix" else {"mask"}
    assert {parameters.pop(k).default for k in options} == {None}
    own = {k: v for k, v in vars(cls()).items() if k != "lr"}
    assert {k: p.default for k, p in parameters.items()} == own
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {k: p.default for k, p in parameters.items()}
    assert program_of(make(first.default, **defaults)) == program_of(transform(cls()))
    assert getattr(jax_backend, make.__name__) is make
    assert make.__doc__ and make.__doc__.startswith(cls.__doc__)


def test_every_rule_has_an_alias():
    assert len({*ALIASES.values()}) == len(rules.ALL)
    assert alias(rules.SGD, "mine").__name__ == "mine"


def test_an_update_of_another_shape_is_refused():
    params = {"w": jnp.ones((8, 4))}
    for tx in (jax_backend.adamw(), jax_backend.m3()):
        with pytest.raises(ValueError, match=r"shape \(8, 4\) has an update of \(4, 8\)"):
            tx.update({"w": jnp.ones((4, 8))}, tx.init(params), params)
