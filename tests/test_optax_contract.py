"""optax's own tests of optimizers, run unmodified from its wheel on every alias.

Whether an alias converges is asked of each in the default run. The other bodies see only its state
and its dtypes: one alias of each kind of state by default, all of them under `-m integrations`.
Those of the wheel's sharding tests are in tests/eight_devices.py.
"""

import inspect
import unittest
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import optax.contrib
import pytest
from optax._src import float64_test
from optax.contrib import _common_test

import jax_backend
from deepopt import rules

# In the manner of optax's own table: an lr that a constant-lr run on Rosenbrock's valley can take.
KWARGS = {
    "sgd": {"learning_rate": 1e-3},
    "sign_sgd": {"learning_rate": 1e-3},
    "heavy_ball": {"learning_rate": 1e-3},
    "nesterov": {"learning_rate": 1e-3},
    "signum": {"learning_rate": 1e-3},
    "preconditioned_momentum": {"learning_rate": 1e-2},
    "feature_momentum": {"learning_rate": 1e-2},
    "delta_momentum": {"learning_rate": 1e-2},
    "deep_momentum": {"learning_rate": 1e-2},
    "adagrad": {"learning_rate": 1.0},
    "rmsprop": {"learning_rate": 1e-2},
    "adam": {"learning_rate": 1e-2},
    "adamw": {"learning_rate": 1e-2},
    "nadam": {"learning_rate": 1e-2},
    "radam": {"learning_rate": 1e-2},
    "amsgrad": {"learning_rate": 1e-2},
    "diagonal_memory": {"learning_rate": 1e-2},
    "lion": {"learning_rate": 1e-3},
    "muon": {"learning_rate": 1e-2},
    "ada_muon": {"learning_rate": 1e-2},
    "shampoo": {"learning_rate": 1e-2},
    "soap": {"learning_rate": 1e-2},
    "multi_frequency": {"learning_rate": 1e-2},
    "m3": {"learning_rate": 1e-2},
    "ademamix": {"learning_rate": 1e-2},
    "nest": {"learning_rate": 1e-2},
    "dgd": {"learning_rate": 1e-3},
    "ggd": {"learning_rate": 1e-3},
}
# One rule of each kind of state, for the tests that do not depend on what a rule computes.
STATES = ("sgd", "nadam", "deep_momentum", "shampoo", "m3")
# optax's tests give no context, without which these take vectors only: a matrix is refused.
CONTEXTUAL = ("dgd", "ggd")
WITH_MATRICES = ("matrix", "mixed_tensor", "inject_hyperparams")
OURS = ("opt_name", "opt_kwargs", "wrapper_name", "wrapper_kwargs")


def bodies(case: type[unittest.TestCase]) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """Each undecorated test of a parametrised TestCase, with each of its own further arguments."""
    found = {}
    for method in vars(case).values():
        if body := getattr(method, "__wrapped__", None):
            given = inspect.getclosurevars(method).nonlocals["testcase_params"]
            own = {k: v for k, v in dict(given).items() if k not in OURS}
            found[body.__name__, str(own)] = (body, own)
    return list(found.values())


CONTRIBUTED = bodies(_common_test.ContribTest)
IDS = ["-".join([b.__name__, *(getattr(x, "__name__", str(x)) for x in k.values())])
       for b, k in CONTRIBUTED]  # fmt: skip


def run(case: type[unittest.TestCase], body: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        body(case(), *args, **kwargs)
    except unittest.SkipTest as skipped:
        pytest.fail(f"skipped: {skipped}")


def test_every_alias_meets_the_contract():
    known = {cls.__name__.lower(): bool(cls().context((1, 1))) for cls in rules.ALL}
    assert known == {k.replace("_", ""): k in CONTEXTUAL for k in KWARGS}
    names = {body.__name__ for body, _ in CONTRIBUTED}
    assert len(names) >= 7 and len(CONTRIBUTED) >= 16 and "test_optimizers" in names


def each(names: Any, spread: Any = STATES) -> list[Any]:
    """The names, those that are not in the spread for the longer run."""
    return [pytest.param(x, marks=() if x in spread else pytest.mark.integrations) for x in names]


CASES = [
    pytest.param(*case.values, body, own, id=f"{label}-{case.values[0]}", marks=case.marks)
    for (body, own), label in zip(CONTRIBUTED, IDS, strict=True)
    for case in each(KWARGS, KWARGS if body.__name__ == "test_optimizers" else STATES)
    # A sign needs a schedule to get through that valley, as in optax's own test of its sign_sgd.
    if (case.values[0], "rosenbrock" in label) != ("sign_sgd", True)
]


@pytest.mark.parametrize(("name", "body", "own"), CASES)
def test_contributed(monkeypatch, request, name, body, own):
    monkeypatch.setattr(optax.contrib, f"ours_{name}", getattr(jax_backend, name), raising=False)
    # The bodies that take no wrapper have no parameters for one.
    given = {"opt_name": f"ours_{name}", "opt_kwargs": KWARGS[name]}
    given |= dict.fromkeys(("wrapper_name", "wrapper_kwargs"))
    matrices = any(x in request.node.name for x in WITH_MATRICES)
    refused = pytest.raises(ValueError, match=r"needs the gram of the leaf at params")
    with refused if name in CONTEXTUAL and matrices else nullcontext():
        run(_common_test.ContribTest, body, **given, **own)


@pytest.mark.parametrize("name", each(KWARGS))
def test_leaves_of_several_dtypes(name):
    before = jax.config.jax_enable_x64
    (body,) = {m.__wrapped__ for m in vars(float64_test.Float64Test).values()
               if hasattr(m, "__wrapped__")}  # fmt: skip
    try:
        run(float64_test.Float64Test, body, getattr(jax_backend, name), KWARGS[name])
    finally:
        jax.config.update("jax_enable_x64", before)
