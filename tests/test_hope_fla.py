"""The convention of flash-linear-attention's gated delta rule against ours."""

import pytest
import torch
from torch import Tensor

from examples.hope.fla import gated_delta
from examples.hope.inner import Gates, InnerRule, unit


def plain(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, scale: float, **state: Tensor
) -> tuple[Tensor, Tensor]:
    """Their recurrence as documented, S ← αS(I - βkkᵀ) + βvkᵀ, on [B, T, H, d]; S is [in, out]."""
    s, answers = state["initial_state"], []
    for t in range(q.shape[1]):
        s = s * g[:, t].exp()[..., None, None]
        old = torch.einsum("bhi,bhio->bho", k[:, t], s)
        s = s + torch.einsum("bhi,bho->bhio", k[:, t], beta[:, t, :, None] * (v[:, t] - old))
        answers.append(torch.einsum("bhi,bhio->bho", scale * q[:, t], s))
    return torch.stack(answers, 1), s


def both(kernel, dtype: torch.dtype, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    kind = {"dtype": dtype, "device": device}
    keys, queries = unit(torch.randn(2, 2, 3, 20, 16, **kind))
    values, weight = torch.randn(2, 3, 20, 16, **kind), torch.randn(2, 3, 16, 16, **kind)
    gates = Gates(0.9 + 0.1 * torch.rand(2, 3, 20, 1, **kind), torch.rand(2, 3, 20, 1, **kind))
    rule = InnerRule(structure="linear", objective="dot", exact=False)
    (_, _, (end,), _), answers = rule.write(
        rule.begin((weight,)), keys, values, gates, queries, after=True
    )
    end_there, there = gated_delta(weight, keys, values, gates, queries, kernel)
    return [(there, answers), (end_there, end)]


def test_our_rule_in_their_convention() -> None:
    for found, expected in both(plain, torch.float64):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


@pytest.mark.thirdparty
def test_their_reference_is_ours() -> None:
    kernels = pytest.importorskip("fla.ops.gated_delta_rule")
    for found, expected in both(kernels.naive_recurrent_gated_delta_rule, torch.float32):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


@pytest.mark.thirdparty
@pytest.mark.skipif(not torch.cuda.is_available(), reason="their kernels run on CUDA")
def test_their_kernel_is_ours() -> None:
    kernels = pytest.importorskip("fla.ops.gated_delta_rule")
    for found, expected in both(kernels.chunk_gated_delta_rule, torch.float32, "cuda"):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-2)
