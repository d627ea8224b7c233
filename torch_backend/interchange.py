"""State of a torch optimizer as a file that jax_backend reads too, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepopt import interchange
from deepopt.interchange import Path, Place, Rename
from deepopt.rule import hints, turns
from torch_backend.fused import LOW_HALF
from torch_backend.layers import whole_tensor
from torch_backend.optimizer import Optimizer
from torch_backend.seen import Seen, seen_of
from torch_backend.values import made


def export_state(optimizer: Optimizer, path: Path) -> None:
    """Write the optimizer's state to a safetensors file, by parameter name, bit for bit.

    `deepopt.interchange` says what is in it. Hyperparameters are there for information. Where
    parameters are DTensors all ranks call it, and the first writes whole arrays.
    Raises ValueError where parameters have no names, or lack a memory of their rule.
    """
    places, states = dict[str, Place](), dict[str, dict[str, Tensor]]()
    for name, (p, place, _) in _places(optimizer).items():
        places[name] = place
        if not (state := optimizer.state.get(p)):
            continue
        if missing := set(place.memories) - set(state):
            raise ValueError(f"{name} has no {sorted(missing)} yet; take a step before the export")
        shapes = place.memories | {k: x for k, x in place.more.items() if k in state}
        kept = {
            k: whole_tensor(state[k]).detach().cpu().reshape(x).clone() for k, x in shapes.items()
        }
        states[name] = {"step": state["step"].to("cpu", torch.int64), **kept}
    if not optimizer.is_on_mesh or dist.get_rank() == 0:
        interchange.write(path, places, states, "torch")


def import_state(
    optimizer: Optimizer,
    path: Path,
    *,
    rename: Rename | None = None,
    transpose: Sequence[str] = (),
) -> None:
    """Load state that `export_state` of this or another backend wrote; hyperparameters stay.

    rename: what the file's names are here, as a mapping or a function. transpose: patterns of names
    here whose matrices are stored the other way round in the file, as those of flax's kernels.
    Raises one ValueError that lists all that does not fit; then nothing has changed.
    """
    known = _places(optimizer)
    places = {name: place for name, (_, place, _) in known.items()}
    states = interchange.read(path, "pt", places, rename, transpose)
    saved = optimizer.state_dict()
    keys = {p: key for key, p in zip(_keys(saved), _parameters(optimizer), strict=True)}
    loaded: dict[Any, dict[str, Tensor]] = {}
    for name, (p, _, seen) in known.items():
        if states[name]:
            stored = {k: shape for k, (_, shape) in seen.memories.items()}
            loaded[keys[p]] = {
                k: x.reshape(stored.get(k, p.shape) if k != "step" else ())
                for k, x in states[name].items()
            }
    optimizer.load_state_dict({**saved, "state": loaded})


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _keys(saved: dict[str, Any]) -> list[Any]:
    return [key for group in saved["param_groups"] for key in group["params"]]


def _places(optimizer: Optimizer) -> dict[str, tuple[Tensor, Place, Seen]]:
    """The parameters by name; ValueError where one has none, or two have one."""
    found: dict[str, tuple[Tensor, Place, Seen]] = {}
    for group in optimizer.param_groups:
        names, params = group.get("param_names"), group["params"]
        if params and (not names or found.keys() & {*names}):
            raise ValueError(
                "state is exported and imported by name, and each parameter needs its own: give "
                f"{type(optimizer).__name__} the module or model.named_parameters()"
            )
        cls = optimizer.rules[group["rule"]]
        rule = made(cls, {k: group[k] for k in hints(cls)})
        turn = turns([p.shape for p in params])
        for name, p, mine in zip(names or (), params, turn, strict=True):
            seen = seen_of(rule, p.shape, group["seen_as"])
            more = {LOW_HALF: tuple(p.shape)} if optimizer.rounding == "exact" else {}
            found[name] = p, Place(rule, seen.count, seen.shape, mine, more), seen
    return found
