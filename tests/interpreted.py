"""The step in Triton, interpreted; tests/test_triton.py runs this in a process of its own."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from cases import CASES, Case
from test_fused import parity, shapes_of
from torch import Tensor, nn

from deepopt import Memories, Rule, Slot, Time, Update, rules
from deepopt import expr as e
from deepopt.expr import Expr
from deepopt.kernels.plan import plan
from deepopt.kernels.triton import Triton
from torch_backend import Optimizer
from torch_backend.kernels import gpu

# A parameter of 31 x 33 entries has four chunks of two blocks, the last of them not whole.
GRAIN = gpu.Grain(chunk=256, block=128, sums=2, programs=2)
STEPS = 3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(gpu, "GRAIN", GRAIN)


def defaults() -> list[Case]:
    """Every rule as it comes, with clocks that tick within the steps."""
    found: list[Case] = []
    for cls in rules.ALL:
        rule = cls(lr=0.05)
        if any(f.name == "period" for f in fields(rule)):
            own = rule.period
            rule = replace(rule, period=(1, *[2] * (len(own) - 1)) if isinstance(own, tuple) else 2)
        found.append(Case(rule, (4, 6)))
    return found


@pytest.mark.parametrize("case", defaults(), ids=str)
def test_a_rule_in_triton_is_the_plain_one(case):
    parity(case, shapes_of(case), "float32", STEPS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_switch_in_triton_is_the_plain_one(case):
    parity(case, [case.shape], "float32", STEPS)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("cls", [rules.AdamW, rules.M3, rules.Nest])
def test_other_widths(cls, dtype):
    case = next(c for c in defaults() if type(c.rule) is cls)
    parity(case, [(31, 33), (5, 3)], dtype, STEPS)


class Everything(Rule):
    """All functions of an entry, and the largest entry, so that none goes untested."""

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        names = "a b c d e f h k l m o p q u v x y z".split()
        return {name: Slot(shape) for name in names}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        half = e.constant(0.5) * g
        peak = e.max_(e.absolute(g))
        # Lanes behind the end, of zeros, would be the largest here and much of the sum.
        beyond = e.max_(-w) * e.sum_(e.exp(-w))
        return g / peak, {
            "a": e.exp(g),
            "b": e.log(e.absolute(g)),
            "c": e.tanh(g),
            "d": e.sigmoid(g),
            "e": e.floor(g),
            "f": e.sign(g),
            "h": e.sqrt(e.absolute(g)),
            "k": e.rsqrt(e.absolute(g)),
            "l": e.maximum(g, 1.0),
            "m": e.minimum(g, 1.0),
            "o": e.where(g < half, 2.0, g),
            # Truth values in arithmetic.
            "p": (g <= half) + e.equal(g, half) * 2.0,
            "q": g**3.0,
            "u": e.absolute(g) ** 0.3,
            "v": g**2.5,
            "x": g ** (-2.0),
            "y": peak * g,
            "z": (g < half) * beyond,
        }


@pytest.mark.parametrize("special", [(), (float("nan"),), (float("inf"), float("-inf"))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_function_and_what_is_not_finite(dtype, special):
    g = torch.cat([torch.tensor([*special, 0.0, -0.0, 1e-8, -2.0, 3.0]), torch.randn(600) * 3])
    plain, fused = (nn.Parameter(torch.full((len(g),), 3.0, dtype=dtype)) for _ in range(2))
    one = Optimizer([plain], Everything(lr=0.1), fused=False)
    two = Optimizer([fused], Everything(lr=0.1), fused=True)
    for p, optimizer in ((plain, one), (fused, two)):
        p.grad = g.to(dtype)
        optimizer.step()
    for name, x in {**one.state[plain], "w": plain}.items():
        y = {**two.state[fused], "w": fused}[name]
        tolerance = 4e-6 if dtype == torch.float32 else 1e-14
        same = torch.isclose(y.detach(), x.detach(), rtol=tolerance, atol=0, equal_nan=True)
        assert same.all(), (name, g[~same], x[~same].tolist(), y[~same].tolist())


class Named(Rule):
    """Memories whose names are words of a kernel's text."""

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        words = "mask range entry t tl i at lo hi n x0 c1 s0 a0 lambda float triton sums"
        return {name: Slot(shape) for name in words.split()}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        size = e.sqrt(e.sum_(g * g))
        return g / size, {k: s[k] + (i + 1.0) * g for i, k in enumerate(self.slots(g.shape))}


def test_a_memory_may_have_any_name():
    parity(Case(Named(lr=0.1), (4, 6)), [(31, 33), (3,)], "float32", STEPS)


def stepped(monkeypatch, language: str, rule: Rule, rounding: str, offset: int = 0, state=None):
    """A bfloat16 parameter at a place in memory, and its state, after steps in a language."""
    monkeypatch.setenv("DEEPOPT_KERNELS", language)
    rng = torch.Generator().manual_seed(5)
    around = torch.zeros(1100, dtype=torch.bfloat16)
    p = nn.Parameter(around[offset : offset + 1023].view(31, 33))
    other = nn.Parameter(torch.ones(7, dtype=torch.bfloat16))
    with torch.no_grad():
        p.copy_(torch.randn(31, 33, generator=rng))
        p[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38])
    optimizer = Optimizer([other, p], rule, fused=True, rounding=rounding, state_dtype=state)
    for _ in range(STEPS):
        for x in (other, p):
            x.grad = torch.randn(x.shape, generator=rng).to(torch.bfloat16)
        optimizer.step()
    return [x for q in (other, p) for x in (q.data, *optimizer.state[q].values())]


@pytest.mark.parametrize("state", [None, torch.bfloat16], ids=["wide", "narrow"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "exact"])
@pytest.mark.parametrize("rule", [rules.AdamW(lr=0.05), rules.SGD(lr=0.1)], ids=["AdamW", "SGD"])
def test_triton_rounds_to_the_bits_that_c_does(rule, rounding, state, monkeypatch):
    how = {"rule": rule, "rounding": rounding, "state": state}
    both = [stepped(monkeypatch, language, **how) for language in ("triton", "c")]
    for a, b in zip(*both, strict=True):
        if a.dtype == torch.bfloat16:
            a, b = a.view(torch.int16), b.view(torch.int16)
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert both[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("offset", [1, 3])
def test_a_tensor_at_an_odd_address_gets_the_same_bits(offset, monkeypatch):
    """Its blocks go by masks, of which vectors of a whole block know nothing."""
    even = stepped(monkeypatch, "triton", rules.AdamW(lr=0.05), "stochastic")
    odd = stepped(monkeypatch, "triton", rules.AdamW(lr=0.05), "stochastic", offset)
    for a, b in zip(even, odd, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_no_result_depends_on_the_number_of_programs(monkeypatch):
    found: list[Tensor] = []
    for programs in (1, 2, 7):
        monkeypatch.setattr(gpu, "GRAIN", replace(GRAIN, programs=programs))
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(s)) for s in ((31, 33), (4, 6), (40, 40))]
        optimizer = Optimizer(params, rules.DeltaMomentum(lr=0.05, view="scalar"), fused=True)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def launched(rule: Rule, sizes: list[int]) -> tuple[gpu.Launch, dict[str, list[Tensor]]]:
    """A launch of the first kernel of a rule over ones."""
    region = plan(rule, (6,), frozenset({"every"})).regions[0]
    written = Triton(region, dict.fromkeys(region.tensors, "float32"))
    (kernel,) = gpu.kernels([written], CPU)
    rows = np.zeros(len(sizes), np.int64)
    launch = kernel.launch(np.array(sizes, np.int64), rows, rows)
    tensors = {name: [torch.ones(n) for n in sizes] for name in region.tensors}
    for i, name in enumerate(region.tensors):
        launch.table[i] = [x.data_ptr() for x in tensors[name]]
    launch.values[:] = 0.5
    return launch, tensors


def test_no_entries_are_no_work():
    launch, _ = launched(rules.AdamW(), [])
    launch.run(1, (0, 0))
    launch, tensors = launched(rules.AdamW(), [0, 3])
    launch.run(1, (0, 0))
    assert bool((tensors["w"][1] != 1).all())
    p, q = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(3))
    p.grad, q.grad = torch.ones(0), torch.ones(3)
    Optimizer([p, q], rules.AdamW(), fused=True).step()
    assert bool((q != 1).all())


def test_nothing_is_stored_where_a_gradient_was_not_finite():
    launch, tensors = launched(rules.AdamW(), [300, 5])
    launch.run(1, (0, 0), found_inf=torch.tensor(1.0))
    assert all(bool((x == 1).all()) for own in tensors.values() for x in own)
    launch.run(1, (0, 0), found_inf=torch.tensor(0.0))
    assert all(bool((x != 1).all()) for x in tensors["w"])


def test_what_changes_is_sent_again():
    launch, tensors = launched(rules.SGD(), [3])
    launch.run(1, (0, 0))
    first = tensors["w"][0].clone()
    launch.values[:] = 0.25
    other = torch.ones(3)
    launch.table[[*tensors].index("w")] = other.data_ptr()
    launch.run(2, (0, 0))
    assert torch.equal(tensors["w"][0], first)
    assert bool((other != 1).all()) and not torch.equal(other, first)


def test_shapes_and_schedules_share_a_kernel():
    gpu._kernels.clear()
    params = [nn.Parameter(torch.ones(s)) for s in ((3, 5), (40, 40), (7,))]
    optimizer = Optimizer(params, rules.AdamW(lr=0.1), fused=True)
    for lr in (0.1, 0.01):
        optimizer.param_groups[0]["lr"] = lr
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert len(gpu._kernels) == 1
