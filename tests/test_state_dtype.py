"""Memories in bfloat16: rounded at random, to the same bits wherever and however often."""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, contexts, stream
from test_fused import near
from torch import nn

import torch_backend
from deepopt import Memories, Rule, Slot, Time, Update, rules
from deepopt.expr import Expr
from deepopt.kernels.source import salt
from deepopt.rules import ALL
from torch_backend import Optimizer, stochastic

NARROW = torch.bfloat16
STEPS = 8
RETENTION = 0.995
FIRST = [next(c for c in CASES if type(c.rule) is rule) for rule in ALL]
# Kernels of one and of several regions, networks, levels, and what is read of a new memory again.
FUSED = [
    *(rules.AdamW(lr=0.05), rules.SOAP(lr=0.05, period=3), rules.DeepMomentum(lr=0.05, width=3)),
    *(rules.DeltaMomentum(lr=0.05, view="flat"), rules.MultiFrequency(lr=0.05, period=(1, 3))),
    *(rules.M3(lr=0.05, period=3, every=2), rules.Nest(lr=0.05, period=(1, 3))),
]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().view(torch.int16) if x.dtype == NARROW else x.detach()


def params_of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def same(one: Optimizer, two: Optimizer) -> None:
    """Weights and all state, bit for bit."""
    for p, q in zip(params_of(one), params_of(two), strict=True):
        assert torch.equal(bits(p), bits(q))
        assert one.state[p].keys() == two.state[q].keys()
        for name, x in one.state[p].items():
            y = two.state[q][name]
            assert x.dtype == y.dtype and torch.equal(bits(x), bits(y)), name


def made(case: Case, kind: torch.dtype = torch.float32, **options) -> Optimizer:
    """The rule over three parameters of the case's shape."""
    starts = [stream(case.shape, STEPS, seed=i)[0] for i in range(3)]
    params = [nn.Parameter(torch.tensor(w).to(kind)) for w in starts]
    return Optimizer(params, case.rule, **{"state_dtype": NARROW, **options})


def advance(optimizer: Optimizer, case: Case, steps: range) -> Optimizer:
    """Take steps, some of which the last parameter sits out."""
    context = contexts(case.rule, case.shape, STEPS)
    for i in steps:
        for j, p in enumerate(params_of(optimizer)):
            g = torch.tensor(stream(case.shape, STEPS, seed=j)[1][i]).to(p.dtype)
            p.grad = None if (i + j) % 4 == 3 and j == 2 else g
            if context[i]:
                optimizer.context[p] = {k: torch.tensor(x).to(p) for k, x in context[i].items()}
        optimizer.step()
    return optimizer


def resumed(optimizer: Optimizer, case: Case, **options) -> Optimizer:
    """A new optimizer of equal weights that has loaded the state from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = made(case, **options)
    with torch.no_grad():
        for p, q in zip(params_of(optimizer), params_of(other), strict=True):
            q.copy_(p)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_every_memory_is_narrow_and_a_resumed_run_is_the_same(case):
    whole = advance(made(case, fused=False), case, range(STEPS))
    half = advance(made(case, fused=False), case, range(5))
    for p in params_of(half):
        for name, x in half.state[p].items():
            wide = name == "step" or x.numel() == 1
            assert x.dtype == (torch.float32 if wide else NARROW), name
    # What a memory of the new optimizer would be is not what counts.
    again = resumed(half, case, fused=False, state_dtype=None)
    same(whole, advance(again, case, range(5, STEPS)))


@pytest.mark.parametrize("rule", FUSED, ids=lambda r: type(r).__name__)
def test_kernels_round_to_the_bits_of_the_plain_path(rule):
    """In float64 nothing but rounding to bfloat16 is left to differ by; and a resumed run goes on.

    Entries that should be zero are noise, whose bits are anybody's, and roots amplify it.
    """
    case = Case(rule, (31, 9))
    options = {"kind": torch.float64, "precision": "float32"}
    plain, fused = (
        advance(made(case, fused=x, **options), case, range(STEPS)) for x in (False, True)
    )
    for p, q in zip(params_of(plain), params_of(fused), strict=True):
        near(p, q, 1e-12, "weights")
        for name, x in plain.state[p].items():
            y = fused.state[q][name]
            assert x.dtype == y.dtype
            near(x, y, 1e-12, name)
    half = advance(made(case, fused=True, **options), case, range(5))
    again = resumed(half, case, fused=True, **options)
    same(fused, advance(again, case, range(5, STEPS)))


def test_neither_neighbours_nor_threads_nor_chunks_change_a_bit():
    """One of several, alone in its batch, in several chunks, on several threads."""

    def after(fused: bool, threads: int, others: bool) -> torch.Tensor:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(2, 40_001)) for _ in range(3)]
        optimizer = Optimizer(params, rules.AdamW(), fused=fused, state_dtype=NARROW)
        torch.set_num_threads(threads)
        for _ in range(2):
            for i, p in enumerate(params):
                g = torch.randn_like(p)
                p.grad = g if others or i == 1 else None
            optimizer.step()
        torch.set_num_threads(1)
        state = optimizer.state[params[1]]
        return torch.cat([bits(state[k]) for k in ("exp_avg", "exp_avg_sq")])

    first = after(True, 1, True)
    for fused, threads, others in ((True, 2, True), (True, 1, False), (False, 1, True)):
        assert torch.equal(first, after(fused, threads, others)), (fused, threads, others)


class Followers(Rule):
    """Averages of a gradient that stays where it is.

    Memory: two tables. Source: this test.
    """

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"one": Slot(shape), "two": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        new = {k: RETENTION * s[k] + (1.0 - RETENTION) * g for k in ("one", "two")}
        return 0.0 * g, new


def followed(steps: int, size: int, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The two memories of ones, where each step adds less than half of what bfloat16 resolves."""
    p = nn.Parameter(torch.zeros(size))
    optimizer = Optimizer([p], Followers(), state_dtype=NARROW, fused=fused)
    for _ in range(steps):
        p.grad = torch.ones(size)
        optimizer.step()
    return tuple(optimizer.state[p][k].float() for k in ("one", "two"))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_the_mean_follows_where_rounding_to_the_nearest_stops(fused):
    steps, size = 400, 4096
    true = 1 - RETENTION**steps
    nearest = torch.zeros(())
    for _ in range(steps):
        nearest = (RETENTION * nearest + (1 - RETENTION)).to(NARROW).float()
    assert nearest < 0.75 * true
    memories = followed(steps, size, fused)
    for m in memories:
        # Each step errs with a deviation of at most half a unit of 2^-8, and old errors decay.
        deviation = 2.0**-9 * np.sqrt(1 / (1 - RETENTION**2))
        assert abs(float(m.mean()) - true) < 4 * deviation / np.sqrt(size)
    # Memories have draws of their own.
    one, two = (m - m.mean() for m in memories)
    assert abs(float((one * two).mean() / (one.std() * two.std()))) < 4 / np.sqrt(size)


def test_the_draws_of_memories_differ_from_those_of_weights_and_of_each_other():
    slots = {k for c in CASES for k in c.rule.all_slots(c.shape)}
    assert len({salt(k) for k in slots}) == len(slots) and 0 not in map(salt, slots)
    assert salt("w") == 0 and all(salt(k) < 2**31 for k in slots)


def test_the_generator_is_philox():
    """Known answers of Random123, philox4x32-10."""
    known = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for (a, b, c, d), key, expected in known:
        block = torch.tensor([a]) + (torch.tensor([b]) << 32)
        found = stochastic._philox(block, c, torch.tensor([[d]]), key)
        assert " ".join(f"{int(x):08x}" for x in found.flatten()) == expected


def test_what_is_not_finite_and_what_is_zero_stay_so():
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -2.5]
    value = torch.tensor(special)
    like = torch.empty(7, dtype=NARROW)
    found = stochastic.rounded(value, like, "m", 0, 1, [0])
    assert found[0].isnan() and torch.equal(bits(found)[1:], bits(value.to(NARROW))[1:])


def test_any_order_of_axes_has_the_bits_of_kernels():
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        start = torch.randn(4, 3, 2, 5, dtype=torch.float64)
        p = nn.Parameter(start.to(memory_format=torch.channels_last))
        optimizer = Optimizer([p], rules.AdamW(), fused=fused, state_dtype=NARROW)
        for _ in range(3):
            p.grad = torch.randn_like(p)
            optimizer.step()
        found.append([*optimizer.state[p].values()])
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("view", ["stacked", "flatten"])
@pytest.mark.parametrize("rule", [rules.Muon(), rules.SOAP(period=2)], ids=["Muon", "SOAP"])
def test_several_matrices_have_the_bits_of_kernels(rule, view):
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3, 6, 4, dtype=torch.float64)) for _ in range(2)]
        group = {"params": params, "seen_as": view}
        optimizer = Optimizer([group], rule, fused=fused, state_dtype=NARROW, precision="float32")
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        found.append([x for p in params for x in (p, *optimizer.state[p].values())])
    for x, y in zip(*found, strict=True):
        near(x, y, 1e-12, "weights or state")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_state_keeps_the_dtype_that_it_was_saved_in(fused):
    """Either way round, and some memories so and others so."""
    case = Case(rules.AdamW(lr=0.05), (5, 3))
    for saved, wanted in ((None, NARROW), (NARROW, None), (NARROW, torch.float32)):
        first = advance(made(case, fused=fused, state_dtype=saved), case, range(3))
        other = advance(resumed(first, case, fused=fused, state_dtype=wanted), case, range(3, 6))
        kept = {s["exp_avg"].dtype for s in other.state.values()}
        assert kept == {torch.float32 if saved is None else saved}
        same(advance(first, case, range(3, 6)), other)
    mixed = advance(made(case, fused=fused, state_dtype=None), case, range(3))
    saved = mixed.state_dict()
    for state in saved["state"].values():
        state["exp_avg"] = state["exp_avg"].to(NARROW)
    other = made(case, fused=fused)
    other.load_state_dict(saved)
    advance(other, case, range(3, 6))
    for state in other.state.values():
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (NARROW, torch.float32)


def test_narrow_counters_that_somebody_cast_still_work():
    """All of a checkpoint in bfloat16, as a careless loader has it."""
    case = Case(rules.Shampoo(lr=0.05, period=2), (5, 5))
    found = []
    for fused in (False, True):
        saved = advance(made(case, torch.float64, fused=fused), case, range(2)).state_dict()
        for state in saved["state"].values():
            state.update({k: x.to(NARROW) for k, x in state.items() if k != "step"})
        other = made(case, torch.float64, fused=fused)
        other.load_state_dict(saved)
        found.append(advance(other, case, range(2, 5)))
    for p, q in zip(*map(params_of, found), strict=True):
        assert found[1].state[q]["negatives"].dtype == NARROW
        near(p, q, 1e-3, "weights")


def test_copies_and_pickles_go_on_alike():
    case = Case(rules.M3(lr=0.05, period=2), (5, 3))
    one = advance(made(case), case, range(3))
    for two in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert two.state_dtype is NARROW
        same(advance(copy.deepcopy(one), case, range(3, 6)), advance(two, case, range(3, 6)))
    older = one.__getstate__()
    del older["state_dtype"]
    two = Optimizer.__new__(Optimizer)
    two.__setstate__(older)
    assert two.state_dtype is None


def test_classes_of_rules_take_it_and_compare_in_bytes():
    params = [nn.Parameter(torch.zeros(64, 32))]
    choices: list[dict[str, Any]] = [{}, {"state_dtype": torch.float32}, {"state_dtype": NARROW}]
    sizes = []
    for options in choices:
        optimizer = torch_backend.AdamW(params, **options)
        params[0].grad = torch.ones(64, 32)
        optimizer.step()
        own = optimizer.state[params[0]].values()
        sizes.append(sum(x.numel() * x.element_size() for x in own) - 4)
    assert sizes == [8 * 2048, 8 * 2048, 4 * 2048]


@pytest.mark.parametrize("value", ["bfloat16", torch.float16, torch.int8, True, 16], ids=repr)
def test_other_dtypes_are_refused(value: Any):
    said = f"state_dtype={value!r} must be one of None, torch.float32, torch.bfloat16"
    with pytest.raises(ValueError) as error:
        torch_backend.AdamW([nn.Parameter(torch.ones(2))], state_dtype=value)
    assert str(error.value) == said
