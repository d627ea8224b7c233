"""Which parameters get which rule, and matrices inside larger tensors."""

import pytest
import torch
from cases import contexts
from models import GPT, ConvNet
from torch import nn

import torch_backend
from deepopt import rules
from torch_backend import Optimizer

MATRIX = [cls for cls in rules.ALL if cls.domain == "matrix"]
each_matrix_rule = pytest.mark.parametrize("rule", MATRIX, ids=lambda cls: cls.__name__)


def table(optimizer):
    """Rule, view and reason by name."""
    return {r.name: (r.rule, r.view, r.why) for r in optimizer.routing.routes}


def parameter(*shape):
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    p.grad = torch.randn(shape, dtype=torch.float64)
    return p


@each_matrix_rule
def test_a_module_is_routed_by_its_roles(rule):
    optimizer = Optimizer(GPT(width=32, layers=2, heads=2), rule())
    routes = table(optimizer)
    rest = "SGD" if "gram" in rule().context((1, 1)) else "AdamW"
    assert routes.pop("tokens.weight") == (rest, "", "embedding (by place or name): fallback")
    assert routes.pop("positions.weight") == (rest, "", "embedding (by place or name): fallback")
    assert routes.pop("project.weight") == (rest, "", "head (by place or name): fallback")
    for name, route in routes.items():
        if "norm" in name or "before" in name or "after" in name or "bias" in name:
            assert route == (rest, "", "not a matrix: fallback"), name
        else:
            assert route == (rule.__name__, "flatten", "matrix"), name


def test_any_rule_takes_everything():
    optimizer = torch_backend.AdamW(GPT(width=32, layers=1, heads=2))
    assert {r[:2] for r in table(optimizer).values()} == {("AdamW", "")}
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("width", [32, 256])
@pytest.mark.parametrize("tie", ["module", "function"])
def test_tied_embeddings_leave_the_last_hidden_matrix_alone(tie, width):
    routes = table(torch_backend.Muon(GPT(width=width, layers=2, heads=2, tie=tie)))
    assert routes["tokens.weight"] == ("AdamW", "", "embedding (by place or name): fallback")
    assert routes["blocks.1.down.weight"][0] == "Muon"
    assert "project.weight" not in routes
    assert not [name for name, (_, _, why) in routes.items() if "head" in why]


def test_last_projection_of_a_network_without_embeddings():
    routes = table(torch_backend.Muon(ConvNet()))
    assert routes["layers.0.weight"] == ("Muon", "flatten", "convolution as a matrix")
    assert routes["layers.7.weight"] == ("AdamW", "", "head (by place or name): fallback")
    mlp = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    rule_of = {name: route[0] for name, route in table(torch_backend.Muon(mlp)).items()}
    assert [rule_of[f"{i}.weight"] for i in (0, 2, 4)] == ["Muon", "Muon", "AdamW"]


def test_single_matrix_model_is_not_a_head():
    assert table(torch_backend.Muon(nn.Linear(4, 3)))["weight"][0] == "Muon"


def test_tables_held_as_parameters_are_known_by_name():
    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
            self.experts = nn.Parameter(torch.zeros(3, 4, 4))
            self.head = nn.Linear(4, 2)

    routes = table(torch_backend.Muon(ViT()))
    assert routes["pos_embed"] == ("AdamW", "", "embedding (by place or name): fallback")
    assert routes["experts"] == ("Muon", "stacked", "stack of matrices")
    assert routes["head.weight"][2] == "head (by place or name): fallback"


def test_named_parameters_are_routed_by_name():
    names = ["wte.weight", "h.0.up.weight", "h.0.up.bias", "lm_head.weight", "conv.weight"]
    shapes = [(9, 4), (8, 4), (8,), (9, 4), (4, 3, 2, 2)]
    named = [(n, torch.zeros(*s, requires_grad=True)) for n, s in zip(names, shapes, strict=True)]
    reasons = [r[2] for r in table(torch_backend.M3(named)).values()]
    assert sorted(reasons) == sorted(
        [
            "embedding (by place or name): fallback",
            "matrix",
            "not a matrix: fallback",
            "head (by place or name): fallback",
            "convolution as a matrix",
        ]
    )
    optimizer = torch_backend.M3(GPT(width=16, layers=1, heads=2).named_parameters())
    assert table(optimizer)["tokens.weight"][0] == "M3"  # a name that says nothing


def test_bare_tensors_are_told_apart_by_shape_alone():
    optimizer = torch_backend.M3([parameter(9, 4), parameter(4), parameter()])
    assert [r.rule for r in optimizer.routing.routes] == ["M3", "AdamW", "AdamW"]
    assert [r.name for r in optimizer.routing.routes] == ["0.0", "1.0", "1.1"]


def test_paths_with_slashes_are_names():
    shapes = {"model/wte/table": (9, 4), "model/up/kernel": (4, 8), "model/head/kernel": (4, 9)}
    routes = table(torch_backend.M3([(n, parameter(*s)) for n, s in shapes.items()]))
    assert [routes[name][0] for name in shapes] == ["AdamW", "M3", "AdamW"]


def test_a_group_may_ask_for_the_fallback():
    """timm says so of the parameters that match its `fallback_list`."""
    apart = {"params": [parameter(9, 4), parameter(4)], "use_fallback": True, "lr_scale": 0.5}
    optimizer = torch_backend.M3([apart, {"params": [parameter(9, 4)]}], lr=0.1)
    assert [r.rule for r in optimizer.routing.routes] == ["AdamW", "AdamW", "M3"]
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.param_groups[0]["lr_scale"] == 0.5
    other = {"params": [parameter(4, 4)], "use_fallback": True}
    optimizer = torch_backend.M3([other], fallback=rules.Muon())
    assert table(optimizer) == {"0.0": ("Muon", "flatten", "matrix (or an embedding or head?)")}
    # Its hyperparameters are those of the rule it gets.
    other = {"params": [parameter(4)], "use_fallback": True, "betas": (0.8, 0.9)}
    assert torch_backend.M3([other]).param_groups[0]["betas"] == (0.8, 0.9)
    for wrong in ({"use_fallback": "yes"}, {"use_fallback": True, "rule": rules.Lion()}):
        with pytest.raises(ValueError, match="use_fallback="):
            torch_backend.M3([{"params": [parameter(4)], **wrong}])
    with pytest.raises(TypeError, match="AdamW has no hyperparameter 'period'"):
        torch_backend.M3([{"params": [parameter(4)], "use_fallback": True, "period": 3}])


def test_a_group_with_its_own_rule_takes_embeddings():
    model = GPT(width=16, layers=1, heads=2)
    groups = [{"params": [("wte.weight", model.tokens.weight)], "rule": rules.Muon()}]
    groups += [{"params": [("wpe.weight", model.positions.weight)]}]
    routes = table(Optimizer(groups, rules.M3()))
    assert routes["wte.weight"][0] == "Muon" and routes["wpe.weight"][0] == "AdamW"


def test_modules_are_welcome_as_groups():
    model = GPT(width=16, layers=1, heads=2)
    optimizer = Optimizer(
        [{"params": model.blocks, "rule": rules.M3()}, {"params": model.tokens}], rules.Lion()
    )
    assert {g["rule"] for g in optimizer.param_groups} == {"M3", "AdamW", "Lion"}


def test_fallback_shares_lr_decay_and_clock_unless_it_is_given():
    params = [parameter(3, 3), parameter(3)]
    optimizer = torch_backend.Muon(params, lr=0.3, weight_decay=0.2, every=2)
    one, two = optimizer.param_groups
    assert [one[k] for k in ("lr", "weight_decay", "every")] == [0.3, 0.2, 2]
    assert [two[k] for k in ("lr", "weight_decay", "every")] == [0.3, 0.2, 2]
    groups = [{"params": params, "lr": 0.7}]
    assert [g["lr"] for g in torch_backend.Muon(groups, lr=0.3).param_groups] == [0.7, 0.7]
    optimizer = torch_backend.Muon(params, lr=torch.tensor(0.3), fallback=rules.Lion(lr=0.5))
    assert optimizer.param_groups[1]["rule"] == "Lion" and optimizer.param_groups[1]["lr"] == 0.5


def test_routing_prints_as_a_table():
    text = str(
        torch_backend.M3(GPT(width=16, layers=1, heads=2), views={"*qkv*": "split:3"}).routing
    )
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["parameter", "shape", "rule", "seen", "as", "why"]
    assert ["blocks.0.qkv.weight", "48×16", "M3", "3", "of", "16×16", "view", "given"] in lines
    assert [
        "norm.bias",
        "16",
        "AdamW",
        "as",
        "it",
        "is",
        "not",
        "a",
        "matrix:",
        "fallback",
    ] in lines
    scalar = str(torch_backend.SGD([parameter()]).routing)
    assert "scalar" in scalar and "takes any shape" in scalar


def test_strict_refuses_to_guess():
    matrix, vector, stack = parameter(3, 3), parameter(3), parameter(2, 3, 3)
    with pytest.raises(ValueError, match=r"strict=True: a parameter of shape \(3, 3\) may be"):
        torch_backend.M3([matrix], strict=True)
    with pytest.raises(ValueError, match=r"strict=True: x of shape \(2, 3, 3\) may be"):
        torch_backend.M3([("x", stack)], strict=True)
    with pytest.raises(ValueError, match=r"M3 needs matrices; x has shape \(3,\)"):
        torch_backend.M3([("x", vector)], strict=True)
    torch_backend.M3([("x", matrix)], strict=True)
    torch_backend.M3([{"params": stack, "seen_as": "stacked"}], strict=True)
    Optimizer([{"params": [matrix], "rule": rules.M3()}], strict=True)
    torch_backend.M3(GPT(width=16, layers=1, heads=2), strict=True, fallback=rules.AdamW())
    torch_backend.AdamW([matrix, vector, stack], strict=True)


def test_a_fallback_that_cannot_take_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"Muon needs matrices; bias has shape \(3,\)"):
        torch_backend.M3([("bias", parameter(3))], fallback=rules.Muon())


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ("split:0", "seen_as='split:0' must be 'flatten', 'stacked' or 'split:k'"),
        ("spilt:3", "seen_as='spilt:3' must be"),
        ("split:4", r"seen_as='split:4' does not divide the 6 rows of shape \(6, 4\)"),
    ],
)
def test_views_are_checked(view, words):
    with pytest.raises(ValueError, match=words):
        torch_backend.Muon([("a", parameter(6, 4))], views={"a": view})
    with pytest.raises(ValueError, match=words):
        torch_backend.Muon([{"params": [parameter(6, 4)], "seen_as": view}])


def test_a_view_that_matches_nothing_is_an_error():
    with pytest.raises(
        ValueError, match=r"'\*.qvk.weight': .* matches no parameter; names: \['a'\]"
    ):
        torch_backend.Muon([("a", parameter(6, 4))], views={"*.qvk.weight": "split:3"})


# A view, a shape, and the blocks of that tensor that it stands for.
VIEWS = {
    "split:3": ((12, 5), lambda x: x.split(4)),
    "stacked": ((3, 4, 5), lambda x: x.unbind()),
    "flatten": ((4, 3, 2, 2), lambda x: [x.flatten(1)]),
    "split:2": ((4, 3, 2), lambda x: [y.flatten(1) for y in x.split(2)]),
}


@pytest.mark.parametrize("view", VIEWS)
@each_matrix_rule
def test_a_view_equals_stepping_its_blocks_apart(rule, view):
    shape, blocks = VIEWS[view]
    extra = {"period": 3} if rule is rules.M3 else {}
    extra |= {"width": 5} if rule is rules.DeepMomentum else {}  # as wide as the blocks are
    whole = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    parts = [nn.Parameter(x.clone()) for x in blocks(whole.detach())]
    extra |= {} if rule().context((1, 1)) else {"every": 2}
    one = Optimizer([("w", whole)], rule(lr=0.1, weight_decay=0.1, **extra), views={"w": view})
    two = Optimizer(parts, rule(lr=0.1, weight_decay=0.1, **extra))
    given = [contexts(rule(), tuple(p.shape), 1 + i)[i] for i, p in enumerate(parts)]
    for p, x in zip(parts, given, strict=True):
        two.context[p].update({k: torch.tensor(v) for k, v in x.items()})
    for k in given[0]:
        one.context[whole][k] = torch.stack([two.context[p][k] for p in parts])
    for _ in range(14):
        whole.grad = torch.randn(shape, dtype=torch.float64)
        for p, g in zip(parts, blocks(whole.grad), strict=True):
            p.grad = g.clone()
        one.step()
        two.step()
    for p, w in zip(parts, blocks(whole.detach()), strict=True):
        assert torch.allclose(p, w, rtol=1e-12, atol=1e-13)


def test_a_memory_as_large_as_its_parameter_is_not_taken_for_one():
    # Rows 4, columns 6, width 4: the network's first layer (6, 4) has as many numbers as a block.
    whole = nn.Parameter(torch.randn(8, 6, dtype=torch.float64))
    parts = [nn.Parameter(x.clone()) for x in whole.detach().split(4)]
    rule = rules.DeepMomentum(width=4, output="identity", lr=0.1)
    one, two = Optimizer([{"params": whole, "seen_as": "split:2"}], rule), Optimizer(parts, rule)
    for _ in range(3):
        whole.grad = torch.randn(8, 6, dtype=torch.float64)
        for p, g in zip(parts, whole.grad.split(4), strict=True):
            p.grad = g.clone()
        one.step()
        two.step()
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-12, atol=1e-13)
    assert one.state[whole]["first"].shape == (2, 6, 4)


def test_single_rows_of_a_module_are_no_matrices():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.up, self.score = nn.Linear(8, 4), nn.Linear(4, 1)
            self.last = nn.Linear(4, 3)

    model = Classifier()
    taken = {r.name: r.rule for r in torch_backend.M3(model).routing.routes}
    assert taken["cls_token"] == taken["score.weight"] == "AdamW"
    assert taken["up.weight"] == "M3"
    group = {"params": [model.score.weight], "rule": rules.M3()}
    assert torch_backend.Optimizer([group]).param_groups[0]["rule"] == "M3"
