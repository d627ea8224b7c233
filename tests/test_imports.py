"""Each package imports with only what it needs: the mathematics without torch and jax, a backend
without the other."""

import subprocess
import sys

import pytest

CHECKS = {
    "import deepopt; deepopt.describe(deepopt.rules.M3()); deepopt.latex(deepopt.rules.M3())": (
        "torch", "jax", "optax", "torch_backend", "jax_backend",
    ),
    "import torch_backend; torch_backend.M3": ("jax", "jaxlib", "optax", "jax_backend"),
    "import jax_backend; jax_backend.m3(1e-3)": ("torch", "triton", "torch_backend"),
    "import examples.hope.jax_model": ("torch", "triton", "torch_backend"),
}  # fmt: skip


@pytest.mark.parametrize("statement", CHECKS)
def test_imports_without(statement):
    """A module that is None in sys.modules cannot be imported, as if it were not installed."""
    blocked = CHECKS[statement]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); {statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["torch", "jax"])
def test_a_backend_says_what_it_lacks(package):
    code = f"import sys; sys.modules[{package!r}] = None; import {package}_backend"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and package in done.stderr.splitlines()[-1]
