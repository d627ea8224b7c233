"""The house: documents run, budgets hold, every public rule says what it must."""

import importlib.util
import pkgutil
import re
import runpy
import warnings
from pathlib import Path

import pytest

from deepopt import describe, latex, rules
from deepopt.__main__ import main

ROOT = Path(__file__).parent.parent
# With `testing`, the battery for rules of users.
BUDGET = {"deepopt": 7500, "torch_backend": 5880, "jax_backend": 1230}


@pytest.mark.parametrize("package", BUDGET)
def test_line_budget(package):
    lines = sum(len(p.read_text().splitlines()) for p in (ROOT / package).rglob("*.py"))
    assert lines <= BUDGET[package], f"{package} has {lines} lines; raise the budget with a reason"


PAGES = [
    *("README.md", "docs/new-rule.md", "docs/around.md"),
    *("docs/compare.md", "docs/memory.md", "docs/metrics.md"),
]


@pytest.mark.parametrize("page", PAGES)
def test_documented_code_runs(page, tmp_path, monkeypatch):
    """In this process, as a script with names of its own: to import torch and jax takes longer."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    script = tmp_path / "page.py"
    if page.endswith("new-rule.md"):
        (tmp_path / "lionish.py").write_text(blocks.pop(0))
    script.write_text("\n".join(blocks))
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(action="ignore"):
        runpy.run_path(str(script), run_name="__main__")


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
    assert ("no memory" in text) == (rule is rules.SignSGD)
    formula = latex(rule())
    assert formula.count("{") == formula.count("}")
    assert re.search(r"w' &= w [-+] ", formula)


def test_command_line(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(rule.__name__ in listed for rule in rules.ALL)
    assert main(["describe", "delta_momentum"]) == 0
    assert "l2 (prox)" in capsys.readouterr().out
    assert main(["describe", "nosuch"]) == 2
    assert "no rule is called 'nosuch'; there are sgd," in capsys.readouterr().err


def test_every_path_that_a_page_names_exists():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text()
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
        for link in links:
            assert (page.parent / link).exists(), f"{page.name} links {link}"
        for path in re.findall(r"\b(?:tests|benchmarks|docs|examples)/[\w/]+\.(?:py|md)\b", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("view", ["matrix", "flat", "scalar"])
def test_the_nest_is_found_behind_every_view(view):
    text = describe(rules.DeltaMomentum(view=view))
    assert re.search(r"momentum_buffer +Linear +unit\(g\) +I +l2 \(prox\) +momentum +rate +1", text)


def test_the_table_shows_the_write_that_is_kept():
    text = describe(rules.Lion())
    assert re.search(r"exp_avg +Table +- +g +dot \(explicit\) +beta2", text)


def test_the_pages_of_the_rules_are_those_of_the_rules():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    pages = generate.pages()
    assert {p.name for p in generate.FOLDER.iterdir()} == set(pages)
    stale = [name for name, text in pages.items() if (generate.FOLDER / name).read_text() != text]
    assert not stale, "run python docs/generate.py"


def test_the_map_of_the_paper_has_no_hole():
    text = (ROOT / "docs" / "paper-map.md").read_text()
    found = set()
    for cell in re.findall(r"^\| ([\d, -]+)", text, re.MULTILINE):
        for part in cell.replace(" ", "").split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    assert found == set(range(1, 122))
    for name in re.findall(r"`((?:deepopt|examples)\.[\w.]+)`", text):
        assert pkgutil.resolve_name(name), name
