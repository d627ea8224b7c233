"""Kronecker memories: blocks, roots, and gradients of which most rows are zero."""

import numpy as np
import pytest
import torch
from torch import nn

from deepopt import Oracle, rules
from deepopt.algebra import Program, fold
from deepopt.expr import symbol
from deepopt.functions import eigenbasis, eigenvalues, inverse_root, negative_eigenvalues
from deepopt.kronecker import Kronecker, blocks
from deepopt.oracle import NUMPY
from torch_backend import Optimizer

MATRIX_RULES = [cls for cls in rules.ALL if cls.domain == "matrix" and not cls().context((2, 2))]
ROOTED = [
    rules.Shampoo(),
    rules.Shampoo(sides="right"),
    rules.MultiFrequency(),
    rules.PreconditionedMomentum(values="kronecker"),
    rules.SOAP(refresh="eigh"),
]


def name(rule) -> str:
    return repr(rule).split("lr=")[0] + getattr(rule, "sides", "")


@pytest.mark.parametrize(
    ("side", "most", "expected"),
    [(6, 6, (1, 6, 6)), (7, 6, (7, 1, 1)), (8, 3, (4, 2, 2)), (0, 4, (1, 0, 0)), (1, 1, (1, 1, 1))],
)
def test_a_long_side_is_cut_into_as_few_equal_blocks_as_can_be(side, most, expected):
    assert blocks(side, most) == expected


def test_a_side_without_equal_blocks_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match=r"side of 50257 .* between 128 and block=1024 .*is 29"):
        blocks(50257, 1024)
    for cls in (rules.Shampoo, rules.SOAP, rules.MultiFrequency):
        p = nn.Parameter(torch.zeros(101, 4))
        with pytest.raises(ValueError, match="side of 101"):
            Optimizer([p], cls(block=50))
        Optimizer([p], cls(block=50, sides="right"))


def test_blocks_are_apart():
    g = np.random.default_rng(0).standard_normal((6, 4))
    made = Kronecker((6, 4), "both", 2)
    x = symbol("x", (6, 4))
    grams = made.grams(x)
    out = fold(Program({**grams, "": made.apply(x, grams)}), NUMPY, {"x": g})
    for i, gram in enumerate(out["left"]):
        np.testing.assert_allclose(gram, g[2 * i : 2 * i + 2] @ g[2 * i : 2 * i + 2].T)
    left, right = np.zeros((6, 6)), np.zeros((4, 4))
    for i, gram in enumerate(out["left"]):
        left[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = gram
    for i, gram in enumerate(out["right"]):
        right[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = gram
    np.testing.assert_allclose(out[""], left @ g @ right.T)


def root(a: np.ndarray, p: int, floor: float) -> tuple[np.ndarray, float]:
    x, least = symbol("a", a.shape), symbol("floor")
    v = eigenbasis(x)
    values = eigenvalues(x, v)
    outputs = {
        "root": inverse_root(v, values, least, p=p),
        "n": negative_eigenvalues(values, least),
    }
    out = fold(Program(outputs), NUMPY, {"a": a, "floor": floor})
    return out["root"], float(out["n"].sum())


@pytest.mark.parametrize("p", [2, 4])
def test_a_root_is_one(p):
    x = np.random.default_rng(1).standard_normal((5, 9))
    r, negatives = root(x @ x.T, p, 0.0)
    np.testing.assert_allclose(np.linalg.matrix_power(r, p) @ x @ x.T, np.eye(5), atol=1e-10)
    assert negatives == 0


def test_a_matrix_that_is_not_positive_has_a_floored_root_and_is_counted():
    q = np.linalg.qr(np.random.default_rng(2).standard_normal((4, 4)))[0]
    r, negatives = root(q @ np.diag([1.0, 1e-9, -1e-9, -0.5]) @ q.T, 2, 1e-4)
    np.testing.assert_allclose(r, q @ np.diag([1.0, 100.0, 100.0, 100.0]) @ q.T, rtol=1e-6)
    assert negatives == 1
    assert np.array_equal(root(np.zeros((3, 3)), 4, 1e-4)[0], np.eye(3))


def test_negative_eigenvalues_show_in_the_metrics():
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = Optimizer([p], rules.Shampoo(period=2))
    p.grad = torch.eye(3)
    optimizer.step()
    optimizer.state[p]["left"][0, 0, 0] = -5.0
    optimizer.step()
    assert optimizer.metrics()["negatives"] == 1


def test_a_memory_that_has_seen_nothing_holds_nothing_back():
    w, zero, g = [np.zeros((3, 4))], [np.zeros((3, 4))], [np.ones((3, 4))]
    for rule in (rules.Shampoo(), rules.MultiFrequency()):
        oracle = Oracle(rule, w)
        for _ in range(10):
            (now,) = oracle.step(w, zero)
        (now,) = oracle.step(w, g)
        assert np.abs(now).min() > 0


def sparse_rows(shape, tokens, steps):
    """Gradients as of an embedding: a few rows, often the same."""
    generator = torch.Generator().manual_seed(0)
    often = 1.0 / torch.arange(1.0, shape[0] + 1.0)
    for _ in range(steps):
        g = torch.zeros(shape)
        rows = torch.multinomial(often, tokens, replacement=True, generator=generator)
        yield g.index_add_(0, rows, 1e-3 * torch.randn(tokens, shape[1], generator=generator))


@pytest.mark.parametrize("rule", [*(cls() for cls in MATRIX_RULES), *ROOTED], ids=name)
def test_rows_that_are_mostly_zero_step_at_the_size_of_lr(rule):
    p = nn.Parameter(torch.zeros(256, 24))
    optimizer = Optimizer([p], rule.with_values({"lr": 1.0}))
    for g in sparse_rows(p.shape, 8, 31):
        p.grad, old = g, p.detach().clone()
        optimizer.step()
        assert (p.detach() - old).abs().max() <= 10.001


def test_one_live_entry_is_bounded():
    g = np.zeros((64, 64))
    g[3, 5] = 1.0
    for cls in MATRIX_RULES:
        if cls is rules.GGD:
            continue
        (w,) = Oracle(cls(lr=1.0), [np.zeros((64, 64))]).step([np.zeros((64, 64))], [g])
        assert np.abs(w).max() <= 10, cls.__name__
