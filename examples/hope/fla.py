"""The gated delta-rule recurrence by the kernels of `flash-linear-attention`, where installed.

M ← M(αI - ηkkᵀ) + ηvkᵀ, read after each write: `InnerRule` with a linear memory, the dot
objective, delta and no exact rates, over any number of rows at once.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from examples.hope.inner import Gates


def gated_delta(
    weight: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Gates,
    queries: Tensor,
    kernel: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The memory [B, H, in, out] after rows [B, H, T, d], and the answer just after each write.

    kernel: a function of `fla.ops.gated_delta_rule`; by default its chunked one, which needs CUDA
        and unlike ours rounds to what the kernel computes in.
    Raises ModuleNotFoundError where the package is missing.
    """
    run = kernel or import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    retention = torch.as_tensor(gates.retention).to(keys).expand_as(gates.rate)
    # Theirs is S ← αS(I - βkkᵀ) + βvkᵀ: the rate is η/α, and values are scaled by α.
    inputs: dict[str, Any] = {
        "q": queries.transpose(1, 2),
        "k": keys.transpose(1, 2),
        "v": (values * retention).transpose(1, 2),
        "beta": (gates.rate / retention).squeeze(-1).transpose(1, 2),
        "g": retention.log().squeeze(-1).transpose(1, 2),
    }
    state = {"initial_state": weight.contiguous(), "output_final_state": True}
    answers, end = run(**inputs, **state, scale=1.0)
    return end, answers.transpose(1, 2)
