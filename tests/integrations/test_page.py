"""docs/integrations.md runs, each section by itself."""

import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_runs(section, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), section, "exec"), {"__name__": "page"})
