"""One definition, three voices: the paper, the oracle, torch and jax agree pairwise."""

from dataclasses import fields
from inspect import signature

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import (
    CASES,
    PAPER,
    TOLERANCE,
    Case,
    contexts,
    difference,
    double_precision,
    scanned,
    stream,
)

from deepopt import Oracle, rules
from deepopt.levels import each
from jax_backend import transform
from torch_backend import Optimizer

STEPS = 40
# Hyperparameters of which the transcriptions want one value for each level.
LEVELS = {
    rules.M3: ("slow", "period", "weight"),
    rules.MultiFrequency: ("retention", "period", "weight"),
    rules.Nest: ("memory", "retention", "period", "weight", "output"),
}
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def oracle_path(
    case: Case, dtype: torch.dtype = torch.float64
) -> tuple[list[np.ndarray], list[dict[str, np.ndarray]]]:
    """The oracle on inputs rounded to dtype, itself in float64."""
    w, g = (torch.tensor(x).to(dtype).double().numpy() for x in stream(case.shape, STEPS))
    oracle = Oracle(case.rule, [w])
    path, states = [], []
    for step, context in zip(g, contexts(case.rule, case.shape, STEPS), strict=True):
        (w,) = oracle.step([w], [step], [context])
        path.append(w)
        states.append({k: v.reshape(np.shape(v)) for k, v in oracle.state[0].items()})
    return path, states


def torch_path(case: Case, dtype: torch.dtype) -> tuple[list[np.ndarray], Optimizer]:
    w, g = stream(case.shape, STEPS)
    p = torch.nn.Parameter(torch.tensor(w, dtype=dtype))
    optimizer = Optimizer([p], case.rule, fused=False)
    path = []
    for step, context in zip(g, contexts(case.rule, case.shape, STEPS), strict=True):
        p.grad = torch.tensor(step, dtype=dtype)
        if context:
            optimizer.context[p] = {k: torch.tensor(x) for k, x in context.items()}
        optimizer.step()
        path.append(p.detach().double().numpy().copy())
    return path, optimizer


def jax_path(case: Case, dtype: str) -> list[np.ndarray]:
    w, g = stream(case.shape, STEPS)
    given = contexts(case.rule, case.shape, STEPS)
    context = {k: jnp.asarray(np.stack([x[k] for x in given])) for k in given[0]}
    path = scanned(transform(case.rule), jnp.asarray(w, dtype), jnp.asarray(g, dtype), context)
    return list(np.asarray(path, np.float64))


@each_case
def test_oracle_equals_the_transcription_of_the_paper(case):
    w, g = stream(case.shape, STEPS)
    transcription = PAPER[type(case.rule)]
    given = {f.name: getattr(case.rule, f.name) for f in fields(case.rule)}
    known = signature(transcription).parameters
    if "frame" not in known and "stagger" not in known:
        given.pop("stagger")
    levels = LEVELS.get(type(case.rule), ())
    n = max((len(given[k]) for k in levels if isinstance(given[k], tuple)), default=1)
    given |= {k: each(given[k], n) for k in levels}
    if "context" in known and case.rule.context(case.shape):
        given["context"] = contexts(case.rule, case.shape, STEPS)
    expected, memories = transcription(w, list(g), **given)
    path, states = oracle_path(case)
    assert max(difference(a, b) for a, b in zip(path, expected, strict=True)) <= case.tolerance
    names = {"exp_avg_sq": "second_moment"} if "fast" in states[-1] else {}
    shared = [k for k in states[-1] if names.get(k, k) in memories[-1]]
    assert len(shared) == len(memories[-1])
    # The columns of a basis are free in sign.
    for k in (k for k in shared if not k.endswith("_basis")):
        ours, theirs = states[-1][k], memories[-1][names.get(k, k)]
        assert difference(ours.ravel(), theirs.ravel()) <= case.tolerance, k


@each_case
def test_torch_equals_the_oracle_in_float64(case):
    expected, states = oracle_path(case)
    path, optimizer = torch_path(case, torch.float64)
    assert max(difference(a, b) for a, b in zip(path, expected, strict=True)) <= case.tolerance
    (state,) = optimizer.state.values()
    for k, v in states[-1].items():
        if k.endswith("_basis"):
            continue  # Free in sign.
        assert difference(state[k].numpy().reshape(v.shape), v) <= case.tolerance, k


@each_case
def test_jitted_jax_equals_the_oracle_in_float64(case):
    with double_precision():
        path = jax_path(case, "float64")
    expected, _ = oracle_path(case)
    assert max(difference(a, b) for a, b in zip(path, expected, strict=True)) <= case.tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_case
def test_narrower_parameters_stay_near_the_oracle(case, dtype):
    expected, _ = oracle_path(case, getattr(torch, dtype))
    path, optimizer = torch_path(case, getattr(torch, dtype))
    assert difference(path, expected) <= TOLERANCE[dtype]
    (state,) = optimizer.state.values()
    assert all(v.dtype == torch.float32 for v in state.values())


@each_case
def test_jax_equals_torch_in_float32(case):
    ours, _ = torch_path(case, torch.float32)
    theirs = jax_path(case, "float32")
    worst = max(difference(a, b) for a, b in zip(ours, theirs, strict=True))
    assert worst <= TOLERANCE["float32"]
