"""The kernels of a rule, to be read."""

from __future__ import annotations

from typing import Literal

from deepopt.algebra import Program
from deepopt.expr import Shape
from deepopt.kernels.c import C
from deepopt.kernels.plan import Region, plan
from deepopt.kernels.source import Storage, Writer
from deepopt.kernels.triton import Triton
from deepopt.rule import Rule, checked_rule

Language = Literal["c", "triton"]
WRITERS: dict[str, type[Writer]] = {"c": C, "triton": Triton}


def kernels(
    rule: Rule, language: Language = "c", shape: Shape = (256, 256), weights: Storage = "float32"
) -> str:
    """The stages of an ordinary step of a rule, kernels as source with the rule's lines beside it.

    weights: how parameters and gradients are stored. Raises ValueError where the rule cannot take
    the shape, or for an unknown language.
    """
    if language not in WRITERS:
        raise ValueError(f"language={language!r} must be one of {sorted(WRITERS)}")
    checked_rule(rule).check(shape, "the example")
    found = plan(rule, shape, frozenset({"every"}))
    writer, parts = WRITERS[language], [repr(rule)]
    for i, stage in enumerate(found.stages, 1):
        if isinstance(stage, Program):
            parts.append(f"stage {i}, of matrices: {_functions(stage)}")
            continue
        for region in stage:
            storage = _storage(region, weights)
            source = writer(region, storage, weights != "float64", comments=True)
            parts += [f"stage {i}, a kernel: {_summary(region)}", source.source()]
    return "\n\n".join(parts)


def _functions(program: Program) -> str:
    names = [str(x["name"]) if x.op == "call" else x.op for x in program.nodes]
    given = ", ".join(k for k in program.inputs)
    work = ", ".join(x for x in names if x not in ("input", "constant"))
    return f"{work} of {given} gives {', '.join(program.outputs)}"


def _summary(region: Region) -> str:
    sweeps = len(region.sweeps)
    times = "one sweep" if sweeps == 1 else f"{sweeps} sweeps"
    return f"reads {', '.join(region.loads)}; writes {', '.join(region.stores)}; {times}"


def _storage(region: Region, weights: Storage) -> dict[str, Storage]:
    wide: Storage = "float64" if weights == "float64" else "float32"
    gradients: Storage = "bfloat16" if weights in ("stochastic", "exact") else weights
    own: dict[str, Storage] = {"w": weights, "g": gradients}
    return {name: own.get(name, wide) for name in region.tensors}
