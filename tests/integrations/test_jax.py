"""docs/jax.md on eight virtual devices, and checkpoints that go on with fewer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integrations

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "jax.md").read_text()
SECTIONS = dict(re.findall(r"^##? (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
BLOCKS = {k: re.findall(r"```python\n(.*?)```", x, re.DOTALL) for k, x in SECTIONS.items()}


def run(script: str, folder: Path, *arguments: str) -> str:
    """What a script prints, in a process of its own."""
    (folder / "page.py").write_text(script)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "page.py", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | flags
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("section", ["flax nnx", "flax linen", "equinox"])
def test_a_model_learns(section, tmp_path):
    code = [*BLOCKS["JAX"], *BLOCKS["flax nnx"][:1], *BLOCKS[section]]
    if section != "flax nnx":
        code[1] = "from jax_backend import m3\n"
    left = "print(float(loss) / float(jnp.mean(y**2)))\n"
    assert float(run("\n".join([*code, left]), tmp_path)) < 0.05


def test_the_rest_of_the_page_runs(tmp_path):
    first = 1 + list(BLOCKS).index("equinox")
    code = [*BLOCKS["JAX"], "from jax_backend import m3\n"]
    code += [x for name in list(BLOCKS)[first:] for x in BLOCKS[name]]
    check = """
for a, b in zip(jax.tree.leaves(run), jax.tree.leaves(restored), strict=True):
    assert (jax.device_get(a) == jax.device_get(b)).all() and len(b.devices()) == 2
"""
    printed = run("\n".join([*code, check]), tmp_path)
    assert printed.startswith("float32[16@data,8]\n")
    assert "0/SOAP/update_rms" in printed and "0/SOAP/alignment/exp_avg" in printed


def test_orbax_restores_on_other_topologies(tmp_path):
    names = ["adamw", "m3", "shampoo"]
    printed = run((ROOT / "tests" / "integrations" / "topologies.py").read_text(), tmp_path, *names)
    assert printed.count("continues") == 2 * len(names)
