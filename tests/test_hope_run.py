"""Studies of the Hope example: trials that survive anything, tables that say what was measured."""

import errno
import json
import math
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.hope import (
    checkpoint,
    figure,
    jobs,
    plan,
    presets,
    report,
    run,
    study,
    table,
    training,
)
from examples.hope.plan import Contender, Plan
from examples.hope.study import Makers, Trial
from examples.hope.tasks import Batch, Batches, Stream, Task
from examples.settings import row

# A toy task, the next of five tokens that go round, and a toy model for it.

SYMBOLS, LENGTH = 5, 8


def rows(generator: torch.Generator, batch: int) -> Batch:
    start = torch.randint(SYMBOLS, (batch, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH + 1)) % SYMBOLS
    return Batch(tokens[:, :-1], tokens[:, 1:])


def right(answer: Any) -> float:
    data = rows(torch.Generator().manual_seed(0), 16)
    return (answer(data.inputs).argmax(-1) == data.targets).double().mean().item()


class Killed(Batches):
    """Batches whose process is killed at the third, once: the file `fuse` is there only then."""

    fuse: Path
    drawn = 0

    def __next__(self) -> Batch:
        self.drawn += 1
        if self.drawn == 3 and self.fuse.exists():
            self.fuse.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__next__()


@dataclass(frozen=True)
class Round(Task):
    fuse: str = ""
    name: str = "round"
    vocabulary: int = SYMBOLS
    outputs: int = SYMBOLS
    metric: str = "accuracy"
    better: Any = "higher"

    def batches(self, batch: int, seed: int) -> Batches:
        kind = Killed if self.fuse else Batches
        made = kind(rows, batch, seed, {"name": self.name})
        if isinstance(made, Killed):
            made.fuse = Path(self.fuse)
        return made

    def score(self, answer: Any, *, quick: bool = False) -> dict[str, float]:
        return {"accuracy": right(answer), "quick": float(quick)}

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "symbols": (SYMBOLS,)}


@dataclass(frozen=True)
class Rounds(Stream):
    name: str = "rounds"
    vocabulary: int = SYMBOLS
    outputs: int = SYMBOLS
    parts: tuple[str, ...] = ("a", "b", "c", "d")
    better: Any = "higher"
    joint: bool = False

    def batches(self, part: int, batch: int, seed: int) -> Batches:
        return Batches(rows, batch, seed, {"name": self.name, "part": part})

    def score(self, part: int, answer: Any) -> float:
        return right(answer) - part

    def more(self, part: int, answer: Any) -> dict[str, float]:
        return {"part": float(part)}

    def record(self) -> dict[str, Any]:
        return {"name": self.name}


class Toy(nn.Module):
    """A table with dropout, so that a resumed run needs the global generator too."""

    def __init__(self, width: int, blow_up: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, width)
        self.level = nn.Linear(width, width)
        self.head = nn.Linear(width, SYMBOLS)
        self.blow_up, self.calls = blow_up, 0
        self.hooks: list[str | int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.dropout(self.embedding(tokens), 0.1, self.training)
        self.calls += self.training
        return self.head(x + self.level(x)) * (math.inf if self.blow_up and self.calls == 4 else 1)

    def hidden_matrices(self) -> dict[str, list[Tensor]]:
        return {"stacked": [self.level.weight]}

    def cms_levels(self) -> list[tuple[int, list[Tensor]]]:
        return [(3, [*self.level.parameters()])]

    def before_step(self) -> None:
        self.hooks.append("before")

    def after_step(self, step: int) -> None:
        self.hooks.append(step)


def make_task(name: str, options: Mapping[str, Any]) -> Task | Stream:
    return Rounds() if name == "rounds" else Round(**options)


def make_model(name: str, config: Mapping[str, Any]) -> nn.Module:
    return Toy(config["width"], name == "unstable")


def configure(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"width": 6, **settings}


MAKERS = Makers(make_task, make_model, configure)
TRIAL = Trial(
    **{"label": "toy", "task": "round", "options": {}, "record": Round().record(), "model": "toy"},
    **{"config": {"width": 6}, "lr": 0.05, "steps": 8, "batch": 4, "seed": 0},
)


def make_plan(out: Path, *names: str, **more: Any) -> Plan:
    contenders = [Contender(name, name, {}, 0.05) for name in names]
    return Plan("round", {}, contenders, out, **{"seeds": 2, "steps": 30, "batch": 8, **more})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def left_behind(folder: Path) -> dict[str, Any]:
    """All that a trial leaves, without what is measured in seconds."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    result = json.loads((folder / "result.json").read_text())
    for name in ("wall", "cpu"):
        del saved["tally"][name]
    for name in ("step_ms", "cpu_seconds"):
        del result[name]
    return {"checkpoint": saved, "result": result, "log": report.read(folder / "log.jsonl")}


# Trials


@pytest.mark.parametrize("task", ["round", "rounds"])
@pytest.mark.parametrize("step", [3, 8, 13])
def test_a_stopped_trial_goes_on_bit_for_bit(
    task: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "ROWS", 3)  # it stops between two rows of the log
    record = make_task(task, {}).record()
    steps = 8 if task == "rounds" else 16
    trial = replace(TRIAL, task=task, record=record, steps=steps, parts=2)
    calls = iter(range(100))
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert training.run(trial, tmp_path / "whole", MAKERS)
    stopped = training.run(trial, tmp_path / "parts", MAKERS, stop=lambda: next(calls) == step)
    assert stopped is None
    saved = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == step
    (tmp_path / "parts" / "checkpoint.pt.0.part").write_bytes(b"torn")
    assert training.run(trial, tmp_path / "parts", MAKERS)
    assert same(left_behind(tmp_path / "whole"), left_behind(tmp_path / "parts"))
    assert not list((tmp_path / "parts").glob("*.part"))


def test_nested_levels_are_told_of_every_step(tmp_path: Path) -> None:
    trained = training.Training(TRIAL, tmp_path, MAKERS)
    trained.learn(lambda step, loss: None, lambda: trained.step == 3, 30.0)
    assert trained.model.hooks == ["before", 1, "before", 2, "before", 3]


def test_a_row_of_the_log_is_the_mean_since_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.run(TRIAL, tmp_path / "fine", MAKERS)
    monkeypatch.setattr(training, "ROWS", 2)
    training.run(TRIAL, tmp_path / "coarse", MAKERS)
    fine, coarse = (report.read(tmp_path / name / "log.jsonl") for name in ("fine", "coarse"))
    assert [row["step"] for row in fine] == [*range(1, 9)]
    assert [row["step"] for row in coarse] == [4, 8]
    assert coarse[1]["loss"] == sum(row["loss"] for row in fine[4:]) / 4


def test_a_killed_process_is_told_of_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Two processes, of which one is killed by signal 9 in its third step."""
    fuse = tmp_path / "fuse"
    fuse.touch()
    trials = [replace(TRIAL, options={"fuse": str(fuse)}), replace(TRIAL, seed=1)]
    killed, calm = (trial.id() for trial in trials)
    out = tmp_path / "killed"
    outcome = jobs.work(trials, out, MAKERS, jobs=2, interval=0)
    assert outcome.errors == {
        killed: "its process was killed by signal 9; the same command goes on"
    }
    assert [*outcome.results] == [calm] and not outcome.stopped and not fuse.exists()
    assert not (out / killed / "result.json").exists()
    assert torch.load(out / killed / "checkpoint.pt", weights_only=True)["step"] == 2
    again, whole = jobs.work(trials, out, MAKERS), jobs.work(trials, tmp_path / "whole", MAKERS)
    assert not again.errors and {*again.results} == {killed, calm}
    assert {*whole.results} == {killed, calm}
    for name in (killed, calm):
        assert same(left_behind(out / name), left_behind(tmp_path / "whole" / name))


def test_a_finished_trial_is_not_repeated(tmp_path: Path) -> None:
    result = training.run(TRIAL, tmp_path, MAKERS)
    (tmp_path / "checkpoint.pt").unlink()
    assert training.run(TRIAL, tmp_path, MAKERS) == result
    assert not (tmp_path / "checkpoint.pt").exists()
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json' is no result: .*; delete it to repeat"):
        training.run(TRIAL, tmp_path, MAKERS)


@pytest.mark.parametrize(
    ("name", "torn", "message"),
    [
        ("result.json", b"{}", "is no result: it has no scores; delete it to repeat"),
        ("result.json", b'{"scores": {"a', "is no result: .*; delete it to repeat"),
        ("checkpoint.pt", None, "cannot be read as a checkpoint"),
        ("checkpoint.pt", b"", "cannot be read as a checkpoint: "),
    ],
)
def test_a_torn_file_is_quoted_and_kept(
    name: str, torn: bytes | None, message: str, tmp_path: Path
) -> None:
    training.run(TRIAL, tmp_path, MAKERS)
    path = tmp_path / name
    torn = path.read_bytes()[:-100] if torn is None else torn
    path.write_bytes(torn)
    if name == "checkpoint.pt":
        (tmp_path / "result.json").unlink()
    with pytest.raises(ValueError, match=f"{name}' {message}"):
        training.run(TRIAL, tmp_path, MAKERS)
    assert path.read_bytes() == torn


def test_a_trial_under_way_elsewhere_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / TRIAL.id()
    folder.mkdir()
    with training.alone(folder):
        outcome = jobs.work([TRIAL], tmp_path, MAKERS)
        assert "belongs to another process that trains the same" in outcome.errors[TRIAL.id()]
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert not jobs.work([TRIAL], tmp_path, MAKERS).errors


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_can_be_made(name: str) -> None:
    for scale in presets.PRESETS[name].sizes.values():
        # Fifty thousand numbers in six languages take long, and are made as five thousand are.
        options = {k: v for k, v in scale.options.items() if k != "numbers"}
        task = presets.make_task(name, options)
        answers = {"vocabulary": task.vocabulary, "outputs": task.outputs}
        with torch.device("meta"):
            for model in presets.model_names():
                presets.make_model(model, presets.configuration(model, scale.model | answers))


def test_every_setting_but_the_label_makes_another_trial() -> None:
    assert replace(TRIAL, label="b").id() == TRIAL.id()
    changed = [
        *({"lr": 0.1}, {"seed": 1}, {"steps": 9}, {"batch": 5}, {"optimizer": "muon"}),
        *({"config": {"width": 7}}, {"record": {}}, {"model": "other"}, {"parts": 1}),
    ]
    assert len({replace(TRIAL, **change).id() for change in changed} | {TRIAL.id()}) == 10


def test_a_checkpoint_of_another_trial_is_refused_with_all_differences(tmp_path: Path) -> None:
    training.run(TRIAL, tmp_path, MAKERS)
    (tmp_path / "result.json").unlink()
    other = replace(TRIAL, lr=0.1, config={"width": 7})
    with pytest.raises(ValueError) as refused:
        training.run(other, tmp_path, MAKERS)
    assert "config.width: checkpoint 6, this run 7" in str(refused.value)
    assert "lr: checkpoint 0.05, this run 0.1" in str(refused.value)
    with pytest.raises(ValueError, match=r"the data of round changed: \{\} became"):
        training.run(replace(TRIAL, record={}), tmp_path / "new", MAKERS)


def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    training.run(TRIAL, tmp_path / TRIAL.id(), MAKERS, stop=lambda: next(calls) == 2)
    path = tmp_path / TRIAL.id() / "checkpoint.pt"
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(*given: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("deepopt.files.os.fsync", full)
            original(*given)

    original = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    outcome = jobs.work([TRIAL], tmp_path, MAKERS)
    message = outcome.errors[TRIAL.id()]
    assert "step 8 is not saved: No space left on device; the checkpoint saved before" in message
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == [
        *("checkpoint.pt", "lock", "log.jsonl", "settings.json")
    ]
    monkeypatch.undo()
    assert jobs.work([TRIAL], tmp_path, MAKERS).results[TRIAL.id()]["status"] == "finished"


def test_only_what_is_asked_costs() -> None:
    logits, targets = torch.randn(2, 3, 4), torch.tensor([[-100, 1, -100], [2, -100, -100]])
    log = logits.log_softmax(-1)
    expected = -(log[0, 1, 1] + log[1, 0, 2]) / 2
    torch.testing.assert_close(training.cost(logits, targets), expected)
    assert training.cost(logits, torch.full((2, 3), -100)) == 0


def test_a_stream_is_learnt_part_by_part(tmp_path: Path) -> None:
    trial = replace(TRIAL, task="rounds", record=Rounds().record(), steps=20, parts=3)
    result = training.run(trial, tmp_path, MAKERS)
    assert result is not None and result["steps"] == 60
    matrix = result["matrix"]
    assert [len(row) for row in matrix] == [3, 3, 3]
    assert all(row[0] - row[2] == pytest.approx(2) for row in matrix)
    assert result["scores"]["average"] == pytest.approx(sum(matrix[-1]) / 3)
    assert result["scores"]["part"] == 1
    # Untrained, the toy knows a fifth of the answers at most.
    gains = [matrix[j - 1][j] + j for j in (1, 2)]
    assert 0.5 < result["scores"]["forward_transfer"] <= max(gains)
    rates = [row["lr"] for row in report.read(tmp_path / "log.jsonl")]
    assert rates[:20] == rates[20:40] == rates[40:] and max(rates) == 0.05


@dataclass(frozen=True)
class Broken(Rounds):
    """A stream whose second part has a score that is no number."""

    def score(self, part: int, answer: Any) -> float:
        return math.nan if part == 1 else super().score(part, answer)


def test_a_score_that_is_no_number_ends_a_stream(tmp_path: Path) -> None:
    trial = replace(TRIAL, task="rounds", record=Rounds().record(), steps=3, parts=2)
    makers = replace(MAKERS, task=lambda name, options: Broken())
    result = training.run(trial, tmp_path, makers)
    assert result is not None and result["status"] == "diverged"
    assert (result["diverged_at"], result["matrix"], result["scores"]) == (3, [], {})


# Studies


def test_a_study_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = make_plan(tmp_path, "toy", "unstable", command="run me")
    asked = replace(
        asked, contenders=[*asked.contenders, Contender("wide", "toy", {"width": 9}, 0.1)]
    )
    stage = plan.conduct(asked, MAKERS)[-1]
    assert [(row["label"], row["seed"]) for row in stage.rows()] == [
        (label, seed) for seed in (0, 1) for label in ("toy", "unstable", "wide")
    ]
    found = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert found == study.as_json(stage.rows())
    states = {row["label"]: (row["status"], row["diverged_at"]) for row in found}
    assert states["unstable"] == ("diverged", 4)
    assert states["toy"] == states["wide"] == ("finished", None)
    assert all(row["scores"]["accuracy"] > 0.9 for row in found if row["label"] == "toy")

    page = (tmp_path / "summary.md").read_text()
    assert "accuracy (higher is better)" in page and "run me" in page and "symbols: [5]" in page
    assert "| unstable | 0 | – | – |" in page
    cells = next(x for x in page.splitlines() if x.startswith("| unstable")).split("|")
    assert [cell.strip() for cell in cells[-3:-1]] == ["2", "0 of 2 (0.00 to 0.66)"]
    assert "- settings, wide: width=9" in page and "versions of it" not in page
    assert "90/180" not in page and "180/180" in capsys.readouterr().err
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    log = report.read(tmp_path / found[1]["id"] / "log.jsonl")
    assert log[-1] == {"step": 4, "loss": None, "lr": log[-1]["lr"], "status": "diverged"}

    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*")}
    plan.conduct(asked, MAKERS)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*")}
    plan.conduct(replace(asked, restart=True), MAKERS)
    assert all(p.stat().st_mtime_ns != before for p, before in times.items())


def test_a_study_of_a_stream(tmp_path: Path) -> None:
    asked = replace(make_plan(tmp_path, "toy", "other", seeds=1, steps=5), task="rounds", tune=True)
    tuning, reported = plan.conduct(asked, MAKERS)
    assert {trial.parts for trial in tuning.trials} == {3}
    assert [len(row["matrix"]) for row in reported.rows()] == [4, 4]
    page = (tmp_path / "summary.md").read_text()
    assert "average (higher is better)" in page and "| backward_transfer |" in page
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_tuning_takes_the_best_rate_of_a_seed_that_is_not_reported(tmp_path: Path) -> None:
    asked = replace(make_plan(tmp_path, "toy"), tune=True)
    tuning, reported = plan.conduct(asked, MAKERS)
    assert [trial.lr for trial in tuning.trials] == [0.0158, 0.05, 0.158]
    assert {trial.seed for trial in tuning.trials} == {plan.TUNING_SEED}
    assert {trial.seed for trial in reported.trials} == {0, 1}
    scores = {row["lr"]: row["scores"]["accuracy"] for row in tuning.rows()}
    assert {trial.lr for trial in reported.trials} == {max(scores, key=lambda lr: scores[lr])}
    shown = [f"{lr:g} → {score:.3f}" for lr, score in scores.items()]
    assert f"learning rates tried, toy: {', '.join(shown)}" in (tmp_path / "summary.md").read_text()
    diverged = [{"label": "x", "lr": lr, "scores": {}} for lr in (0.1, 0.2)]
    with pytest.raises(ValueError, match=r"x diverged at every learning rate tried, 0\.1, 0\.2"):
        plan._best(diverged, "accuracy", "higher")
    lower = [{"label": "x", "lr": lr, "scores": {"loss": 1 / lr}} for lr in (0.1, 0.2, 0.3)]
    assert plan._best(lower, "loss", "lower")[0] == {"x": 0.3}
    assert plan._best(lower, "loss", "lower")[1]["learning rates tried, x"].endswith("at the edge")


def test_results_of_several_versions_are_told(tmp_path: Path) -> None:
    asked = make_plan(tmp_path, "toy")
    plan.conduct(asked, MAKERS)
    assert "versions" not in (tmp_path / "summary.md").read_text()
    for path in tmp_path.glob("*/result.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "code": "of another day"}))
        break
    plan.conduct(asked, MAKERS)
    assert "- code: 2 versions of it made these rows" in (tmp_path / "summary.md").read_text()


def test_what_fails_overwrites_nothing(tmp_path: Path) -> None:
    """A trial that another process holds, when tuning, reporting and beginning again."""
    asked = make_plan(tmp_path, "toy", seeds=1)
    (first,) = plan.conduct(asked, MAKERS)
    left = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {path.name for path in left} >= {"results.jsonl", "summary.md", "plot.png"}
    other = make_plan(tmp_path, "other", seeds=1)
    trial = plan.Trials(other, MAKERS, MAKERS.task(other.task, {})).report({"other": 0.05})[0]
    (tmp_path / trial.id()).mkdir()
    with training.alone(tmp_path / trial.id()):
        (stage,) = plan.conduct(other, MAKERS)
        assert "belongs to another process" in stage.outcome.errors[trial.id()]
        with pytest.raises(OSError, match="belongs to another process"):
            plan.conduct(replace(other, restart=True), MAKERS)
    with training.alone(tmp_path / first.trials[0].id()):
        with pytest.raises(OSError, match="belongs to another process"):
            plan.conduct(replace(asked, restart=True), MAKERS)
    assert left == {path: path.read_bytes() for path in left}


def test_all_parts_at_once_are_one_training(tmp_path: Path) -> None:
    makers = replace(MAKERS, task=lambda name, options: Rounds(joint=True))
    trial = replace(TRIAL, task="rounds", record={"name": "rounds"}, steps=5)
    result = training.run(trial, tmp_path, makers)
    assert result is not None and [*result["scores"]] == ["average", "part"]
    rates = [row["lr"] for row in report.read(tmp_path / "log.jsonl")]
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[5] > rates[15] > rates[19]


def test_lengths_and_depths_are_a_map() -> None:
    scores = {"128@0": 1.0, "128@0.5": 0.5, "64@0.5": 0.1, "64@0": 0.2, "exact@64": 1.0, "8@0": 0.0}
    (line,) = table.lines([{**result("a", 0, 0.5), "scores": scores}], "exact@64", ["a"])
    found = figure._cells(line)
    assert found.values == [[0.2, 0.1], [1.0, 0.5]]
    assert (found.down, found.across) == (["64", "128"], ["0", "0.5"])


def test_a_signal_stops_a_study_which_then_goes_on(tmp_path: Path) -> None:
    def press(trial: Trial, step: int, loss: float | None) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    trials = [TRIAL, replace(TRIAL, seed=1)]
    before = signal.getsignal(signal.SIGTERM)
    outcome = jobs.work(trials, tmp_path, MAKERS, tell=press)
    assert outcome.stopped and not outcome.results
    assert signal.getsignal(signal.SIGTERM) is before
    assert torch.load(tmp_path / TRIAL.id() / "checkpoint.pt", weights_only=True)["step"] == 5
    assert not (tmp_path / trials[1].id()).exists()
    again = jobs.work(trials, tmp_path, MAKERS)
    assert len(again.results) == 2 and not again.stopped


# Tables


def result(label: str, seed: int, score: float | None, **more: Any) -> dict[str, Any]:
    status = "diverged" if score is None else "finished"
    scores = {} if score is None else {"accuracy": score, "other": 2 * score}
    return {
        **{"label": label, "seed": seed, "lr": 0.1, "status": status, "scores": scores},
        **{"parameters": 1234, "steps": 10, "step_ms": 2.0, "cpu_seconds": 1.0, **more},
    }


ROWS = [
    *(result("a", 0, 0.5), result("b", 0, 0.9, step_ms=4.0), result("a", 1, 0.7)),
    *(result("b", 1, 0.8), result("a", 2, 0.6), result("b", 2, None)),
]


def test_the_table_is_the_one_computed_by_hand() -> None:
    a, b = table.lines(ROWS, "accuracy", ["a", "b", "c"], solved=0.7)
    assert (a.solved, b.solved) == (1, 2)
    b_first = table.lines(ROWS, "accuracy", ["b", "a"])[1]
    assert b_first.label == "a" and b_first.difference.mean == pytest.approx(-0.25)
    # Nothing to differ from: the first of those asked for has no rows.
    alone = table.lines(ROWS, "accuracy", ["c", "a", "b"])
    assert [(x.label, x.difference.mean, x.solved) for x in alone] == [
        *(("a", None, None), ("b", None, None))
    ]
    # Deviation 0.1, three values: t = 4.3027 for two degrees of freedom.
    assert a.scores["accuracy"].mean == pytest.approx(0.6)
    assert a.scores["accuracy"].half == pytest.approx(4.3027 * 0.1 / math.sqrt(3))
    assert (a.finished, a.diverged, b.finished, b.diverged) == (3, 0, 2, 1)
    # Differences 0.4 and 0.1: mean 0.25, deviation 0.3/√2, t = 12.7062 for one degree.
    assert b.difference.mean == pytest.approx(0.25)
    assert b.difference.half == pytest.approx(12.7062 * 0.3 / math.sqrt(2) / math.sqrt(2))
    assert b.difference.count == 2 and a.difference.mean is None
    assert b.scores["other"].mean == pytest.approx(1.7)
    assert b.step_ms == pytest.approx((4 + 2 + 2) / 3)
    page = table.markdown([a, b], "accuracy", "higher", {"task": {"pairs": 3}})
    assert (
        "| a | 3 | 0.600 ± 0.248 | – | 1,234 | 10 | 2.0 | 1.0 | 0.1 | 0 | 1 of 3 (0.06 to 0.79) |"
        in page
    )
    assert "| other | 1.200 ± 0.497 | 1.700 ± 1.271 |" in page and "- task: pairs: 3" in page
    assert f"{table.estimate([0.5, None])}" == "0.500" and f"{table.estimate([])}" == "–"
    lines = table.csv_text([a, b], "accuracy").splitlines()
    first = dict(zip(lines[0].split(","), lines[2].split(","), strict=True))
    assert first["model"] == "b" and float(first["accuracy difference"]) == pytest.approx(0.25)


# The command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mqra"], "no task is called 'mqra': did you mean 'mqar'?"),
        (["zzzz"], "no task is called 'zzzz': there are text, mqar, "),
        ([], "no task given: --list shows them"),
        (["mqar", "--seeds", "0"], "--seeds 0: at least 1"),
        (["mqar", "--jobs", "0"], "--jobs 0: at least 1"),
        (["mqar", "--lr", "-1"], "--lr -1: a learning rate is positive"),
        (["mqar", "--lr", "hop=1"], "--lr hop=…: did you mean 'hope'?"),
        (["mqar", "--out", "{file}"], "is a file: give a folder"),
        (["mqar", "--models", "hope", "hope"], "--models has 'hope' twice"),
        (["mqar", "--models", "hope:chunk"], "'chunk': NAME=VALUE is asked for"),
        (["mqar", "--options", "pears=3"], "task mqar has no option 'pears': did you mean 'pairs'"),
        (["mqar", "--data", "{file}"], "task mqar reads no text"),
        (["text", "--data", "{empty}"], "holds no text"),
        (["text", "--data", "{file}"], "is too small"),
        (["mqar", "--device", "tpu"], "--device tpu: cpu or cuda"),
        (["mqar", "--lr", "0.1", "0.2"], "--lr 0.1 0.2: two rates for all models"),
        (["mqar", "--models", "hope:inner.delta=False"], "delta='False': true or false"),
        (["mqar", "--models", "hope:inner=false"], "inner=False: its settings have names such as"),
        (["mqar", "--models", "delta:forget=0"], "delta does not depend on 'forget', but on chunk"),
        (["mqar", "--config", "periods=3"], "periods=3: a list, such as [1, 2]"),
        (["mqar", "--config", 'periods=["1"]'], "periods='1': a whole number"),
        (["mqar", "--config", "chunk=8.5"], "chunk=8.5: a whole number"),
        (["mqar", "--config", "forget=true"], "forget=True: a number"),
        (["mqar", "--config", "vocabulary=2"], "vocabulary is given by the task, 64 here"),
        (["mqar", "--config", "mixer=delta"], "mixer 'delta': hope has 'titans'"),
        (["mqar", "--options", "pairs=x"], "pairs='x': a whole number"),
        (["languages-names", "--options", "languages=de"], "languages='de': a list"),
        (["languages-names", "--options", 'languages=["de"]'], "a stream has at least two parts"),
    ],
)
def test_bad_options_are_explained(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "file").write_text("few")
    paths = {name: str(tmp_path / name) for name in ("empty", "file")}
    out = ["--out", str(tmp_path / "out")] if "--out" not in options else []
    command = [*(x.format(**paths) for x in options), *out, "--size", "quick"]
    assert run.main(command) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and shown.startswith("error: ")


def test_a_baseline_is_what_its_own_settings_make_it() -> None:
    sizes = {"width": 32, "layers": 1, "heads": 2, "vocabulary": 64}
    plain, other = (
        presets.configuration("delta", {**sizes, "forget": forget, "inner.objective": objective})
        for forget, objective in ((0.1, "l2"), (0.3, "dot"))
    )
    assert plain == other and plain["mixer"] == "delta" and plain["forget"] == 0.1
    counts = []
    for name in presets.model_names():
        model = presets.make_model(name, presets.configuration(name, sizes))
        counts.append(sum(p.numel() for p in model.parameters()))
    assert max(counts) - min(counts) < 2 * 3 * 32
    longer = presets.configuration("delta", {**sizes, "chunk": 16})
    assert longer["chunk"] == 16 and longer != plain


def test_rows_of_an_ablation() -> None:
    assert row("hope") == ("hope", {})
    settings = {"periods": [1, 2], "chunk": 8, "inner.objective": "dot", "own_values": False}
    text = "hope:periods=[1,2],chunk=8,inner.objective=dot,own_values=false"
    assert row(text) == ("hope", settings)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    makers = replace(MAKERS, task=presets.make_task, model=make_token_model)
    out = tmp_path / "out"
    command = ["mqar", "--models", "toy", "toy:width=9", "--size", "quick", "--out", str(out)]
    command += ["--lr", "toy=0.02", "--seeds", "2", "--steps", "3"]
    assert run.main(command, makers) == 0
    shown = capsys.readouterr().out
    assert f"python -m examples.hope.run {' '.join(command)}" in shown
    assert "| toy:width=9 | 2 |" in shown and "hardly trained" in shown
    for name in ("results.jsonl", "summary.md", "summary.csv", "plot.png"):
        assert (out / name).stat().st_size > 0


def test_ctrl_c_before_the_first_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str, options: Mapping[str, Any]) -> Task:
        raise KeyboardInterrupt

    command = ["mqar", "--size", "quick", "--restart", "--out", str(tmp_path / "out")]
    assert run.main(command, replace(MAKERS, task=interrupted)) == 130
    assert "stopped; to go on: " in (shown := capsys.readouterr().err)
    assert "examples.hope.run mqar --size quick --out" in shown


class Tokens(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config["vocabulary"], config["width"])
        self.head = nn.Linear(config["width"], config["outputs"])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))

    def hidden_matrices(self) -> dict[str, list[Tensor]]:
        return {}

    def cms_levels(self) -> list[tuple[int, list[Tensor]]]:
        return []

    def before_step(self) -> None: ...

    def after_step(self, step: int) -> None: ...


def make_token_model(name: str, config: Mapping[str, Any]) -> nn.Module:
    return Tokens(config)
