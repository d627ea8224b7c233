"""Checkpoints of every version so far are loaded, and their runs go on to the same numbers."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from cases import TOLERANCE, difference
from safetensors import safe_open
from torch import nn

from deepopt import Rule, rules
from jax_backend import export_state, transform
from torch_backend import Optimizer, import_state
from torch_backend.checkpoint import SCHEMA

FOLDER = Path(__file__).parent / "checkpoints"
IN_TORCH = {
    f"{path.parent.name}-{name}": run
    for path in sorted(FOLDER.glob("*/torch.pt"))
    for name, run in torch.load(path, weights_only=True).items()
}


IN_JAX: dict[str, tuple[Rule, dict[str, Any]]] = {}
for path in sorted(FOLDER.glob("*/jax.safetensors")):
    with safe_open(path, framework="numpy") as file:
        leaves = file.get_tensors()
        for name, text in sorted(file.metadata().items()):
            rule, values = json.loads(text)
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            IN_JAX[f"{path.parent.name}-{name}"] = (
                getattr(rules, rule)(**values),
                {k.removeprefix(name): x for k, x in leaves.items() if k.startswith(f"{name}[")},
            )


def test_every_rule_of_v0_1_is_there():
    assert {f"v0.1-{rule.__name__}" for rule in rules.ALL} <= set(IN_TORCH) & set(IN_JAX)


@pytest.mark.parametrize("name", IN_TORCH)
def test_a_torch_checkpoint_goes_on(name):
    saved = IN_TORCH[name]
    params = {k: nn.Parameter(x.clone()) for k, x in saved["before"].items()}
    groups = []
    for group in saved["state"]["param_groups"]:
        assert "v0.1" not in name or "schema" not in group
        members = [(k, params[k]) for k in group["param_names"]]
        seen = {"seen_as": group["seen_as"]} if group["seen_as"] else {}
        groups.append({"params": members, "rule": getattr(rules, group["rule"])(), **seen})
    optimizer = Optimizer(groups, rounding=saved["rounding"])
    optimizer.load_state_dict(saved["state"])
    assert {group["schema"] for group in optimizer.param_groups} == {SCHEMA}
    for group in saved["state"]["param_groups"]:
        for key, k in zip(group["params"], group["param_names"], strict=True):
            kept, found = saved["state"]["state"].get(key, {}), optimizer.state[params[k]]
            assert kept.keys() == found.keys()
            assert all(
                torch.equal(x, found[n]) and x.dtype == found[n].dtype for n, x in kept.items()
            )
    for k, p in params.items():
        p.grad = saved["gradients"][k]
        optimizer.context[p].update(saved["context"][k])
    optimizer.step()
    for k, p in params.items():
        tolerance = TOLERANCE["bfloat16" if p.dtype == torch.bfloat16 else "float32"]
        assert difference(p.detach().float(), saved["after"][k].float()) <= tolerance / 40
        assert not torch.equal(p, saved["before"][k])


def of(leaves: dict[str, Any], what: str) -> dict[str, Any]:
    """A tree of the names of a layer."""
    return {k: leaves.get(f"['{what}']['{k}']") for k in ("layer.bias", "layer.weight")}


@pytest.mark.parametrize("name", IN_JAX)
def test_the_leaves_of_an_optax_state_are_what_they_were(name):
    """By path, shape and dtype, so that orbax, flax or a list of leaves restores it."""
    rule, leaves = IN_JAX[name]
    state = jax.eval_shape(transform(rule).init, of(leaves, "before"))
    found, _ = jax.tree_util.tree_flatten_with_path({"state": state})
    mine = {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in found}
    theirs = {k: (x.shape, x.dtype) for k, x in leaves.items() if k.startswith("['state']")}
    assert mine == theirs


def restored(name: str) -> Any:
    """The state of a transform with the leaves that were saved."""
    rule, leaves = IN_JAX[name]
    state = jax.eval_shape(transform(rule).init, of(leaves, "before"))
    found, tree = jax.tree_util.tree_flatten_with_path({"state": state})
    return tree.unflatten([leaves[jax.tree_util.keystr(path)] for path, _ in found])["state"]


@pytest.mark.parametrize("name", IN_JAX)
def test_an_optax_checkpoint_goes_on_in_torch(name, tmp_path):
    """A trace of every rule in jax would be dear; test_interchange.py says that they agree."""
    rule, leaves = IN_JAX[name]
    before, gradients = of(leaves, "before"), of(leaves, "gradients")
    export_state(restored(name), before, tmp_path / "state", rule)
    params = {k: nn.Parameter(torch.tensor(x)) for k, x in before.items()}
    optimizer = Optimizer(list(params.items()), rule, fused=False)
    import_state(optimizer, tmp_path / "state")
    for k, p in params.items():
        p.grad = torch.tensor(gradients[k], dtype=p.dtype)
    for what in rule.context((1, 1)):
        weight = params["layer.weight"]
        optimizer.context[weight][what] = torch.tensor(
            leaves[f"['context']['{what}']['layer.weight']"]
        )
    optimizer.step()
    for k, x in of(leaves, "after").items():
        assert difference(params[k].detach(), x) <= TOLERANCE["float32"]
        assert difference(before[k], x) > TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["v0.1-AdamW", "v0.1-M3"])
def test_an_optax_checkpoint_goes_on(name):
    rule, leaves = IN_JAX[name]
    params = of(leaves, "before")
    state = jax.tree.map(jnp.asarray, restored(name))
    update = jax.jit(transform(rule).update, compiler_options={"xla_backend_optimization_level": 0})
    updates, _ = update(of(leaves, "gradients"), state, params)
    after = optax.apply_updates(params, updates)
    for k, x in of(leaves, "after").items():
        assert difference(after[k], x) <= TOLERANCE["float32"] / 40
        assert difference(params[k], x) > TOLERANCE["float32"]
