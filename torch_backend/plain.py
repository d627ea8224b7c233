"""The plain path: a rule's program run with torch's operations, equal shapes stacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from deepopt.algebra import Program
from deepopt.rule import Rule, trace
from torch_backend.algebra import Compiled, Torch
from torch_backend.seen import Seen, arithmetic, places_of, remember, rounds_at_random, seen_of
from torch_backend.stochastic import rounded

if TYPE_CHECKING:
    from torch_backend.optimizer import Optimizer

# The most numbers that same-shape matrices are stacked into at a time: what a CPU's cache holds,
# and what keeps an accelerator busy.
BATCH = {"cpu": 1 << 18}
BATCH_ELSEWHERE = 1 << 24


class Batch(NamedTuple):
    """Parameters that are stepped by one call, and all that it needs but their tensors.

    group, places: of the parameters; they say what random numbers round their memories.
    """

    program: Compiled
    scalars: list[Any]
    seen: Seen
    params: list[Tensor]
    factor: float
    group: int
    places: list[int]


class Norm:
    """The Frobenius norm of several gradients together, computed when it is first asked for."""

    def __init__(self, gradients: Iterable[Tensor | None], value: Tensor | None = None) -> None:
        self._gradients = gradients
        self._value = value

    def on(self, device: torch.device) -> Tensor:
        """The norm as a tensor of rank 0 on a device, in float32 at least."""
        value = self._value
        if value is None:
            norm = torch.linalg.vector_norm
            gradients = [g for g in self._gradients if g is not None]
            parts = [norm(g, dtype=arithmetic(g.dtype)).to(device) for g in gradients]
            dtype = max((x.dtype for x in parts), key=lambda x: x.itemsize)
            value = self._value = norm(torch.stack([x.to(dtype) for x in parts]))
        return value.to(device)


def batches(
    optimizer: Optimizer,
    i: int,
    rule: Rule,
    scalars: Mapping[str, Any],
    norm: Norm,
    positions: Sequence[int],
    write: bool = True,
) -> list[Batch]:
    """What the plain path is to run for a group; changes nothing.

    write: whether results will be. Raises RuntimeError for sparse gradients, and where the rounding
    of results needs kernels.
    """
    group = optimizer.param_groups[i]
    view, maximize = group["seen_as"], group["maximize"]
    turn = optimizer.turns(i) if rule.stagger else []
    ticking: dict[tuple[int, int], frozenset[str]] = {}
    members: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = {}
    places = places_of([seen_of(rule, p.shape, view) for p in group["params"]])
    for position in positions:
        p = group["params"][position]
        if p.grad is None:
            continue
        if p.grad.layout is not torch.strided:
            raise RuntimeError(
                f"{type(optimizer).__name__} does not support sparse gradients; "
                f"{optimizer.name_of(i, position)} has one (use sparse=False in its embedding)"
            )
        if write and p.numel() and optimizer.rounding != "nearest" and p.dtype == torch.bfloat16:
            raise RuntimeError(
                f"rounding={optimizer.rounding!r} needs kernels, which cannot step "
                f"{optimizer.name_of(i, position)}"
            )
        seen = seen_of(rule, p.shape, view)
        state = optimizer.state[p] if p in optimizer.state else {}
        if optimizer.differentiable and getattr(state.get("step"), "requires_grad", False):
            raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
        step = int(state["step"]) + 1 if "step" in state else 1
        moment = (step, turn[position] if rule.stagger else 0)
        if moment not in ticking:
            ticking[moment] = rule.ticks(step, index=moment[1])
        alone = -1 if seen.count else position
        key = (seen, p.dtype, p.device, step, ticking[moment], alone)
        members.setdefault(key, []).append((p, places[position]))
    prepared: dict[tuple[Any, ...], tuple[Compiled, list[Any]]] = {}
    found: list[Batch] = []
    for (seen, dtype, device, step, ticks, _), params in members.items():
        most = max(1, BATCH.get(device.type, BATCH_ELSEWHERE) // max(1, seen.largest))
        most = 1 if optimizer.foreach is False else most
        for start in range(0, len(params), most):
            part = params[start : start + most]
            key = (seen, dtype, device, step, ticks, len(part) > 1)
            if key not in prepared:
                stacked, outside = len(part) > 1, optimizer.differentiable
                run = _compiled(rule, seen.shape, ticks, dtype, device, stacked, outside)
                own: dict[str, Any] = {**scalars, "step": float(step)}
                if "gradient_norm" in run.program.inputs:
                    own["gradient_norm"] = norm.on(device) * own.get("inverse_scale", 1.0)
                prepared[key] = run, run.scalars(own)
            sign = -1.0 if maximize else 1.0
            factor = sign * scalars.get("inverse_scale", 1.0)
            own_params, own_places = [p for p, _ in part], [place for _, place in part]
            found.append(
                Batch(*prepared[key], seen, own_params, factor, optimizer.stream(i), own_places)
            )
    return found


@lru_cache(maxsize=4096)
def _compiled(
    rule: Rule,
    shape: tuple[int, ...],
    ticking: frozenset[str],
    dtype: torch.dtype,
    device: torch.device,
    stacked: bool,
    outside: bool,
) -> Compiled:
    """The program of a step; it may overwrite what it is to write, and stacks, which are copies.

    outside: it may overwrite nothing.
    """
    outputs = dict(trace(rule, shape, ticking).outputs)
    outputs.pop("direction", None)
    # A memory that this step only reads must survive it.
    written = [k for k in rule.all_slots(shape) if k in outputs]
    donate = ["w", "g", *written] if stacked else written
    algebra = Torch(arithmetic(dtype), device)
    return Compiled(Program(outputs), algebra, None if outside else donate)


def computed(
    optimizer: Optimizer, batch: Batch, states: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a step of parameters with these states makes; memories may be overwritten with it."""
    program, scalars, seen, params, factor, *_ = batch
    dtype = arithmetic(params[0].dtype)
    gradients = [cast(Tensor, p.grad).to(dtype) for p in params]
    inputs = {
        "w": seen.gather([p.to(dtype, copy=optimizer.differentiable) for p in params], seen.shape),
        "g": seen.gather([factor * g if factor != 1 else g for g in gradients], seen.shape),
    }
    for name in program.program.inputs:
        if name in seen.memories:
            shape = seen.memories[name][0].shape
            inputs[name] = seen.gather([s[name].to(dtype) for s in states], shape)
        elif name in seen.context:
            shape = seen.context[name]
            given = [optimizer.context[p][name].to(p.device, dtype) for p in params]
            inputs[name] = seen.gather([x.expand(seen.stack(shape)) for x in given], shape)
    return program(inputs, scalars)


def run(optimizer: Optimizer, batch: Batch) -> None:
    """Step parameters of one shape, one by one or stacked along a first axis."""
    seen, params, group, places = batch.seen, batch.params, batch.group, batch.places
    for p in params:
        remember(p, optimizer.state[p], seen, optimizer.state_dtype)
        optimizer.state[p]["step"] += 1
    states = [optimizer.state[p] for p in params]
    out = computed(optimizer, batch, states)
    update = out.pop("update", None)
    for j, p in enumerate(params):
        if update is not None:
            step = seen.part(update, seen.shape, j)
            step = step.expand(seen.stack(seen.shape)).reshape(p.shape)
            p.add_(step)  # In the wider dtype of the two, then rounded once.
        for name, value in out.items():
            stored, slot = states[j][name], seen.memories[name][0]
            value = seen.part(torch.as_tensor(value), slot.shape, j)
            if optimizer.differentiable:
                # What autograd holds must stay as it is, and nothing may be the gradient itself.
                whole = value.expand(seen.stack(slot.shape)).reshape(stored.shape)
                states[j][name] = whole.to(stored.dtype, copy=True)
                continue
            # A memory that was overwritten in place is there already.
            if stored.data_ptr() == value.data_ptr() and stored.dtype == value.dtype:
                continue
            value = value.expand(seen.stack(slot.shape)).reshape(stored.shape)
            if rounds_at_random(slot, stored.dtype):
                own = range(places[j], places[j] + (seen.count or 1))
                value = rounded(value, stored, name, group, int(states[j]["step"]), own)
            stored.copy_(value)
