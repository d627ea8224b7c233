"""The fused step equals the plain one, for every rule, and touches nothing else."""

import pytest
import torch
from cases import CASES, Case, contexts, stream
from torch import nn

from deepopt import Memories, Retention, Rule, Slot, Time, Update, rules
from deepopt.expr import Expr, absolute, array, max_, maximum, minimum, sign, sqrt, sum_, tanh
from deepopt.functions import norm
from torch_backend import Optimizer

# Of the first case of a rule; its other switches go beyond a tick of every clock.
STEPS, MORE = 50, 16
# Parameters and gradients of one dtype, state and arithmetic of another. The products of an
# iteration of Newton-Schulz and sums are taken in another order, which five steps of it amplify;
# narrow weights round, rarely to the other neighbour.
DTYPES = {
    "float64": (torch.float64, 1e-12),
    "float32": (torch.float32, 2e-4),
    "bfloat16": (torch.bfloat16, 50 * 2.0**-9),
    "float16": (torch.float16, 50 * 2.0**-12),
}
# Its momentum grows without bound, and differences with it, in every precision alike.
DIVERGES = "decay=literal"
GUARD = 64


def guarded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of x in the middle of memory that holds a known pattern, and that memory."""
    around = torch.full((x.numel() + 2 * GUARD,), 77.0).to(x.dtype)
    inside = around[GUARD : GUARD + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside, around


def untouched(around: torch.Tensor) -> bool:
    return bool((around[:GUARD] == 77).all() and (around[-GUARD:] == 77).all())


def shapes_of(case: Case) -> list[tuple[int, ...]]:
    """The case's shape, and odd ones around the lengths of vectors and blocks."""
    if case.rule.context((1, 1)) or {"negatives", "left", "right"} & {*case.rule.all_slots((2, 2))}:
        # Roots of a Gram matrix of one row follow its rounding errors.
        return [case.shape]
    network = any("first" in k for k in case.rule.all_slots((2, 2)))
    # A network of few units that is taught by one row moves far with the least difference.
    odd = [(1, 1), (3, 1), (9, 7) if network else (1, 17), (31, 33)]
    return [case.shape, *odd, *([] if case.rule.domain == "matrix" else [(1023,), (1,)])]


def step(optimizer: Optimizer, params: list[nn.Parameter], gradients, context, i: int) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = torch.tensor(g[i]).to(p.dtype)
        if context[i]:
            optimizer.context[p] = {k: torch.tensor(x) for k, x in context[i].items()}
    optimizer.step()


# Every switch in three precisions; in the fourth, which differs in a conversion, every rule.
FIRST = {type(case.rule): case for case in reversed(CASES)}
PAIRS = [(c, d) for c in CASES for d in DTYPES if d != "float16" or FIRST[type(c.rule)] is c]


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_the_fused_step_is_the_plain_one(case, dtype):
    parity(case, shapes_of(case), dtype, STEPS if FIRST[type(case.rule)] is case else MORE)


def parity(case: Case, shapes: list[tuple[int, ...]], dtype: str, steps: int) -> None:
    """Weights after every step and all state at the end, in memory that nobody else's is near."""
    kind, tolerance = DTYPES[dtype]
    tolerance *= 100 if DIVERGES in str(case) else 1
    streams = [stream(s, steps, seed=i) for i, s in enumerate(shapes)]
    gradients = [g for _, g in streams]
    plain, fused = ([nn.Parameter(torch.tensor(w).to(kind)) for w, _ in streams] for _ in range(2))
    context = contexts(case.rule, case.shape, steps)
    one = Optimizer(plain, case.rule, fused=False)
    two = Optimizer(fused, case.rule, fused=True, precision="float32")
    memory: list[torch.Tensor] = []
    for p in fused:
        p.data, around = guarded(p.data)
        memory.append(around)
    for i in range(steps):
        step(one, plain, gradients, context, i)
        step(two, fused, gradients, context, i)
        if i == 0:
            for state in two.state.values():
                for name in [k for k in state if k != "step"]:
                    state[name], around = guarded(state[name])
                    memory.append(around)
        for p, q in zip(plain, fused, strict=True):
            near(p, q, tolerance, f"step {i}")
    for p, q in zip(plain, fused, strict=True):
        assert one.state[p].keys() == two.state[q].keys()
        for name, x in one.state[p].items():
            y = two.state[q][name]
            assert x.dtype == y.dtype and x.shape == y.shape
            if not name.endswith("_basis"):
                near(x, y, tolerance, name)
    assert all(map(untouched, memory))


@pytest.mark.parametrize(
    ("rule", "shape", "view"),
    [
        # Sums over more than one chunk of a tensor.
        (rules.DeltaMomentum(lr=0.1, view="flat", output="identity"), (300, 700), "flatten"),
        (rules.M3(lr=0.1, period=2), (300, 700), "flatten"),
        # Several matrices of one parameter.
        (rules.M3(lr=0.1, period=2), (3, 6, 4), "stacked"),
        (rules.DeepMomentum(lr=0.1, width=3), (9, 4), "split:3"),
        (rules.Shampoo(lr=0.1, period=2), (2, 5, 5), "stacked"),
    ],
    ids=str,
)
def test_large_tensors_and_several_matrices(rule, shape, view):
    w, gradients = stream(shape, 3)
    found = []
    for fused in (False, True):
        p = nn.Parameter(torch.tensor(w))
        optimizer = Optimizer([{"params": [p], "seen_as": view}], rule, fused=fused)
        for g in gradients:
            p.grad = torch.tensor(g)
            optimizer.step()
        found.append([p, *optimizer.state[p].values()])
    for one, two in zip(*found, strict=True):
        near(one, two, 1e-12, "weights or state")


def near(x: torch.Tensor, y: torch.Tensor, tolerance: float, what: str) -> None:
    """Raise AssertionError where y is not x, relative to x's largest entry."""
    a, b = x.detach().double(), y.detach().double()
    known = a.isfinite()
    same = torch.where(known, 0.0, a).equal(torch.where(known, 0.0, b)) or a.isnan().any()
    assert same, f"{what} of shape {tuple(x.shape)} is infinite elsewhere"
    assert torch.equal(a.isnan(), b.isnan()), what
    error = float((a - b)[known].abs().max()) if known.any() else 0.0
    scale = max(float(a[known].abs().max()), 1e-30) if known.any() else 1.0
    assert error <= tolerance * scale, f"{what} of shape {tuple(x.shape)}: {error / scale:.3g}"


# Rounding of narrow weights


def bfloat16_step(rounding: str, update: float, steps: int = 1, size: int = 1 << 14):
    p = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    optimizer = Optimizer([p], rules.SGD(lr=1.0), fused=True, rounding=rounding)
    for _ in range(steps):
        p.grad = torch.full_like(p, -update)
        optimizer.step()
    return p.detach().float(), optimizer


def test_stochastic_rounding_keeps_the_mean():
    """A quarter of the distance to the next number, which rounding to nearest would not see."""
    quarter = 2.0**-9
    assert torch.equal(bfloat16_step("nearest", quarter)[0], torch.ones(1 << 14))
    p, _ = bfloat16_step("stochastic", quarter)
    assert set(p.tolist()) == {1.0, 1.0 + 2.0**-7}
    # Four standard errors of a share of a quarter.
    share = float((p > 1).float().mean())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / p.numel()) ** 0.5
    # Neighbours, steps, tensors and groups have draws of their own; a repeat has the same.
    assert torch.equal(p, bfloat16_step("stochastic", quarter)[0])
    twice = bfloat16_step("stochastic", quarter, steps=2)[0]
    both = float(((p > 1) & (twice > 1 + 2.0**-7)).float().mean())
    assert abs(both - 1 / 16) < 0.02
    assert abs(float(((p > 1)[1:] & (p > 1)[:-1]).float().mean()) - 1 / 16) < 0.02
    one, two = (nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16)) for _ in range(2))
    one.grad = two.grad = torch.full_like(one, -quarter)
    Optimizer([one, two], rules.SGD(lr=1.0), fused=True, rounding="stochastic").step()
    assert abs(float(((one > 1) & (two > 1)).float().mean()) - 1 / 16) < 0.02


def test_stochastic_rounding_leaves_what_is_not_finite():
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16))
    p.grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=torch.bfloat16)
    Optimizer([p], rules.SGD(lr=1.0), fused=True, rounding="stochastic").step()
    assert p[0].isnan() and p[1] == -float("inf") and p[2] == float("inf") and p[3] == 4.0


@pytest.mark.parametrize("rule", [rules.AdamW(lr=1e-3), rules.M3(lr=1e-3, period=3)])
def test_exact_rounding_is_a_float32_master(rule):
    torch.manual_seed(0)
    start = torch.randn(33, 17).to(torch.bfloat16)
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    one = Optimizer([narrow], rule, fused=True, rounding="exact", precision="float32")
    two = Optimizer([wide], rule, fused=True, precision="float32")
    for _ in range(30):
        narrow.grad = torch.randn(33, 17).to(torch.bfloat16)
        wide.grad = narrow.grad.float()
        one.step()
        two.step()
        low = one.state[narrow]["low_half"]
        bits = wide.detach().view(torch.int32)
        assert torch.equal(low, (bits & 0xFFFF).to(torch.int32).to(torch.int16))
        assert torch.equal(
            narrow.detach().view(torch.int16), ((bits + 0x8000) >> 16).to(torch.int16)
        )
    near(wide, narrow, 2.0**-8, "weights")


def test_other_rounding_goes_through_a_checkpoint():
    torch.manual_seed(0)
    runs = []
    for stop in (None, 5):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(9, 4).to(torch.bfloat16))
        for rounding in ("stochastic", "exact"):
            optimizer = Optimizer([p], rules.AdamW(lr=1e-2), fused=True, rounding=rounding)
            for i in range(10):
                if i == stop:
                    saved = optimizer.state_dict()
                    optimizer = Optimizer([p], rules.AdamW(lr=1e-2), fused=True, rounding=rounding)
                    optimizer.load_state_dict(saved)
                p.grad = torch.randn(9, 4).to(torch.bfloat16)
                optimizer.step()
        runs.append(p.detach().clone())
    assert torch.equal(*runs)


# What changes between steps


def test_what_changes_between_steps_is_seen():
    """Gradients that come and go, state and weights that are replaced, values that are edited."""
    torch.manual_seed(0)
    shapes = [(5, 3), (4, 4), (7,), (5, 3)]
    starts = [torch.randn(s) for s in shapes]
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        params = [nn.Parameter(x.clone()) for x in starts]
        optimizer = Optimizer(params, rules.AdamW(lr=1e-2), fused=fused)
        for i in range(24):
            for j, p in enumerate(params):
                g = torch.randn(p.shape)
                p.grad = None if (i + j) % 5 == 0 else g
            if i == 6:
                params[0].data = params[0].data.clone()
            if i == 8:
                name = "exp_avg"
                optimizer.state[params[1]][name] = optimizer.state[params[1]][name].clone()
            if i == 10:
                optimizer.state[params[1]]["step"] += 3
            if i == 12:
                optimizer.param_groups[0]["lr"] = 3e-3
                optimizer.param_groups[0]["betas"] = (0.8, 0.95)
            if i == 14:
                optimizer.param_groups[0]["maximize"] = True
            if i == 16:
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.1})
                params = [p for g in optimizer.param_groups for p in g["params"]]
            if i == 18:
                del optimizer.state[params[2]]
            if i == 20:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
        results.append(params)
    for one, two in zip(*results, strict=True):
        near(one, two, 1e-5, "weights")


def test_a_step_leaves_gradients_alone():
    for g in (torch.randn(4, 6), torch.randn(6, 4).t()):
        p = nn.Parameter(torch.randn(4, 6))
        p.grad, before = g, g.clone()
        Optimizer([p], rules.M3(), fused=True, maximize=True).step()
        assert p.grad is g and torch.equal(g, before)


def test_tensors_in_one_order_of_axes_need_no_copy():
    """A convolution's channels last, and a transposed matrix, for rules that go entry by entry."""
    torch.manual_seed(0)
    start = torch.randn(4, 3, 2, 5)
    orders = [start.clone(), start.to(memory_format=torch.channels_last), start.permute(3, 1, 0, 2)]
    gradients = torch.randn(6, 4, 3, 2, 5)
    found = []
    for i, x in enumerate(orders):
        p = nn.Parameter(x)
        optimizer = Optimizer([p], rules.AdamW(lr=0.1), fused=True)
        for g in gradients:
            p.grad = g if i < 2 else g.permute(3, 1, 0, 2)
            optimizer.step()
        assert optimizer.state[p]["exp_avg"].stride() == p.stride() == x.stride()
        found.append(p.detach() if i < 2 else p.detach().permute(2, 1, 3, 0))
    for other in found[1:]:
        near(found[0], other, 1e-6, "weights")


def test_gradients_of_another_precision():
    p, q = (nn.Parameter(torch.ones(40)) for _ in range(2))
    for x in (p, q):
        x.grad_dtype = torch.bfloat16
        x.grad = torch.linspace(-1, 1, 40).to(torch.bfloat16)
    Optimizer([p], rules.AdamW(), fused=True).step()
    Optimizer([q], rules.AdamW(), fused=False).step()
    near(p, q, 1e-6, "weights")


class UserRule(Rule):
    """A rule of a user's own: a sign, a clock, a norm, and sums along rows.

    Memory: one table. Source: this test.
    """

    retention: Retention = 0.9
    domain = "matrix"

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"m": Slot(shape), "slow": Slot(shape, clock="c"), "size": Slot((1, 1))}

    def clocks(self) -> dict[str, int]:
        return {"c": 3}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        m = self.retention * s["m"] + g / (1.0 + norm(g))
        size = maximum(s["size"], max_(absolute(g)))
        slow = t.when("c", s["slow"] + sign(m), s["slow"])
        rows = sqrt(sum_(m * m, (-1,)) + 1e-6)
        return m / rows + slow / size, {"m": m, "slow": slow, "size": size}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_rule_of_a_users_own_is_fused(dtype):
    torch.manual_seed(0)
    starts = [torch.randn(s).to(dtype) for s in ((6, 4), (1, 5), (5, 1), (1, 1))]
    gradients = [[torch.randn_like(x) for x in starts] for _ in range(10)]
    found = []
    for fused in (False, True):
        params = [nn.Parameter(x.clone()) for x in starts]
        optimizer = Optimizer(params, UserRule(lr=0.01, weight_decay=0.1), fused=fused)
        for step_gradients in gradients:
            for p, g in zip(params, step_gradients, strict=True):
                p.grad = g
            optimizer.step()
        found.append(params)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-6}[dtype]
    for one, two in zip(*found, strict=True):
        near(one, two, tolerance, "weights")


# Plans that could be wrong


def rule_of(slots, update, **fields) -> Rule:
    """A rule for matrices with these memories, by name: shape or slot, and this update."""

    class Given(Rule):
        """A rule of a test."""

        domain = "matrix"

        def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
            return slots(shape)

        def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
            return update(g, s, t)

    return Given(**{"lr": 0.1, **fields})


def size_and_row(first: bool):
    """A number and a column, of which the one is made with the other's old value."""

    def slots(shape):
        return {"size": Slot((1, 1), value=1.0), "row": Slot((shape[0], 1), value=1.0)}

    def update(g, s, t):
        new = {"size": s["size"] * 2.0 + sum_(g * g), "row": s["row"] * s["size"]}
        return g * s["size"], new if first else dict(reversed(new.items()))

    return rule_of(slots, update)


def deep(g, s, t):
    for _ in range(600):
        g = tanh(g) + 0.001 * s["m"]
    return g, {"m": 0.9 * s["m"] + g}


def many(g, s, t):
    new = {k: 0.5 * x + g for k, x in s.items()}
    return sum(new.values(), start=g), new


AWKWARD = {
    "a number is overwritten beside a kernel that reads it": size_and_row(True),
    "the same in another order": size_and_row(False),
    "a number spread over a column": rule_of(
        lambda shape: {"row": Slot((shape[0], 1))},
        lambda g, s, t: (g, {"row": array("full", (g.shape[0], 1), 1.0) * norm(g)}),
    ),
    "a column beside a parameter of one entry": rule_of(
        lambda shape: {"h": Slot((5, 1), value=1.0)},
        lambda g, s, t: (g * sum_(0.9 * s["h"]) + max_(s["h"]), {"h": 0.9 * s["h"]}),
    ),
    "infinity": rule_of(
        lambda shape: {}, lambda g, s, t: (minimum(g, float("inf")) * (g < float("inf")), {})
    ),
    "truth values divide": rule_of(
        lambda shape: {}, lambda g, s, t: (g * ((g > 0.0) / (g > -9.0)), {})
    ),
    "a norm for some shapes": rule_of(
        lambda shape: {}, lambda g, s, t: (g * t.norm if g.shape[0] > 1 else g, {})
    ),
    "names of C": rule_of(
        lambda shape: {k: Slot(shape) for k in ("g_at", "acc", "linux", "asm", "x1", "a b", "a_b")},
        many,
    ),
    "a number named as C's": rule_of(
        lambda shape: {k: Slot((1, 1)) for k in ("acc", "hi", "sums")},
        lambda g, s, t: (g, {k: x + sum_(g) for k, x in s.items()}),
    ),
    "more tensors than registers": rule_of(
        lambda shape: {f"m{i}": Slot(shape) for i in range(90)}, many
    ),
    "a deep graph": rule_of(lambda shape: {"m": Slot(shape)}, deep),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_rules(name):
    torch.manual_seed(0)
    starts = [torch.randn(s, dtype=torch.float64) for s in ((1, 1), (3, 4), (1, 5), (50, 2))]
    gradients = [[torch.randn_like(x) for x in starts] for _ in range(4)]
    found = []
    for fused in (False, True):
        params = [nn.Parameter(x.clone()) for x in starts]
        optimizer = Optimizer(params, AWKWARD[name], fused=fused)
        for several in gradients:
            for p, g in zip(params, several, strict=True):
                p.grad = g
            optimizer.step()
        found.append([*params, *(x for s in optimizer.state.values() for x in s.values())])
    for one, two in zip(*found, strict=True):
        near(one, two, 1e-13, "weights or state")


# What kernels must notice


def adamw_pair(*tensors: torch.Tensor) -> tuple[list[nn.Parameter], Optimizer]:
    params = [nn.Parameter(x) for x in tensors]
    optimizer = Optimizer(params, rules.AdamW(lr=0.1), fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return params, optimizer


def test_a_parameter_that_changes_its_shape_is_refused():
    (p,), optimizer = adamw_pair(torch.ones(16))
    p.grad = None
    p.data = torch.ones(3000)
    p.grad = torch.ones(3000)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 .* has shape \(16,\); it should"):
        optimizer.step()
    base = torch.ones(16)
    (q,), optimizer = adamw_pair(base)
    q.grad, q.data = None, q.data[:4]
    q.grad = torch.ones(4)
    with pytest.raises(ValueError, match="has shape"):
        optimizer.step()


def test_a_parameter_whose_axes_are_swapped_in_place():
    (p,), optimizer = adamw_pair(torch.arange(16.0).reshape(4, 4))
    before, g = p.detach().clone(), torch.zeros(4, 4)
    p.grad, p.data = None, p.data.t()
    g[0, 1] = 1.0
    p.grad = g
    optimizer.step()
    moved = (p.detach() - before.t()).abs()
    assert moved[0, 1] > moved[1, 0]


def test_state_of_another_kind():
    for step in (torch.tensor(1), 1, torch.tensor(1.0, dtype=torch.float64)):
        (p,), optimizer = adamw_pair(torch.ones(4))
        optimizer.state[p]["step"] = step
        optimizer.step()
        assert float(optimizer.state[p]["step"]) == 2.0
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to(torch.int8)
    with pytest.raises(RuntimeError, match=r"cannot step parameter 0 .*: its memory exp_avg is"):
        optimizer.step()


def test_gradients_that_are_views_of_a_kind():
    (p, q), optimizer = adamw_pair(torch.zeros(4), torch.zeros(4))
    p.grad, q.grad = torch._neg_view(torch.ones(4)), torch.full((4,), -1.0)
    optimizer.step()
    assert torch.equal(p, q)
    p.grad = torch._efficientzerotensor((4,))
    q.grad = torch.zeros(4)
    optimizer.step()
    assert torch.equal(p, q)
    p.grad = torch.ones(4).to_sparse()
    before = [x.detach().clone() for x in (p, q)]
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert all(map(torch.equal, (p, q), before))


def test_a_step_invalidates_what_autograd_has_saved():
    (p,), optimizer = adamw_pair(torch.ones(4))
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_that_are_written_by_others_lose_their_low_half():
    p = nn.Parameter(torch.randn(64).to(torch.bfloat16))
    optimizer = Optimizer([p], rules.SGD(lr=0.01), fused=True, rounding="exact")
    for _ in range(2):
        p.grad = torch.randn(64).to(torch.bfloat16)
        optimizer.step()
    with torch.no_grad():
        p.mul_(torch.arange(64) % 2)
    before = p.detach().clone()
    p.grad = torch.zeros(64).to(torch.bfloat16)
    optimizer.step()
    assert torch.equal(p[::2], before[::2]) and bool(p.isfinite().all())


@pytest.mark.parametrize("extreme", [maximum, minimum])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_the_larger_of_two_keeps_a_nan(extreme, first):
    rule = rule_of(
        lambda shape: {"m": Slot(shape, value=1.0)},
        lambda g, s, t: (extreme(*((g, s["m"]) if first else (s["m"], g))), {"m": s["m"]}),
    )
    found = []
    for fused in (False, True):
        p = nn.Parameter(torch.zeros(2, 3))
        p.grad = torch.tensor([[float("nan"), 2.0, 0.0], [-1.0, 1.0, float("nan")]])
        Optimizer([p], rule, fused=fused).step()
        found.append(p.detach())
    assert torch.equal(found[0].isnan(), p.grad.isnan())
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
    assert torch.equal(found[0].isnan(), found[1].isnan())
