"""Checkpoints in the terms of an optimizer: those of this library, and those of torch's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepopt.differences import refuse, several
from deepopt.rule import Rule, check_value, hints, trace
from deepopt.rules import AMSGrad
from torch_backend.fused import LOW_HALF
from torch_backend.layers import on_mesh
from torch_backend.seen import Seen, seen_of
from torch_backend.values import host, made

if TYPE_CHECKING:
    from torch_backend.optimizer import Optimizer

# Keys of torch's optimizers: how they compute, and what must have this value to mean nothing here.
TORCH = {"foreach", "fused", "capturable", "differentiable"}
NEUTRAL = {"amsgrad": False, "centered": False, "dampening": 0, "momentum": 0, "nesterov": False}

# What makes of a checkpoint of each schema one of the next. Schema 0 is that of v0.1, whose groups
# did not say their schema and were the same otherwise.
MIGRATIONS: Sequence[Callable[[dict[str, Any]], dict[str, Any]]] = (lambda given: given,)
SCHEMA = len(MIGRATIONS)

# What modules around a model put into the names of its parameters.
AROUND = re.compile(
    r"^(_orig_mod\.)?module\.|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def checked(
    optimizer: Optimizer, given: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
    """The groups of a `migrated` checkpoint, and copies of its state on the parameters' devices.

    Raises one ValueError that lists all differences from the optimizer, and changes nothing.
    """
    wrong = list[str]()
    groups: list[dict[str, Any]] = []
    states: dict[Tensor, dict[str, Any]] = {}
    ways: dict[Tensor, tuple[Seen, Rule]] = {}
    for i, saved in enumerate(_in_our_order(optimizer, given["param_groups"], wrong)):
        groups.append(_group(optimizer, i, saved, wrong))
        if (rule := _rule(optimizer, i, groups[i], wrong)) is None:
            continue
        members = zip(groups[i]["params"], optimizer.param_groups[i]["params"], strict=False)
        for j, (key, p) in enumerate(members):
            if key in given["state"]:
                state = given["state"][key]
                found, differences = _state(optimizer, (i, j), rule, state, "rule" in saved)
                wrong += differences
                if found:
                    states[p] = found
                    ways[p] = seen_of(rule, p.shape, optimizer.param_groups[i]["seen_as"]), rule
    keys = [key for group in given["param_groups"] for key in group["params"]]
    if len(known := {*keys}) < len(keys):
        wrong.append(f"the checkpoint's groups have a parameter more than once: {several(keys)}")
    if lost := [k for k in given["state"] if isinstance(k, int) and k not in known]:
        wrong.append(
            f"the checkpoint has state for {several(lost)}, which is in none of its groups"
        )
    refuse("the checkpoint does not fit this optimizer", wrong)
    return groups, {
        p: {k: x if k == "step" else _placed(x, p, k, *ways[p]) for k, x in state.items()}
        for p, state in states.items()
    }


def _placed(value: Tensor, p: Tensor, name: str, seen: Seen, rule: Rule) -> Tensor:
    """A copy of a saved memory where its parameter is, in parts where that is on a mesh."""
    if on_mesh(p) or on_mesh(value):
        from torch_backend.distributed import placed

        value = placed(value, p, name, seen, rule)
    return value.detach().to(p.device, copy=True)


def migrated(given: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in the present schema; ValueError where it is none, or of a newer one."""
    groups: Any = given.get("param_groups")
    whole = isinstance(groups, list | tuple) and all(map(_whole, groups))
    if not whole or not isinstance(given.get("state"), Mapping):
        raise ValueError(
            "a checkpoint is what state_dict() makes: 'state' by parameter, and 'param_groups' "
            f"with their 'params' and, if they have any, as many 'param_names'; got {given!r:.300}"
        )
    schemas = [group.get("schema", 0) for group in groups if "rule" in group]
    for schema in schemas:
        if type(schema) is not int or schema < 0 or schema != schemas[0]:
            raise ValueError(f"the groups of the checkpoint say schema {several(schemas)}")
        if schema > SCHEMA:
            raise ValueError(
                f"the checkpoint has schema {schema}, and this version of nested-deepopt reads up "
                f"to {SCHEMA}: load it with the version that wrote it, or a newer one"
            )
    for migrate in MIGRATIONS[schemas[0] if schemas else SCHEMA :]:
        given = migrate(given)
    return given


def _whole(group: Any) -> bool:
    """Whether a saved group says its parameters."""
    if not isinstance(group, Mapping) or not isinstance(keys := group.get("params"), list | tuple):
        return False
    names = group.get("param_names", [""] * len(keys))
    typed = isinstance(names, list | tuple) and all(isinstance(x, str) for x in names)
    return typed and len(names) == len(keys) and all(isinstance(x, int | str) for x in keys)


def _names(group: Mapping[str, Any]) -> list[str] | None:
    """The names of a group's parameters, as they are in the bare model; None if it has none."""
    names = group.get("param_names")
    if not names:
        return None
    bare = [AROUND.sub("", name) for name in names]
    return bare if len({*bare}) == len(bare) else list(names)


def _in_our_order(
    optimizer: Optimizer, saved: Sequence[dict[str, Any]], wrong: list[str]
) -> list[dict[str, Any]]:
    """The saved groups in the order of ours; by name where all groups have names."""
    ours = optimizer.param_groups
    if len(saved) != len(ours):
        wrong.append(
            f"the checkpoint has {len(saved)} parameter groups, this optimizer has {len(ours)}"
        )
    theirs = {frozenset(_names(group) or ()): group for group in saved}
    wanted = [frozenset(_names(group) or ()) for group in ours]
    if len(theirs) == len(saved) == len(ours) and {*wanted} == {*theirs}:
        return [theirs[names] for names in wanted]
    return list(saved[: len(ours)])


def _group(
    optimizer: Optimizer, i: int, saved: Mapping[str, Any], wrong: list[str]
) -> dict[str, Any]:
    """A saved group in our terms; `params` are its keys in our order, None where one is missing."""
    mine = optimizer.param_groups[i]
    what = f"group {i} of the checkpoint"
    keys, a, b = list(saved["params"]), _names(saved), _names(mine)
    if len(keys) != len(mine["params"]):
        wrong.append(
            f"{what} has {len(keys)} parameters, this optimizer's has {len(mine['params'])}"
        )
    if a and b and a != b:
        known = dict(zip(a, keys, strict=True))
        if {*a} != {*b}:
            more, less = [x for x in a if x not in b], [x for x in b if x not in known]
            wrong.append(
                what
                + f" has parameters {several(more)} that group {i} here has not" * bool(more)
                + " and" * bool(more and less)
                + f" lacks {several(less)} of group {i} here" * bool(less)
                + " (without 'param_names' in its groups a checkpoint is loaded by position)"
            )
        keys = [known.get(name) for name in b]
    cls = optimizer.rules[mine["rule"]]
    theirs = translated(saved, cls, f"{what} has", wrong)
    if b:
        theirs["param_names"] = mine["param_names"]
    kept = {k: v for k, v in mine.items() if k != "params"}
    return {**kept, **theirs, "params": keys, "schema": SCHEMA}


def _rule(optimizer: Optimizer, i: int, group: Mapping[str, Any], wrong: list[str]) -> Rule | None:
    """The rule of a group in our terms, None where it is another or cannot be."""
    mine, before = optimizer.param_groups[i], len(wrong)
    for key, verb in (("rule", "stepped by"), ("seen_as", "seen as")):
        if group[key] != mine[key]:
            wrong.append(
                f"group {i} of the checkpoint was {verb} {group[key]!r}; in this optimizer it is "
                f"{verb} {mine[key]!r}"
            )
    if type(group["maximize"]) is not bool:
        wrong.append(f"group {i} of the checkpoint: maximize={group['maximize']!r} must be a bool")
    if len(wrong) > before:
        return None
    cls = optimizer.rules[mine["rule"]]
    for name in hints(cls):
        try:
            check_value(cls, name, host(group[name], name))
        except (TypeError, ValueError) as error:
            wrong.append(f"group {i} of the checkpoint: {error}")
    try:
        return None if len(wrong) > before else made(cls, {k: group[k] for k in hints(cls)})
    except ValueError as error:
        wrong.append(f"group {i} of the checkpoint: {error}")
        return None


def _state(
    optimizer: Optimizer, place: tuple[int, int], rule: Rule, state: Any, ours: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The state of the parameter at (group, position), and what is wrong with it.

    ours: whether this library saved it; such may hold memories that a change of a static
    hyperparameter left behind, and they are dropped.
    """
    mine, what = optimizer.param_groups[place[0]], optimizer.name_of(*place)
    if not isinstance(state, Mapping):
        return {}, [f"the checkpoint's state for {what} is {state!r:.40}, not a dict"]
    state = {k: v for k, v in state.items() if v is not None}
    if not state:
        return {}, []
    p = mine["params"][place[1]]
    memories = seen_of(rule, p.shape, mine["seen_as"]).memories
    shapes = {name: stored for name, (_, stored) in memories.items()}
    if optimizer.rounding == "exact" and LOW_HALF in state:
        shapes[LOW_HALF] = p.shape
    found: dict[str, Tensor] = {}
    names, wrong = set(state) - {"step"}, list[str]()
    if set(shapes) - names or (names - set(shapes) and not ours):
        wrong.append(
            f"the checkpoint has memories {sorted(names)} for {what}; {type(rule).__name__} keeps "
            f"{sorted(shapes)}"
        )
    counts = ours or "step" in trace(rule, (1, 1), rule.ticks(rule.every)).inputs
    if "step" not in state and counts:
        wrong.append(f"the checkpoint's state for {what} has no step")
    for name, shape in {"step": torch.Size(()), **shapes}.items():
        try:
            found[name] = _tensor(name, state.get(name, 0.0), shape)
        except ValueError as error:
            if name in state:
                wrong.append(f"the checkpoint's {name} for {what} {error}")
    return found, wrong


def _tensor(name: str, value: Any, shape: torch.Size) -> Tensor:
    """A saved value as the tensor that it should be; ValueError says what it is instead."""
    try:
        x = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"is {value!r:.40}; it should be a tensor") from None
    if x.numel() == 1 == prod(shape):
        x = x.reshape(shape)
    if x.shape != shape:
        raise ValueError(f"has shape {tuple(x.shape)}; it should be {tuple(shape)}")
    if name == "step":
        x = x.detach().to("cpu", torch.float32, copy=True)
        if not (x >= 0 and x == x.floor() and x.isfinite()):
            raise ValueError(f"is {float(x)}; it should be a number of steps")
    elif x.is_floating_point() == (name == LOW_HALF):
        raise ValueError(f"has dtype {x.dtype}; its memories are floating-point numbers")
    return x


def translated(
    saved: Mapping[str, Any], cls: type[Rule], what: str, wrong: list[str]
) -> dict[str, Any]:
    """A saved group in the terms of a rule: torch's own optimizers spell some things differently.

    wrong: gets what the rule does not have.
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
            wrong.append(f"{what} {name}={saved[name]!r}; {cls.__name__} has not")
    return group
