"""A step in three parts, over shards, is the step."""

import numpy as np
import pytest
from cases import CASES, contexts, difference, stream

from deepopt import rules
from deepopt.algebra import fold
from deepopt.oracle import NumPy, Oracle, canonical
from deepopt.split import replicated, split, variants

SHARDS = 3


class Shard(NumPy):
    """NumPy where an array of one value has no shape, which would be that of the whole."""

    def array(self, kind, shape, value):
        assert kind == "full"
        return np.float64(value)


def sharded_step(rule, w, g, state, ticking, scalars, context):
    """One step of a parameter cut along its first axis; the new w and state."""
    shape = canonical(w.shape)
    parts = split(rule, shape, ticking)
    whole = {"w": w.reshape(shape), "g": g.reshape(shape), **state}
    common = {k: x for k, x in state.items() if k in replicated(rule, shape)}

    def shards_of(values):
        cut = {k: np.array_split(x, SHARDS) for k, x in values.items() if np.shape(x) == shape}
        one = {k: x for k, x in values.items() if k not in cut and np.size(x) == 1}
        return [{k: x[i] for k, x in cut.items()} | one for i in range(SHARDS)]

    def on_shards(program, inputs):
        kept = [{k: own[k] for k in program.inputs if k in own} for own in inputs]
        out = [fold(program, Shard(), {**x, **common, **scalars}) for x in kept]
        return {k: [x[k] for x in out] for k in out[0]}

    def together(values, own):
        full = [np.broadcast_to(x, np.shape(y)) for x, y in zip(values, own, strict=True)]
        return np.concatenate(full)

    before = on_shards(parts.before, shards_of(whole))
    pieces = [x["w"] for x in shards_of(whole)]
    gathered = {k: together(x, pieces) for k, x in before.items() if k.startswith("gathered")}
    mine = {k: state[k] for k in parts.whole.inputs if k in state}
    assert not any(np.shape(x) == shape for x in mine.values())
    middle = fold(parts.whole, NumPy(), {**gathered, **mine, **context, **scalars})
    back = {k: x for k, x in middle.items() if k.startswith("scattered")}
    after = on_shards(
        parts.after, [a | b for a, b in zip(shards_of(whole), shards_of(back), strict=True)]
    )
    out = {k: x for k, x in (before | after).items() if not k.startswith("gathered")}
    new = {k: together(x, pieces) if k not in common else x[0] for k, x in out.items()}
    new |= {k: x for k, x in middle.items() if k not in back}
    update = new.pop("update", 0.0)
    return (whole["w"] + update).reshape(w.shape), {**state, **new}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_step_as_the_whole(case):
    steps = 7
    w, gradients = stream(case.shape, steps)
    given = contexts(case.rule, case.shape, steps)
    oracle, one, shape = Oracle(case.rule, [w]), w, canonical(case.shape)
    state = {k: slot.start() for k, slot in case.rule.all_slots(shape).items()}
    for step in range(1, steps + 1):
        g, context = gradients[step - 1], given[step - 1]
        (one,) = oracle.step([one], [g], [context])
        scalars = case.rule.scalars() | {
            "step": float(step),
            "gradient_norm": np.linalg.norm(g),
        }
        ticking = case.rule.ticks(step)
        w, state = sharded_step(case.rule, w, g, state, ticking, scalars, context)
        # Five Newton-Schulz steps amplify another order of the operations.
        assert difference(w, one) < 1e-11
        for name, value in oracle.state[0].items():
            np.testing.assert_allclose(state[name], value, 1e-9, 1e-12, err_msg=name)


def sent(program, kind):
    """How many arrays of the parameter's shape a program sends."""
    return sum(x.shape == (4, 6) for k, x in program.outputs.items() if k.startswith(kind))


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        (rules.AdamW(), [(0, 0)]),
        (rules.NAdam(), [(0, 0)]),
        (rules.AdamW(every=2), [(0, 0), (0, 0)]),
        (rules.Muon(), [(1, 1)]),
        (rules.AdaMuon(), [(2, 2)]),
        (rules.DeltaMomentum(), [(2, 2)]),
        # The slow memory is read out when its clock ticks.
        (rules.M3(), [(3, 1), (4, 2)]),
        (rules.PreconditionedMomentum(), [(1, 0)]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_sent(rule, counts):
    steps = [split(rule, (4, 6), ticking) for ticking in variants(rule)]
    found = [(sent(x.before, "gathered"), sent(x.whole, "scattered")) for x in steps]
    assert found == counts
    assert [x.is_local for x in steps] == [not a for a, _ in counts]


def test_shards_keep_what_no_gradient_moves():
    assert replicated(rules.NAdam(), (4, 6)) == {"mu_product"}
    assert replicated(rules.MultiFrequency(period=(1, 3)), (4, 6)) == {"mass_1"}
    assert replicated(rules.Shampoo(), (4, 6)) == set()
