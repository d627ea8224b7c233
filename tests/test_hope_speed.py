"""The benchmark of Hope's speed, very small: every table has its rows, and the page shows them."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import hope, hope_cells

SECTIONS = ["forms", "training", "generation", "peers"]


def test_the_whole_benchmark(tmp_path: Path) -> None:
    out, page = tmp_path / "speed.jsonl", tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\n<!-- /results -->\nafter\n")
    assert hope.main(["--quick", "--out", str(out), "--page", str(page)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    found = {s: [r for r in records if r["section"] == s] for s in SECTIONS}
    assert [len(found[s]) for s in SECTIONS] == [3, 3, 4, 3]
    assert all(r["tokens/s"] > 0 for s in SECTIONS[1:] for r in found[s])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert text.count("Hope, checkpoint") == 2
    assert (tmp_path / "images" / "hope-speed.png").stat().st_size > 0
    # Of one section alone, the others stay on file as they are.
    assert hope.main(["--quick", "--sections", "peers", "--out", str(out)]) == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r for r in again if r["section"] != "peers"] == records[:-3]


def test_the_state_of_hope_does_not_grow() -> None:
    cell = {"quick": True, "lengths": [16, 64], "piece": 16, "tokens": 1, "repeats": 1}
    records = hope_cells.generation(cell)
    size = {(r["model"], r["length"]): r["bytes"] for r in records}
    assert size["hope", 16] == size["hope", 64]
    assert size["transformer", 16] < size["transformer", 64]


def test_forms_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = hope_cells.LanguageModel.stream

    def wrong(self, tokens, state=None):
        logits, state = streamed(self, tokens, state)
        return logits + 1.0, state

    monkeypatch.setattr(hope_cells.LanguageModel, "stream", wrong)
    cell = {"quick": True, "batch": 1, "length": 8, "repeats": 1}
    with pytest.raises(ArithmeticError, match="apart"):
        hope_cells.forms(cell)


def test_a_tensor_is_counted_once() -> None:
    x = torch.zeros(10, dtype=torch.float64)
    assert hope_cells.held([x, {"a": x}, (x.clone(), None, 3)]) == 160
