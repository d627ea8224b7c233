"""A run moves from torch to optax and back through a file, and its state with it bit for bit."""


import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from cases import contexts, difference, double_precision
from checkpoints.make import small
from torch import nn

import jax_backend
import torch_backend
from deepopt import Rule, rules
from torch_backend import Optimizer

# Steps before the move, and after it; a clock of three ticks in both.
BEFORE, AFTER = 2, 2
SHAPES = {"layer.bias": (3,), "layer.weight": (4, 3), "other.weight": (4, 3)}


def stream(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {k: rng.standard_normal(shape) for k, shape in SHAPES.items()}


def in_torch(rule: Rule, dtype=torch.float64, values=None, **options):
    params = {k: torch.tensor(x, dtype=dtype) for k, x in (values or stream(99)).items()}
    params = {k: nn.Parameter(x) for k, x in params.items()}
    return params, Optimizer(list(params.items()), rule, **options)


def context(rule: Rule, step: int) -> dict[str, dict[str, np.ndarray | None]]:
    given = contexts(rule, (4, 3), step + 1)[step]
    return {k: {n: x if len(s) > 1 else None for n, s in SHAPES.items()} for k, x in given.items()}


def step_torch(params, optimizer: Optimizer, rule: Rule, start: int, stop: int) -> None:
    for step in range(start, stop):
        for name, g in stream(step).items():
            params[name].grad = torch.tensor(g, dtype=params[name].dtype)
        for what, tree in context(rule, step).items():
            for name, x in tree.items():
                if x is not None:
                    optimizer.context[params[name]][what] = torch.tensor(x)
        optimizer.step()


def bits(params, optimizer: Optimizer) -> dict[str, bytes]:
    return {
        f"{name}/{k}": x.numpy().tobytes() + str(x.dtype).encode()
        for name, p in params.items()
        for k, x in optimizer.state.get(p, {}).items()
    }


# Stagger too where there are clocks: turns go by the order of parameters, which is that of jax.
RULES = [small(cls()).with_values({"stagger": True}) for cls in rules.ALL]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_a_run_moves_to_optax_and_back(rule, tmp_path):
    params, optimizer = in_torch(rule)
    step_torch(params, optimizer, rule, 0, BEFORE)
    torch_backend.export_state(optimizer, tmp_path / "torch")
    before = bits(params, optimizer)
    with double_precision():
        tree = {k: jnp.asarray(p.detach().numpy()) for k, p in params.items()}
        tx = jax_backend.transform(rule)
        state = jax_backend.import_state(tx.init(tree), tree, tmp_path / "torch", rule)
        jax_backend.export_state(state, tree, tmp_path / "jax", rule)

        @jax.jit
        def walk(tree, state, gradients, given):
            def one(carry, x):
                tree, state = carry
                updates, state = tx.update(x[0], state, tree, context=x[1])
                return (optax.apply_updates(tree, updates), state), None

            return jax.lax.scan(one, (tree, state), (gradients, given))[0]

        steps = range(BEFORE, BEFORE + AFTER)
        stack = lambda *xs: np.stack(xs)  # noqa: E731
        gradients = jax.tree.map(stack, *(stream(i) for i in steps))
        given = jax.tree.map(stack, *(context(rule, i) for i in steps))
        tree, state = walk(tree, state, gradients, given)
        jax_backend.export_state(state, tree, tmp_path / "later", rule)

    again, other = in_torch(rule)
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
