"""Continual use of Hope: what moves and when, what is measured, how a run is interrupted."""

import errno
import json
import math
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepopt import Rule, rules
from examples.hope import carried, checkpoint, continual, data, report, train
from examples.hope.config import Config, config_from
from examples.hope.continual import Settings
from examples.hope.learner import Learner
from examples.hope.memories import Learning
from examples.hope.model import Hope
from examples.hope.stream import Stream, split

TINY = Config(width=16, layers=2, heads=2, memory_width=6, cms_width=16, chunk=4, slow_chunk=8)
# A segment is no multiple of a chunk, so that states are carried in the middle of one.
SETTINGS = Settings("m3", 2e-2, segment=30, periods=(30, 60, 120), every=300, windows=1)
RUN = replace(TINY, layers=1)
EXACT = {"rtol": 0.0, "atol": 1e-12}  # float64: rounding of a few hundred operations


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An old text, a model trained on it (start.pt), and new texts a and b."""
    path = tmp_path_factory.mktemp("continual")
    (path / "old").write_text("".join(f"line {i}: def f(x): return {i % 7}\n" for i in range(500)))
    settings = train.Settings(model=RUN, steps=20, batch=4, length=16, evaluations=1, windows=1)
    train.train(settings, data.load(path / "old", 16), path)
    (path / "checkpoint.pt").rename(path / "start.pt")
    (path / "a").write_bytes(bytes(range(256)) * 3)
    (path / "b").write_text("wait, what? " * 60)
    return path


def learner(config: Config = TINY, **options: object) -> Learner:
    torch.manual_seed(1)
    model = Hope(config).double()
    options = {"rule": rules.SGD(lr=0.01), "segment": 10, **options}
    return Learner(model, **options)


def text(count: int) -> Tensor:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(2))


def run(folder: Path, out: Path, settings: Settings = SETTINGS, **options: object):
    options = {"old": folder / "old", **options}
    return continual.run(
        settings, [folder / "a", folder / "b"], folder / "start.pt", out, **options
    )


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


# The learner


@pytest.mark.parametrize(
    ("cms", "levels"),
    [("sequential", (0, 1, 2)), ("independent", (0, 2)), ("sequential", (1,)), ("sequential", ())],
)
def test_levels_move_on_their_clocks_by_the_sum_of_their_gradients(cms, levels) -> None:
    """Eq. 71 with f = ∇L, by hand."""
    config = replace(TINY, cms=cms)
    mine = learner(config, periods=(10, 20, 40), levels=levels)
    hand = learner(config, levels=()).model.requires_grad_()
    inside = [ps for _, ps in hand.cms_levels()]
    sums = [[torch.zeros_like(p) for p in ps] for ps in inside]
    tokens, last, state = text(90), torch.tensor([0]), None
    start = {name: p.detach().clone() for name, p in hand.named_parameters()}
    for i in range(10, 91, 10):
        found = mine.learn(tokens[i - 10 : i])
        inputs = torch.cat((last, tokens[i - 10 : i - 1]))[None]
        logits, state = hand.stream(inputs, state)
        loss = F.cross_entropy(logits[0], tokens[i - 10 : i], reduction="sum")
        assert found == pytest.approx(loss.item() / 10 / math.log(2), rel=1e-12)
        gradients = torch.autograd.grad(loss, [p for ps in inside for p in ps])
        it, state, last = iter(gradients), carried.detached(state), tokens[i - 1 : i]
        clocks = zip(range(3), inside, sums, (10, 20, 40), strict=True)
        for level, ps, of_level, period in clocks:
            for p, total in zip(ps, of_level, strict=True):
                total += next(it)
                if i % period == 0 and level in levels:
                    p.data -= 0.01 * total
                if i % period == 0:
                    total.zero_()
        for p, q in zip(mine.model.parameters(), hand.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), **EXACT)
    moved = {id(p) for level in levels for p in inside[level]}
    for name, p in hand.named_parameters():
        assert torch.equal(p, start[name]) == (id(p) not in moved), name


@pytest.mark.parametrize(
    ("cms", "rule"),
    [
        ("sequential", rules.AdamW(lr=0.01)),
        ("nested", rules.AdamW(lr=0.01)),
        ("nested", rules.M3(lr=0.01)),
    ],
)
def test_a_level_moves_at_multiples_of_its_period_only(cms: str, rule: Rule) -> None:
    mine = learner(replace(TINY, cms=cms, layers=1), rule=rule, periods=(20, 40, 80))
    memory = mine.model.continuum()[0]
    for read in range(10, 101, 10):
        before = [[p.detach().clone() for p in ps] for _, ps in mine.model.cms_levels()]
        begun = [start.up.weight.detach().clone() for start in memory.starts]
        mine.learn(text(10))
        for period, ps, old in zip((20, 40, 80), mine.model.cms_levels(), before, strict=True):
            changed = [not torch.equal(p, q) for p, q in zip(ps[1], old, strict=True)]
            assert any(changed) == (read % period == 0)
        # A nested level has begun again with its slower one, and not yet moved.
        for i, start in enumerate(memory.starts):
            period, slower = (20, 40, 80)[i : i + 2]
            again = same(memory.levels[i].state_dict(), start.state_dict())
            assert again == (read % slower < period)
            assert torch.equal(start.up.weight, begun[i]) == (read % slower != 0)


def test_periods_are_those_of_the_model_in_segments() -> None:
    assert learner().periods == (10, 20, 40)
    assert [period for period, _ in learner(periods=(30, 30, 60)).model.cms_levels()] == [3, 3, 6]


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, inner=Learning(momentum=True)),
        replace(TINY, mixer="attention"),
        replace(TINY, mixer="segments"),
        replace(TINY, mixer="delta", cms="nested"),
    ],
)
def test_a_loaded_learner_is_the_saved_one(config: Config, tmp_path: Path) -> None:
    rule = rules.M3(lr=0.01)
    whole = learner(config, rule=rule)
    whole.learn(text(50))
    with (tmp_path / "state").open("wb") as file:
        torch.save(whole.state_dict(), file)
    torch.manual_seed(3)
    other = Learner(Hope(config).double(), rule, segment=10)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert same(other.state_dict(), whole.state_dict())
    assert other.generate(b"", 5) == whole.generate(b"", 5)
    assert [other.learn(text(20)) for _ in range(2)] == [whole.learn(text(20)) for _ in range(2)]
    assert same(other.state_dict(), whole.state_dict())


def test_a_state_keeps_its_types_and_which_tuples_are_one() -> None:
    model = Hope(TINY)
    for length in (8, 9):
        _, state = model.stream(text(length)[None])
        for again in (
            carried.detached(state),
            carried.named(carried.plain(state), model.stream(text(1)[None])[1]),
        ):
            assert type(again[0]) is type(state[0]) and again[0].position == length
            memory = again[0].memory
            assert (memory.now is memory.start) == (length == 8)
            assert same(again, state)
    assert not any(x.requires_grad for x in carried.detached(state)[0].memory.now)
    with pytest.raises(ValueError, match="not that of this model"):
        carried.named(carried.plain(state)[:1], state)


def test_memories_remember_what_was_read() -> None:
    """Frozen: the bits of a text are those of one pass, whatever the pieces."""
    mine = learner(levels=())
    tokens = text(60)
    found = [mine.learn(tokens[:20]), mine.learn(tokens[20:])]
    logits = mine.model(torch.cat((torch.tensor([0]), tokens[:-1]))[None])[0]
    bits = F.cross_entropy(logits, tokens, reduction="none") / math.log(2)
    expected = [bits[:20].mean().item(), bits[20:].mean().item()]
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_learner_goes_on_with_what_it_read() -> None:
    mine = learner()
    mine.learn(bytes(text(50).tolist()))
    before = mine.state_dict()["carried"]
    drawn = mine.generate(b"say: ", 30, seed=4)
    assert len(drawn) == 30 and same(mine.state_dict()["carried"], before)
    assert drawn != mine.generate(b"say: ", 30, seed=5)
    assert drawn == mine.generate(b"say: ", 30, seed=4)


def test_bytes_are_drawn_as_from_the_whole_text() -> None:
    model = Hope(TINY).double()
    model.head.weight.data *= 30  # so that the temperature counts
    generator, found = torch.Generator().manual_seed(7), list(b"begin")
    with torch.no_grad():
        for _ in range(20):
            probabilities = torch.softmax(model(torch.tensor([found]))[0, -1].float() / 0.8, -1)
            found.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    assert train.generate(model, b"begin", 20, 7) == bytes(found[5:])
    with pytest.raises(ValueError, match="at least one byte"):
        train.generate(model, b"", 1, 0)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    mine = learner()
    mine.learn(text(20))
    with torch.no_grad():
        mine.model.head.weight[0, 0] = math.nan
    before = {k: v.clone() for k, v in mine.model.state_dict().items()}
    with pytest.raises(ArithmeticError, match=r"after 20 tokens: try a smaller lr than 0\.01"):
        mine.learn(text(10))
    after = mine.model.state_dict()
    assert mine.read == 20
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment 0: at least 1"),
        ({"periods": (10, 20)}, r"periods \(10, 20\): one for each of the model's 3 levels"),
        ({"periods": (20, 10, 40)}, "the highest frequency first"),
        ({"periods": (10, 15, 40)}, "multiples of a segment of 10"),
        ({"levels": (3,)}, r"levels \(3,\): choose among \(0, 1, 2\)"),
        ({"levels": (0, 0)}, "each once"),
        ({"levels": (0,), "config": replace(TINY, cms="nested")}, "all of them learn, or none"),
        ({"config": replace(TINY, feed_forward="swiglu")}, "a model without continuum memory"),
    ],
)
def test_a_learner_that_cannot_be_is_explained(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        learner(**options)


def test_what_does_not_fit_is_explained() -> None:
    mine = learner()
    with pytest.raises(ValueError, match=r"shape \(15,\): a whole number of segments of 10"):
        mine.learn(text(15))
    with pytest.raises(ValueError, match=r"tokens of torch\.float32: bytes"):
        mine.learn(text(10).float())
    assert mine.read == 0
    other = learner(rule=rules.SGD(lr=0.5), levels=(0,))
    with pytest.raises(ValueError, match=r"levels: saved \(0, 1, 2\), here \(0,\); lr: saved 0.01"):
        other.load_state_dict(mine.state_dict())


def test_a_configuration_comes_back_from_its_values() -> None:
    config = replace(TINY, inner=Learning("linear", momentum=True), periods=(1, 3))
    values = asdict(config)
    assert config_from(values) == config
    assert config_from(json.loads(json.dumps(values))) == config
    assert config_from({"width": 16}) == Config(width=16)
    with pytest.raises(ValueError, match=r"no depth, inner\.speed: written by another version"):
        config_from({"width": 16, "depth": 3, "inner": {"speed": 1}})


# The stream


def test_files_follow_each_other_after_separators(tmp_path: Path) -> None:
    for name, content in (("a", b"abc"), ("b", b"\xff\xfe"), ("empty", b""), ("c", b"defg")):
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in ("a", "b", "empty", "missing", "c")]
    stream = Stream(paths, 100)
    assert stream.skipped == [
        f"{str(tmp_path / 'empty')!r} is skipped: it is empty",
        f"{str(tmp_path / 'missing')!r} is skipped: No such file or directory",
    ]
    assert (stream.tokens, stream.bytes, len(stream.held_out)) == (12, 9, 0)
    pieces = [stream.next(5), stream.next(5), stream.next(5)]
    assert pieces[2] is None and stream.read == 10
    assert bytes(torch.cat(pieces[:2]).tolist()) == b"abc\0\xff\xfe\0def"
    with pytest.raises(ValueError, match=r"no text to learn from.*is empty; .*No such file"):
        Stream(paths[2:4], 100)


@pytest.mark.parametrize("sizes", [(1000,), (105, 0, 5, 300, 590), (20,) * 50])
def test_one_block_in_twenty_is_held_out(sizes: tuple[int, ...]) -> None:
    """Whatever the files: block 10 of 0 to 19, 30 of 20 to 39, and so on."""
    letters = bytes(1 + i % 255 for i in range(sum(sizes)))
    learnt, held, begun = b"", b"", 0
    for size in sizes:
        sides = split(letters[begun : begun + size], begun, 10)
        learnt, held, begun = learnt + sides[0], held + sides[1], begun + size
    expected = [i for i in range(len(letters)) if i // 10 % 20 == 10]
    assert held.replace(b"\0", b"") == bytes(letters[i] for i in expected)
    others = sorted({*range(len(letters))} - {*expected})
    assert learnt.replace(b"\0", b"") == bytes(letters[i] for i in others)
    assert b"\0\0" not in learnt + b"x" + held
    if sizes == (1000,):
        assert [len(x) for x in learnt.split(b"\0")] == [100, 190, 190, 190, 190, 90, 0]


def test_a_stream_continues_only_in_the_text_it_read(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(path.name.encode() * 30)
    whole, stream = Stream(paths, 10), Stream(paths, 10)
    whole.next(25)
    stream.next(40)
    state = stream.state_dict()
    paths[1].write_bytes(b"b" * 9 + b"c" * 21)  # what was not read yet
    again = Stream(paths, 10)
    again.load_state_dict(state)
    assert bytes(again.next(20).tolist()) == b"c" * 20
    paths[0].write_bytes(b"a" * 31)
    paths[1].write_bytes(b"bbbc" + b"b" * 26)
    with pytest.raises(
        ValueError, match=r"file 1 \(.*a\), read to its end.*; file 2 \(.*b\).* 9 tok"
    ):
        Stream(paths, 10).load_state_dict(state)
    with pytest.raises(ValueError, match="2 files were read, 1 are given"):
        Stream([tmp_path / "a"], 10).load_state_dict(state)
    with pytest.raises(ValueError, match="b' changed while the files before it were read"):
        whole.next(25)
    assert whole.read == 25


# Runs


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The folder of a run that was not interrupted."""
    run(folder, folder / "whole")
    return folder / "whole"


def test_what_is_measured_is_what_the_model_does(folder, whole, tmp_path, capsys) -> None:
    saved = checkpoint.read(whole / "checkpoint.pt")
    found = run(folder, whole, resume=True)  # is done: shown again
    assert found.state_dict() == saved["measured"]
    assert same(checkpoint.read(whole / "checkpoint.pt"), saved)
    texts = {
        "old": data.load(folder / "old", 16).valid,
        "new": Stream([folder / "a", folder / "b"], 64).held_out,
    }
    assert len(texts["new"]) == 65  # one block of 64 bytes, and its separator
    start = checkpoint.read(folder / "start.pt")["model"]
    for row, weights in ((found.rows[0], start), (found.rows[-1], saved["learner"]["model"])):
        model = Hope(RUN)
        model.load_state_dict(weights)
        for name, held_out in texts.items():
            direct = train.evaluate(model, data.windows(held_out, 8, 16, 1))
            assert row[name] == pytest.approx(direct, rel=1e-6)
    assert [row["tokens"] for row in found.rows] == [0, 300, 600, 900, 1200, 1410]
    read = [row["read"] for row in report.read(whole / "log.jsonl") if "read" in row]
    assert len(read) == 47 and found.bits == pytest.approx(30 * sum(read))
    shown = capsys.readouterr().out
    for name in ("old", "new"):
        first, last = found.rows[0][name], found.rows[-1][name]
        assert first != last
        assert f"{first:6.3f}  {last:6.3f}  {last - first:+6.3f}" in shown
    assert "the last 17 tokens, fewer than a segment, were not read" in shown
    assert (whole / "loss.png").stat().st_size > 10_000


def test_a_frozen_run_learns_nothing(folder: Path, whole: Path, tmp_path: Path) -> None:
    found = run(folder, tmp_path, replace(SETTINGS, levels=(), every=10_000))
    saved = checkpoint.read(tmp_path / "checkpoint.pt")["learner"]
    assert same(saved["model"], checkpoint.read(folder / "start.pt")["model"])
    assert saved["optimizer"] is None
    assert [row["old"] for row in found.rows] == [found.rows[0]["old"]] * 2
    # What learns knows the text better in the end.
    rows = [report.read(x / "log.jsonl") for x in (whole, tmp_path)]
    learnt, frozen = ([row["read"] for row in of if "read" in row][-10:] for of in rows)
    assert sum(learnt) < sum(frozen) - 10 * 0.1


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C while `step` is being taken."""
    original = report.Progress.update

    def update(self: report.Progress, done: int, loss: float | None = None) -> None:
        original(self, done, loss)
        if done == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(report.Progress, "update", update)


def test_a_resumed_run_is_the_uninterrupted_one(folder, whole, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(17, patch)
        assert run(folder, tmp_path) is None
    assert checkpoint.read(tmp_path / "checkpoint.pt")["step"] == 17
    run(folder, tmp_path, resume=True)
    assert same(*(checkpoint.read(x / "checkpoint.pt") for x in (whole, tmp_path)))
    assert report.read(whole / "log.jsonl") == report.read(tmp_path / "log.jsonl")
    assert not list(tmp_path.rglob("*.part"))


@pytest.fixture(scope="module")
def short(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A finished run of 11 segments: its command line and folder."""
    (folder / "short").write_bytes(b"short text " * 30)
    out = tmp_path_factory.mktemp("short")
    start, old = str(folder / "start.pt"), str(folder / "old")
    command = [str(folder / "short"), "--checkpoint", start, "--old", old, "--out", str(out)]
    command += ["--segment", "30", "--windows", "1", "--optimizer", "adamw"]
    assert continual.main(command) == 0
    return command, out


def test_all_differences_are_listed(short, capsys) -> None:
    command, _ = short
    text = Path(command[0])
    before = text.read_bytes()
    text.write_bytes(before.replace(b"short", b"SHORT"))
    try:
        changed = [*command, "--lr", "0.5", "--levels", "0", "--every", "7", "--resume"]
        assert continual.main(changed) == 2
    finally:
        text.write_bytes(before)
    shown = capsys.readouterr().err
    for difference in (
        "lr: checkpoint 0.001, this run 0.5",
        "levels: checkpoint None, this run (0,)",
        "every: checkpoint 65536, this run 7",
        f"file 1 ({text}) has changed in its first 330 tokens, which were read",
    ):
        assert difference in shown
    assert "segment:" not in shown and "model." not in shown


def test_another_model_is_refused(short, folder, tmp_path, capsys) -> None:
    command, _ = short
    saved = checkpoint.read(folder / "start.pt")
    saved["identity"]["model"]["forget"] = 0.2
    torch.save(saved, tmp_path / "other.pt")
    other = [*command, "--resume"]
    other[2] = str(tmp_path / "other.pt")
    assert continual.main(other) == 2
    shown = capsys.readouterr().err
    assert "model.forget: checkpoint 0.1, this run 0.2" in shown
    assert "checkpoint: checkpoint " in shown


def test_a_run_is_not_overwritten(short, folder, tmp_path, capsys) -> None:
    command, out = short
    before = (out / "checkpoint.pt").read_bytes()
    own = [*command, "--restart"]
    own[2] = str(out / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").write_bytes((folder / "start.pt").read_bytes())
    trained = [*command, "--restart", "--out", str(tmp_path)]
    for wrong, message in (
        (command, "holds a run: add --resume to go on, --restart to begin again"),
        (own, "would be overwritten: give another --out"),
        (trained, "would be overwritten: give another --out"),
        ([*trained, "--resume"], "is no checkpoint of examples.hope.continual"),
        ([*command, "--resume", "--out", str(tmp_path / "no")], "nothing to resume"),
    ):
        assert continual.main(wrong) == 2
        assert message in capsys.readouterr().err
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_run_goes_on_from_another(short, tmp_path, capsys) -> None:
    command, out = short
    after = [*command, "--out", str(tmp_path / "next")]
    after[2] = str(out / "checkpoint.pt")
    assert continual.main(after) == 0
    assert "only its weights" not in capsys.readouterr().out
    first, then = (checkpoint.read(x / "checkpoint.pt") for x in (out, tmp_path / "next"))
    assert (first["learner"]["read"], then["learner"]["read"]) == (330, 660)
    assert then["measured"]["rows"][0]["old"] == first["measured"]["rows"][-1]["old"]
    assert continual.main([*after, "--restart", "--lr", "0.1"]) == 0
    assert "only its weights are taken" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "next" / "checkpoint.pt")["learner"]["read"] == 330


def test_a_full_disk_leaves_the_checkpoint_before(short, tmp_path, monkeypatch, capsys) -> None:
    command, _ = short
    command = [*command, "--out", str(tmp_path), "--every", "90"]
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        assert continual.main(command) == 130
    assert f"examples.hope.continual {' '.join(command)} --resume" in capsys.readouterr().err
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("os.fsync", full)
        assert continual.main([*command, "--resume"]) == 2
    shown = capsys.readouterr().err
    assert "No space left on device; the checkpoint saved before it stays" in shown
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))
    assert continual.main([*command, "--resume"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "-1"], "lr -1.0: a learning rate is positive"),
        (["--every", "0"], "every 0: at least 1"),
        (["--threads", "0"], "--threads 0: at least 1"),
        (["--segment", "1000"], "330 bytes to learn from, fewer than a segment of 1000"),
        (["--periods-tokens", "30", "60"], "one for each of the model's 3 levels"),
        (["--checkpoint", "no.pt"], "No such file or directory: 'no.pt'"),
    ],
)
def test_bad_options_are_explained(options, message, short, tmp_path, capsys) -> None:
    command, _ = short
    assert continual.main([*command, "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_checkpoint_are_refused(short, tmp_path, capsys) -> None:
    command, _ = short
    (tmp_path / "damaged.pt").write_bytes(b"PK damaged")
    torch.save({"identity": {"model": "hope"}}, tmp_path / "other.pt")
    for name, message in (("damaged", "cannot be read"), ("other", "holds no model of examples")):
        wrong = [*command, "--checkpoint", str(tmp_path / f"{name}.pt")]
        assert continual.main([*wrong, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
