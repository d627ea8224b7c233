"""Sharded arrays: tests/eight_devices.py in a process of eight virtual devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "which",
    [
        pytest.param("not integrations", id="spread"),
        pytest.param("integrations", id="all", marks=pytest.mark.integrations),
    ],
)
def test_on_eight_devices(which):
    count = "--xla_force_host_platform_device_count="
    # Beside what conftest.py asks of the compiler.
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS'].replace(count + '1', '')} {count}8"}
    command = [
        "-m",
        "pytest",
        "tests/eight_devices.py",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
    ]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=os.environ | flags
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
