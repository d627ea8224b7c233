"""Comparison studies: the search, the statistics, the ledger, trials, and whole studies."""

import csv
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import nn

from deepopt import rules
from examples.blame import of_user
from examples.compare import __main__ as command
from examples.compare import contenders, registry, report, search, stats, steppers
from examples.compare.contenders import contender
from examples.compare.figures import matrices, pictures, short, svg
from examples.compare.ledger import Ledger, read
from examples.compare.problem import Part, Problem
from examples.compare.steppers import Clock, factor, optimizers
from examples.compare.study import LEDGER, Plan, Study, digest, estimate
from examples.compare.summary import overall, profile, tables, verdict
from examples.compare.tasks import TASKS
from examples.compare.trial import Trial, code, run, software, stepper
from examples.workers import side_by_side

# The search for a learning rate


def bowl(rate: float, best: float) -> float:
    return (math.log10(rate) - math.log10(best)) ** 2


def searched(best: float, trials: int, start: float = 1e-2, better: str = "lower") -> list[float]:
    tried: dict[float, float | None] = {}
    while len(tried) < trials:
        for rate in search.following(start, tried, better)[: trials - len(tried)]:
            assert rate not in tried
            tried[rate] = bowl(rate, best) * (1 if better == "lower" else -1)
    return [*tried]


def test_a_search_grows_until_the_best_is_inside_and_then_halves() -> None:
    assert searched(1e-2, 5) == [0.0032, 0.01, 0.032, 0.0057, 0.0075]
    assert searched(1e-2, 5, better="higher") == searched(1e-2, 5)
    assert searched(1.0, 7) == [0.0032, 0.01, 0.032, 0.1, 0.32, 1.0, 3.2]
    assert searched(1e-4, 7) == [0.0032, 0.01, 0.032, 0.001, 0.00032, 0.0001, 3.2e-5]


@pytest.mark.parametrize("best", [3e-4, 2e-3, 1e-2, 7e-2, 0.4])
def test_a_search_of_seven_trials_comes_near(best: float) -> None:
    tried = dict.fromkeys(searched(best, 7))
    scores = {rate: bowl(rate, best) for rate in tried}
    found = search.best_rate(scores, "lower")
    assert found is not None and abs(math.log10(found / best)) < 0.3
    assert not search.at_edge(scores, "lower")
    assert search.at_edge({0.1: 1.0, 1.0: 0.5}, "lower") and search.at_edge({0.1: None}, "lower")


@pytest.mark.parametrize("seed", range(20))
def test_every_search_has_as_many_trials(seed: int) -> None:
    best = 10 ** np.random.default_rng(seed).uniform(-4, 1)
    assert len(searched(best, 15)) == 15


def test_rates_that_diverge_are_worse_than_all() -> None:
    tried: dict[float, float | None] = {0.0032: 1.0, 0.01: None, 0.032: None}
    assert search.following(0.01, tried, "lower") == [0.001]
    assert search.at_edge(tried, "lower")
    nothing: dict[float, float | None] = dict.fromkeys(tried)
    assert search.best_rate(nothing, "lower") is None
    assert search.following(0.01, nothing, "lower") == [0.00032]


# Statistics


def test_intervals_are_the_wider_of_two() -> None:
    found = stats.interval([0.5, 0.6, 0.7])
    assert found.high - found.mean == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    # The bootstrap's is lopsided where the values are.
    lopsided = stats.interval([0.0, 0.1, 0.1, 0.2, 3.0])
    student = stats.mean_interval([0.0, 0.1, 0.1, 0.2, 3.0])
    assert lopsided.low <= student[0] - student[1]
    assert lopsided.high > student[0] + student[1] + 0.5
    assert lopsided == stats.interval([0.0, 0.1, 0.1, 0.2, 3.0])
    assert stats.interval([2.0] * 5) == stats.Interval(2.0, 2.0, 2.0, 5)
    # Resamples of values that nearly agree have no bound.
    values = [-0.24, -0.235, -0.23, -0.237, -0.12]
    odd, (mean, half) = stats.interval(values), stats.mean_interval(values)
    assert odd.high == pytest.approx(mean + 3 * half) and odd.low == pytest.approx(mean - half)
    assert not stats.interval([1.0]).apart and f"{stats.interval([1.0])}" == "1.000"
    assert math.isnan(stats.interval([]).mean)


@pytest.mark.parametrize(("gap", "least", "most"), [(0.0, 0, 5), (6.0, 95, 100)])
def test_what_is_better_is_found_and_copies_are_not_told_apart(
    gap: float, least: int, most: int
) -> None:
    """100 studies of 5 seeds; the gap is in standard deviations of a paired difference."""
    chance, found = np.random.default_rng(0), 0
    for _ in range(100):
        seeds = chance.normal(size=5)  # what a seed does to both
        ours, theirs = (seeds + chance.normal(size=5) / math.sqrt(2) for _ in range(2))
        a, b = ({i: float(x[i]) for i in range(5)} for x in (ours - gap, theirs))
        found += stats.paired(a, b).high < 0 or stats.paired(a, b).low > 0
    assert least <= found <= most


def test_pairs_are_those_that_both_have() -> None:
    assert stats.paired({0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.5, 1: 1.5}).mean == 0.5
    assert stats.paired({0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.5, 1: 1.5}).count == 2
    assert stats.paired({5: 9.0, 1: 2.0}, {1: 1.5, 0: 0.5}).mean == 0.5
    assert not stats.interval([1.0, 1.001]).apart and stats.interval([1.0, 1.001, 1.0]).apart
    ratio = stats.geometric([0.5, 2.0])
    assert ratio.mean == pytest.approx(1.0) and ratio.low < 0.5 < 2 < ratio.high
    assert stats.geometric([0.25]).mean == 0.25 and math.isnan(stats.geometric([]).mean)


def test_targets_sensitivities_and_ranks() -> None:
    curve = [{"step": s, "validate": v} for s, v in [(0, 3.0), (10, 2.0), (20, None), (30, 1.0)]]
    assert stats.reached(curve, 2.5, "lower", "step") == 10
    assert stats.reached(curve, 1.0, "lower", "step") == 30
    assert stats.reached(curve, 0.9, "lower", "step") is None
    assert stats.reached(curve, 2.5, "higher", "step") == 0
    # A quarter of the way to 1.5, and to what diverged: that is no worse than the untrained model.
    tried: dict[float, float | None] = {0.1: 1.5, 1.0: 1.0, 10.0: None}
    assert stats.sensitivity(tried, 2.0, "lower") == pytest.approx((0.125 + 0.25) / 2)
    tried[0.1] = 9.0  # as is one that ends worse than it
    assert stats.sensitivity(tried, 2.0, "lower") == pytest.approx((0.25 + 0.25) / 2)
    assert math.isnan(stats.sensitivity({0.1: 0.5, 1.0: 0.9}, 0.1, "higher"))
    # What lies beyond the rates that were tried is not known.
    assert math.isnan(stats.sensitivity({0.75: 1.5, 1.0: 1.0, 10.0: 2.0}, 2.0, "lower"))
    assert math.isnan(stats.sensitivity({0.1: 1.5, 1.0: 1.0, 1.3: 2.0}, 2.0, "lower"))
    assert math.isnan(stats.sensitivity({0.1: None, 1.0: None}, 0.1, "lower"))
    assert stats.ranks({"a": 2.0, "b": 1.0, "c": 2.0, "d": math.nan}, "lower") == {
        **{"a": 2.5, "b": 1.0, "c": 2.5, "d": 4.0}
    }
    assert stats.ranks({"a": 2.0, "b": 1.0}, "higher") == {"a": 1.0, "b": 2.0}


# The ledger


def test_a_ledger_keeps_the_first_of_equal_rows(tmp_path: Path) -> None:
    path = tmp_path / "new" / LEDGER
    with Ledger(path) as ledger:
        ledger.write("a", {"lr": 0.1}, {"test": 1.0})
        ledger.write("a", {"lr": 0.1}, {"test": 2.0})
        ledger.write("b", {"lr": 0.2}, {"test": None})
        expected = {
            "a": {"test": 1.0, "asked": {"lr": 0.1}},
            "b": {"test": None, "asked": {"lr": 0.2}},
        }
        assert ledger.results() == read(path) == expected  # a report may read meanwhile
        with pytest.raises(OSError, match="belongs to another process that is running"):
            Ledger(path)
    with Ledger(path) as again:
        assert again.results() == expected


def test_what_is_no_ledger_of_this_version_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    with pytest.raises(FileNotFoundError, match="no study has been run in"):
        read(path)
    path.write_text("something else, and long enough to be no empty file " * 20)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is no ledger"):
        Ledger(path)
    assert path.read_bytes() == before
    path.unlink()
    with sqlite3.connect(path) as base:
        base.execute("PRAGMA user_version = 7")
    base.close()
    with pytest.raises(ValueError, match="a ledger of version 7, and this is version 2"):
        Ledger(path)


def test_what_a_disk_refuses_is_told_with_the_path(tmp_path: Path) -> None:
    with Ledger(tmp_path / LEDGER) as ledger:
        (pages,) = ledger._base.execute("PRAGMA page_count").fetchone()
        ledger._base.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError, match=r"sqlite' cannot be written: database or disk is full"):
            ledger.write("a", {}, {"text": "x" * 10_000})
    other = tmp_path / "other" / LEDGER
    other.with_suffix(".lock").mkdir(parents=True)
    with pytest.raises(OSError, match=r"ledger\.lock' cannot be locked: unable to open"):
        Ledger(other)
    other.mkdir()
    with pytest.raises(OSError, match=r"ledger\.sqlite' cannot be read: unable to open"):
        read(other)


HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
KILLED = """
import sys
from pathlib import Path
from examples.compare.ledger import Ledger
with Ledger(Path(sys.argv[1])) as ledger:
    for i in range(10**9):
        ledger.write(f"{i}", {}, {"text": "x" * 1000})
        print(i, flush=True)
"""


HOT = """
import os, signal, sqlite3, sys
base = sqlite3.connect(sys.argv[1], isolation_level=None)
base.execute("PRAGMA cache_size = 1")
base.execute("BEGIN")
for i in range(500):
    base.execute("INSERT INTO trials VALUES (?, '{}', ?)", (f"half {i}", "x" * 1000))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_row_that_was_half_written_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    with Ledger(path) as ledger:
        ledger.write("whole", {}, {"test": 1.0})
    subprocess.run([sys.executable, "-c", HOT, str(path)], env=HERE)
    assert path.with_name(f"{LEDGER}-journal").stat().st_size > 0  # what has to be rolled back
    assert [*read(path)] == ["whole"]
    subprocess.run([sys.executable, "-c", HOT, str(path)], env=HERE)
    with Ledger(path) as ledger:
        assert [*ledger.results()] == ["whole"]


def test_a_killed_process_leaves_whole_rows_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, env=HERE
    )
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Ledger(path) as ledger:
        found = ledger.results()
    assert {f"{i}" for i in told} <= found.keys()
    assert all(len(row["text"]) == 1000 for row in found.values())


# Contenders


def test_contenders_are_what_was_asked_for() -> None:
    m3 = contender("m3:momentum=0.95,weight=0|0.1,slow=[0.9,0.99]", "torch")
    assert (m3.name, m3.kind, m3.lr) == ("m3", "rule", 1e-2)
    assert m3.variants() == [{**m3.settings, "weight": w} for w in (0, 0.1)]
    assert (m3.settings["momentum"], m3.settings["slow"]) == (0.95, (0.9, 0.99))
    # Another default must be another trial: all settings but the rate are in it.
    assert {*m3.variants()[0], "lr"} == {f.name for f in fields(rules.M3)}
    assert contender("DeltaMomentum", "jax").name == "deltamomentum"
    sgd = contender("torch.sgd:momentum=0.9", "torch")
    assert (sgd.name, sgd.kind, sgd.settings) == ("torch.optim.SGD", "torch", {"momentum": 0.9})
    made = sgd.make(0.1, sgd.settings)([nn.Parameter(torch.ones(2))])
    assert made.param_groups[0]["lr"] == 0.1 and made.param_groups[0]["momentum"] == 0.9
    assert contender("optax.lion", "jax").kind == "optax"
    assert {*contenders.listing()} >= {"M3", "AdamW", "torch.muon", "optax.muon"}


@pytest.mark.parametrize(
    ("text", "backend", "message"),
    [
        ("moun", "torch", "no rule is called 'moun': did you mean 'muon'"),
        ("m3:momentun=0.9", "torch", "M3 has no setting 'momentun': did you mean 'momentum'"),
        ("m3:lr=0.1", "torch", "M3: lr is what the study tunes; give --lr"),
        ("m3:momentum=2", "torch", "momentum=2"),
        ("m3:momentum=0.9|2", "torch", "momentum=2"),
        ("torch.optim.AdanW", "torch", "'torch.optim' has no optimizer 'AdanW': did you mean"),
        ("torch.optim.Adamw", "torch", "has no optimizer 'Adamw': did you mean 'AdamW'"),
        ("torch.adamww", "torch", "'torch' has no optimizer 'adamww': did you mean 'torch.adamw'"),
        ("m4", "torch", "no rule is called 'm4': did you mean 'm3'"),
        ("torch.adamw:lr=1", "torch", "lr is what the study tunes"),
        ("torch.adamw:beta=1", "torch", "has no setting 'beta': did you mean 'betas'"),
        ("torch.adamw:amsgrad=1", "torch", "amsgrad=1: true or false"),
        ("torch.adamw", "jax", "the task is one of jax, which needs a function of optax's kind"),
        ("optax.adamw", "torch", "the task is one of torch, which needs a torch.optim.Optimizer"),
    ],
)
def test_unknown_contenders_are_explained(text: str, backend: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        contender(text, backend)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ImportError, match=r"'nowhere\.SOAP' cannot be .*: no module 'nowhere' here"
    ):
        contender("nowhere.SOAP", "torch")
    # pip is for names that are known: a misspelt one may be anybody's.
    monkeypatch.setitem(sys.modules, "heavyball", None)
    with pytest.raises(ImportError, match="pip install heavyball"):
        contender("heavyball.SOAP", "torch")


THEIRS = """
import torch

class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr=0.02, share=0.5):
        super().__init__(params, {"lr": lr, "share": share})
        self.modes = []

    def train(self):
        self.modes.append("train")

    def eval(self):
        self.modes.append("eval")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * group["share"] * p.grad.sign()
"""


def test_optimizers_of_others_come_by_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = contender("theirs.Signs:share=0.25", "torch")
    assert (found.kind, found.lr, found.settings) == ("torch", 0.02, {"share": 0.25})
    trial = Trial(
        "line", {}, "theirs.Signs:share=0.25", {"share": 0.25}, 0.01, 0, steps=4, points=2
    )
    problem = make_line(0)
    training = stepper(problem, trial)
    training.step(next(problem.parts[0].batches))
    moved = problem.model["w"].detach().abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * 0.25 / 4))  # warming up
    training.model()
    training.step(next(problem.parts[0].batches))
    # As the schedule-free ones ask for.
    assert training.optimizers[0].modes == ["train", "eval", "train"]
    assert run(trial, make_line(0))["status"] == "finished"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inside = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, x: Any) -> Any:
        return self.head(self.inside(self.embedding(x)))


class Telling(Net):
    """It says itself what is hidden, as Hope does."""

    def hidden_matrices(self) -> dict[str, list[torch.Tensor]]:
        return {"flatten": [self.inside.weight]}


@pytest.mark.parametrize("name", ["m3", "adamw", "torch.adamw", "torch.muon"])
def test_all_contenders_step_the_same_matrices_beside_the_same_adamw(name: str) -> None:
    model = Net()
    made = optimizers(model, contender(name, "torch"), 0.02, {}, 0.003)
    groups = [g for optimizer in made for g in optimizer.param_groups]
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert {n: rates[id(p)] for n, p in model.named_parameters()} == {
        n: 0.02 if n == "inside.weight" else 0.003 for n, _ in model.named_parameters()
    }


@pytest.mark.parametrize("name", ["m3", "adamw", "torch.adamw", "torch.muon", "dgd"])
def test_without_a_rest_one_rate_is_for_everything(name: str) -> None:
    """And one weight decay, whether the model or its layers say what is hidden."""
    for model in (Net(), Telling()):
        made = optimizers(model, contender(name, "torch"), 0.02, {"weight_decay": 0.3}, None)
        groups = [g for optimizer in made for g in optimizer.param_groups]
        assert {(g["lr"], g["weight_decay"]) for g in groups} == {(0.02, 0.3)}
        assert sum(len(g["params"]) for g in groups) == 5


@pytest.mark.parametrize("name", ["m3", "adamw", "torch.adamw", "torch.muon"])
@pytest.mark.parametrize("rest", [None, 0.003])
def test_a_model_of_matrices_alone(name: str, rest: float | None) -> None:
    model = registry.make_problem("factorisation", {}, 0).model
    made = optimizers(model, contender(name, "torch"), 0.02, {}, rest)
    groups = [g for optimizer in made for g in optimizer.param_groups if g["params"]]
    assert [(g["lr"], len(g["params"])) for g in groups] == [(0.02, 2)]


@pytest.mark.parametrize("rest", [None, 0.003])
def test_matrices_outside_of_layers_have_no_inputs(rest: float | None) -> None:
    model = Telling()
    model.loose = nn.Parameter(torch.ones(2, 4, 4))
    model.hidden_matrices = lambda: {"flatten": [model.inside.weight], "stacked": [model.loose]}
    made = optimizers(model, contender("dgd", "torch"), 0.02, {}, rest)
    (model(torch.arange(5)).square().sum() + model.loose.square().sum()).backward()
    before = [p.detach().clone() for p in model.parameters()]
    for optimizer in made:
        optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_rules_of_matrices_need_some() -> None:
    vectors = nn.ParameterList([torch.ones(3)])
    for name in ("m3", "torch.muon"):
        with pytest.raises(ValueError, match="matrices"):
            optimizers(vectors, contender(name, "torch"), 0.1, {}, 0.1)


@pytest.mark.parametrize("name", ["m3", "optax.muon"])
@pytest.mark.parametrize("rest", [None, 0.003])
def test_heads_in_jax_are_stepped_beside_the_matrices(name: str, rest: float | None) -> None:
    """As routing has it in torch: by AdamW, at the `rest` or at the contender's own rate."""

    def alike(outside: tuple[str, ...]) -> dict[str, bool]:
        problem = replace(registry.make_problem("cancer", {"backend": "jax"}, 0), outside=outside)
        training = stepper(problem, Trial("cancer", {}, name, {}, 0.02, 0, rest=rest))
        training.step(next(problem.parts[0].batches))
        moved = {k: abs(np.asarray(training.model()[k] - x)) for k, x in problem.model.items()}
        rate = (0.02 if rest is None else rest) / 20  # the first of 20 steps of warm-up
        # AdamW moves every entry by its rate at first, but for a little decay.
        return {k: float(np.median(x)) == pytest.approx(rate, rel=0.02) for k, x in moved.items()}

    assert alike(("w2",)) == {"b0": True, "b1": True, "b2": True} | {
        "w0": False,
        "w1": False,
        "w2": True,
    }
    assert not alike(())["w2"]


def test_rules_that_need_the_inputs_of_layers_are_for_torch() -> None:
    with pytest.raises(ValueError, match="dgd needs the inputs of layers, which studies record in"):
        Study(Plan([("t", "digits", {"backend": "jax"})], ["dgd"]))


# Trials


def make_line(
    seed: int, steps: int = 40, backend: str = "torch", nan: int = -1, parts: int = 1
) -> Problem:
    """Least squares whose matrix is found; `nan`: the step whose batch is not a number."""
    xp = registry.make_problem("regression", {"backend": backend}, seed)
    source, count = xp.parts[0].batches, iter(range(10**9))

    def batches() -> Any:
        for rows in source:
            yield tuple(x * math.nan for x in rows) if next(count) == nan else rows

    made = [
        Part(batches(), xp.parts[0].validate, xp.parts[0].validate if i else None)
        for i in range(parts)
    ]
    return Problem(xp.model, xp.loss, made, steps, record={"name": "line"})


def test_a_trial_learns_and_tells() -> None:
    told: list[tuple[int, float | None]] = []
    trial = Trial("line", {}, "adamw", {}, 0.03, 0, points=4)
    found = run(trial, make_line(0), lambda *x: told.append(x))
    assert found["status"] == "finished" and found["steps"] == 40
    curve = found["curve"]
    assert [p["step"] for p in curve] == [s for s, _ in told] == [0, 10, 20, 30, 40]
    assert [p["validate"] for p in curve] == [s for _, s in told]
    assert curve[-1]["validate"] == found["validate"] == found["test"] < curve[0]["validate"] / 1.5
    assert curve[-1]["seconds"] == found["seconds"] >= found["optimizer_seconds"] > 0
    assert found["parameter_bytes"] == 64 * 16 * 4
    assert 2 * 4096 <= found["state_bytes"] < 2 * 4096 + 100
    assert json.loads(json.dumps(found)) == found
    again = run(trial, make_line(0))
    assert [p["validate"] for p in again["curve"]] == [p["validate"] for p in curve]


@pytest.mark.parametrize("name", ["adamw", "m3", "deltamomentum"])
def test_a_trial_in_jax_is_that_in_torch(name: str) -> None:
    curves = []
    for backend in ("torch", "jax"):
        trial = Trial("line", {}, name, {}, 0.03, 0, steps=12, points=3)
        found = run(trial, make_line(0, backend=backend))
        curves.append([p["validate"] for p in found["curve"]])
    np.testing.assert_allclose(*curves, rtol=5e-3)


@pytest.mark.parametrize("name", ["adamw", "m3", "dgd"])
def test_networks_in_jax_are_those_in_torch(name: str) -> None:
    """And delta gradient descent finds the layers of torch's."""
    curves = []
    for backend in ("torch", "jax") if name != "dgd" else ("torch",):
        trial = Trial("cancer", {}, name, {}, 0.003, 0, steps=12, points=3)
        found = run(trial, registry.make_problem("cancer", {"backend": backend}, 0))
        curves.append([p["validate"] for p in found["curve"]])
    np.testing.assert_allclose(curves[0], curves[-1], rtol=5e-3)
    assert curves[0][-1] < curves[0][0] / 1.05


def test_a_gradient_that_is_no_number_ends_a_trial() -> None:
    problem = make_line(0)
    whole = problem.loss
    # Finite itself: a root at zero has no slope.
    problem.loss = lambda model, rows: whole(model, rows) + (model["w"] * 0.0).abs().sqrt().sum()
    found = run(Trial("line", {}, "adamw", {}, 0.03, 0), problem)
    assert (found["status"], found["diverged_at"]) == ("diverged", 1)
    assert torch.isfinite(problem.model["w"]).all()


def test_a_loss_that_is_no_number_ends_a_trial() -> None:
    found = run(Trial("line", {}, "adamw", {}, 0.03, 0), make_line(0, nan=7))
    assert (found["status"], found["diverged_at"], found["steps"]) == ("diverged", 8, 8)
    assert found["validate"] is found["test"] is found["matrix"] is None


def test_a_row_is_json_that_others_read() -> None:
    found = run(Trial("line", {}, "adamw", {}, 0.03, 0, points=4), make_line(0, nan=2))
    assert found is not None and found["curve"][-1]["step"] == 0
    problem = make_line(0)
    problem.parts[0].validate = lambda model: math.inf
    found = run(Trial("line", {}, "adamw", {}, 0.03, 0), problem)
    assert found is not None and found["curve"][0]["validate"] is None
    assert (found["reason"], found["diverged_at"]) == ("a score is inf", 0)
    json.dumps(found, allow_nan=False)


def test_what_a_score_draws_does_not_change_the_training() -> None:
    curves = []
    for draws in (0, 3):
        problem = make_line(0)
        whole, weights = problem.loss, problem.parts[0].validate

        def noisy(model: Any, rows: Any, whole: Any = whole) -> Any:
            return whole(model, rows) * (1 + torch.rand(()))

        def drawn(model: Any, weights: Any = weights, draws: int = draws) -> float:
            torch.rand(draws)
            return weights(model)

        problem.loss, problem.parts[0].validate = noisy, drawn
        torch.manual_seed(0)
        found = run(Trial("line", {}, "adamw", {}, 0.03, 0, points=4), problem)
        assert found is not None
        curves.append([p["validate"] for p in found["curve"]])
    assert curves[0] == curves[1]


def test_a_trial_stops_at_the_step_it_is_asked_to() -> None:
    asked: list[int] = []
    stop = lambda: len(asked) == 3 or asked.append(0)  # noqa: E731
    told: list[int] = []
    trial = Trial("line", {}, "adamw", {}, 0.03, 0, points=40)
    assert run(trial, make_line(0), lambda step, _: told.append(step), stop) is None
    assert told == [0, 1, 2, 3]


class Singular(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise torch.linalg.LinAlgError("the input is singular")


def test_numbers_that_leave_their_range_end_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "Singular", Singular, raising=False)
    found = run(Trial("line", {}, "torch.optim.Singular", {}, 0.03, 0), make_line(0))
    assert found is not None and found["status"] == "diverged"
    assert found["reason"].endswith("LinAlgError: the input is singular")


def test_a_clock_counts_the_second_step_for_the_first() -> None:
    times = iter([0.0, 60.0, 61.0, 70.0, 72.0])
    clock = Clock(lambda: next(times))
    for _ in range(3):
        with clock:
            pass
    assert clock.total == 1.0 + 1.0 + 2.0


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_rest_has_a_rate_of_its_own(backend: str) -> None:
    problem = registry.make_problem("cancer", {"backend": backend}, 0)
    training = stepper(problem, Trial("cancer", {}, "adamw", {}, 0.1, 0, rest=1e-12))
    for _ in range(3):
        training.step(next(problem.parts[0].batches))
    model = training.model()
    leaves = model.parameters() if isinstance(model, nn.Module) else jax.tree.leaves(model)
    sizes = [(x.ndim, abs(x).max().item()) for x in leaves]
    assert max(size for axes, size in sizes if axes == 1) < 1e-10  # biases begin at zero
    assert min(size for axes, size in sizes if axes > 1) > 0.1


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_gradients_are_clipped(backend: str) -> None:
    ends = []
    for clip in (None, 1e-6):
        problem = replace(make_line(0, backend=backend), clip=clip)
        name = "torch.sgd" if backend == "torch" else "optax.sgd"
        found = run(Trial("line", {}, name, {}, 1.0, 0, steps=2, points=1), problem)
        assert found is not None
        ends.append([p["validate"] for p in found["curve"]])
    assert ends[0][1] < 0.95 * ends[0][0] and ends[1][1] > 0.999 * ends[1][0]


def test_parts_come_one_after_another() -> None:
    trial = Trial("line", {}, "adamw", {}, 0.03, 0, parts=2, steps=10)
    found = run(trial, make_line(0, parts=3))
    assert found["steps"] == found["total"] == 20 and found["parts"] == ["1", "2"]
    assert [len(row) for row in found["matrix"]["test"]] == [2, 2]
    assert found["test"] == pytest.approx(np.mean(found["matrix"]["test"][-1]))
    assert "first" in found["curve"][-1]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 6)), 0.775, 0.1]),
        ("linear", [0.5, 1.0, 1.0, 5 / 6, 4 / 6, 0.0]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(schedule: Any, expected: list[float]) -> None:
    problem = SimpleNamespace(total=8, warmup=0.25, schedule=schedule)
    found = [factor(step, problem) for step in (0, 1, 2, 3, 4, 8)]  # type: ignore[arg-type]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_starts_alike_for_a_seed(name: str) -> None:
    small = {"bytes": {"layers": 1, "width": 16}, "hope": {"layers": 1, "width": 16}}
    a, b, other = (registry.make_problem(name, small.get(name, {}), seed) for seed in (3, 3, 4))
    scores = [p.parts[0].validate(p.model) for p in (a, b)]
    assert scores[0] == scores[1] and math.isfinite(scores[0])
    losses = [p.loss(p.model, next(p.parts[0].batches)).item() for p in (a, b, other)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2] or name in ("orthogonal", "rotating")  # from zero weights
    assert a.record == other.record and a.record
    assert (registry.tasks()[name].__doc__ or "").strip()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, "no task is called 'digit': did you mean 'digits'"),
        ("digits", {"widht": 3}, "task digits has no option 'widht': did you mean 'width'"),
        ("digits", {"width": "x"}, "width='x': a whole number"),
        ("digits", {"batch": 9999}, "batch=9999: from 1 to the 1257 rows"),
        ("digits", {"width": -3}, "width=-3: at least 1"),
        ("orthogonal", {"parts": 70}, "size=64: at least 70"),
        ("regression", {"condition": 0.0}, "condition=0.0: at least 1"),
        ("factorisation", {"size": 8}, "size=8: at least 16"),
        ("bytes", {"heads": 5}, "width=96: a multiple of heads=5"),
        ("bytes", {"device": "cuda"}, "device='cuda': torch finds no GPU here"),
        ("digits", {"backend": "tf"}, "backend='tf': 'torch' or 'jax'"),
        ("examples.compare.stats", {}, "module:function is asked for"),
        ("examples.compare.stats:rank", {}, "has no function 'rank': did you mean 'ranks'"),
        ("examples.compare.stats:figure", {}, "figure"),
    ],
)
def test_unknown_tasks_are_explained(name: str, options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        next(registry.make_problem(name, options, 0).parts[0].batches)


def test_tasks_with_known_answers_know_them() -> None:
    # What a batch says of the loss is the excess risk, and the noise.
    problem = registry.make_problem("regression", {"batch": 20_000, "condition": 10.0}, 0)
    (part,), model = problem.parts, problem.model
    with torch.no_grad():
        whole = problem.loss(model, next(part.batches)).item()
    assert whole == pytest.approx(part.validate(model) + 0.5, rel=0.02)
    # A direction of norm one, and noise of norm one half around it.
    stream = registry.make_problem("orthogonal", {"batch": 2000}, 0)
    means = []
    for part in stream.parts:
        x, _ = next(part.batches)
        means.append(x.mean(0))
        assert (x - x.mean(0)).norm(dim=1).mean().item() == pytest.approx(0.5, rel=0.03)
    torch.testing.assert_close(
        torch.stack(means) @ torch.stack(means).T, torch.eye(8), atol=0.03, rtol=0
    )


def test_text_is_tested_on_other_bytes_than_it_is_tuned_on() -> None:
    problem = registry.make_problem("bytes", {"layers": 1, "width": 8, "heads": 1, "length": 8}, 0)
    (part,) = problem.parts
    assert part.test is not None
    assert part.test(problem.model) != part.validate(problem.model)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": []}, "parts .*: a list of at least one Part"),
        ({"parts": Part(iter([]), len)}, "a list of at least one Part"),
        ({"parts": [Part([1], len)]}, "batches of type list: an endless iterator"),
        ({"steps": 0}, "steps 0: a whole number, at least 1"),
        ({"steps": 20.0}, r"steps 20\.0: a whole number"),
        ({"better": "more"}, "better 'more': 'lower' or 'higher'"),
        ({"schedule": "step"}, "schedule 'step': 'cosine'"),
        ({"warmup": 1.0}, "warmup 1.0: a share"),
        ({"record": {"rows": 3, "file": Path("x")}}, "record 'file' of type .*Path: .*str"),
        ({"record": {"rows": np.int64(3)}}, "record 'rows' of type int64: .*int"),
        ({"outside": ["head"]}, r"outside \['head'\]: for trees of arrays, not an nn.Module"),
        (
            {"model": {"a": {"w": np.ones(2)}}, "outside": ["w"]},
            r"outside 'w': no array of the model, which has \['a/w'\]",
        ),
    ],
)
def test_problems_that_cannot_be_are_explained(wrong: dict[str, Any], message: str) -> None:
    given = {"model": Net(), "loss": None, "parts": [Part(iter([]), len)], "steps": 1}
    with pytest.raises(ValueError, match=message):
        Problem(**{**given, **wrong})


# Processes


def odd(item: int, tell: Any, stop: Any) -> int:
    tell(item, "begun")
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 3:
        raise ZeroDivisionError("three")
    return 10 * item


def test_a_process_that_dies_takes_only_its_item_along() -> None:
    said: list[Any] = []
    done = side_by_side(range(6), odd, 2, heard=lambda *x: said.append(x))
    assert done.results == {0: 0, 1: 10, 4: 40, 5: 50}
    assert re.fullmatch(r"ZeroDivisionError: three \(test_compare.py:\d+\)", done.errors[3])
    assert "was killed by signal 9" in done.errors[2]
    assert (5, 5, "begun") in said and not done.stopped


def patient(item: int, tell: Any, stop: Any) -> int | None:
    if item == 0:
        return 7
    tell("begun")
    while not stop():
        time.sleep(0.01)
    return None


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_wish_to_stop_reaches_every_process(jobs: int) -> None:
    begun: list[int] = []
    done = side_by_side(
        *(range(5), patient, jobs),
        heard=lambda index, word: begun.append(index),
        stop=lambda: len(begun) >= jobs,
    )
    assert done.stopped and (done.results, done.errors) == ({0: 7}, {})
    assert sorted(begun) == [1, 2][:jobs]


EARLY = """
import multiprocessing, os, signal
if multiprocessing.current_process().name != "MainProcess":
    os.kill(os.getpid(), signal.SIGINT)
def work(item, tell, stop):
    return item
"""


def test_ctrl_c_does_not_reach_a_process_that_still_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "early.py").write_text(EARLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    work = importlib.import_module("early").work
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = side_by_side(range(2), work, 2)
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.results, done.errors) == ({0: 0, 1: 1}, {})
    assert after is signal.default_int_handler


# Studies

TASK = """
import os, signal, torch
from torch import nn
from examples.compare.problem import Part, Problem

def make_task(seed, noise=0.1, fuse=""):
    torch.manual_seed(seed)
    model, truth = nn.Linear(6, 3), torch.linspace(-1, 1, 18).view(3, 6)
    def batches():
        while True:
            if fuse and seed == 1 and os.path.exists(fuse):
                os.unlink(fuse)
                os.kill(os.getpid(), signal.SIGKILL)
            x = torch.randn(8, 6)
            yield x, x @ truth.T + noise * torch.randn(8, 3)
    def loss(model, rows):
        return ((model(rows[0]) - rows[1]) ** 2).mean()
    def score(model):
        with torch.no_grad():
            return ((model.weight - truth) ** 2).sum().item()
    return Problem(model, loss, [Part(batches(), score)], steps=20, metric="squared error")

def careless(seed):
    problem = make_task(seed)
    problem.model.weight.data += torch.seed() % 999
    return problem

def broken(seed):
    return make_task(1 / 0)

def dropped(seed):
    problem = make_task(seed)
    problem.model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3), nn.Dropout(0.5))
    part = problem.parts[0]
    part.validate = lambda model: problem.loss(model, (torch.ones(4, 6), torch.ones(4, 3))).item()
    return problem

def unstable(seed):
    problem = make_task(seed)
    whole = problem.loss
    problem.loss = lambda model, rows: whole(model, rows) * (float("nan") if seed else 1.0)
    return problem
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "my_task", None)
    del sys.modules["my_task"]
    return "my_task:make_task"


OPTIONS = ["--optimizers", "adamw", "muon", "--seeds", "3", "--trials", "3", "--rest", "same"]


def test_a_study_of_a_task_of_ones_own(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["run", mine, *OPTIONS, "--out", str(out)]
    assert command.main(asked) == 0
    shown = capsys.readouterr().out
    assert "| adamw | " in shown and "squared error, lower is better, on validation data" in shown
    assert f"python -m examples.compare {' '.join(asked)}" in shown
    rows = read(out / LEDGER)
    assert len(rows) == 2 * (3 + 3)
    for name in ("report.html", "report.md", "summary.csv", "pictures/differences.svg"):
        assert (out / name).stat().st_size > 0
    before = (out / "report.html").read_bytes()
    assert command.main(asked) == 0  # nothing is left to do
    assert command.main(["report", str(out)]) == 0
    assert read(out / LEDGER) == rows and (out / "report.html").read_bytes() == before
    (found,) = tables(Study(Plan.load(out)), rows)
    adamw, muon = found.lines
    assert adamw.difference is None and muon.difference is not None
    expected = [muon.test[s] - adamw.test[s] for s in range(3)]
    assert muon.difference.mean == pytest.approx(np.mean(expected))
    assert [*adamw.steps] == [0, 1, 2] and max(adamw.steps.values()) <= 1
    assert [line.trials for line in found.lines] == [6, 6]
    more = [*asked, "--seeds", "4"]
    assert command.main(more) == 0 and len(read(out / LEDGER)) == 14


def test_a_killed_process_is_told_of_and_its_trial_comes_again(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fuse, out = tmp_path / "fuse", tmp_path / "out"
    fuse.touch()
    asked = ["run", f"{mine}:fuse={fuse}", *OPTIONS, "--out", str(out), "--jobs", "2"]
    assert command.main(asked) == 1
    assert "was killed by signal 9; the same command goes on" in capsys.readouterr().err
    assert len(read(out / LEDGER)) == 11
    assert command.main([*asked, "--jobs", "1"]) == 0
    assert len(read(out / LEDGER)) == 12


def test_a_study_that_is_killed_goes_on(mine: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["run", mine, *OPTIONS, "--out", str(out)]
    whole = [sys.executable, "-m", "examples.compare", *asked]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(whole, env=HERE, cwd=tmp_path, **silent)
    while process.poll() is None and not (out / LEDGER).exists():
        time.sleep(0.05)
    while process.poll() is None and len(read(out / LEDGER)) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read(out / LEDGER)
    assert len(before) >= 2
    assert command.main(asked) == 0
    after = read(out / LEDGER)
    assert len(after) == 12 and all(after[name] == row for name, row in before.items())
    assert [len(set(after)), len(after)] == [12, 12]


def test_what_diverges_is_told_and_the_study_goes_on(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = mine.replace("make_task", "unstable")
    out = tmp_path / "out"
    asked = ["run", task, *OPTIONS[:3], "--seeds", "1", "--lr", "adamw=0.1", "muon=0.1"]
    assert command.main([*asked, "--rest", "same", "--out", str(out)]) == 0
    (found,) = tables(Study(Plan.load(out)), read(out / LEDGER))
    assert [line.diverged for line in found.lines] == [0, 0]
    asked[asked.index("--seeds") + 1] = "2"
    assert command.main([*asked, "--rest", "same", "--out", str(out)]) == 0
    (found,) = tables(Study(Plan.load(out)), read(out / LEDGER))
    assert [(line.diverged, [*line.test]) for line in found.lines] == [(1, [0]), (1, [0])]
    capsys.readouterr()


def planted_row(trial: Trial, score: float | None) -> dict[str, Any]:
    # What diverges is as good as any before it does.
    way = [10.0, 0.1, 4.0] if score is None else [10.0, 4.0, score]
    return {
        **{"status": "diverged" if score is None else "finished", "test": score},
        **{"validate": score, "matrix": None, "parts": ["1"], "record": {}, "software": {}},
        **{"seconds": 2.0, "steps": 2, "optimizer_seconds": 1.0, "peak_bytes": None},
        **{"state_bytes": 8, "parameter_bytes": 4, "asked": asdict(trial)},
        **{"reason": "a score is inf", "diverged_at": 2},
        "curve": [
            {"step": i, "seconds": i / 2, "validate": x, "loss": x} for i, x in enumerate(way)
        ],
    }


def planted(mine: str, scores: dict[str, list[float | None]], **more: Any) -> Any:
    """The table of a study whose reported seeds have these scores."""
    count = max(map(len, scores.values()))
    plan = Plan([("t", mine, {})], [*scores], seeds=count, lr=dict.fromkeys(scores, 0.1), **more)
    study, rows = Study(plan), {}
    for trial in study.following({}):
        if trial.seed >= len(scores[trial.optimizer]):
            continue
        rows[trial.id()] = planted_row(trial, scores[trial.optimizer][trial.seed])
    (found,) = tables(study, rows)
    return found


def test_contenders_take_turns(mine: str) -> None:
    plan = Plan([("t", mine, {})], ["adamw", "muon"], seeds=2, lr={"adamw": 0.1, "muon": 0.1})
    trials = Study(plan).following({})
    assert [(t.optimizer, t.seed) for t in trials] == [
        *[("adamw", 0), ("muon", 0), ("adamw", 1), ("muon", 1)]
    ]


def test_one_optimizer_may_be_compared_at_two_rates(mine: str) -> None:
    plan = Plan([("t", mine, {})], ["m3", "M3"], seeds=1, lr={"m3": 0.1, "M3": 0.2})
    assert [t.lr for t in Study(plan).following({})] == [0.1, 0.2]


def test_what_diverged_is_no_winner(mine: str) -> None:
    found = planted(mine, {"adamw": [1.0, 1.1, 1.2], "muon": [0.5, 0.5, None], "m3": [3.0] * 3})
    assert {x.label: x.rank for x in found.lines} == {"adamw": 1.0, "m3": 2.0, "muon": 3.0}
    assert {k: v[1:] for k, v in overall([found]).items()} == {
        **{"adamw": (0, 0, 1), "muon": (0, 1, 0), "m3": (0, 1, 0)}
    }
    page = report.markdown(Plan([("t", mine, {})], ["adamw"]), [found])
    assert "0.5000 [0.5000, 0.5000], 2 of 3 seeds" in page and "GPU |" not in page
    found.lines[0].peak = 7.0
    page = report.markdown(Plan([("t", mine, {})], ["adamw"]), [found])
    assert "| 2.00, 7 MB on the GPU |" in page
    assert "muon diverged on a reported seed (seed 2, lr 0.1: a score is inf at step 2)." in page
    assert found.lines[1].steps == {0: 1.0, 1: 1.0, 2: math.inf}


def test_what_diverges_counts_on_both_sides(mine: str) -> None:
    found = planted(mine, {"adamw": [None] * 3, "muon": [1.0, 2.0, 3.0], "m3": [None, 1.0, 2.0]})
    assert [x[1:] for x in overall([found]).values()] == [(0, 0, 1), (1, 0, 0), (1, 0, 0)]
    found = planted(mine, {"adamw": [1.0, 2.0, None], "muon": [0.5, 1.5, None]})
    assert verdict(found, found.lines[1]) == 0  # two seeds tell nothing apart
    # A rule that diverges at all rates is not trained on the seeds: it reaches no target.
    study = Study(Plan([("t", mine, {})], ["adamw", "muon"], seeds=2, trials=3))
    rows: dict[str, Any] = {}
    while trials := study.following(rows):
        for trial in trials:
            score = None if trial.optimizer == "muon" else 1.0
            rows[trial.id()] = planted_row(trial, score)
    assert study.left(rows) == [0, 0]
    (found,) = tables(study, rows)
    assert found.lines[1].steps == {0: math.inf, 1: math.inf} and found.lines[1].diverged == 2
    assert profile([found]) == {"adamw": [1.0, 1.0], "muon": [math.inf, math.inf]}
    study = Study(Plan([("t", mine, {})], ["muon", "adamw"], seeds=2, trials=3, drop_in=True))
    study.following(rows)
    assert study.left(rows) == [0, 0]
    assert "Not finished" not in report.markdown(study.plan, tables(study, rows))


def test_what_is_not_finished_is_told(mine: str) -> None:
    plan = Plan([("t", mine, {})], ["adamw"])
    found = planted(mine, {"adamw": [1.0, 1.1, 1.2], "muon": [0.5]})
    assert [str(x.rank) for x in found.lines] == ["1.0", "nan"]
    told = "Not finished: muon on t (1 of 3 seeds). The same command goes on."
    assert told in report.markdown(plan, [found]) and told in report.page(plan, [found], {})
    # A reference that has not been trained leaves nothing to tell apart.
    found = planted(mine, {"adamw": [], "muon": [0.5, 0.5, 0.6]})
    assert overall([found])["muon"][1:] == (0, 0, 0)
    whole = planted(mine, {"adamw": [1.0, 1.1, 1.2], "muon": [0.5, 0.5, None]})
    assert "Not finished" not in report.markdown(plan, [whole])


def test_a_reference_is_as_fast_as_itself_and_another_can_be_chosen(mine: str) -> None:
    scores: dict[str, Any] = {"adamw": [2.0, 2.1, 2.2], "muon": [4.0, 4.0, 4.0]}
    adamw, muon = planted(mine, scores).lines
    never = dict.fromkeys(range(3), math.inf)
    assert (adamw.steps, muon.steps) == (dict.fromkeys(range(3), 1.0), never)
    adamw, muon = planted(mine, scores, reference="muon").lines
    assert muon.difference is None and adamw.difference.mean == pytest.approx(-1.9)
    assert adamw.steps == adamw.seconds == dict.fromkeys(range(3), 1.0)
    worse = planted(mine, {"adamw": [20.0, 20.0], "muon": [1.0, 1.0]})  # than untrained
    assert worse.lines[1].steps == {}
    with pytest.raises(ValueError, match="--reference lion: one of adamw, muon"):
        Plan([("t", mine, {})], ["adamw", "muon"], reference="lion")


def test_a_summary_has_the_figures_as_they_are(mine: str) -> None:
    found = planted(mine, {"adamw": [1.0, 1.1, 1.2], "muon": [0.5, 0.6, 0.7], "m3": [None] * 3})
    stream = {"forgetting": stats.Interval(0.5, 0.4, 0.6, 3)}
    kept = {"forgetting": stats.Interval(0.1, -0.1, 0.3, 3)}
    lines = [found.lines[0], replace(found.lines[1], stream=stream, kept=kept), found.lines[2]]
    text = report.table_csv([replace(found, lines=lines)])
    adamw, muon, m3 = csv.DictReader(io.StringIO(text))
    assert float(muon["mean"]) == pytest.approx(0.6)
    assert float(muon["difference"]) == pytest.approx(-0.5)
    assert float(muon["steps to target"]) == 1.0 and muon["missed"] == "0" and m3["missed"] == "3"
    assert [x["verdict"] for x in (adamw, muon, m3)] == ["", "1", "-1"]
    names = ("forgetting", "forgetting low", "forgetting difference high")
    assert [muon[x] for x in names] == ["0.5", "0.4", "0.3"]
    assert adamw["forgetting"] == adamw["difference"] == m3["steps to target"] == ""
    assert (m3["seeds"], m3["diverged"], muon["better"]) == ("0", "3", "lower")
    # Two that were lucky of four are no speed.
    for late, mean in ((2, ""), (1, "0.5")):
        steps = dict(enumerate([0.5] * (4 - late) + [math.inf] * late))
        few = replace(found, lines=[lines[0], replace(lines[1], steps=steps, seconds=steps)])
        _, row = csv.DictReader(io.StringIO(report.table_csv([few])))
        assert (row["steps to target"], row["missed"]) == (mean, f"{late}")


def test_names_in_pictures_differ_where_settings_do() -> None:
    names = [f"m3:momentum=0.95,slow=0.99,period={period}" for period in (8, 64)]
    assert short(names[0]) != short(names[1]) and {len(short(x)) for x in names} == {28}
    assert short("m3:period=8") == "m3:period=8"


def test_names_are_text_in_a_page(mine: str) -> None:
    found = planted(mine, {"adamw": [1.0, 1.1, 1.2], "muon": [0.5, 0.5, 0.5]})
    plan = Plan([("t", mine, {})], ["adamw"], command="run <b>x")
    lines = [replace(found.lines[0], label="<q>l"), found.lines[1]]
    named = replace(found, task="<i>t", metric="<u>m", lines=lines)
    page = report.page(plan, [named], {"-i-t-steps": '<svg id="a"><use href="#a"/></svg>'})
    assert not re.search("<(i>t|u>m|b>x|q>l)", page) and "&lt;i&gt;t" in page
    # Each picture's names are its own.
    (name,) = set(re.findall(r'id="(p[0-9][^"]*)"', page))
    assert f'href="#{name}"' in page
    told = "\n".join(report.conditions(plan, [replace(found, software=["code 12", "code 34"])]))
    assert "THE SOFTWARE DIFFERS" in told and "the code here is another by now" in told
    told = "\n".join(report.conditions(plan, [replace(found, software=[f"code {code()}"])]))
    assert "DIFFER" not in told and "another" not in told
    twice = replace(found, records=["a 1", "a 2"])
    assert any("THE DATA DIFFER" in line for line in report.conditions(plan, [twice]))
    assert not any("THE DATA DIFFER" in line for line in report.conditions(plan, [found]))


def test_higher_may_be_better(mine: str) -> None:
    found = planted(mine, {"adamw": [0.5, 0.51, 0.5], "muon": [0.7, 0.7, 0.72]})
    assert verdict(found, found.lines[1]) == -1
    found.better = "higher"
    assert verdict(found, found.lines[1]) == 1 and verdict(found, found.lines[0]) == 0


WRONG = """
from my_task import make_task
def raises(seed):
    raise FileNotFoundError("/data/mine.csv")
def seedless():
    return make_task(0)
def ends(seed):
    problem = make_task(seed)
    problem.parts[0].batches = iter([next(problem.parts[0].batches)] * 5)
    return problem
def fails(seed):
    problem = make_task(seed)
    problem.loss = lambda model, rows: model.nothing
    return problem
def hopeless(seed):
    problem = make_task(seed)
    loss = problem.loss
    problem.loss = lambda model, rows: loss(model, rows) * float("nan")
    return problem
"""


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        (
            "raises",
            2,
            r"task wrong:raises: FileNotFoundError: /data/mine.csv \(wrong.py:4\)",
        ),
        ("seedless", 2, "error: task wrong:seedless: it takes no seed"),
        ("ends", 1, r"adamw, lr [^:]* more trials: the batches ended: they must be endless"),
        ("fails", 2, r"wrong:fails, adamw: AttributeError: .*'nothing' \(wrong.py:13\)"),
    ],
)
def test_what_a_users_code_does_is_told_with_its_line(
    mine: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    status: int,
    message: str,
) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    sys.modules.pop("wrong", None)
    asked = ["run", f"wrong:{name}", *OPTIONS[:2], *OPTIONS[3:], "--out", str(tmp_path / "out")]
    assert command.main(asked) == status
    assert re.search(message, capsys.readouterr().err)


def test_a_module_that_exits_is_told(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for status, words in (("", "SystemExit"), ("0", "SystemExit: 0")):
        (tmp_path / "my_exit.py").write_text(f"import sys\nsys.exit({status})\n")
        assert command.main(["run", "my_exit:make", "--out", str(tmp_path / "out")]) == 2
        told = f"error: task 'my_exit:make': {words} (my_exit.py:2)\n"
        assert capsys.readouterr().err == told
    assert command.main(["run", mine, "--optimizers", "my_exit.Signs"]) == 2
    assert capsys.readouterr().err == "error: SystemExit: 0 (my_exit.py:2)\n"


def test_a_training_that_exits_ends_its_trial_alone() -> None:
    done = side_by_side(range(3), lambda item, *x: sys.exit(item) if item else 7, 1)
    assert done.results == {0: 7} and [*done.errors] == [1, 2]
    assert done.errors[2].startswith("SystemExit: 2 (test_compare.py:")


def test_a_report_that_fails_hides_no_errors(
    mine: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "conduct", lambda *x: (["adamw, seed 0: it broke"], False))
    monkeypatch.setattr(command, "reported", lambda *x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.main(["run", mine, *OPTIONS, "--out", str(tmp_path / "out")])
    assert "error: adamw, seed 0: it broke" in capsys.readouterr().err


def test_pictures_that_cannot_be_drawn_are_missed_before_training(
    mine: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "examples.compare.report", None)
    monkeypatch.delattr("examples.compare.report")
    out = tmp_path / "out"
    assert command.main(["run", mine, *OPTIONS, "--out", str(out)]) == 2
    assert "pictures need matplotlib" in capsys.readouterr().err and not out.exists()


def test_a_task_that_is_never_finite_is_explained(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    sys.modules.pop("wrong", None)
    asked = ["run", "wrong:hopeless", *OPTIONS[:2], *OPTIONS[3:], "--out", str(tmp_path / "out")]
    assert command.main(asked) == 0
    shown = capsys.readouterr().out
    assert "adamw diverged at every rate that was tried (seed 1000, lr 0.00032: a loss or" in shown
    assert "gradient is not finite at step 1, and 2 more)." in shown and "nan" not in shown


def test_a_profile_counts_from_the_fastest_of_each_seed(mine: str) -> None:
    # adamw needs 2 steps to each of its scores, muon 1 where 4 is enough.
    found = planted(mine, {"adamw": [4.5, 1.0, 2.0], "muon": [3.0, 1.5, 2.0]})
    adamw, muon = found.lines
    adamw.steps |= {0: 1.0}
    muon.steps |= {0: 0.5}
    assert profile([found]) == {"adamw": [1.0, 1.0, 2.0], "muon": [1.0, 1.0, math.inf]}
    alone = planted(mine, {"adamw": [1.0]})
    assert profile([found, alone]) == profile([found])
    names = [*pictures([replace(found, task=f"{i}") for i in range(6)])]
    assert names[:2] == ["differences", "profile"]
    assert "profile" not in pictures([replace(found, task=f"{i}") for i in range(5)])


def test_names_in_pictures_are_no_mathematics(mine: str) -> None:
    found = planted(mine, {"adamw": [4.5, 1.0], "muon": [3.0, 1.5]})
    odd = r"$\frac{$"
    lines = [replace(x, label=f"{odd}{x.label}", tried={1e-3: 2.0, 1e-1: 1.0}) for x in found.lines]
    table = replace(found, task=odd, metric=odd, lines=lines)
    drawn = pictures([table])
    assert len(drawn) == 4
    lines[1].matrix = [[1.0]]
    drawn["matrices"] = matrices(table)
    for figure in drawn.values():
        text = svg(figure)
        assert odd in text and ">$\\mathdefault" not in text  # ticks are


def test_an_edited_task_is_another_task(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper, imports = tmp_path / "my_helper.py", "\nfrom my_helper import SCALE\n"
    helper.write_text("SCALE = 1.0\n")
    (tmp_path / "my_task.py").write_text(TASK + imports)
    monkeypatch.setitem(sys.modules, "my_helper", None)
    del sys.modules["my_helper"]
    plan = Plan([("t", mine, {})], ["adamw"], seeds=1, trials=3)
    before = {t.id() for t in Study(plan).following({})}
    assert before == {t.id() for t in Study(plan).following({})}
    path = tmp_path / "my_task.py"
    path.write_text(path.read_text() + "# edited\n")
    edited = {t.id() for t in Study(plan).following({})}
    assert not before & edited
    helper.write_text("SCALE = 2.0\n")  # what it imports counts too
    assert not edited & {t.id() for t in Study(plan).following({})}
    own = Plan([("t", "cancer", {})], ["adamw"], seeds=1, trials=3)
    assert {t.code for t in Study(own).following({})} == {""}


def test_a_ledger_of_what_was_edited_is_told(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    plan = Plan([("t", mine, {})], ["adamw"], seeds=1, trials=3)
    row = {"validate": 1.0, "curve": [{"validate": 2.0}], "parts": [], "record": {}, "software": {}}
    with Ledger(out / LEDGER) as ledger:
        plan.save(out)
        assert command.main(["report", str(out)]) == 1
        assert capsys.readouterr().err == "nothing to report yet\n"
        for trial in Study(plan).following({}):
            ledger.write(trial.id(), asdict(trial), row)
    assert command.main(["report", str(out)]) == 1  # tuning has begun
    assert capsys.readouterr().err == "nothing to report yet\n"
    (tmp_path / "my_task.py").write_text(TASK + "# edited\n")
    assert command.main(["report", str(out)]) == 1
    shown = capsys.readouterr().err
    assert f"yet: 3 rows of '{out / LEDGER}' are of other tasks or settings, or of files" in shown


def test_a_compiled_module_of_ones_own_is_a_part_of_a_task(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_task.py").write_text(TASK + "\nimport my_compiled\n")
    compiled = tmp_path / "my_compiled.so"
    monkeypatch.setitem(sys.modules, "my_compiled", SimpleNamespace(__file__=str(compiled)))
    found = set()
    for content in (b"\x7fELF\0one", b"\x7fELF\0two"):
        compiled.write_bytes(content)
        found.add(digest(mine, contender("adamw", "torch")))
    assert len(found) == 2


def test_a_task_must_follow_from_its_seed(mine: str) -> None:
    with pytest.raises(ValueError, match="weights and data must follow from the seed"):
        Study(Plan([("t", mine.replace("make_task", "careless"), {})], ["adamw"]))


def test_a_model_may_have_dropout(mine: str) -> None:
    """It is off in scores, on in training, and what was off from the start stays so."""
    assert Study(Plan([("t", mine.replace("make_task", "dropped"), {})], ["adamw"]))
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model[2].eval()
    problem = replace(make_line(0), model=model, loss=lambda m, rows: m(torch.ones(2, 6)).sum())
    training = stepper(problem, Trial("line", {}, "adamw", {}, 0.1, 0))
    for _ in range(2):
        assert not training.model()[1].training
        training.step(None)
        assert [m.training for m in model] == [True, True, False]


def test_batches_are_the_same_whatever_an_optimizer_draws() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            drawn.append(torch.randn(3))
            super().step()

    drawn, seen = [], []
    for kind in (torch.optim.SGD, Noisy):
        torch.manual_seed(3)
        noisy = SimpleNamespace(
            **{"name": "", "kind": "torch", "label": "noisy"},
            make=lambda lr, settings, kind=kind: lambda params: kind(params, lr=lr),
        )
        training = steppers.Torch(make_line(0), noisy, 0.1, {}, None)
        for _ in range(3):
            rows = torch.randn(4, 64), torch.randn(4, 16)
            seen.append(rows[0])
            training.step(rows)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    assert len(drawn) == 3 and not torch.equal(drawn[0], drawn[1])


RULE = """
import deepopt
class Mine(deepopt.Rule):
    lr: deepopt.Rate = 0.02
    half: bool = False
    def update(self, w, g, s, t):
        return (g / 2.0 if self.half else g), {}
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_rule_of_ones_own_takes_part(
    mine: str, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rule.py").write_text(RULE)
    monkeypatch.delitem(sys.modules, "my_rule", raising=False)
    found = contender("my_rule.Mine:half=true", backend, 0.3)
    assert (found.kind, found.lr, found.settings["weight_decay"]) == ("rule", 0.02, 0.3)
    with pytest.raises(ValueError, match="Mine has no setting 'halve': did you mean 'half'"):
        contender("my_rule.Mine:halve=1", backend)
    trial = Trial("line", {}, found.label, found.variants()[0], 0.03, 0, steps=4, points=2)
    scores = run(trial, make_line(0, backend=backend))["curve"]
    assert scores[-1]["validate"] < scores[0]["validate"]
    plan = Plan([("t", "regression", {"backend": backend})], ["my_rule.Mine"])
    (before,) = {t.code for t in Study(plan).following({})}
    (tmp_path / "my_rule.py").write_text(RULE + "# edited")
    (after,) = {t.code for t in Study(plan).following({})}
    assert before != after != ""
    del sys.modules["my_rule"]


def test_files_in_the_folder_of_examples_may_be_a_users() -> None:
    here = Path(contenders.__file__).parents[1]
    assert of_user(str(here / "my_task.py")) and of_user(str(here / "mine" / "task.py"))
    ours = ("compare/study.py", "hope/model.py", "blame.py", "settings.py", "workers.py")
    assert not any(of_user(str(here / name)) for name in ours)
    assert {str(x.relative_to(here)) for x in here.glob("*.py")} == {"__init__.py", *ours[2:]}


def test_the_software_of_a_row_says_whose_it_is() -> None:
    found = software("torch", "optax.adamw")
    assert {*found} == {"python", "numpy", "deepopt", "code", "torch", "optax"}
    assert software("jax", "m3")["jax"] == jax.__version__


def test_one_weight_decay_for_all() -> None:
    found = [contender(x, "torch", 0.3) for x in ("m3", "torch.adamw", "adamw:weight_decay=0.2")]
    assert [x.settings["weight_decay"] for x in found] == [0.3, 0.3, 0.2]
    assert "weight_decay" not in contender("torch.optim.Rprop", "torch", 0.3).settings


def test_drop_in_takes_the_rate_of_the_first(mine: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command.main(["run", mine, *OPTIONS, "--drop-in", "--out", str(out)]) == 0
    (found,) = tables(Study(Plan.load(out)), read(out / LEDGER))
    assert found.lines[0].lr == found.lines[1].lr
    assert [len(line.tried) for line in found.lines] == [3, 0]


def test_choices_are_tuned_within_the_same_number_of_trials(mine: str) -> None:
    plan = Plan([("t", mine, {})], ["adamw", "m3:weight=0|0.1"], seeds=1, trials=5)
    study, rows = Study(plan), {}
    while trials := study.following(rows):
        for trial in trials:
            weight = trial.settings.get("weight", 0)
            score = bowl(trial.lr, 0.01) - 0.01 * weight
            rows[trial.id()] = {"validate": score, "test": score}
    adamw, m3 = study.entries
    assert len(adamw.tuning) == len(m3.tuning) == 5
    assert m3.settings["weight"] == 0.1 and m3.lr == 0.01
    assert {t.seed for t in m3.tuning.values()} == {1000}
    assert [t.seed for t in m3.reported.values()] == [0]


def test_a_rate_may_be_judged_by_several_seeds(mine: str) -> None:
    plan = Plan([("t", mine, {})], ["adamw"], seeds=1, trials=4, tuning_seeds=3)
    study, rows = Study(plan), {}
    assert study.left(rows) == [4 * 3 + 1]
    while trials := study.following(rows):
        for trial in trials:
            # One seed has luck at a bad rate, another diverges at the best one.
            lucky = trial.seed == 1000 and trial.lr == 0.01
            score = -0.5 if lucky else bowl(trial.lr, 0.001)
            bad = trial.seed == 1002 and trial.lr == 0.001
            rows[trial.id()] = {"validate": None if bad else score, "test": score}
    (entry,) = study.entries
    assert {t.seed for t in entry.tuning.values()} == {1000, 1001, 1002}
    assert len(entry.tuning) == 12 and entry.lr not in (0.01, 0.001)


def test_what_a_stream_keeps_is_compared_in_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["run", "orthogonal:parts=2,steps=20", *OPTIONS[:3], "--seeds", "3", "--out", str(out)]
    assert command.main([*asked, "--lr", "adamw=0.01", "muon=0.03"]) == 0
    rows = read(out / LEDGER)
    (found,) = tables(Study(Plan.load(out)), rows)
    adamw, muon = found.lines
    assert found.target is None and adamw.steps == adamw.seconds == {}
    rose: dict[str, list[float]] = {"adamw": [], "muon": []}
    for row in sorted(rows.values(), key=lambda row: row["asked"]["seed"]):
        matrix = row["matrix"]["test"]
        rose[row["asked"]["optimizer"]].append(matrix[1][0] - matrix[0][0])
    apart = [b - a for a, b in zip(rose["adamw"], rose["muon"], strict=True)]
    assert muon.kept["forgetting"].mean == pytest.approx(np.mean(apart))
    assert muon.kept["forgetting"].apart and {*muon.kept} == {
        *("average", "backward_transfer", "forgetting", "learning")
    }
    shown = capsys.readouterr().out.partition("| stream |")[2].splitlines()
    bold = {line.split(" | ")[0]: line.count("**") for line in shown if line.startswith("| ")}
    assert bold["| adamw"] == 0 and bold["| muon"] > 0


def test_streams_are_tuned_on_their_beginning(tmp_path: Path) -> None:
    plan = Plan([("t", "orthogonal", {"parts": 6})], ["adamw"], seeds=1, trials=3)
    study = Study(plan)
    assert {t.parts for t in study.following({})} == {3}
    rows = {t.id(): {"validate": 1.0, "test": 1.0} for t in study.following({})}
    assert [t.parts for t in study.following(rows)] == [None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run", "digit"], "no task is called 'digit': did you mean 'digits'"),
        (["run", "nowhere:make"], "task 'nowhere:make': no module 'nowhere' in "),
        (
            ["run", "digits:width", "10"],
            "task 'digits:width': no module 'digits', and options are NAME=VALUE; digits has ",
        ),
        (["run", "my_task.py:make"], "task 'my_task.py:make': without .py, my_task:make"),
        (["run", "digits", "digits"], "task 'digits' is there twice"),
        (["run", "digits", "--optimizers", "m4"], "no rule is called 'm4'"),
        (["run", "digits", "--optimizers", "m3", "m3"], "--optimizers m3 m3: each once"),
        (
            ["run", "digits", "--optimizers", "adamw", "m3", "M3:momentum=0.9"],
            "--optimizers m3 M3:momentum=0.9: both are m3 with the same settings; each once",
        ),
        (
            ["run", "digits", "--optimizers", "torch.adamw", "torch.optim.AdamW"],
            "--optimizers torch.adamw torch.optim.AdamW: both are torch.optim.AdamW with the same",
        ),
        (["run", "digits", "--seeds", "0"], "--seeds 0: at least 1"),
        (["run", "digits", "--tuning-seeds", "0"], "--tuning-seeds 0: at least 1"),
        (["run", "digits", "--trials", "2"], "--trials 2: at least 3"),
        (["run", "digits", "--lr", "adamw=-1"], "--lr adamw=-1: a learning rate is positive"),
        (["run", "digits", "--lr", "0.1"], "--lr 0.1: NAME=RATE is asked for"),
        (["run", "digits", "--lr", "adam=0.1"], "--lr adam=…: no such row"),
        (["run", "digits", "--rest", "x"], "--rest x: a learning rate is positive"),
        (["run", "digits", "--out", "{file}"], "is a file: give a folder"),
        (
            ["run", "digits", "--optimizers", "m3:weight=0|0.1|0.2", "--trials", "4"],
            "m3:weight=0|0.1|0.2 has 3 choices: --trials 5 at least",
        ),
        (["report", "{file}"], "holds no study: study.json is missing"),
        (["run", "digits", "--reference", "lion"], "--reference lion: one of adamw, muon, m3"),
        (["run", "digits", "--drop-in", "--trials", "1"], "--trials 1: at least 3"),
    ],
)
def test_bad_options_are_explained(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = [x.format(file=tmp_path / "file") for x in options]
    if given[0] == "run" and "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    assert command.main(given) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and shown.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tasks": [["t", "x"]]}', '{"tasks": []}'])
def test_a_broken_plan_is_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.json").write_text(text)
    assert command.main(["report", str(tmp_path)]) == 2
    assert f"error: '{tmp_path / 'study.json'}' is no whole plan" in capsys.readouterr().err


def test_a_study_of_days_asks_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "estimate", lambda *x: 3.2 * 86400)
    out = tmp_path / "out"
    assert command.main(["run", "cancer", "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert "36 trials, about 3.2 days" in shown and "--yes to begin" in shown
    assert not out.exists()


def test_more_jobs_than_cores_are_no_faster(mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    study = Study(Plan([("t", mine, {})], ["adamw"]))
    monkeypatch.setattr(
        "examples.compare.study._timed", lambda *x: (1.0, 0, 0, study.problems["t"])
    )
    whole = estimate(study, {}, 1)
    assert [whole / estimate(study, {}, jobs) for jobs in (2, 4, 400)] == [2, 4, 4]


def test_a_second_study_of_the_same_folder_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "Study", lambda plan: pytest.fail("a model was made"))
    out = tmp_path / "out"
    with Ledger(out / LEDGER):
        assert command.main(["run", "cancer", "--seeds", "1", "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: '{out}' belongs to another process that is running")


def test_the_list_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in TASKS) and "DeltaMomentum" in shown


BROWSER = "chromium --headless --no-sandbox --disable-gpu --enable-logging=stderr".split()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(mine: str, tmp_path: Path, width: int) -> None:
    out = tmp_path / "out"
    assert command.main(["run", mine, *OPTIONS, "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "<script" not in page and not re.search(r'(src|href)="(?!#|data:,)', page)
    look = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth"
    (out / "look.html").write_text(page.replace("</body>", f"{look}</script></body>"))
    done = subprocess.run(
        [*BROWSER, f"--window-size={width},900", "--dump-dom", f"file://{out / 'look.html'}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert title is not None and int(title[1]) <= int(title[2])
    assert done.stdout.count("<svg") == 4
