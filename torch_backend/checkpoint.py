"""Checkpoints in the terms of an optimizer: those of this library, and those of torch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepopt.rule import Rule, hints
from deepopt.rules import AMSGrad
from torch_backend.fused import LOW_HALF
from torch_backend.layers import on_mesh
from torch_backend.seen import Seen, seen_of
from torch_backend.values import made

if TYPE_CHECKING:
    from torch_backend.optimizer import Optimizer

# Keys of torch's optimizers: how they compute, and what must have this value to mean nothing here.
TORCH = {"foreach", "fused", "capturable", "differentiable"}
NEUTRAL = {"amsgrad": False, "centered": False, "dampening": 0, "momentum": 0, "nesterov": False}


def checked_groups(
    optimizer: Optimizer, saved_groups: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The groups of a checkpoint in our terms."""
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} parameter groups, this optimizer has "
            f"{len(optimizer.param_groups)}"
        )
    groups: list[dict[str, Any]] = []
    for i, (saved, mine) in enumerate(zip(saved_groups, optimizer.param_groups, strict=True)):
        if len(saved["params"]) != len(mine["params"]):
            raise ValueError(
                f"group {i} of the checkpoint has {len(saved['params'])} parameters, this "
                f"optimizer's has {len(mine['params'])}"
            )
        cls = optimizer.rules[mine["rule"]]
        group = {k: v for k, v in mine.items() if k != "params"} | translated(saved, cls)
        for key, verb in (("rule", "stepped by"), ("seen_as", "seen as")):
            if group[key] != mine[key]:
                raise ValueError(
                    f"group {i} of the checkpoint was {verb} {group[key]!r}; in this "
                    f"optimizer it is {verb} {mine[key]!r}"
                )
        groups.append(group)
    return groups


def checked_state(
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    saved: Mapping[Any, Any],
    ours: Sequence[bool],
) -> dict[Tensor, dict[str, Any]]:
    """Copies of a checkpoint's state on the parameters' devices, names and shapes checked.

    ours: which groups this library saved; theirs may hold memories that a change of a static
    hyperparameter left behind, and they are dropped.
    """
    loaded: dict[Tensor, dict[str, Any]] = {}
    for i, (group, mine) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        cls = optimizer.rules[mine["rule"]]
        rule = made(cls, {k: group[k] for k in hints(cls)})
        for j, (key, p) in enumerate(zip(group["params"], mine["params"], strict=True)):
            state = {k: v for k, v in saved.get(key, {}).items() if v is not None}
            if not state:
                continue
            seen = seen_of(rule, p.shape, mine["seen_as"])
            shapes = {name: stored for name, (_, stored) in seen.memories.items()}
            if optimizer.rounding == "exact" and LOW_HALF in state:
                shapes[LOW_HALF] = p.shape
            what, names = optimizer.name_of(i, j), set(state) - {"step"}
            if set(shapes) - names or (names - set(shapes) and not ours[i]):
                raise ValueError(
                    f"the checkpoint has memories {sorted(names)} for {what}; "
                    f"{cls.__name__} keeps {sorted(shapes)}"
                )
            step = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32)
            loaded[p] = {"step": step.detach().reshape(()).cpu().clone()}
            for name, shape in shapes.items():
                value = torch.as_tensor(state[name])
                if value.numel() == 1 == prod(shape):
                    value = value.reshape(shape)
                if value.shape != shape:
                    raise ValueError(
                        f"the checkpoint's {name} for {what} has shape {tuple(value.shape)}; "
                        f"it should be {tuple(shape)}"
                    )
                loaded[p][name] = _placed(value, p, name, seen, rule)
    return loaded


def _placed(value: Tensor, p: Tensor, name: str, seen: Seen, rule: Rule) -> Tensor:
    """A copy of a memory on its parameter's device, or cut as the parameter on its mesh is."""
    if on_mesh(p) or on_mesh(value):
        from torch_backend.distributed import placed

        value = placed(value, p, name, seen, rule)
    return value.detach().to(p.device, copy=True)


def translated(saved: Mapping[str, Any], cls: type[Rule]) -> dict[str, Any]:
    """A saved group in the terms of a rule: torch's own optimizers spell some things differently.

    Raises ValueError for what the rule does not have.
    """
    group = {k: v for k, v in saved.items() if k not in TORCH}
    if "rule" in saved:
        return group
    if "decoupled_weight_decay" in saved:
        group["decoupled"] = group.pop("decoupled_weight_decay")
    elif "dampening" in saved:
        group["decoupled"] = False
    if "adjust_lr_fn" in saved:
        group["scale"] = "rms" if group.pop("adjust_lr_fn") == "match_rms_adamw" else "spectral"
        group["steps"] = group.pop("ns_steps")
        for name in ("ns_coefficients", "eps"):
            group.pop(name)
    needed = {**NEUTRAL, "amsgrad": issubclass(cls, AMSGrad)}
    for name, neutral in needed.items():
        if name in group and name not in hints(cls) and group.pop(name) != neutral:
            raise ValueError(f"the checkpoint has {name}={saved[name]!r}; {cls.__name__} has not")
    return group
