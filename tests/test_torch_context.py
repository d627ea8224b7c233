"""What torch rules need beyond gradients: recorded inputs, matrices given by hand, and norms."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from cases import difference
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import torch_backend
from deepopt import Memories, Oracle, Rate, Rule, Time, Update, around, rules
from deepopt.expr import Expr
from torch_backend import Optimizer, bind

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear, leading axes": (lambda: nn.Linear(5, 4, bias=False), (3, 2, 5)),
    "linear, one row": (lambda: nn.Linear(5, 4), (5,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv1d, one image": (lambda: nn.Conv1d(3, 4, 2), (3, 9)),
    "conv1d, same": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=2), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2), (1, 3)), (2, 2, 7, 8)),
    "conv2d, valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 2, 5, 5)),
    "conv2d, reflected": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
                          (2, 2, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2, dilation=(1, 2, 1)), (2, 2, 4, 5, 4)),
}  # fmt: skip


class Scaled(Rule):
    """Descent by the gradient over the norm of all gradients."""

    power: Rate = 1.0

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        return g / t.norm**self.power, {}


def doubles(*tensors):
    return [x.detach().double().clone().numpy() for x in tensors]


def jacobian_gram(layer, x):
    """Σ xᵀx per group by autograd alone: row i of a group's gradient for output i is its input."""
    groups = getattr(layer, "groups", 1)
    y = layer(x)
    flat = y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else None
    if flat is None:
        axis = y.ndim - len(layer.kernel_size) - 1
        flat = y.movedim(axis, -1).reshape(-1, y.shape[axis])
    per, grams = layer.weight.shape[0] // groups, []
    for group in range(groups):
        rows = []
        for row in flat:
            (g,) = torch.autograd.grad(row[group * per], layer.weight, retain_graph=True)
            rows.append(g[group * per].flatten())
        keys = torch.stack(rows)
        grams.append(keys.T @ keys)
    return torch.stack(grams), len(flat)


def expected(rule, weight, gradient, grams):
    """One step of the oracle, group by group."""
    count = len(grams)
    w = weight.reshape(count, -1, grams.shape[-1])
    g = gradient.reshape(w.shape)
    contexts = [{"gram": gram} for gram in grams]
    return np.concatenate(Oracle(rule, w).step(list(w), list(g), contexts)).reshape(weight.shape)


# Recording


@pytest.mark.parametrize("rule", [rules.DGD(lr=0.1), rules.GGD(lr=0.1, kappa=0.7)], ids=["", "GGD"])
@pytest.mark.parametrize("case", LAYERS)
def test_a_recorded_step_equals_the_oracle(case, rule):
    make, shape = LAYERS[case]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    total, rows = jacobian_gram(layer, x)
    optimizer = Optimizer(layer, rule)
    (layer(x) * torch.randn_like(layer(x))).sum().div(rows).backward()
    w, g = doubles(layer.weight, layer.weight.grad)
    gram = optimizer.context[layer.weight]["gram"]
    assert difference(gram.reshape(total.shape), total / rows) <= 1e-13
    optimizer.step()
    new = expected(rule, w, g, total.numpy() / rows)
    assert difference(layer.weight.detach(), new) <= 1e-13
    assert difference(new, w) > 1e-3
    assert optimizer.context[layer.weight]["gram"] is gram


def test_patches_may_be_laid_out_in_parts(monkeypatch):
    layer, x = nn.Conv2d(2, 3, 3).double(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    optimizer = torch_backend.DGD(layer)
    grams = []
    for most in (1, 600, 1 << 24):
        monkeypatch.setattr("torch_backend.layers.PATCHES", most)
        optimizer.zero_grad()
        layer(x).sum().backward()
        grams.append(optimizer.context[layer.weight]["gram"])
    assert difference(grams[0], grams[2]) <= 1e-14 and difference(grams[1], grams[2]) <= 1e-14


class Twice(nn.Module):
    """One weight used twice in a forward: by one layer, or by two that share it."""

    def __init__(self, tied):
        super().__init__()
        self.one = nn.Linear(4, 4, dtype=torch.float64)
        self.two = nn.Linear(4, 4, dtype=torch.float64) if tied else self.one
        self.two.weight = self.one.weight
        self.seen = []

    def forward(self, x):
        y = torch.tanh(self.one(x))
        self.seen = [x.detach(), y.detach()]
        return self.two(y)

    @property
    def total(self):
        return sum(x.T @ x for x in self.seen)


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "one layer"])
def test_uses_of_one_weight_add_up_and_passes_are_averaged(tied, reentrant):
    model = Twice(tied)
    optimizer = torch_backend.DGD(model, views={"one.weight": "flatten"})
    batches = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for accumulated in (1, 3):
        optimizer.zero_grad(set_to_none=accumulated == 1)
        total = 0.0
        for x in batches[:accumulated]:
            y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
            y.square().mean().div(accumulated).backward()
            total = total + model.total
        gram = optimizer.context[model.one.weight]["gram"]
        assert difference(gram, total / (6 * accumulated)) <= 1e-14


@pytest.mark.parametrize("reentrant", [True, False])
def test_segments_of_one_backward_pass_belong_together(reentrant):
    layer = nn.Linear(4, 4, dtype=torch.float64)
    optimizer = torch_backend.DGD(layer)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    checkpoint(layer, y, use_reentrant=reentrant).sum().backward()
    gram = optimizer.context[layer.weight]["gram"]
    assert difference(gram, ((x.T @ x + y.T @ y) / 6).detach()) <= 1e-14


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["", "reentrant", "non-reentrant"])
def test_what_a_checkpoint_drops_is_not_kept(reentrant):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    inner = []
    model[1].register_forward_hook(lambda *x: inner.append(StorageWeakRef(x[2].untyped_storage())))
    optimizer = torch_backend.DGD(model, views={"2.weight": "flatten"})
    x = torch.randn(6, 4, requires_grad=True)
    y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
    assert inner[0].expired() is (reentrant is not None)
    y.sum().backward()
    assert len(optimizer.context) == 2


def test_rules_of_the_other_axis_are_not_recorded():
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"DGD wants the gram .* first axis; .* inputs='last'"):
        torch_backend.DGD(layer, inputs="first")
    optimizer = torch_backend.DGD([layer.weight], inputs="first")
    with pytest.raises(ValueError, match="first axis"):
        optimizer.record(layer)
    assert not layer._forward_hooks


def test_a_gradient_that_starts_anew_starts_its_gram_anew():
    layer = nn.Linear(3, 3)
    optimizer = torch_backend.DGD(layer)
    x, y = torch.randn(2, 5, 3)
    layer(x).sum().backward()
    layer.weight.grad = None
    layer(y).sum().backward()
    assert difference(optimizer.context[layer.weight]["gram"], y.T @ y / 5) <= 1e-6
    optimizer.zero_grad()
    assert "gram" not in optimizer.context[layer.weight]
    layer(x).sum().backward()
    layer(y).sum().backward()
    mean = (x.T @ x + y.T @ y) / 10
    assert difference(optimizer.context[layer.weight]["gram"], mean) <= 1e-6
    # One that was set by hand is never written into; to watch a layer twice changes nothing.
    optimizer.context[layer.weight]["gram"] = by_hand = torch.eye(3)
    optimizer.record(layer)
    layer(x).sum().backward()
    assert torch.equal(by_hand, torch.eye(3))
    assert difference(optimizer.context[layer.weight]["gram"], x.T @ x / 5) <= 1e-6


def test_autocast_and_narrow_parameters_are_recorded_in_float32():
    x = torch.randn(64, 8)
    wide, narrow = nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16)
    one, two = torch_backend.DGD(wide), torch_backend.DGD(narrow)
    with torch.autocast("cpu", torch.bfloat16):
        y = wide(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    narrow(x.bfloat16()).sum().backward()
    for optimizer, layer, seen in ((one, wide, x), (two, narrow, x.bfloat16().float())):
        gram = optimizer.context[layer.weight]["gram"]
        assert gram.dtype == torch.float32 and difference(gram, seen.T @ seen / 64) <= 1e-6
        optimizer.step()


def test_nothing_is_recorded_without_a_gradient():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3))
    optimizer = torch_backend.DGD(model, views={"2.weight": "flatten"})
    x = torch.randn(5, 3)
    with torch.no_grad():
        assert model(x).grad_fn is None
    model[2].requires_grad_(False)
    model[0](x).relu_()
    model(x).sum().backward()
    assert "gram" in optimizer.context[model[0].weight]
    assert not optimizer.context.get(model[2].weight)


def test_gradients_of_gradients_pass_through():
    layer, x = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True)
    results = []
    for _ in range(2):
        (g,) = torch.autograd.grad(torch.tanh(layer(x)).sum(), x, create_graph=True)
        layer.zero_grad()
        g.square().sum().backward()
        results.append(layer.weight.grad.clone())
        torch_backend.DGD(layer)
    assert torch.equal(*results)


# Routing


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 8)
        self.free = nn.Parameter(torch.randn(8, 8))
        self.turned = nn.ConvTranspose1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.groups = nn.Conv1d(8, 8, 1, groups=2)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 7)

    def forward(self, x):
        x = self.tokens(x)
        x = self.attention(x, x, x)[0] @ self.free
        x = self.groups(self.turned(x.mT)).mT
        return self.head(self.hidden(input=self.norm(x)))


def test_only_weights_of_layers_whose_inputs_are_seen_get_the_rule():
    model = Net()
    optimizer = torch_backend.DGD(model, lr=0.125, weight_decay=0.5)
    routes = {r.name: r for r in optimizer.routing.routes}
    taken = {r.name: r.view for r in routes.values() if r.rule == "DGD"}
    assert taken == {"groups.weight": "split:2", "hidden.weight": "flatten"}
    assert {r.rule for r in routes.values()} == {"DGD", "SGD"}
    assert routes["head.weight"].why == "head (by place or name): fallback"
    assert routes["tokens.weight"].why == "embedding (by place or name): fallback"
    unseen = "not of a layer whose inputs are recorded: fallback"
    for name in ("free", "turned.weight", "attention.in_proj_weight", "attention.out_proj.weight"):
        assert routes[name].why == unseen
    assert all(g["lr"] == 0.125 and g["weight_decay"] == 0.5 for g in optimizer.param_groups)
    model(torch.randint(7, (2, 5))).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)
                   if p.grad.any())  # fmt: skip
    others = torch_backend.DGD(Net(), fallback=rules.Lion()).param_groups
    assert {g["rule"] for g in others} == {"DGD", "Lion"}


def test_blocks_of_a_fused_projection_share_what_they_are_given():
    layer, x = nn.Linear(4, 12, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    optimizer = torch_backend.GGD(layer, lr=0.1, views={"weight": "split:3"})
    layer(x).square().mean().backward()
    w, g = doubles(layer.weight, layer.weight.grad)
    optimizer.step()
    grams = np.stack([(x.T @ x / 6).numpy()] * 3)
    assert difference(layer.weight.detach(), expected(rules.GGD(lr=0.1), w, g, grams)) <= 1e-13


# Delta gradient descent as its closed forms


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_explicit_steps_are_the_closed_form(kappa):
    layer, x = nn.Linear(5, 4, bias=False, dtype=torch.float64), torch.randn(7, 5).double()
    optimizer = torch_backend.DGD(layer, lr=0.1, kappa=kappa, solver="explicit")
    layer(x).square().mean().backward()
    w, g = layer.weight.detach().clone(), layer.weight.grad.clone()
    optimizer.step()
    c = x.T @ x / 7
    new = w @ (torch.eye(5) - 0.1 * kappa * c) - 0.1 * g
    assert difference(layer.weight.detach(), new) <= 1e-14
    if not kappa:
        p = nn.Parameter(w.clone())
        p.grad = g
        torch_backend.SGD([p], lr=0.1).step()
        assert torch.equal(layer.weight, p)


# Contexts by hand


def given(count=1, dtype=torch.float64, **options):
    params = [nn.Parameter(torch.randn(4, 3, dtype=dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    options = {"values": "given", "lr": 0.1} | options
    return params, torch_backend.PreconditionedMomentum(params, **options)


@pytest.mark.parametrize("count", [1, 3])
def test_a_given_preconditioner_equals_the_oracle(count):
    params, optimizer = given(count)
    oracle = Oracle(rules.PreconditionedMomentum(values="given", lr=0.1), doubles(*params))
    weights = doubles(*params)
    for _ in range(3):
        contexts = [torch.randn(4, 4, dtype=torch.float64) for _ in params]
        for p, x in zip(params, contexts, strict=True):
            optimizer.context[p]["preconditioner"] = x
        gradients = doubles(*(p.grad for p in params))
        weights = oracle.step(weights, gradients, [{"preconditioner": x} for x in contexts])
        optimizer.step()
    assert all(difference(p.detach(), w) <= 1e-12 for p, w in zip(params, weights, strict=True))


EYE = torch.eye(4, dtype=torch.float64)
BAD = {
    "missing": (None, ValueError, r"preconditioner of parameter 1 .* of shape \(4, 4\): there is "
                r"none. Set optimizer.context\[p\]\['preconditioner'\] before the step"),
    "shape": (EYE[:3], ValueError, r"shape \(4, 4\): got shape \(3, 4\)"),
    "nan": (EYE * float("nan"), ValueError, "preconditioner of parameter 1 of group 0 has NaN"),
    "inf": (EYE / 0.0, ValueError, "NaN or Inf entries; it must be finite"),
    "array": (EYE.numpy(), TypeError, "must be a tensor, not <class 'numpy.ndarray'>"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_contexts_are_refused_before_anything_moves(case):
    value, error, words = BAD[case]
    params, optimizer = given(2)
    for p in params:
        optimizer.context[p]["preconditioner"] = EYE
    optimizer.step()
    before = pickle.dumps((optimizer.state_dict(), params))
    if value is None:
        del optimizer.context[params[1]]["preconditioner"]
    else:
        optimizer.context[params[1]]["preconditioner"] = value
    with pytest.raises(error, match=words):
        optimizer.step()
    assert pickle.dumps((optimizer.state_dict(), params)) == before
    if case in ("nan", "inf"):
        optimizer.on_nonfinite = "skip"
        optimizer.step()
        assert optimizer.metrics()["skipped_steps"] == 1.0
        assert pickle.dumps((optimizer.state_dict(), params)) == before


def test_a_missing_gram_says_how_to_get_it():
    layer = nn.Linear(3, 3)
    optimizer = torch_backend.DGD(layer)
    F.linear(torch.ones(2, 3), layer.weight).sum().backward()
    words = r"DGD needs the gram of weight.*there is none.*context\[p\]\['gram'\].*give DGD the "
    with pytest.raises(ValueError, match=words + r"module.*not by F\.linear"):
        optimizer.step()
    bare = torch_backend.DGD([layer.weight], lr=0.1)
    with pytest.raises(ValueError, match="gram of parameter 0 of group 0"):
        bare.step()
    bare.context[layer.weight]["gram"] = torch.eye(3)
    bare.step()
    bare.record(layer)
    layer(torch.ones(2, 3)).sum().backward()
    assert torch.equal(bare.context[layer.weight]["gram"], torch.ones(3, 3))
    with pytest.raises(ValueError, match="ReLU has no Linear or Conv layer"):
        bare.record(nn.ReLU())


# Copies


def roundtrip(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, roundtrip])
def test_copies_keep_what_was_given_and_record_nothing(copied):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch_backend.DGD(model, views={"1.weight": "flatten"})
    model(torch.randn(4, 3)).sum().backward()
    optimizer.context[model[1].weight]["gram"] = torch.eye(3)
    assert "context" not in optimizer.state_dict() and not optimizer.state_dict()["state"]
    new, twin = copied((model, optimizer))
    assert [*twin.context] == [new[1].weight]
    assert torch.equal(twin.context[new[1].weight]["gram"], torch.eye(3))
    kept = optimizer.context[model[0].weight]["gram"].clone()
    new(torch.randn(4, 3)).sum().backward()
    assert torch.equal(optimizer.context[model[0].weight]["gram"], kept)
    with pytest.raises(ValueError, match=r"optimizer\.record\(module\)"):
        twin.step()
    twin.record(new)
    new(torch.randn(4, 3)).sum().backward()
    twin.step()


def test_a_dropped_optimizer_leaves_the_model_as_it_was():
    layer = nn.Linear(3, 3)
    optimizer = torch_backend.DGD(layer)
    assert layer(torch.ones(2, 3)).grad_fn.name().startswith("_Use")
    del optimizer
    assert not layer(torch.ones(2, 3)).grad_fn.name().startswith("_Use")


# Norms, averages, metrics, classes made by functions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_of_all_gradients_is_an_input(dtype):
    params = [nn.Parameter(torch.randn(s, dtype=dtype)) for s in [(3, 4), (3, 4), (5,), ()]]
    params.append(nn.Parameter(torch.randn(3, dtype=torch.float32)))
    for p in params:
        p.grad = torch.randn_like(p)
    weights, gradients = doubles(*params), doubles(*(p.grad for p in params))
    optimizer = Optimizer([{"params": params[:2]}, {"params": params[2:]}], Scaled(lr=0.5))
    new = Oracle(Scaled(lr=0.5), weights).step(weights, gradients)
    optimizer.step()
    tolerance = {torch.bfloat16: 2.0**-8, torch.float32: 1e-6, torch.float64: 1e-7}
    for p, w in zip(params, new, strict=True):
        assert difference(p.detach().double(), w) <= tolerance[p.dtype]


def test_averages_are_swapped_in_and_out_bit_by_bit():
    w = nn.Parameter(torch.randn(4, 3, dtype=torch.bfloat16))
    plain = nn.Parameter(torch.randn(3))
    groups = [{"params": [w], "rule": around.averaged(rules.SGD(lr=0.5))}, {"params": [plain]}]
    optimizer = Optimizer(groups)
    with pytest.raises(ValueError, match="no parameter has an average"):
        with torch_backend.averaged(optimizer):
            pass
    optimizer.state["foreign"] = 1
    w.grad, start = torch.ones_like(w), w.detach().clone()
    optimizer.step()
    old = w.detach().clone(), plain.detach().clone()
    with pytest.raises(RuntimeError, match="inside"):
        with torch_backend.averaged(optimizer):
            assert torch.allclose(w, start, atol=2e-2) and torch.is_grad_enabled()
            assert torch.equal(plain, old[1])
            raise RuntimeError("inside")
    assert torch.equal(w, old[0]) and not torch.equal(w, start)


def test_metrics_count_negative_eigenvalues():
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer = torch_backend.Shampoo(params)
    assert "negatives" not in optimizer.metrics()
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    if "negatives" in optimizer.state[params[0]]:
        for p, n in zip(params, (2.0, 3.0), strict=True):
            optimizer.state[p]["negatives"].fill_(n)
    assert optimizer.metrics()["negatives"] == 5.0


def test_impossible_shapes_are_refused_when_they_are_given():
    optimizer = torch_backend.Shampoo([nn.Parameter(torch.randn(4, 4))], block=16)
    before = repr(optimizer), dict(optimizer.rules), dict(optimizer._why)
    bad = [nn.Parameter(torch.randn(s)) for s in [(3,), (4, 4), (17, 4)]]
    with pytest.raises(ValueError, match="a side of 17 cannot be cut"):
        optimizer.add_param_group({"params": bad})
    assert (repr(optimizer), optimizer.rules, optimizer._why) == before


def test_classes_made_by_functions_of_one_name_stay_apart():
    classes = [around.clipped(rules.SGD, max_norm=x) for x in (1.0, 2.0, 3.0)]
    assert len(set(classes)) == 3 and len({c.__qualname__ for c in classes}) == 1
    params = [nn.Parameter(torch.zeros(2)) for _ in classes]
    groups = [{"params": [p], "rule": c(lr=1.0)} for p, c in zip(params, classes, strict=True)]
    optimizer = roundtrip(copy.deepcopy(Optimizer(groups)))
    names = [g["rule"] for g in optimizer.param_groups]
    full = f"deepopt.around.{classes[0].__name__}"
    assert names == [classes[0].__name__, full, f"{full}#2"]
    for i, group in enumerate(optimizer.param_groups):
        (p,) = group["params"]
        p.grad = torch.full((2,), 9.0)
        assert group["max_norm"] == i + 1.0
    optimizer.step()
    moved = [float(g["params"][0].detach().norm()) for g in optimizer.param_groups]
    assert np.allclose(moved, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("made", [around.cautious(rules.M3), around.clipped(rules.DGD)])
def test_classes_made_by_functions_can_be_bound(made):
    bound, model = bind(made), nn.Linear(3, 3)
    optimizer = roundtrip(copy.deepcopy(bound(model, lr=0.25)))
    assert type(optimizer) is bound and optimizer.param_groups[0]["rule"] == made.__name__
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer = bound(model)
    before = model.weight.detach().clone()
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_a_backward_pass_for_something_else_records_nothing():
    model, x = small(), torch.randn(8, 4, dtype=torch.float64)
    optimizer = torch_backend.DGD(model, lr=0.1)
    model(x).sum().backward()
    before = optimizer.context[model[0].weight]["gram"].clone()
    other = (100 * torch.randn(8, 4, dtype=torch.float64)).requires_grad_()
    torch.autograd.grad(model(other).sum(), other)
    assert torch.equal(optimizer.context[model[0].weight]["gram"], before)


def test_what_a_step_has_used_is_not_used_again():
    model, x = small(), torch.randn(8, 4, dtype=torch.float64)
    optimizer = torch_backend.DGD(model, lr=0.1)
    for size in (1.0, 0.1, 0.01):
        model(size * x).sum().backward()
        gram = optimizer.context[model[0].weight]["gram"]
        torch.testing.assert_close(gram, size**2 * x.mT @ x / 8)
        optimizer.step()
        model.zero_grad(set_to_none=False)


def test_layers_whose_keys_are_not_known_fall_back():
    class Scaled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(10 * x, self.weight, self.bias)

    model = nn.ModuleDict({"e": nn.Embedding(6, 4), "s": Scaled(4, 4), "h": nn.Linear(4, 6)})
    model["h"].weight = model["e"].weight
    optimizer = Optimizer([{"params": model, "rule": rules.DGD()}])
    assert {r.rule for r in optimizer.routing.routes} == {"SGD"}


def test_nothing_is_left_behind_in_the_model():
    model = small()
    optimizer = torch_backend.DGD(model, lr=0.1)
    assert torch.func.jacrev(model)(torch.randn(4, dtype=torch.float64)).shape == (2, 4)
    assert model[0]._forward_hooks
    del optimizer
    gc.collect()
    assert not model[0]._forward_hooks


def test_large_contexts_are_stacked_a_few_at_a_time():
    tall = [nn.Parameter(torch.ones(8, 600)) for _ in range(4)]
    optimizer = Optimizer(tall, rules.DGD(lr=0.1), fused=False)
    for p in tall:
        p.grad, optimizer.context[p]["gram"] = torch.ones(8, 600), torch.eye(600)
    batches = optimizer._group(0, None).batches
    assert [len(batch.params) for batch in batches] == [1, 1, 1, 1]
