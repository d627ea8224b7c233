"""The torch binding as torch users know optimizers: groups, schedules, closures, bad input."""

import inspect
import pickle
import warnings
from math import lcm
from typing import ClassVar

import numpy as np
import pytest
import torch
from cases import CASES, DEFAULTS, contexts, difference, stream
from models import convnet, give_context, gpt
from torch import nn

import deepopt.rule
import torch_backend
from deepopt import Memories, Oracle, Retention, Rule, Slot, Time, Update, rules
from deepopt.describe import state_numbers
from deepopt.expr import Expr, array, sign, where
from torch_backend import Optimizer, bind

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_default = pytest.mark.parametrize("rule", DEFAULTS, ids=lambda r: type(r).__name__)
each_class = pytest.mark.parametrize("cls", rules.ALL, ids=lambda c: c.__name__)


class Awkward(Rule):
    """Memories that swap, alias and transpose: what an in-place step must not confuse."""

    keep: Retention = 0.7
    domain: ClassVar = "matrix"

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        names = ("last", "older", "weight", "turned", "half", "other", "count")
        return {k: Slot(shape) for k in names} | {"count": Slot((1, 1), value=1.0)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        eye = 0.1 * array("eye", (g.shape[0], g.shape[0]))
        view = (self.keep * s["turned"]).mT
        late = where(t.step < 3.0, g, 2.0 * g) * where(g > 0.0, self.keep, 0.3)
        memories = {
            "last": g,
            "older": s["last"],
            "weight": w,
            "turned": view + g,
            "half": g,
            "other": self.keep * s["half"],
            "count": s["count"] + 1.0,
        }
        d = (g < 1.0) * sign(g) * late + s["older"] + (eye + g @ g.mT) @ g + s["other"] * s["count"]
        return d + view * 0.1, memories


AwkwardOptimizer = bind(Awkward)


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    p.grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return p


def snapshot(optimizer: torch.optim.Optimizer) -> str:
    """All that an error must leave as it was."""
    params = [[p.tolist() for p in g["params"]] for g in optimizer.param_groups]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state = [sorted((k, v.tolist()) for k, v in s.items()) for s in optimizer.state.values()]
    return repr((params, groups, state))


def run(optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> torch.Tensor:
    """Steps with gradients that depend on the seed only; returns all parameters as one vector."""
    generator = torch.Generator().manual_seed(seed)
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        give_context(optimizer, step)
        optimizer.step()
    return torch.cat([p.detach().flatten().double() for p in params])


# Classes


@each_class
def test_a_bound_class_is_a_real_optimizer_with_a_true_signature(cls):
    bound = getattr(torch_backend, cls.__name__)
    optimizer = bound([parameter(3, 3)])
    assert isinstance(optimizer, torch.optim.Optimizer) and type(optimizer) is bound
    assert bound.__name__ == cls.__name__ and bound.__module__ == "torch_backend"
    assert bound.__doc__ == cls.__doc__
    assert bind(cls) is bound and pickle.loads(pickle.dumps(bound)) is bound
    given = dict(inspect.signature(bound).parameters)
    options = ["fallback", "views", "strict", "maximize", "foreach", "differentiable"]
    options += ["on_nonfinite"]
    options += ["fused", "precision", "rounding", "capturable", "state_dtype"]
    hyper = {k: p.default for k, p in inspect.signature(cls).parameters.items()}
    assert list(given)[:2] == ["params", "lr"] and list(given)[-12:] == options
    assert {k: p.default for k, p in given.items() if k in hyper} == hyper
    assert set(given) == {"params", *hyper, *options}
    (group,) = optimizer.param_groups
    assert {k: group[k] for k in hyper} == hyper
    assert type(optimizer).__name__ in repr(optimizer) and "lr: " in repr(optimizer)


def test_lr_is_the_second_positional_argument():
    assert torch_backend.M3([parameter(3, 3)], 0.25).param_groups[0]["lr"] == 0.25
    with pytest.raises(TypeError):
        torch_backend.M3([parameter(3, 3)], 0.25, 0.1)


def test_a_misspelt_hyperparameter_is_an_error_with_a_suggestion():
    with pytest.raises(TypeError, match="M3 has no hyperparameter 'perod'; did you mean 'period'"):
        torch_backend.M3([parameter(3, 3)], perod=8)
    with pytest.raises(TypeError, match="SGD has no hyperparameter 'betas'; it has"):
        torch_backend.SGD([parameter(3, 3)], betas=(0.9, 0.99))
    with pytest.raises(TypeError, match="no hyperparameter 'momentun'; did you mean 'momentum'"):
        Optimizer([{"params": [parameter(3, 3)], "momentun": 0.9}], rules.HeavyBall())


def test_bind_refuses_what_is_no_rule():
    with pytest.raises(TypeError, match="bind takes a class of rules"):
        bind(rules.M3())


def test_a_subclass_keeps_its_own_constructor():
    class Mine(torch_backend.HeavyBall):
        def __init__(self, params):
            super().__init__(params, 0.5, momentum=0.25)

    optimizer = Mine([parameter(3)])
    assert optimizer.param_groups[0]["momentum"] == 0.25
    assert list(inspect.signature(Mine).parameters) == ["params"]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("every", [1, 3])
def test_a_rule_of_ones_own_with_awkward_memories_equals_the_oracle(count, every):
    streams = [stream((4, 4), 9, seed) for seed in range(count)]
    params = [nn.Parameter(torch.tensor(w)) for w, _ in streams]
    rule = Awkward(lr=0.01, every=every, weight_decay=0.1)
    optimizer = AwkwardOptimizer(params, lr=0.01, every=every, weight_decay=0.1)
    weights = [w for w, _ in streams]
    oracle = Oracle(rule, weights)
    for step in range(9):
        gradients = [g[step] for _, g in streams]
        for p, g in zip(params, gradients, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        weights = oracle.step(weights, gradients)
        for p, g, w, s in zip(params, gradients, weights, oracle.state, strict=True):
            assert np.array_equal(p.grad, g) and difference(p.detach(), w) <= 1e-13
            for name, value in s.items():
                assert difference(optimizer.state[p][name], value) <= 1e-12, name
    copy = pickle.loads(pickle.dumps(optimizer))
    assert type(copy) is AwkwardOptimizer


def test_two_rules_of_one_name_stay_apart():
    class AdamW(Rule):
        def update(self, w, g, s, t):
            return g, {}

    params = [parameter(3, seed=i) for i in range(2)]
    optimizer = Optimizer([{"params": params[:1], "rule": AdamW(lr=1.0)}, {"params": params[1:]}])
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before - params[0].grad)
    assert optimizer.param_groups[1]["rule"] == "deepopt.rules.adaptive.AdamW"
    assert set(optimizer.state[params[1]]) == {"step", "exp_avg", "exp_avg_sq"}


# Groups


@each_default
def test_several_rules_in_one_object_step_as_they_would_alone(rule):
    shapes = [(4, 3), (3, 5), (6, 6)]
    together = [parameter(*s) for s in shapes]
    groups = [
        {"params": [together[0]], "rule": rule},
        {"params": [together[1]], "rule": rules.AdamW(lr=0.1), "betas": (0.8, 0.9)},
        {"params": [together[2]], "lr": 0.5, "maximize": True},
    ]
    path = run(Optimizer(groups, rules.HeavyBall()), 1)
    apart = [parameter(*s) for s in shapes]
    alone = [
        Optimizer([apart[0]], rule),
        Optimizer([apart[1]], rules.AdamW(lr=0.1, betas=(0.8, 0.9))),
        Optimizer([apart[2]], rules.HeavyBall(lr=0.5), maximize=True),
    ]
    for a, b, optimizer in zip(apart, together, alone, strict=True):
        a.grad = b.grad.clone()
        optimizer.step()
    assert torch.equal(path, torch.cat([p.detach().flatten().double() for p in apart]))


def test_statics_may_be_overridden_and_changed():
    params = [parameter(4, 4, seed=i) for i in range(2)]
    optimizer = Optimizer([{"params": params[:1], "period": 2}, {"params": params[1:]}], rules.M3())
    assert [g["period"] for g in optimizer.param_groups] == [2, 16]
    optimizer.add_param_group({"params": [parameter(2)], "rule": rules.AdamW()})
    other = optimizer.param_groups.pop()
    own = {"params", "rule", "seen_as", "maximize", "schema"}
    assert set(other) == set(inspect.signature(rules.AdamW).parameters) | own
    run(optimizer, 2)
    assert optimizer.state[params[0]]["readout_1"].any()
    assert not optimizer.state[params[1]]["readout_1"].any()
    optimizer.param_groups[1]["period"] = 3
    run(optimizer, 1)
    assert optimizer.state[params[1]]["readout_1"].any()
    optimizer.param_groups[1]["every"] = 4
    run(optimizer, 1)
    assert "gradient_sum" in optimizer.state[params[1]]
    optimizer.param_groups[1]["period"] = 0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"M3\(period=0\) must be an integer >= 1"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_groups_may_be_rearranged():
    one, two = parameter(3, seed=1), parameter(3, seed=2)
    optimizer = Optimizer([{"params": [one], "rule": rules.Lion()}, {"params": [two]}], rules.SGD())
    optimizer.param_groups.pop(0)
    before = two.detach().clone()
    optimizer.step()
    assert torch.equal(two, before - 0.01 * two.grad)


def test_a_group_can_be_added_later():
    optimizer = torch_backend.M3([parameter(3, 3)], lr=0.5)
    run(optimizer, 2)
    late = [parameter(4, 4), parameter(4)]
    optimizer.add_param_group({"params": late, "weight_decay": 0.5})
    assert [g["rule"] for g in optimizer.param_groups] == ["M3", "M3", "AdamW"]
    assert [g["lr"] for g in optimizer.param_groups] == [0.5] * 3
    run(optimizer, 1)
    assert optimizer.state[late[0]]["step"] == 1 and optimizer.state[late[1]]["step"] == 1


def test_keys_that_schedulers_and_trainers_leave_are_kept():
    p = parameter(3, 3)
    group = {"params": [p], "initial_lr": 0.5, "max_lr": 1.0, "name": "decay"}
    optimizer = Optimizer([group], rules.HeavyBall(lr=0.1))
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    torch.optim.lr_scheduler.StepLR(optimizer, 1, last_epoch=3)
    other = Optimizer([parameter(3, 3)], rules.HeavyBall())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["initial_lr"] == 0.5 and other.param_groups[0]["name"] == "decay"


def test_names_given_as_torch_gives_them_back():
    first = torch_backend.SGD([("a", parameter(2)), ("b", parameter(3))])
    (group,) = first.param_groups
    assert group["param_names"] == ["a", "b"]
    group = {k: group[k] for k in ("params", "param_names")}
    assert [r.name for r in torch_backend.Lion([group]).routing.routes] == ["a", "b"]


def test_an_empty_group_is_welcome_beside_others():
    optimizer = Optimizer([{"params": [], "rule": rules.M3()}, {"params": [parameter(2)]}])
    optimizer.step()
    assert [g["rule"] for g in optimizer.param_groups] == ["M3", "AdamW"]


# Closures, hooks, learning rates


def test_closure_runs_with_gradients_before_any_is_read():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch_backend.SGD([p], lr=0.5)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) == 3.0
    assert torch.equal(p, torch.zeros(3)) and p.requires_grad
    assert optimizer.step() is None


@each_default
def test_maximize_is_descent_on_the_negative(rule):
    up, down = parameter(4, 4), parameter(4, 4)
    for _ in range(3):
        Optimizer([up], rule, maximize=True).step()
        Optimizer([down], rule).step()
        down.grad = -up.grad
    up, down = parameter(4, 4), parameter(4, 4)
    one, two = Optimizer([up], rule, maximize=True), Optimizer([down], rule)
    for seed in range(3):
        up.grad = parameter(4, 4, seed=seed).grad
        down.grad = -up.grad
        one.step()
        two.step()
    assert torch.equal(up, down)


@each_default
def test_a_tensor_lr_is_a_number_and_never_written(rule):
    number, tensor = parameter(4, 4), parameter(4, 4)
    lr = torch.tensor(0.25, dtype=torch.float64)
    bound = getattr(torch_backend, type(rule).__name__)
    one, two = bound([number, parameter(3)], lr=0.25), bound([tensor, parameter(3)], lr=lr)
    assert all(g["lr"] is lr for g in two.param_groups)
    assert torch.equal(run(one, 3), run(two, 3))
    assert lr == 0.25
    lr.fill_(0.5)
    one.param_groups[0]["lr"] = one.param_groups[-1]["lr"] = 0.5
    assert torch.equal(run(one, 3), run(two, 3))
    two.add_param_group({"params": parameter(5, 5)})
    assert two.param_groups[-1]["lr"] is lr
    assert bound([{"params": parameter(2, 2), "lr": 0.1}], lr=lr).param_groups[0]["lr"] == 0.1
    assert bound([parameter(2, 2)], lr=torch.tensor([0.5])).param_groups[0]["lr"].shape == (1,)


@each_case
def test_no_scalar_retraces_and_no_group_is_written(case):
    optimizer = Optimizer([parameter(*case.shape)], case.rule)
    (group,) = optimizer.param_groups
    cycle = case.rule.every * lcm(*case.rule.clocks().values())
    run(optimizer, cycle)
    traced = len(deepopt.rule._traces)
    for name in deepopt.rule.scalar_names(type(case.rule)):
        value = group[name]
        group[name] = tuple(x * 0.5 for x in value) if isinstance(value, tuple) else value * 0.5
    before = {k: v for k, v in group.items() if k != "params"}
    run(optimizer, cycle)
    assert len(deepopt.rule._traces) == traced
    assert {k: v for k, v in group.items() if k != "params"} == before


# Tensors of every kind


@each_case
def test_gradients_are_never_written(case):
    p, q = (parameter(*case.shape, seed=i) for i in range(2))
    optimizer = Optimizer([p, q], case.rule)
    for _ in range(3):
        kept = [p.grad.clone(), q.grad.clone()]
        give_context(optimizer)
        optimizer.step()
        assert torch.equal(p.grad, kept[0]) and torch.equal(q.grad, kept[1])


@each_case
def test_zero_gradient_moves_nothing(case):
    rule = case.rule.with_values({"weight_decay": 0.0})
    if not rule.decoupled or "gram" in rule.context(case.shape):
        return
    for dtype in (torch.float32, torch.bfloat16):
        p, q = (parameter(*case.shape, dtype=dtype, seed=i) for i in range(2))
        before = p.detach().clone(), q.detach().clone()
        optimizer = Optimizer([p, q], rule)
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        give_context(optimizer)
        for _ in range(8):
            optimizer.step()
        assert torch.equal(p, before[0]) and torch.equal(q, before[1])


@each_case
def test_a_vanishing_rate_moves_nothing(case):
    p = parameter(*case.shape, dtype=torch.float64)
    before = p.detach().clone()
    run(Optimizer([p], case.rule.with_values({"lr": 1e-28})), 4)
    # The short version of the paper has an erasing term without a rate.
    assert torch.equal(p, before) or getattr(case.rule, "solver", "") == "neurips"


def test_missing_gradients_and_frozen_parameters_are_left_alone():
    here, missing, frozen = parameter(3, 3), parameter(3, 3, seed=1), parameter(3, 3, seed=2)
    missing.grad = frozen.grad = None
    frozen.requires_grad_(False)
    before = missing.detach().clone(), frozen.detach().clone()
    optimizer = torch_backend.M3([here, missing, frozen])
    optimizer.step()
    assert torch.equal(missing, before[0]) and torch.equal(frozen, before[1])
    assert list(optimizer.state) == [here]
    frozen.requires_grad_(True)
    frozen.grad = here.grad.clone()
    optimizer.step()
    assert optimizer.state[frozen]["step"] == 1 and optimizer.state[here]["step"] == 2
    alone = torch_backend.M3([parameter(3, 3, seed=2)])
    alone.param_groups[0]["params"][0].grad = here.grad.clone()
    alone.step()
    assert torch.allclose(frozen, alone.param_groups[0]["params"][0], rtol=0, atol=1e-7)


def test_all_gradients_missing():
    p = parameter(3, 3)
    p.grad = None
    optimizer = torch_backend.Muon([p])
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("cls", [c for c in rules.ALL if c.domain == "any"])
def test_scalars_are_parameters(cls):
    scalar, vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor([2.0]))
    for p in (scalar, vector):
        p.grad = torch.ones_like(p)
        run(Optimizer([p], cls(every=2)), 4)
    assert scalar.shape == () and scalar == vector and scalar != 2.0


@each_default
def test_tensors_without_rows_are_stepped_as_nothing(rule):
    empty, full = parameter(0, 4), parameter(3, 4)
    optimizer = Optimizer([empty, parameter(4, 0), full], rule)
    before = full.detach().clone()
    run(optimizer, 2)
    assert not torch.equal(full, before) and optimizer.state[empty]["step"] == 2
    assert all(x.isfinite().all() for state in optimizer.state.values() for x in state.values())


@each_default
def test_memory_layout_does_not_matter(rule):
    plain, strided, last = (parameter(4, 3, 2, 2) for _ in range(3))
    base = torch.zeros(4, 3, 2, 4)
    strided.data = base[..., ::2].copy_(plain.data)
    last.data = last.data.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous() and not last.is_contiguous()
    # Kernels take what fills its memory, in any order of axes; the rest takes the plain path.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        results = [
            run(Optimizer([p], rule, precision="float32"), 3) for p in (plain, strided, last)
        ]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-5, atol=1e-6)
    assert torch.equal(base[..., ::2], strided.detach())
    assert last.is_contiguous(memory_format=torch.channels_last)


# Bad input


BAD = {
    "negative lr": (ValueError, r"lr=-0.1\) must be a finite number >= 0", {"lr": -0.1}),
    "infinite lr": (ValueError, r"lr=inf\) must be a finite", {"lr": float("inf")}),
    "lr that is no number": (ValueError, r"lr='1'\) must be a finite number", {"lr": "1"}),
    "negative tensor": (ValueError, r"lr=-1.0\) must be a finite", {"lr": torch.tensor(-1.0)}),
    "nan tensor": (ValueError, r"lr=nan\) must be a finite", {"lr": torch.tensor(np.nan)}),
    "long tensor": (ValueError, "Tensor lr must be 1-element", {"lr": torch.ones(2)}),
    "retention of 1": (ValueError, r"momentum=1.0\) must be a number in \[0", {"momentum": 1.0}),
    "retention": (ValueError, r"momentum=-0.1\) must be a number in", {"momentum": -0.1}),
    "no period": (ValueError, r"every=0\) must be an integer >= 1", {"every": 0}),
    "half a period": (ValueError, r"every=1.5\) must be an integer >= 1", {"every": 1.5}),
    "not a switch": (ValueError, r"nesterov=1\) must be of type bool", {"nesterov": 1}),
    "unknown": (TypeError, "HeavyBall has no hyperparameter 'betas'", {"betas": (0.9, 0.99)}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_hyperparameters_are_refused_wherever_they_stand(case):
    error, words, given = BAD[case]
    p = parameter(3, 3)
    with pytest.raises(error, match=words):
        torch_backend.HeavyBall([p], **given)
    with pytest.raises(error, match=words):
        Optimizer([{"params": [p], **given}], rules.HeavyBall())
    optimizer = torch_backend.HeavyBall([p])
    run(optimizer, 1)
    before = snapshot(optimizer)
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": [parameter(3)], **given})
    assert snapshot(optimizer) == before


def _sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


PARAMS = {
    "nothing": (ValueError, "empty parameter list", lambda: []),
    "module without parameters": (ValueError, "empty parameter list", nn.ReLU),
    "tensor": (TypeError, "params argument given to the optimizer", lambda: parameter(3)),
    "set": (TypeError, "params argument given to the optimizer", lambda: {parameter(3)}),
    "set in a group": (TypeError, "need an order", lambda: [{"params": {parameter(3)}}]),
    "string": (TypeError, r"parameter 0 is <class 'str'>", lambda: ["w"]),
    "complex": (ValueError, "parameter 1 is of dtype torch.complex64",
                lambda: [parameter(3), torch.zeros(2, dtype=torch.complex64)]),
    "integer": (ValueError, "parameter 0 is of dtype torch.int64", lambda: [torch.arange(3)]),
    "sparse": (ValueError, "layout torch.sparse_coo", lambda: [_sparse()]),
    "not a leaf": (ValueError, "non-leaf", lambda: [parameter(3) * 2.0]),
    "twice": (UserWarning, "duplicate parameters: parameter 1", lambda: [parameter(3)] * 2),
    "twice by name": (UserWarning, "duplicate parameters: b",
                      lambda: list(zip("ab", [parameter(3)] * 2, strict=True))),
    "in two groups": (ValueError, "more than one parameter group: parameter 0 is",
                      lambda: [{"params": [p]} for p in [parameter(3)] * 2]),
    "half named": (ValueError, "all optimizer params should be with/without names",
                   lambda: [("a", parameter(3)), parameter(3)]),
    "no matrix": (ValueError, r"needs matrices; a parameter has shape \(3,\)",
                  lambda: [{"params": [parameter(3)], "rule": rules.M3()}]),
}  # fmt: skip


@pytest.mark.parametrize("case", PARAMS)
def test_bad_parameters_are_refused(case):
    error, words, params = PARAMS[case]
    with pytest.raises(error, match=words):
        Optimizer(params(), strict=case == "no matrix")


@pytest.mark.parametrize("case", ["string", "complex", "integer", "sparse", "not a leaf", "twice"])
def test_a_group_that_fails_half_way_adds_nothing(case):
    error, words, bad = PARAMS[case]
    optimizer = torch_backend.M3([parameter(3, 3)])
    run(optimizer, 2)
    before = snapshot(optimizer)
    words = words.replace("parameter 1", "parameter 3").replace("parameter 0", "parameter 2")
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": [parameter(4, 4), parameter(4), *bad()]})
    with pytest.raises(ValueError, match="more than one parameter group: parameter 0 is"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"]})
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [("name", parameter(4, 4))]})
    assert snapshot(optimizer) == before


def test_bad_options_are_refused():
    p = [parameter(3, 3)]
    with pytest.raises(ValueError, match="on_nonfinite='ignore' must be 'propagate', 'skip'"):
        Optimizer(p, on_nonfinite="ignore")
    with pytest.raises(TypeError, match="rule='adamw' must be a rule"):
        Optimizer(p, "adamw")
    with pytest.raises(TypeError, match="fallback='adamw' must be a rule"):
        Optimizer(p, fallback="adamw")
    with pytest.raises(TypeError, match=r"rule=<class .*M3'> must be a rule"):
        Optimizer([{"params": p, "rule": rules.M3}])
    with pytest.raises(TypeError, match="param_group must be a dict"):
        Optimizer(p).add_param_group(p)


def test_sparse_gradients_are_refused_before_anything_moves():
    p, embedding = parameter(3, 3), nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = torch_backend.Lion([p, embedding.weight])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="Lion does not support sparse gradients; parameter 1"):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_class
def test_non_finite_gradients(cls, bad):
    def optimizer(on_nonfinite):
        params = [("fine", parameter(3, 3)), ("broken", parameter(3, 3, seed=1))]
        made = getattr(torch_backend, cls.__name__)(params, on_nonfinite=on_nonfinite)
        run(made, 2)
        for p in made.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        params[1][1].grad[1, 1] = bad
        return made

    propagating = optimizer("propagate")
    propagating.step()
    fine, broken = propagating.param_groups[0]["params"]
    assert fine.isfinite().all()
    # The sign of Inf is finite.
    signs = (rules.Lion, rules.SignSGD, rules.Signum, rules.AdaMuon)
    if cls not in signs or bad != float("inf"):
        assert not broken.isfinite().all()

    skipping = optimizer("skip")
    before = snapshot(skipping)
    skipping.step()
    skipping.step()
    assert snapshot(skipping) == before and skipping.skipped_steps == 2
    copy = pickle.loads(pickle.dumps(skipping))
    assert copy.skipped_steps == 2 and copy.on_nonfinite == "skip"
    run(skipping, 1)
    assert snapshot(skipping) != before

    raising = optimizer("raise")
    before = snapshot(raising)
    with pytest.raises(ValueError, match="the gradient of broken has NaN or Inf entries"):
        raising.step()
    assert snapshot(raising) == before


def test_a_rule_that_cannot_be_traced_changes_nothing():
    class Broken(Rule):
        def update(self, w, g, s, t):
            return g, {"nosuch": g}

    optimizer = Optimizer(
        [{"params": [parameter(3)]}, {"params": [parameter(3)], "rule": Broken()}], rules.AdamW()
    )
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"Broken\.update returned memory 'nosuch'"):
        optimizer.step()
    assert snapshot(optimizer) == before


# What every rule owes at its defaults


@pytest.fixture(scope="module", params=[gpt, convnet], ids=["gpt", "convnet"])
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param()


@pytest.mark.parametrize("zeros", [False, True], ids=["", "zeros"])
@each_default
def test_first_step_descends_everywhere_and_stays_small(rule, model, zeros):
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = {name: p.grad.clone() for name, p in model.named_parameters()}
    if zeros:
        for p in model.parameters():
            p.grad.view(-1)[:1] = 0.0
            if p.ndim > 1:
                p.grad[p.shape[0] // 2] = 0.0
    rule = rule.with_values({"weight_decay": 0.0})
    Optimizer(model, rule).step()
    with torch.no_grad():
        moved = {name: p - start[name] for name, p in model.named_parameters()}
        uphill = {n: (p.grad.double() * moved[n]).sum() for n, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.copy_(start[name])
            p.grad.copy_(kept[name])
    assert not [name for name, x in uphill.items() if x >= 0]
    most = {name: float(x.abs().max() / rule.lr) for name, x in moved.items() if x.ndim > 1}
    assert {name: x for name, x in most.items() if x > 10} == {}


@each_default
def test_every_rule_shrinks_a_matrix_that_is_its_own_gradient(rule):
    w = nn.Parameter(torch.randn(16, 8))
    start = w.square().sum()
    optimizer = Optimizer([w], rule.with_values({"lr": 1e-2, "weight_decay": 0.0}))
    for _ in range(100):
        w.grad = w.detach().clone()
        optimizer.step()
    assert w.square().sum() <= 0.9 * start


def test_state_is_as_small_as_promised():
    p = parameter(256, 256)
    limits = {rules.DeltaMomentum: 1, rules.M3: 4, rules.DeepMomentum: 2}
    for cls, limit in limits.items():
        optimizer = Optimizer([p], cls())
        optimizer.step()
        numbers = sum(v.numel() for k, v in optimizer.state[p].items() if k != "step") / p.numel()
        assert numbers <= limit and numbers == state_numbers(cls(), (256, 256))


@each_case
def test_clocks_and_stagger_equal_the_oracle(case):
    rule = case.rule.with_values({"stagger": True})
    streams = [stream(case.shape, 15, seed) for seed in range(3)]
    params = [nn.Parameter(torch.tensor(w)) for w, _ in streams]
    weights = [w for w, _ in streams]
    optimizer, oracle = Optimizer(params, rule), Oracle(rule, weights)
    given = contexts(rule, case.shape, 15)
    for step in range(15):
        gradients = [g[step] for _, g in streams]
        for p, g in zip(params, gradients, strict=True):
            p.grad = torch.tensor(g)
        give_context(optimizer, step)
        optimizer.step()
        weights = oracle.step(weights, gradients, [given[step]] * 3)
    worst = max(difference(p.detach(), w) for p, w in zip(params, weights, strict=True))
    assert worst <= 1e-12
    assert np.isfinite(worst)


def test_neutral_flags_of_torch_may_stay_in_the_line():
    flags = {"amsgrad": False, "centered": False, "momentum": 0}
    assert torch_backend.AdamW([parameter(3)], lr=1e-3, **flags).param_groups[0]["lr"] == 1e-3
    with pytest.raises(TypeError, match="AdamW has no hyperparameter 'amsgrad'"):
        torch_backend.AdamW([parameter(3)], amsgrad=True)


def test_an_explicit_view_wins_over_a_guess():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rules_of = {r.name: r.rule for r in torch_backend.M3(model).routing.routes}
    assert rules_of["1.weight"] == "AdamW"
    viewed = torch_backend.M3(model, views={"1.weight": "flatten"})
    assert {r.name: r.rule for r in viewed.routing.routes}["1.weight"] == "M3"


@pytest.mark.parametrize("edit", [{"betas": (0.9, 1.5)}, {"lr": float("nan")}, {"eps": -1.0}])
def test_a_group_edited_to_an_impossible_value_is_refused_at_the_step(edit):
    optimizer = torch_backend.AdamW([parameter(3)])
    optimizer.step()
    optimizer.param_groups[0].update(edit)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"AdamW\("):
        optimizer.step()
    assert str(snapshot(optimizer)) == str(before)


def test_a_function_first_lifted_in_inference_mode_can_be_trained_later():
    double = torch_backend.lift(lambda x: x * array("eye", (3, 3), 2.0))
    x = torch.randn(3, 3, requires_grad=True)
    with torch.inference_mode():
        double(x)
    double(x).sum().backward()
    assert torch.equal(x.grad, 2 * torch.eye(3))
