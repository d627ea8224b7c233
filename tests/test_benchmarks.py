"""The benchmark of steps: no numbers without parity, sections by name, records on file."""

import json

import pytest
import torch

from benchmarks import state, step
from benchmarks.device import Setting
from benchmarks.race import Broken, Contender, parameters, race
from benchmarks.report import merged, table


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def moved(name, by, **facts):
    """A contender that adds a number to its weights."""
    (w,) = parameters([(3, 2)], "cpu")
    return Contender(name, lambda: w.add_(by), lambda: [w], **facts)


def test_a_quick_run_writes_its_records(tmp_path, capsys):
    out = tmp_path / "step.jsonl"
    assert step.main(["tiny", "--quick", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["row"] for r in records][:2] == ["AdamW", "torch AdamW, fused"]
    assert all(r["ms"][0] > 0 and {"date", "load", "torch", "threads"} <= set(r) for r in records)
    assert "host µs per tensor" in capsys.readouterr().out
    assert step.main(["tiny", "--quick", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == len(records)


def test_no_number_is_printed_where_parity_is_broken(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "torch_adamw", lambda **_: lambda p: torch.optim.AdamW(p, 2e-2))
    out = tmp_path / "step.jsonl"
    assert step.main(["tiny", "--quick", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "steps of AdamW" in said.err and "those of torch AdamW, fused" in said.err
    assert not said.out and not out.exists()


def test_nan_is_not_parity():
    bad = moved("bad", float("nan"), twin="good")
    with pytest.raises(Broken, match="steps of bad"):
        race(Setting(quick=True), [bad, moved("good", 1.0)], 3)


def test_a_direction_that_is_not_polar_is_refused():
    with pytest.raises(Broken, match="polar factor"):
        race(Setting(quick=True), [moved("shift", 1.0)], 3, orthogonal=True)


def test_unknown_sections_are_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        step.main(["adam"])
    assert "'adam'; there are adamw, delta, muon" in capsys.readouterr().err


def test_records_replace_those_of_the_same_section_and_threads(tmp_path):
    path = tmp_path / "records.jsonl"
    old = {"section": "m3", "device": "cpu", "threads": 1, "row": "M3"}
    merged(path, [old, {**old, "row": "Muon"}])
    merged(path, [{**old, "threads": 2}])
    merged(path, [{**old, "row": "only"}])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["row"], r["threads"]) for r in rows] == [("M3", 2), ("only", 1)]


def test_a_table_has_the_columns_that_its_records_have():
    head = {
        "section": "first",
        "device": "cpu",
        "threads": 1,
        "date": "",
        "machine": "",
        "cores": 2,
    }
    text = table([{**head, "load": 0, "python": "", "torch": "", "row": "SGD", "cold_s": 0.25}])
    assert "| contender | more, cold, s |" in text and "| SGD | +0.250 |" in text


def test_a_quick_run_of_state_prints_a_row_for_each_rule(capsys):
    assert state.main(["--quick"]) == 0
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| ")][1:]
    assert [x.split("|")[1].strip() for x in rows] == [type(r).__name__ for r in state.RULES]
    assert all(0.5 <= float(x.split("|")[4]) < 0.51 and "diverged" not in x for x in rows)
