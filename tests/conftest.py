"""Deterministic, single-threaded tests; HYPOTHESIS_PROFILE=thorough looks harder."""

import os

if os.environ.get("HYPOTHESIS_PROFILE", "quick") == "quick":
    # Most of what the tests do in jax is to compile small programs that run once, a third of it in
    # LLVM's optimizer; XLA's own passes, whose result some tests read, stay as they are.
    fast = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    os.environ.setdefault("XLA_FLAGS", fast)
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "quick", max_examples=15, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("thorough", max_examples=300, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _deterministic():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
