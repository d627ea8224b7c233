"""A run moves from torch to optax and back through a file, and its state with it bit for bit."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from cases import contexts, difference, double_precision
from checkpoints.make import small
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

import jax_backend
import torch_backend
from deepopt import Rule, interchange, rules
from torch_backend import Optimizer

# Steps before the move, and after it; a clock of three ticks in both.
BEFORE, AFTER = 3, 3
LAYER = {"layer.bias": (3,), "layer.weight": (4, 3)}
# A compilation of each rule, for a few steps.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def stream(step: int, shapes=LAYER) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {k: rng.standard_normal(shape) for k, shape in shapes.items()}


def in_torch(rule: Rule, dtype=torch.float64, values=None, **options):
    params = {k: torch.tensor(x, dtype=dtype) for k, x in (values or stream(99)).items()}
    params = {k: nn.Parameter(x) for k, x in params.items()}
    return params, Optimizer(list(params.items()), rule, **{"fused": False, **options})


def context(rule: Rule, step: int, shapes=LAYER) -> dict[str, dict[str, np.ndarray | None]]:
    given = contexts(rule, (4, 3), step + 1)[step]
    return {k: {n: x if len(s) > 1 else None for n, s in shapes.items()} for k, x in given.items()}


def step_torch(params, optimizer: Optimizer, rule: Rule, start: int, stop: int) -> None:
    for step in range(start, stop):
        shapes = {name: p.shape for name, p in params.items()}
        for name, g in stream(step, shapes).items():
            params[name].grad = torch.tensor(g, dtype=params[name].dtype)
        for what, tree in context(rule, step, shapes).items():
            for name, x in tree.items():
                if x is not None:
                    optimizer.context[params[name]][what] = torch.tensor(x)
        optimizer.step()


def bits(params, optimizer: Optimizer) -> dict[str, bytes]:
    return {
        f"{name}/{k}": x.reshape(-1).view(torch.uint8).numpy().tobytes() + str(x.dtype).encode()
        for name, p in params.items()
        for k, x in optimizer.state.get(p, {}).items()
    }


# Clocks that tick together have fewer programs to compile.
MOVED = {
    cls.__name__: (small(cls()).with_values({"root": 3}), {"layer.weight": (4, 3)})
    for cls in rules.ALL
}
MOVED["fallback"] = rules.Muon(lr=0.05), LAYER
# Turns go by the order of parameters, which is the same in both.
staggered = small(rules.M3()).with_values({"stagger": True})
MOVED["stagger"] = staggered, {**LAYER, "other.weight": (4, 3)}


@pytest.mark.parametrize("name", MOVED)
def test_a_run_moves_to_optax_and_back(name, tmp_path):
    rule, shapes = MOVED[name]
    params, optimizer = in_torch(rule, values=stream(99, shapes))
    step_torch(params, optimizer, rule, 0, BEFORE)
    torch_backend.export_state(optimizer, tmp_path / "torch")
    before = bits(params, optimizer)
    with double_precision():
        tree = {k: jnp.asarray(p.detach().numpy()) for k, p in params.items()}
        tx = jax_backend.transform(rule)
        state = jax_backend.import_state(tx.init(tree), tree, tmp_path / "torch", rule)
        jax_backend.export_state(state, tree, tmp_path / "jax", rule)

        step = jax.jit(tx.update, compiler_options=QUICK)
        for i in range(BEFORE, BEFORE + AFTER):
            updates, state = step(stream(i, shapes), state, tree, context=context(rule, i, shapes))
            tree = optax.apply_updates(tree, updates)
        jax_backend.export_state(state, tree, tmp_path / "later", rule)

    again, other = in_torch(rule, values=stream(99, shapes))
    torch_backend.import_state(other, tmp_path / "jax")
    assert bits(again, other) == before and (before or not rule.all_slots((4, 3)))

    step_torch(params, optimizer, rule, BEFORE, BEFORE + AFTER)
    torch_backend.import_state(other, tmp_path / "later")
    for name, p in params.items():
        assert difference(tree[name], p.detach()) <= 1e-12
        for k, x in optimizer.state[p].items():
            y = other.state[again[name]][k]
            assert x.dtype == y.dtype and x.shape == y.shape
            # Bases of eigenvectors are free to sum in another order between backends.
            assert difference(y, x) <= 1e-9


def moved(optimizer: Optimizer, path, **options) -> None:
    torch_backend.export_state(optimizer, path)
    torch_backend.import_state(optimizer, path, **options)


def stepped(rule: Rule, shapes=LAYER, steps: int = 2, **options):
    params, optimizer = in_torch(rule, torch.float32, stream(99, shapes), **options)
    step_torch(params, optimizer, rule, 0, steps)
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_bits_are_kept(dtype, tmp_path):
    params, optimizer = in_torch(rules.AdamW(), dtype)
    step_torch(params, optimizer, rules.AdamW(), 0, 2)
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].to(dtype)
        state["exp_avg_sq"].flatten()[0] = float("nan")
    before = bits(params, optimizer)
    torch_backend.export_state(optimizer, tmp_path / "a")
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    torch_backend.import_state(optimizer, tmp_path / "a")
    assert before == bits(params, optimizer)
    with double_precision(dtype == torch.float64):
        tree = {k: jnp.asarray(p.detach().float().numpy()) for k, p in params.items()}
        state = jax_backend.adamw(1e-3).init(tree)
        given = (state, tree, tmp_path / "a", rules.AdamW())
        jax_backend.export_state(
            jax_backend.import_state(*given), *given[1:2], tmp_path / "b", given[3]
        )
    with safe_open(tmp_path / "a", "pt") as a, safe_open(tmp_path / "b", "pt") as b:
        for k in a.keys():
            assert a.get_tensor(k).dtype == b.get_tensor(k).dtype
            assert torch.equal(a.get_tensor(k).nan_to_num(), b.get_tensor(k).nan_to_num())
        assert a.metadata().keys() == b.metadata().keys()


def test_a_double_needs_x64(tmp_path):
    params, optimizer = in_torch(rules.AdamW())
    step_torch(params, optimizer, rules.AdamW(), 0, 1)
    torch_backend.export_state(optimizer, tmp_path / "a")
    tree = {k: jnp.zeros(s) for k, s in LAYER.items()}
    with pytest.raises(ValueError, match=r"layer.bias: exp_avg is float64; set jax_enable_x64"):
        state = jax_backend.adamw(1e-3).init(tree)
        jax_backend.import_state(state, tree, tmp_path / "a", rules.AdamW())


def test_views_are_stacks_and_names_can_be_changed(tmp_path):
    """A fused projection seen as three matrices is a leaf with an axis in front."""
    rule, shapes = rules.SOAP(lr=0.05, period=2), {"qkv.weight": (6, 4)}
    params, optimizer = in_torch(rule, values=stream(99, shapes), views={"qkv.*": "split:3"})
    step_torch(params, optimizer, rule, 0, 3)
    before, kept = bits(params, optimizer), optimizer.state[params["qkv.weight"]]
    torch_backend.export_state(optimizer, tmp_path / "a")
    with double_precision():
        tree = {"attention": {"qkv": jnp.zeros((3, 2, 4))}}
        state = jax_backend.transform(rule).init(tree)
        state = jax_backend.import_state(
            state, tree, tmp_path / "a", rule, rename={"qkv.weight": "attention.qkv"}
        )
        jax_backend.export_state(state, tree, tmp_path / "b", rule)
        for leaves in (x for x in jax.tree.leaves(state) if x.ndim):
            assert leaves.shape[0] == 3
            assert any(np.array_equal(leaves.ravel(), x.numpy().ravel()) for x in kept.values())
    torch_backend.import_state(optimizer, tmp_path / "b", rename=lambda x: x[10:] + ".weight")
    assert before == bits(params, optimizer)


@pytest.mark.parametrize("rule", [rules.AdamW(lr=0.05), rules.M3(lr=0.05, period=2)])
def test_a_layer_may_be_stored_the_other_way_round(rule, tmp_path):
    """As flax's kernels (in, out) beside torch's weights (out, in)."""
    params, optimizer = in_torch(rule, values=stream(99))
    step_torch(params, optimizer, rule, 0, 3)
    torch_backend.export_state(optimizer, tmp_path / "a")
    rename = {"layer.weight": "Dense_0.kernel", "layer.bias": "Dense_0.bias"}
    options = {"rename": rename, "transpose": ["*.kernel"]}

    def flax(values):
        w, b = (np.asarray(values[f"layer.{k}"]) for k in ("weight", "bias"))
        return {"Dense_0": {"kernel": jnp.asarray(w.T), "bias": jnp.asarray(b)}}

    with double_precision():
        tree, tx = (
            flax({k: p.detach().numpy() for k, p in params.items()}),
            jax_backend.transform(rule),
        )
        with pytest.raises(
            ValueError, match="sees a parameter of 4×3, here it sees a parameter of 3×4"
        ):
            jax_backend.import_state(tx.init(tree), tree, tmp_path / "a", rule, rename=rename)
        state = jax_backend.import_state(tx.init(tree), tree, tmp_path / "a", rule, **options)
        update = jax.jit(tx.update, compiler_options=QUICK)
        updates, state = update(flax(stream(3)), state, tree)
        tree = optax.apply_updates(tree, updates)
        jax_backend.export_state(state, tree, tmp_path / "b", rule)
    step_torch(params, optimizer, rule, 3, 4)
    assert difference(tree["Dense_0"]["kernel"].T, params["layer.weight"].detach()) <= 1e-12
    back = {v: k for k, v in rename.items()}
    kept = {k: x.clone() for k, x in optimizer.state[params["layer.weight"]].items()}
    torch_backend.import_state(optimizer, tmp_path / "b", rename=back, transpose=["*.weight"])
    for k, x in kept.items():
        assert difference(optimizer.state[params["layer.weight"]][k], x) <= 1e-9


@pytest.mark.parametrize("rule", [rules.SOAP(), rules.Muon(scale="spectral"), rules.Shampoo()])
def test_what_a_transpose_would_change_is_refused(rule, tmp_path):
    _, optimizer = stepped(rule)
    before = values_of(optimizer)
    with pytest.raises(
        ValueError, match="does not step a transposed matrix as it steps the matrix"
    ):
        moved(optimizer, tmp_path / "a", transpose=["*.weight"])
    assert before == values_of(optimizer)


def values_of(optimizer: Optimizer) -> list:
    return [[k, x.tolist()] for s in optimizer.state.values() for k, x in s.items()]


def test_exact_weights_keep_their_low_halves(tmp_path):
    _, optimizer = in_torch(rules.AdamW(), torch.bfloat16, rounding="exact", fused=True)
    params = {
        n: p
        for g in optimizer.param_groups
        for n, p in zip(g["param_names"], g["params"], strict=True)
    }
    step_torch(params, optimizer, rules.AdamW(), 0, 2)
    before = values_of(optimizer)
    moved(optimizer, tmp_path / "a")
    assert before == values_of(optimizer) and "low_half" in str(before)
    other = Optimizer(list(params.items()), rules.AdamW())
    with pytest.raises(ValueError, match=r"the file has \['exp_avg', 'exp_avg_sq', 'low_half'"):
        torch_backend.import_state(other, tmp_path / "a")
    assert not other.state


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    _, optimizer = stepped(
        rules.M3(period=2, stagger=True), LAYER | {"a.weight": (4, 3), "b.weight": (5, 2)}
    )
    torch_backend.export_state(optimizer, tmp_path / "a")
    shapes = {
        "layer.bias": (3,),
        "a.weight": (4, 3),
        "layer.weight": (4, 3),
        "b.weight": (2, 5),
        "c": (2, 2),
    }
    _, other = stepped(rules.M3(period=4, stagger=True, beta2=0.5), shapes)
    before = values_of(other)
    with pytest.raises(ValueError) as refused:
        torch_backend.import_state(other, tmp_path / "a")
    for words in (
        "does not fit this optimizer in 5 ways; nothing was loaded",
        "this optimizer has 'c' that the file has not",
        "the file's M3 has period=2, this one period=4",
        "layer.weight: its clocks are shifted by 0 updates in the file and by 1 here",
        "b.weight: the file's rule sees a parameter of 5×2, here it sees a parameter of 2×5",
    ):
        assert words in str(refused.value), words
    assert before == values_of(other)
    with pytest.raises(ValueError, match="the file's rule is M3, here it is Muon"):
        torch_backend.import_state(stepped(rules.Muon())[1], tmp_path / "a")


def test_names_and_patterns_that_nothing_has_are_refused(tmp_path):
    _, optimizer = stepped(rules.AdamW())
    path = tmp_path / "a"
    torch_backend.export_state(optimizer, path)
    with pytest.raises(TypeError, match="must be a sequence of patterns"):
        torch_backend.import_state(optimizer, path, transpose="layer.weight")
    with pytest.raises(ValueError, match=r"transpose has '\*.kernel', which no parameter"):
        torch_backend.import_state(optimizer, path, transpose=["*.kernel"])
    with pytest.raises(ValueError, match="rename has 'kernel', which the file has not"):
        torch_backend.import_state(optimizer, path, rename={"kernel": "weight"})


def test_steps_that_differ_have_no_place_in_optax(tmp_path):
    params, optimizer = stepped(rules.AdamW())
    params["layer.bias"].grad = None
    optimizer.step()
    torch_backend.export_state(optimizer, tmp_path / "a")
    tree = {k: jnp.zeros(s) for k, s in LAYER.items()}
    with pytest.raises(ValueError, match=r"counts the steps of a rule once, and the file has 2 of "
                       "layer.bias, 3 of layer.weight"):  # fmt: skip
        jax_backend.import_state(
            jax_backend.adamw(1).init(tree), tree, tmp_path / "a", rules.AdamW()
        )


def test_a_parameter_that_was_not_stepped_stays_so(tmp_path):
    _, optimizer = in_torch(rules.M3())
    moved(optimizer, tmp_path / "a")
    assert not any(optimizer.state.values())
    tree = {k: jnp.zeros(s) for k, s in LAYER.items()}
    state = jax_backend.m3(1e-3).init(tree)
    same = jax_backend.import_state(state, tree, tmp_path / "a", rules.M3())
    assert jax.tree.structure(state) == jax.tree.structure(same)
    assert all(map(jnp.array_equal, jax.tree.leaves(state), jax.tree.leaves(same)))


def test_several_transforms_in_one_state(tmp_path):
    """Rules by name, inside optax.partition and a chain whose other states stay."""

    def rule_of(name: str) -> Rule:
        return rules.Lion() if "bias" in name else rules.HeavyBall()

    parts = {
        "a": jax_backend.transform(rules.HeavyBall()),
        "b": jax_backend.transform(rules.Lion()),
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(parts, {k: "b" if "bias" in k else "a" for k in LAYER}),
        optax.scale_by_schedule(lambda _: 1.0),
    )
    tree = {k: jnp.ones(s) for k, s in LAYER.items()}
    state = jax.tree.map(lambda x: x + 3, tx.init(tree))
    jax_backend.export_state(state, tree, tmp_path / "a", rule_of)
    found = jax_backend.import_state(tx.init(tree), tree, tmp_path / "a", rule_of)
    old, new = (jax.tree_util.tree_leaves_with_path(x) for x in (state, found))
    for (path, x), (_, y) in zip(old, new, strict=True):
        schedule = "inner_states" not in jax.tree_util.keystr(path)
        assert bool((x == y).all()) is not schedule, path
    groups = [
        {"params": [(k, nn.Parameter(torch.ones(s)))], "rule": rule_of(k)} for k, s in LAYER.items()
    ]
    optimizer = Optimizer(groups)
    torch_backend.import_state(optimizer, tmp_path / "a")
    assert {float(s["step"]) for s in optimizer.state.values()} == {3}
    assert {
        float(x)
        for s in optimizer.state.values()
        for x in s.values()
        if x.ndim
        for x in x.flatten()
    } == {3}
    with pytest.raises(
        ValueError, match=r"0 parts of the state keep .'exp_avg', 'exp_avg_sq'. of layer.bias"
    ):
        jax_backend.export_state(state, tree, tmp_path / "b", rules.AdamW())
    assert not (tmp_path / "b").exists()


def test_what_is_no_such_file_is_refused(tmp_path):
    _, optimizer = stepped(rules.AdamW())
    path = tmp_path / "a"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"a' cannot be read as safetensors"):
        torch_backend.import_state(optimizer, path)
    save_file({"x": np.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"holds no state of an optimizer; metadata: \{\}"):
        torch_backend.import_state(optimizer, path)
    save_file({"x": np.zeros(2)}, path, {"format": "7", "rules": "[]", "parameters": "{}"})
    with pytest.raises(
        ValueError, match="has format 7, and this version of nested-deepopt reads up to 1"
    ):
        torch_backend.import_state(optimizer, path)
    with pytest.raises(FileNotFoundError):
        torch_backend.import_state(optimizer, tmp_path / "none")
    with pytest.raises(ValueError, match="each parameter needs its own: give Optimizer the module"):
        torch_backend.export_state(Optimizer([nn.Parameter(torch.ones(3))]), path)


def test_the_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'nested-deepopt\[safetensors\]'"):
        torch_backend.export_state(stepped(rules.AdamW())[1], tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_a_file_says_the_rules(tmp_path):
    rule = rules.M3(lr=0.3, slow=(0.9, 0.8), period=(2, 4))
    torch_backend.export_state(stepped(rule)[1], tmp_path / "a")
    found = interchange.rules_of(tmp_path / "a")
    name, values = found["layer.weight"]
    assert getattr(rules, name)(**values) == rule and found["layer.bias"][0] == "AdamW"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_the_page_on_checkpoints_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), "checkpoints.md", "exec"), {"__name__": "page"})
    assert "in 4 ways; nothing was loaded" in capsys.readouterr().out
    assert {x.name for x in tmp_path.iterdir()} == {"checkpoint.pt", "folder", "state.safetensors"}
