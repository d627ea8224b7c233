"""Optimizers of DTensors, over several processes, equal those on one."""

import re
from pathlib import Path

import on_ranks
import pytest
import torch
from cases import CASES, TOLERANCE
from ranks import Ranks
from torch.distributed.tensor import Replicate, Shard

from deepopt import rules
from deepopt.around import clipped_globally

M3 = rules.M3(lr=0.02, period=2, weight_decay=0.1)
# Of each rule the first case, and every switch of those whose arrays are of other shapes.
FIRST = list({type(case.rule): case.rule for case in reversed(CASES)}.values())
MATRICES = [(7, 5), (4, 6), (5, 5)]
# Five Newton-Schulz steps amplify another order of the operations.
DOUBLE = 10 * TOLERANCE["float64"]
SINGLE = 2e-5


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("placement", on_ranks.PLACEMENTS)
def test_every_rule_equals_one_device(four, placement):
    def shapes(rule):
        # torch itself cannot bring parts together that two mesh dimensions cut unevenly.
        found = [(8, 4), (4, 4)] if placement == "same" else MATRICES
        vector = rule.domain == "any" and placement not in ("1", "both")
        return [*found, (8,)] if vector else found

    some = FIRST if placement in ("0", "both") else FIRST[::3]
    jobs = [(rule, shapes(rule), placement) for rule in some]
    for (rule, *_), *worst in zip(jobs, *four.run(on_ranks.every_rule, jobs), strict=True):
        assert max(worst) < DOUBLE, rule


def test_matrices_that_are_views(four):
    views = [((6, 5, 4), "stacked"), ((12, 5), "split:3"), ((7, 3, 2), "flatten")]
    for rule in (M3, rules.AdaMuon(lr=0.05), rules.MultiFrequency(lr=0.05, period=(1, 2))):
        assert max(four.run(on_ranks.seen_as_several, rule, views)) < DOUBLE, rule


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # One sum of flags that say who has gradients, one gathering, one scattering.
        (rules.Muon(), {"allreduce_": 1, "alltoall_base_": 2}),
        (rules.M3(period=1), {"allreduce_": 1, "alltoall_base_": 2}),
        (rules.Shampoo(period=1), {"allreduce_": 1, "alltoall_base_": 2}),
        (rules.AdamW(), {"allreduce_": 1}),
        (clipped_globally(rules.AdamW)(), {"allreduce_": 2}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_a_step_sends(four, rule, expected):
    for found, *_ in four.run(on_ranks.counted, rule, [(8, 4)] * 6, 1):
        assert found == expected


def test_work_is_shared_out(four):
    shapes = [(8, 8)] * 8
    owned = four.run(on_ranks.owned, rules.Muon(), shapes)
    assert owned == [2, 2, 2, 2]


def test_matrices_may_go_one_by_one(four):
    assert max(four.run(on_ranks.rounds, M3, MATRICES)) < DOUBLE


def test_shards_step_in_kernels(four):
    for rule in (rules.AdamW(lr=0.05), rules.NAdam(lr=0.05), rules.AdEMAMix(lr=0.05)):
        assert max(four.run(on_ranks.kernels, rule)) < DOUBLE


def test_a_compiled_step_of_shards(four):
    assert max(four.run(on_ranks.compiled_step, M3)) < DOUBLE


def test_the_page_runs(two):
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3 and two.run(on_ranks.page, blocks) == [4, 4]


def test_gradients_that_some_ranks_have_not(four):
    for rule in (rules.AdamW(lr=0.05), M3):
        for apart, steps, frozen in four.run(on_ranks.gradients_on_some_ranks, rule):
            assert apart < DOUBLE and steps == [3, 2] and not frozen


@pytest.mark.parametrize("where", [0, 1], ids=["matrix", "vector"])
def test_gradients_that_are_not_finite(four, where):
    for message, same, skipped in four.run(on_ranks.bad_gradients, M3, "skip", where):
        assert not message and same and skipped == 1
    for message, same, skipped in four.run(on_ranks.bad_gradients, M3, "raise", where):
        assert ("matrix", "vector")[where] in message and same and not skipped
    for message, same, _ in four.run(on_ranks.bad_gradients, M3, "propagate", where):
        assert not message and not same


def test_a_gradient_scaler_is_heard_by_all(four):
    for rule in (rules.AdamW(lr=0.05), rules.Muon(lr=0.05)):
        assert max(four.run(on_ranks.scaled, rule)) < SINGLE


def test_the_norm_of_all_gradients(four):
    for rule in (clipped_globally(rules.AdamW)(lr=0.05), clipped_globally(rules.Muon)(lr=0.05)):
        assert max(four.run(on_ranks.norms, rule)) < DOUBLE


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("shape", ["rank 2", "(8, 5)", "(8, 4)", "weight"]),
        ("names", ["rank 1", "extra", "nothing more"]),
        ("lr", ["rank 3", "lr=0.5", "lr=0.1"]),
    ],
)
def test_ranks_that_do_not_step_the_same(four, what, words):
    for message, untouched in four.run(on_ranks.unlike, what):
        assert untouched
        assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("partial", ["ValueError", "weight", "sharded or replicated"]),
        ("nameless", ["ValueError", "mesh_dim_names"]),
        ("fused", ["RuntimeError", "fused=True", "weight"]),
        ("rounding", ["RuntimeError", "rounding='stochastic'", "weight"]),
    ],
)
def test_placements_and_options_that_no_step_can_have(four, what, words):
    for message in four.run(on_ranks.refused, what):
        assert all(word in message for word in words), message


@pytest.mark.parametrize("rule", [M3, rules.AdamW(lr=0.02), rules.DGD(lr=0.1)], ids=str)
def test_fsdp_equals_one_device(four, rule):
    options = {"precision": "float32"}
    assert max(four.run(on_ranks.fsdp, rule, (4,), options)) < SINGLE
    assert max(four.run(on_ranks.fsdp, rule, (2, 2), options)) < SINGLE


def test_fsdp_with_a_compiled_model_and_accumulated_gradients(four):
    options = {"precision": "float32"}
    assert max(four.run(on_ranks.fsdp, M3, (4,), options, True, 2)) < SINGLE


def test_hope_by_fsdp_equals_hope_on_one_device(four):
    assert max(four.run(on_ranks.hope, M3, 3)) < SINGLE


@pytest.mark.parametrize("rule", [M3, rules.AdamW(lr=0.02), rules.DGD(lr=0.1)], ids=str)
def test_data_parallel_workers_hold_the_same_bits(two, rule):
    for differing, apart in two.run(on_ranks.ddp, rule):
        assert differing == 0 and apart < SINGLE


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_checkpoints_go_from_two_ranks_to_four_to_one(two, four, flat, tmp_path):
    rule, folder = rules.MultiFrequency(lr=0.02, period=(1, 2)), str(tmp_path)
    rows, first, second, last = (6,), slice(0, 2), slice(2, 4), slice(4, 6)
    two.run(on_ranks.saved, rule, folder, flat, False, first, (2,), rows)
    four.run(on_ranks.saved, rule, folder, flat, True, second, (4,), rows)
    weights, state = on_ranks.saved(0, 1, rule, folder, flat, True, last, (), rows)
    expected, memories = on_ranks.saved(0, 1, rule, "", flat, False, slice(0, 6), (), rows)
    for name, x in expected.items():
        assert on_ranks.apart(weights[name], x) < SINGLE, name
        assert set(state[name]) == set(memories[name])
        assert all(torch.allclose(state[name][k], y, 1e-3, 1e-5) for k, y in memories[name].items())


def test_a_sharded_run_resumes_bit_by_bit(four, tmp_path):
    for rule in (rules.M3(lr=0.02, period=2, stagger=True), rules.AdamW(lr=0.02)):
        folder = str(tmp_path / type(rule).__name__)
        whole = four.run(on_ranks.saved, rule, "", False, False, slice(0, 4), (4,), (4,))
        four.run(on_ranks.saved, rule, folder, False, False, slice(0, 3), (4,), (4,))
        again = four.run(on_ranks.saved, rule, folder, False, True, slice(3, 4), (4,), (4,))
        for (weights, state), (expected, memories) in zip(again, whole, strict=True):
            assert all(torch.equal(weights[k], x) for k, x in expected.items())
            for name, own in memories.items():
                assert all(torch.equal(state[name][k], x) for k, x in own.items())


def test_every_rule_resumes_over_shards_bit_by_bit(four):
    narrow, drawn = {"state_dtype": torch.bfloat16}, {"rounding": "stochastic"}
    jobs = [(rule, {} if i % 2 else narrow) for i, rule in enumerate(FIRST)]
    jobs += [(rules.M3(period=2, stagger=True), {}), (rules.AdamW(), drawn | narrow)]
    for job, *differing in zip(jobs, *four.run(on_ranks.every_resumed, jobs), strict=True):
        assert not any(differing), job


def test_state_leaves_a_mesh_by_name_and_comes_back(four, tmp_path):
    rule = rules.Shampoo(lr=0.1, period=2)
    assert all(four.run(on_ranks.exported, rule, str(tmp_path / "state.safetensors")))


def test_metrics_are_those_of_whole_tensors(four):
    for rule in (rules.AdamW(lr=0.05), rules.M3(lr=0.05, period=2)):
        for one, many in four.run(on_ranks.measured, rule):
            assert one.keys() == many.keys() and many == pytest.approx(one, rel=1e-6)


def test_narrow_memories_of_shards_lose_no_small_increments(four):
    # 0.999 of a memory near its end is the memory itself where bfloat16 rounds to nearest.
    rules_of_shards = (rules.AdamW(), rules.PreconditionedMomentum(beta2=0.999))
    for rule in rules_of_shards:
        for narrow, apart in four.run(on_ranks.narrow, rule):
            assert narrow and apart < 0.01


def test_gradients_of_several_processes_are_not_released(two):
    for message in two.run(on_ranks.released, False):
        assert "by 2 processes" in message
    for message in two.run(on_ranks.released, True):
        assert "DTensors" in message


def test_rules_that_compute_with_the_shape(four):
    cut = [(Shard(0),)]
    assert max(four.run(on_ranks.pairs, on_ranks.PerRow(lr=0.1), [(8, 4)], cut)) < DOUBLE


def test_turns_go_by_all_parameters(four):
    rule, shapes = rules.M3(lr=0.05, period=3, stagger=True), [(4, 4), (8, 8), (6, 6)]
    for mixed in ([None, (Shard(0),), (Replicate(),)], [(Shard(0),), None, (Shard(1),)]):
        assert max(four.run(on_ranks.pairs, rule, shapes, mixed)) < DOUBLE


def test_a_mesh_may_number_its_ranks_in_any_order(four):
    for rule in (rules.Muon(lr=0.05), rules.Shampoo(lr=0.05, period=1)):
        assert max(four.run(on_ranks.permuted, rule)) < DOUBLE


def test_narrow_weights_of_fewer_rows_than_ranks(four):
    for dtypes, p in four.run(on_ranks.narrow_and_empty):
        assert dtypes == {torch.bfloat16} and (p < 1).all()


def test_shards_draw_numbers_of_their_own_and_replicas_the_same(four):
    for own, same in four.run(on_ranks.draws):
        assert not any(own) and all(same)


def test_what_one_rank_lacks_is_said_by_all(four):
    messages = four.run(on_ranks.context_on_some_ranks)
    assert "needs the gram of v" in messages[2]
    assert all("another rank cannot step v" in x for i, x in enumerate(messages) if i != 2)


def test_tensor_parallel_layers(four):
    for rule in (rules.M3(lr=0.02, period=2), rules.DGD(lr=0.1)):
        assert max(four.run(on_ranks.tensor_parallel, rule)) < SINGLE


def test_state_that_is_dropped_and_groups_that_change(four):
    assert max(four.run(on_ranks.regrouped)) < DOUBLE
