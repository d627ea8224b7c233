"""Gradients that are dropped one by one, while the backward pass makes them."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from deepopt.rule import hints, trace
from torch_backend.optimizer import Optimizer
from torch_backend.seen import seen_of
from torch_backend.values import host, instance


class Released:
    """The hooks of `release_gradients`; `remove()` takes them away."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Leave gradients to the loop again."""
        for handle in self._handles:
            handle.remove()


def release_gradients(optimizer: Optimizer) -> Released:
    """Step each parameter as soon as a backward pass has its gradient, and drop the gradient.

    Gradients then need the memory of one at a time instead of all. Every backward pass is a step:
    the loop stays as it is, but `optimizer.step()` finds nothing left to do, nor does the clipping
    of gradients; to accumulate them, give rules `every`. Not for gradient scaling, nor for
    gradients that are still to be averaged over processes. Parameters that are frozen or added
    later are left to step().

    Raises ValueError for what needs all gradients at once: rules that go by their joint norm,
    on_nonfinite="skip" or "raise", several processes, differentiable=True,
    and capturable=True, which needs them in place.
    """
    _check(optimizer)
    known = ref(optimizer)

    def hook(p: Tensor) -> None:
        if (own := known()) is not None:
            with torch.no_grad():
                own.take_step(only=p)
            p.grad = None

    params = [p for group in optimizer.param_groups for p in group["params"]]
    return Released([p.register_post_accumulate_grad_hook(hook) for p in params if p.requires_grad])


def _check(optimizer: Optimizer) -> None:
    what = "gradients cannot be released one by one"
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{what}: release_gradients takes an optimizer of torch_backend, bare of any wrapper, "
            f"not {type(optimizer)}"
        )
    if optimizer.on_nonfinite != "propagate":
        raise ValueError(
            f"{what}: on_nonfinite={optimizer.on_nonfinite!r} looks at all of them before it "
            "steps; use 'propagate'"
        )
    if optimizer.is_on_mesh:
        raise ValueError(f"{what}: its DTensors step together, as all ranks agree on")
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world > 1:
        raise ValueError(
            f"{what} by {world} processes: each would step by gradients of its own, before they "
            "are averaged"
        )
    if optimizer.differentiable:
        raise ValueError(f"{what}: differentiable=True keeps them in the graph")
    if optimizer.capturable:
        raise ValueError(f"{what}: capturable=True needs them to stay in place")
    for i, group in enumerate(optimizer.param_groups):
        cls = optimizer.rules[group["rule"]]
        rule = instance(cls, {k: host(group[k], k) for k in hints(cls)})
        for shape in {p.shape for p in group["params"]}:
            seen = seen_of(rule, shape, group["seen_as"])
            if "gradient_norm" in trace(rule, seen.shape, rule.ticks(rule.every)).inputs:
                raise ValueError(
                    f"{what}: the rule {group['rule']} of group {i} goes by the norm of all of "
                    "them together; clip tensor by tensor, by deepopt.around.clipped"
                )
