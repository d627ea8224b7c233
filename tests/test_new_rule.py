"""A rule written by a user in a file of their own has every backend, the table and the formula."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from cases import difference, double_precision, stream

from deepopt import Oracle, describe, latex
from jax_backend import alias, transform
from torch_backend import Optimizer, bind

MINE = '''
from deepopt import Memories, Rate, Retention, Rule, Slot, Time, Update, average
from deepopt.expr import Expr, sign


class MyLion(Rule):
    """The sign of an interpolated average."""

    read: Retention = 0.9
    kept: Retention = 0.99

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"m": Slot(shape)}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        return sign(average(s["m"], g, self.read)), {"m": average(s["m"], g, self.kept)}
'''
SLOW = '''
from deepopt import Memories, Period, Rate, Rule, Slot, Time, Update
from deepopt.expr import Expr


class Held(Rule):
    """Descent on the gradient and on the sum of the last whole chunk of gradients."""

    share: Rate = 0.5
    period: Period = 3

    def clocks(self) -> dict[str, int]:
        return {"slow": self.period}

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"chunk": Slot(shape), "held": Slot(shape, clock="slow")}

    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        chunk = s["chunk"] + g
        held = t.when("slow", chunk, s["held"])
        chunk = t.when("slow", 0.0 * chunk, chunk)
        return g + self.share * s["held"], {"chunk": chunk, "held": held}
'''


@pytest.fixture
def load(tmp_path):
    def load(text: str, name: str):
        file = tmp_path / f"{name.lower()}.py"
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(name.lower(), file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    return load


def jax_path(tx, w, g):
    def one(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        w = optax.apply_updates(carry[0], updates)
        return (w, state), w

    w = jnp.asarray(w)
    return jax.jit(lambda w, g: jax.lax.scan(one, (w, tx.init(w)), g)[1])(w, jnp.asarray(g))


def torch_path(make, w, g):
    p = torch.nn.Parameter(torch.tensor(w))
    optimizer, path = make([p]), []
    for step in g:
        p.grad = torch.tensor(step)
        optimizer.step()
        path.append(p.detach().numpy().copy())
    return np.stack(path)


def oracle_path(rule, w, g):
    oracle, path = Oracle(rule, [w]), []
    for step in g:
        (w,) = oracle.step([w], [step])
        path.append(w)
    return np.stack(path)


@pytest.mark.parametrize(("text", "name"), [(MINE, "MyLion"), (SLOW, "Held")])
def test_one_file_gives_every_backend(load, text, name):
    cls = load(text, name)
    assert len(text.strip().splitlines()) <= 22
    rule = cls(lr=0.05, weight_decay=0.1)
    w, g = stream((4, 6), 10)
    with double_precision():
        expected = oracle_path(rule, w, g)
        bound, made = bind(cls), alias(cls, "mine")
        paths = {
            "torch": torch_path(lambda p: Optimizer(p, rule), w, g),
            "bound": torch_path(lambda p: bound(p, lr=0.05, weight_decay=0.1), w, g),
            "jax": jax_path(transform(rule), w, g),
            "alias": jax_path(made(0.05, weight_decay=0.1), w, g),
        }
        for k, path in paths.items():
            assert difference(path, expected) <= 1e-12, k
    for slot in rule.slots((4, 6)):
        assert slot in str(describe(rule))
    assert "\\" in latex(rule)


def test_a_users_lion_is_optax_lion(load):
    w, g = (x.astype(np.float32) for x in stream((4, 6), 20))
    ours = jax_path(alias(load(MINE, "MyLion"), "my_lion")(0.05, weight_decay=0.1), w, g)
    theirs = jax_path(optax.lion(0.05, b1=0.9, b2=0.99, weight_decay=0.1), w, g)
    assert difference(ours, theirs) <= 1e-6


def test_a_users_clock_ticks(load):
    """The held chunk is the sum of the three gradients before, and nothing at first."""
    rule = load(SLOW, "Held")(lr=1.0)
    w, g = stream((5,), 9)
    path = np.concatenate([[w], oracle_path(rule, w, g)])
    for k in range(9):
        held = g[k - k % 3 - 3 : k - k % 3].sum(0) if k >= 3 else 0.0
        assert difference(path[k] - path[k + 1], g[k] + 0.5 * held) <= 1e-12
