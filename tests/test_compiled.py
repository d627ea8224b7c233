"""Random programs in every algebra: NumPy, torch in place and stacked, jax."""

import jax.numpy as jnp
import numpy as np
import torch
from cases import double_precision
from hypothesis import given
from hypothesis import strategies as st
from test_core import graphs

from deepopt.algebra import Program, fold
from deepopt.expr import symbol
from deepopt.grad import grad
from deepopt.oracle import NUMPY
from jax_backend.algebra import Jax
from torch_backend.algebra import Compiled, Torch

TORCH = Torch(torch.float64, torch.device("cpu"))


def close(got, want):
    got, want = np.asarray(got), np.asarray(want)
    size = max(1.0, float(np.abs(want).max(initial=0.0)))
    np.testing.assert_allclose(np.broadcast_to(got, want.shape), want, rtol=0, atol=1e-10 * size)


@given(graphs(), st.integers(0, 2**32 - 1), st.sampled_from([(), ("a",), ("a", "b")]))
def test_random_programs_agree_in_place_and_stacked(graph, seed, donate):
    objective, shape = graph
    d_a, d_b = grad(objective, [symbol("a", shape), symbol("b", shape)])
    program = Program({"loss": objective, "a": d_a, "b": d_b, "both": d_a * symbol("lr") - d_b})
    rng = np.random.default_rng(seed)
    stack = rng.uniform(0.2, 0.8, (3, 2, *shape))
    stack[:, 1] += 1.0
    each = [fold(program, NUMPY, {"a": a, "b": b, "lr": 0.3}) for a, b in stack]
    compiled = Compiled(program, TORCH, donate)

    def run(a, b):
        inputs = {"a": torch.tensor(a), "b": torch.tensor(b)}
        kept = {k: v.clone() for k, v in inputs.items() if k not in donate}
        out = compiled(inputs, compiled.scalars({"lr": 0.3}))
        assert all(torch.equal(inputs[k], v) for k, v in kept.items())
        return out

    for (a, b), want in zip(stack, each, strict=True):
        out = run(a, b)
        for name in want:
            close(out[name], want[name])
    together = run(stack[:, 0], stack[:, 1])
    for name in each[0]:
        close(together[name], np.stack([want[name] for want in each]))
    with double_precision():
        a, b = jnp.asarray(stack[0, 0]), jnp.asarray(stack[0, 1])
        out = fold(program, Jax(jnp.float64), {"a": a, "b": b, "lr": 0.3})
        for name in each[0]:
            close(out[name], each[0][name])
