"""optax's own tests of contributed optimizers, run unmodified from its wheel on every alias."""

import inspect
import unittest
from collections.abc import Callable
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
    "heavy_ball": {"learning_rate": 1e-3},
    "delta_momentum": {"learning_rate": 1e-2},
    "deep_momentum": {"learning_rate": 1e-2},
    "adamw": {"learning_rate": 1e-2},
    "lion": {"learning_rate": 1e-3},
    "muon": {"learning_rate": 1e-2},
    "m3": {"learning_rate": 1e-2},
}
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
    assert {cls.__name__.lower() for cls in rules.ALL} == {k.replace("_", "") for k in KWARGS}
    names = {body.__name__ for body, _ in CONTRIBUTED}
    assert len(names) >= 7 and len(CONTRIBUTED) >= 16


@pytest.mark.parametrize("name", KWARGS)
@pytest.mark.parametrize(("body", "own"), CONTRIBUTED, ids=IDS)
def test_contributed(monkeypatch, body, own, name):
    monkeypatch.setattr(optax.contrib, f"ours_{name}", getattr(jax_backend, name), raising=False)
    # The bodies that take no wrapper have no parameters for one.
    given = {"opt_name": f"ours_{name}", "opt_kwargs": KWARGS[name]}
    given |= dict.fromkeys(("wrapper_name", "wrapper_kwargs"))
    run(_common_test.ContribTest, body, **given, **own)


@pytest.mark.parametrize("name", KWARGS)
def test_leaves_of_several_dtypes(name):
    before = jax.config.jax_enable_x64
    (body,) = {m.__wrapped__ for m in vars(float64_test.Float64Test).values()
               if hasattr(m, "__wrapped__")}  # fmt: skip
    try:
        run(float64_test.Float64Test, body, getattr(jax_backend, name), KWARGS[name])
    finally:
        jax.config.update("jax_enable_x64", before)
