"""Makes the checkpoints of a version; tests/test_old_checkpoints.py continues from them for ever.

    PYTHONPATH=tests python -m checkpoints.make tests/checkpoints/v0.1

It is run once for each version whose format is new, before the code changes.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from cases import contexts
from safetensors.numpy import save_file
from torch import Tensor, nn

from deepopt import Rule, rules
from jax_backend import transform
from torch_backend import Optimizer
from torch_backend.values import values_of

# Steps before the save: every clock of a case has ticked, and ticks again within two more.
STEPS = 7


@dataclass(frozen=True)
class Case:
    """What is trained: a rule, named shapes, and options of the optimizer or of its groups."""

    rule: Rule
    shapes: Mapping[str, tuple[int, ...]]
    seen_as: str | None = None
    dtype: torch.dtype = torch.float32
    rounding: str = "nearest"


LAYER = {"layer.bias": (3,), "layer.weight": (4, 3)}


def small(rule: Rule) -> Rule:
    """The rule with clocks that tick often, and values that are not its defaults."""
    period = (1, 3) if isinstance(getattr(rule, "period", 1), tuple) else 3
    quick = {"lr": 0.05, "weight_decay": 0.1, "period": period, "width": 2}
    quick |= {"root": 2} if isinstance(rule, rules.MultiFrequency) else {}
    return rule.with_values(quick)


def cases() -> dict[str, Case]:
    """Every rule, and what else a checkpoint may hold."""
    more = {
        "split": Case(small(rules.M3()), {"qkv": (6, 4)}, "split:3"),
        "stacked": Case(small(rules.SOAP()), {"experts": (2, 3, 4)}, "stacked"),
        "exact": Case(rules.AdamW(lr=0.01), LAYER, None, torch.bfloat16, "exact"),
        "several": Case(rules.M3(lr=0.05, slow=(0.9, 0.8), period=(2, 3), stagger=True), LAYER),
        "every": Case(rules.Muon(lr=0.05, every=2), LAYER),
    }
    return {cls.__name__: Case(small(cls()), LAYER) for cls in rules.ALL} | more


def gradients(case: Case, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Those of each step, by name."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield {k: rng.standard_normal(shape) for k, shape in case.shapes.items()}


def in_torch(case: Case) -> dict[str, Any]:
    """A run's checkpoint, all that the step after it depends on, and the parameters after it."""
    start = next(gradients(case, 1))
    params = {k: nn.Parameter(torch.tensor(x, dtype=case.dtype)) for k, x in start.items()}
    group = {"params": [*params.items()], "rule": case.rule}
    group |= {"seen_as": case.seen_as} if case.seen_as else {}
    optimizer = Optimizer([group], rounding=case.rounding)
    found: dict[str, Any] = {"rounding": case.rounding}
    for i, g in enumerate(gradients(case, STEPS + 1)):
        for name, p in params.items():
            p.grad = torch.tensor(g[name], dtype=case.dtype)
            if p.ndim > 1:
                given = contexts(case.rule, tuple(p.shape), STEPS + 1)[i]
                optimizer.context[p].update({k: torch.tensor(x) for k, x in given.items()})
        if i == STEPS:
            found["state"] = optimizer.state_dict()
            found["state"]["state"] = {
                i: {k: x.clone() for k, x in state.items()}
                for i, state in found["state"]["state"].items()
            }
            found["before"] = {k: p.detach().clone() for k, p in params.items()}
            found["gradients"] = {k: p.grad for k, p in params.items()}
            found["context"] = {k: dict(optimizer.context.get(p, {})) for k, p in params.items()}
        optimizer.step()
    return found | {"after": {k: p.detach() for k, p in params.items()}}


def in_jax(case: Case) -> dict[str, np.ndarray]:
    """The same in jax: leaves by the path that leads to them."""
    tx = transform(case.rule)
    params = jax.tree.map(jnp.float32, next(gradients(case, 1)))
    state, found = tx.init(params), dict[str, Any]()
    for i, g in enumerate(gradients(case, STEPS + 1)):
        given = contexts(case.rule, case.shapes["layer.weight"], STEPS + 1)[i]
        context = {k: {"layer.bias": None, "layer.weight": x} for k, x in given.items()}
        if i == STEPS:
            found = {"state": state, "before": params, "gradients": g, "context": context}
        updates, state = jax.jit(tx.update)(g, state, params, context=context)
        params = optax.apply_updates(params, updates)
    leaves, _ = jax.tree_util.tree_flatten_with_path({**found, "after": params})
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    known = cases()
    saved: dict[str, dict[str, Tensor]] = {name: in_torch(case) for name, case in known.items()}
    torch.save(saved, folder / "torch.pt")
    rest = {k: case for k, case in known.items() if case.shapes is LAYER and k != "exact"}
    leaves = {f"{k}{path}": x for k, case in rest.items() for path, x in in_jax(case).items()}
    about = {k: json.dumps([type(x.rule).__name__, values_of(x.rule)]) for k, x in rest.items()}
    save_file(
        {k: np.array(x, order="C") for k, x in leaves.items()}, folder / "jax.safetensors", about
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
