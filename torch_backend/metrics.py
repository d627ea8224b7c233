"""What an optimizer is about to do, in plain numbers: steps tried out, and nothing written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import hypot, sqrt
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from deepopt.rule import Rule, hints, turns
from deepopt.signs import signed_memories
from torch_backend.layers import whole_tensor
from torch_backend.plain import Batch, Norm, batches, computed
from torch_backend.seen import remember
from torch_backend.values import host, instance

if TYPE_CHECKING:
    from torch_backend.optimizer import Optimizer


@torch.no_grad()
def metrics(optimizer: Optimizer) -> dict[str, float]:
    """Numbers to log, for each group i under "{i}/{rule}/".

    update_rms: root mean square of what a step by the present gradients would add to the weights
        that have one, learning rate and decay included, before weights are rounded, and with the
        plain path's arithmetic; after a step it is of one more.
    weight_rms: of all weights of the group. nonfinite: NaN and Inf entries of gradients.
    alignment/{memory}: cosine of a memory and the gradient, before that step, for memories of the
        weights' shape that are odd in the gradient; 0 where either is zero.
    phase/{clock}: steps since the clock last ticked, of the first parameter that took most steps.
    Of what has no gradient, or not the context that its rule needs, there is no update and no
    alignment. Beside the groups: "skipped_steps" so far, and "negatives", eigenvalues that roots
    found negative, where a rule counts them. DTensors are brought together, a group at a time, and
    every rank must ask.
    """
    numbers = {"skipped_steps": float(optimizer.skipped_steps)}
    own = [s for g in optimizer.param_groups for p in g["params"] if (s := _state(optimizer, p))]
    if counts := [s["negatives"] for s in own if "negatives" in s]:
        numbers["negatives"] = sum(float(whole_tensor(x).sum()) for x in counts)
    shards = optimizer.shards() if optimizer.is_on_mesh else None
    gradients = {} if shards is None else shards.live()
    if shards is None:
        norm = Norm(p.grad for g in optimizer.param_groups for p in g["params"])
    else:
        norm = shards.norm(gradients)
    for i, group in enumerate(optimizer.param_groups):
        if shards is None:
            found = _of_group(optimizer, i, norm)
        else:
            found = _of_group(shards.whole(i, gradients), 0, norm)
        numbers |= {f"{i}/{group['rule']}/{name}": value for name, value in found.items()}
    return numbers


def _state(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    """The state of a parameter, which is not made by asking."""
    return optimizer.state[p] if p in optimizer.state else {}


def _of_group(optimizer: Optimizer, i: int, norm: Norm) -> dict[str, float]:
    group = optimizer.param_groups[i]
    cls, params = optimizer.rules[group["rule"]], group["params"]
    values = {k: host(group[k], k) for k in hints(cls)}
    rule = instance(cls, values)
    gradients = [p.grad for p in params if p.grad is not None]
    found = {
        "weight_rms": _norm(params) / sqrt(max(1, sum(p.numel() for p in params))),
        "nonfinite": float(sum(g.numel() - int(g.isfinite().sum()) for g in gradients)),
    }
    needed = set(rule.context((1, 1)))
    ready = [
        j
        for j, p in enumerate(params)
        if p.grad is not None and needed <= optimizer.context.get(p, {}).keys()
    ]
    tried = batches(optimizer, i, rule, rule.scalars(**values), norm, ready, write=False)
    if tried:
        found |= _tried(optimizer, rule, tried)
    return found | _phases(optimizer, rule, params)


def _tried(optimizer: Optimizer, rule: Rule, tried: Sequence[Batch]) -> dict[str, float]:
    """The size of updates, and how memories lie to gradients, over these batches."""
    updates, angles = list[Tensor](), dict[str, list[tuple[Tensor, Tensor]]]()
    params = [p for batch in tried for p in batch.params]
    for batch in tried:
        seen, states = batch.seen, [dict(_state(optimizer, p)) for p in batch.params]
        for p, state in zip(batch.params, states, strict=True):
            remember(p, state, seen, optimizer.state_dtype)
            for name in signed_memories(rule, seen.shape):
                g = batch.factor * cast(Tensor, p.grad)
                angles.setdefault(name, []).append((g, state[name]))
        # Memories may be overwritten.
        states = [{k: x.clone() for k, x in state.items()} for state in states]
        # A step on which the rule only gathers gradients moves nothing.
        if (update := computed(optimizer, batch, states).get("update")) is not None:
            parts = (seen.part(update, seen.shape, j) for j in range(len(states)))
            updates += [x.expand(seen.stack(seen.shape)) for x in parts]
    found = {"update_rms": _norm(updates) / sqrt(max(1, sum(p.numel() for p in params)))}
    for name, pairs in angles.items():
        sizes = _norm(g for g, _ in pairs) * _norm(m for _, m in pairs)
        dots = sum(float((g.double() * m.double()).sum()) for g, m in pairs)
        found[f"alignment/{name}"] = dots / sizes if sizes else 0.0
    return found


def _phases(optimizer: Optimizer, rule: Rule, params: Sequence[Tensor]) -> dict[str, float]:
    """Steps since each clock ticked, of the first parameter that has taken most."""
    steps = [int(_state(optimizer, p).get("step", 0)) for p in params]
    if not steps:
        return {}
    first = steps.index(max(steps))
    updates, rest = divmod(steps[first], rule.every)
    updates += turns([p.shape for p in params])[first] if rule.stagger else 0
    clocks = {"every": 1} if rule.every > 1 else {}
    clocks |= rule.clocks()
    return {f"phase/{k}": float(updates % n * rule.every + rest) for k, n in clocks.items()}


def _norm(tensors: Iterable[Tensor]) -> float:
    return hypot(*(float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in tensors))
