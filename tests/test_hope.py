"""The Hope example: memories against plain recurrences, training that can be interrupted."""

import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepopt import Oracle, rules
from deepopt.memory import Linear, dot, l2, read_along, write
from examples.hope import data, report, train
from examples.hope.config import Config
from examples.hope.inner import Gates, InnerRule, unit
from examples.hope.mixers import SelfModifyingTitans
from examples.hope.model import Hope
from torch_backend import Optimizer
from torch_backend.algebra import lift

TINY = Config(width=16, layers=1, heads=2, memory_width=6, cms_width=16, chunk=4, slow_chunk=8)
SETTINGS = train.Settings(model=TINY, steps=6, batch=2, length=16, evaluations=2, windows=2)
EXACT = {"rtol": 0.0, "atol": 1e-12}  # float64: rounding of a few hundred operations


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> data.Corpus:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: def f(x): return x * {i % 7}\n" for i in range(2000)))
    return data.load(path, SETTINGS.length)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(256, (batch, length))


# The model as a whole


@pytest.mark.parametrize("variant", train.VARIANTS)
def test_an_untrained_model_is_as_good_as_guessing(variant: str) -> None:
    model = Hope(replace(train.MODEL, **train.VARIANTS[variant]))
    loss = train.cost(model, tokens(4, 65)).item()
    assert abs(loss - math.log(256)) < 0.2


def test_every_initial_memory_gets_an_outer_gradient() -> None:
    model = Hope(TINY)
    train.cost(model, tokens(2, 17)).backward()
    mixer = model.blocks[0].mixer
    for parameter in mixer.initial:
        norms = parameter.grad.norm(dim=(-2, -1))
        assert norms.shape == (2 * 5,)  # heads, memories
        assert norms.min() > 1e-8
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


def test_rates_and_retentions_keep_their_ranges() -> None:
    mixer = SelfModifyingTitans(TINY)
    _, generators = mixer.begin(1)
    for size in (1.0, 1e4):
        for parameter in (mixer.rate, mixer.retention):
            parameter.data.normal_().mul_(size)
        rows = unit(torch.randn(4, 1, 2, 50, 8))
        *rows, (retention, rate, _) = mixer.generate(generators, rows)
        for found in rows:
            torch.testing.assert_close(found.norm(dim=-1), torch.ones(1, 2, 50))
        assert ((rate >= 0) & (rate <= 1)).all()
        assert ((retention >= 0.9 - 1e-6) & (retention <= 1)).all()
        assert rate.amax() > rate.amin() and retention.amax() > retention.amin()


@pytest.mark.parametrize("scale", [1e-3, 1e2])
def test_no_memory_makes_the_outputs_infinite(scale: float) -> None:
    mixer = SelfModifyingTitans(replace(TINY, chunk=8))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.mul_(scale)
    norms: list[Tensor] = []
    answers, _ = mixer(torch.randn(2, 128, 16).requires_grad_(), report=norms)
    answers.square().mean().backward()
    assert answers.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    assert len(norms) == 128 // 8 + 128 // 8 - 1
    assert all(norm > 0 for norm in norms)


# The memories against recurrences written out here


def test_a_chunk_is_the_unrolled_product() -> None:
    """Oracle 39: M_end = M ΠA_t − Σ η_t G_t Π_{s>t} A_s, per layer, in the columns of the paper."""
    n, d, hidden = 5, 4, 3
    f64 = {"dtype": torch.float64}
    first, second = torch.randn(d, hidden, **f64), torch.randn(hidden, d, **f64)
    keys, values = unit(torch.randn(n, d, **f64)), torch.randn(n, d, **f64)
    alpha, eta = 0.9 + 0.1 * torch.rand(n, 1, **f64), torch.rand(n, 1, **f64)
    memories = InnerRule().begin((first, second))
    written, answers = InnerRule().write(memories, keys, values, Gates(alpha, eta), keys)

    z = torch.tanh(keys @ first)
    error = keys + z @ second - values
    inner = (error @ second.T) * (1 - z * z)
    for weight, x, slope, result in zip(
        (first, second), (keys, z), (inner, error), written.now, strict=True
    ):
        exact = eta / (1 + eta * (x * x).sum(1, keepdim=True))
        eye = torch.eye(x.shape[1], **f64)
        erase = [alpha[t] * eye - exact[t] * torch.outer(x[t], x[t]) for t in range(n)]
        expected = weight.T
        for a in erase:
            expected = expected @ a
        for t in range(n):
            tail = exact[t] * torch.outer(slope[t], x[t])
            for a in erase[t + 1 :]:
                tail = tail @ a
            expected = expected - tail
        torch.testing.assert_close(result.T, expected, **EXACT)
    torch.testing.assert_close(answers[0], (keys + z @ second)[0], **EXACT)


def test_a_query_sees_writes_before_it_and_none_after() -> None:
    """Oracle 40 with chunks of 4: the pair at position 7 changes the answers from position 8 on."""
    f64 = {"dtype": torch.float64}
    start = InnerRule().begin((torch.randn(4, 6, **f64), torch.randn(6, 4, **f64)))
    keys, queries = unit(torch.randn(2, 12, 4, **f64))
    values = unit(torch.randn(12, 4, **f64))
    rates = torch.full((4, 1), 0.95, **f64), torch.full((4, 1), 0.5, **f64)

    def answers(keys: Tensor) -> Tensor:
        state, found = start, []
        for i in range(0, 12, 4):
            now = slice(i, i + 4)
            pairs = keys[now], values[now]
            state, answer = InnerRule().write(state, *pairs, Gates(*rates), queries[now])
            state = state.next_chunk()
            found.append(answer)
        return torch.cat(found)

    for position in (5, 7):
        changed = keys.clone()
        changed[position] = -keys[position]
        difference = (answers(changed) - answers(keys)).abs().amax(1)
        assert difference[: position + 1].max() < 1e-12
        assert difference[position + 1] > 1e-3


# A linear memory: paper §8, one token at a time


def _linear(weight, key, value, retention, rate, *, objective):
    stated = {"dot": dot, "l2": l2}[objective](Linear(weight), value, key)
    new = write(stated, retention=retention, rate=rate, solver="sequential", delta=True)
    return new.weight


linear = lift(_linear)


def one(value: float) -> Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


@pytest.mark.parametrize(("objective", "erased"), [("dot", 1.0), ("l2", 2.0)])
def test_one_write_of_a_linear_memory(objective: str, erased: float) -> None:
    """Oracle 37: the l2 objective erases twice, the dot objective once."""
    f64 = {"dtype": torch.float64}
    m, k, v = torch.randn(4, 3, **f64), torch.randn(1, 4, **f64), torch.randn(1, 3, **f64)
    new = linear(m, k, v, one(0.95), one(0.3), objective=objective)
    expected = m.T @ (0.95 * torch.eye(4, **f64) - erased * 0.3 * k.T @ k) + 0.3 * v.T @ k
    torch.testing.assert_close(new.T, expected, **EXACT)


@pytest.mark.parametrize(
    ("objective", "retention", "held"),
    [("dot", 1.0, 1.0), ("l2", 1.0, 0.5), ("dot", 0.9, 0.3 / (1 - 0.9 + 0.3))],
)
def test_a_repeated_pair(objective: str, retention: float, held: float) -> None:
    """Oracle 38: what the memory answers after many writes of one pair, in units of the value."""
    m = torch.randn(4, 3, dtype=torch.float64)
    k, v = unit(torch.randn(1, 4).double()), torch.randn(1, 3, dtype=torch.float64)
    for _ in range(200):
        m = linear(m, k, v, one(retention), one(0.3), objective=objective)
    torch.testing.assert_close(k @ m, held * v, **EXACT)


def test_orthonormal_pairs_are_recalled() -> None:
    """Oracle 38: η = α = 1 writes each pair in one shot, in one chunk of all of them."""
    keys, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    values = torch.randn(6, 3, dtype=torch.float64)
    ones = torch.ones(6, 1, dtype=torch.float64)
    m = torch.randn(6, 3, dtype=torch.float64)
    new = linear(m, keys, values, ones, ones, objective="dot")
    torch.testing.assert_close(keys @ new, values, **EXACT)


@pytest.mark.parametrize("eta", [0.1, 0.9, 1.8])
def test_a_write_without_value_shrinks_by_its_norm(eta: float) -> None:
    """Oracle 39: ‖αI − ηkkᵀ‖₂ = max(α, |α − η|) for unit k."""
    eye = torch.eye(4, dtype=torch.float64)
    k = unit(torch.randn(1, 4).double())
    erase = linear(eye, k, torch.zeros_like(k), one(0.9), one(eta), objective="dot")
    expected = torch.tensor(max(0.9, abs(0.9 - eta)), dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.matrix_norm(erase, 2), expected, **EXACT)


def test_reading_along_a_linear_memory() -> None:
    def along(weight, keys, values, queries, rate):
        return read_along(dot(Linear(weight), values, keys), queries, rate=rate, delta=True)

    f64 = {"dtype": torch.float64}
    m, keys, queries = torch.randn(4, 3, **f64), *unit(torch.randn(2, 5, 4, **f64))
    values, rate = torch.randn(5, 3, **f64), torch.rand(5, 1, **f64)
    answers = lift(along)(m, keys, values, queries, rate)
    for t in range(5):
        torch.testing.assert_close(answers[t], queries[t] @ m, **EXACT)
        k = keys[t : t + 1]
        m = linear(m, k, values[t : t + 1], one(1.0), rate[t : t + 1], objective="dot")


# The continuum memory system


def test_levels_receive_the_sums_of_their_own_chunks() -> None:
    """Oracle 30: a level of period C moves at steps C, 2C, … by the sum of its last C gradients."""
    lr, periods = 0.1, (1, 2, 4, 8)
    model = Hope(replace(TINY, periods=periods)).double()
    levels = model.cms_levels()
    assert [period for period, _ in levels] == list(periods)
    inside = [p for _, parameters in levels for p in parameters]
    assert len({id(p) for p in inside}) == len(inside) == 4 * 3
    optimizer = Optimizer(
        [{"params": ps, "rule": rules.SGD(lr=lr), "every": period} for period, ps in levels]
    )
    oracles = [
        Oracle(rules.SGD(lr=lr, every=period), list(map(numpy, ps))) for period, ps in levels
    ]
    held = [list(map(numpy, ps)) for _, ps in levels]
    start = [[p.detach().clone() for p in ps] for _, ps in levels]
    sums = [[torch.zeros_like(p) for p in ps] for _, ps in levels]
    for step in range(1, 17):
        optimizer.zero_grad()
        train.cost(model, tokens(2, 9)).backward()
        for i, (_, parameters) in enumerate(levels):
            gradients = [numpy(p.grad) for p in parameters]
            held[i] = oracles[i].step(held[i], gradients)
            for total, p in zip(sums[i], parameters, strict=True):
                total += p.grad
        optimizer.step()
        for i, (period, parameters) in enumerate(levels):
            for p, w, w0, total in zip(parameters, held[i], start[i], sums[i], strict=True):
                torch.testing.assert_close(p.detach(), torch.from_numpy(w), **EXACT)
                if step % period == 0:
                    w0 -= lr * total
                    total.zero_()
                torch.testing.assert_close(p.detach(), w0, **EXACT)


def test_training_steps_every_level_by_its_own_clock() -> None:
    model = Hope(replace(TINY, periods=(1, 2, 4)))
    optimizer = train.make_optimizer(model, "m3", 0.01)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [*model.parameters()]
    )
    for step in range(1, 9):
        before = [[p.detach().clone() for p in ps] for _, ps in model.cms_levels()]
        train.cost(model, tokens(2, 9)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for (period, parameters), old in zip(model.cms_levels(), before, strict=True):
            same = [torch.equal(p, q) for p, q in zip(parameters, old, strict=True)]
            assert not any(same) if step % period == 0 else all(same)


def numpy(x: Tensor):
    return x.detach().numpy().copy()


# Training


def losses(out: Path) -> list[dict[str, float]]:
    return report.read(out / "log.jsonl")


def test_a_short_run_learns(corpus: data.Corpus, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=30, batch=8)
    train.train(settings, corpus, tmp_path)
    rows = [row["train"] for row in losses(tmp_path) if "train" in row]
    assert len(rows) == 30
    assert rows[0] == pytest.approx(8.0, abs=0.3)
    assert sum(rows[-3:]) / 3 < rows[0] - 0.8


def test_nested_levels_begin_again_during_training(corpus: data.Corpus, tmp_path: Path) -> None:
    """At step 2 the first level begins again from a start that has learnt, the second does not."""
    settings = replace(SETTINGS, model=replace(TINY, cms="nested", periods=(1, 2, 4)), steps=2)
    train.train(settings, corpus, tmp_path)
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    torch.manual_seed(settings.seed)
    before = Hope(settings.model).state_dict()
    weight = "blocks.0.feed_forward.{}.up.weight"
    level, start = (trained[weight.format(x)] for x in ("levels.0", "starts.0"))
    assert torch.equal(level, start)
    assert not torch.equal(start, before[weight.format("starts.0")])
    second, of_third = (trained[weight.format(x)] for x in ("levels.1", "starts.1"))
    assert not torch.equal(second, of_third)
    assert torch.equal(of_third, before[weight.format("starts.1")])


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C while `step` is being taken."""
    original = report.Progress.update

    def update(self: report.Progress, done: int, loss: float | None = None) -> None:
        original(self, done, loss)
        if done == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(report.Progress, "update", update)


@pytest.mark.parametrize("optimizer", sorted(train.LEARNING_RATES))
def test_a_resumed_run_is_the_uninterrupted_one(
    corpus: data.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, steps=8)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train.train(settings, corpus, whole)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert train.train(settings, corpus, parts) is None
    assert len([row for row in losses(parts) if "train" in row]) == 3
    assert train.train(settings, corpus, parts, resume=True) == result

    a, b = (torch.load(x / "checkpoint.pt", weights_only=True) for x in (whole, parts))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[k], b["optimizer"]["state"][i][k]) for k in state)
    assert (a["step"], a["scheduler"]) == (b["step"], b["scheduler"])
    assert losses(whole) == losses(parts)
    assert not list(tmp_path.rglob("*.part"))


def test_a_checkpoint_of_another_run_is_refused(corpus: data.Corpus, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=1)
    train.train(settings, corpus, tmp_path)
    with pytest.raises(ValueError, match=r"lr: checkpoint 0\.02, this run 0\.5"):
        train.train(replace(settings, lr=0.5), corpus, tmp_path, resume=True)
    with pytest.raises(ValueError, match="chunk: checkpoint 4, this run 2"):
        other = replace(settings, model=replace(TINY, chunk=2))
        train.train(other, corpus, tmp_path, resume=True)
    with pytest.raises(ValueError, match="corpus: checkpoint"):
        train.train(settings, replace(corpus, sha256="0" * 64), tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train.train(settings, corpus, tmp_path / "elsewhere", resume=True)


def test_a_diverged_run_stops_and_says_so(corpus: data.Corpus, tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError, match=r"the loss is nan at step \d+: try a smaller --lr"):
        train.train(replace(SETTINGS, lr=1e38), corpus, tmp_path)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    command = ["--quick", "--steps", "2", "--data", str(text), "--out", str(tmp_path / "out")]
    assert train.main(command) == 0
    shown = capsys.readouterr().out
    assert "Witten-Bell n-gram, order 2" in shown
    for name in ("loss.png", "log.jsonl", "checkpoint.pt"):
        path = tmp_path / "out" / name
        assert str(path) in shown
        assert path.stat().st_size > 0
    first = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert first["corpus"] == "text.txt"


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    command = ["--quick", "--steps", "3", "--data", str(text), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert train.main(command) == 130
    again = f"{sys.executable} -m examples.hope.train {' '.join(command)} --resume"
    assert again in capsys.readouterr().err
    saved = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    assert train.main(command) == 2
    assert "holds a run stopped at step 1 of 3: add --resume" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == saved
    assert train.main([*command, "--resume"]) == 0
    assert train.main(command) == 0
    (tmp_path / "out" / "checkpoint.pt").write_bytes(saved[:1000])
    assert train.main([*command, "--resume"]) == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "no/such/file"], "no such file or folder: 'no/such/file'"),
        (["--data", "{empty}"], "holds no text"),
        (["--data", "{short}"], "is too small"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--threads", "0"], "--threads 0: at least 1"),
        (["--lr", "-1"], "--lr -1.0: a learning rate is positive"),
    ],
)
def test_bad_options_are_explained(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("few")
    paths = {name: str(tmp_path / name) for name in ("empty", "short")}
    assert train.main(["--quick", *(x.format(**paths) for x in options)]) == 2
    assert message in capsys.readouterr().err
