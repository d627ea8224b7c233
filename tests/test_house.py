"""The house: documents run, budgets hold, every public rule says what it must."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepopt import describe, latex, rules
from deepopt.__main__ import main

ROOT = Path(__file__).parent.parent
BUDGET = {"deepopt": 2600, "torch_backend": 1600, "jax_backend": 400}


@pytest.mark.parametrize("package", BUDGET)
def test_line_budget(package):
    lines = sum(len(p.read_text().splitlines()) for p in (ROOT / package).rglob("*.py"))
    assert lines <= BUDGET[package], f"{package} has {lines} lines; raise the budget with a reason"


@pytest.mark.parametrize("page", ["README.md", "docs/new-rule.md"])
def test_documented_code_runs(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rule", rules.ALL, ids=lambda r: r.__name__)
def test_docstring_says_memory_units_and_source(rule):
    text = rule.__doc__
    assert text.split("\n")[0].endswith(".")
    assert "Memory:" in text and "Source:" in text
    own = {k for k in rule.__annotations__ if k not in ("domain", "weight_decay")}
    missing = {k for k in own if not re.search(rf"\b{k}\b", text)}
    assert not missing


@pytest.mark.parametrize("rule", rules.ALL, ids=lambda r: r.__name__)
def test_describe_and_latex(rule):
    text = describe(rule())
    for name in rule().all_slots((256, 256)):
        assert f"  {name}' = " in text
    formula = latex(rule())
    assert formula.count("{") == formula.count("}")
    assert r"w &\leftarrow w -\eta" in formula


def test_command_line(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(rule.__name__ in listed for rule in rules.ALL)
    assert main(["describe", "delta_momentum"]) == 0
    assert "l2 (prox)" in capsys.readouterr().out
    assert main(["describe", "nosuch"]) == 2
    assert "no rule is called 'nosuch'; there are sgd," in capsys.readouterr().err
