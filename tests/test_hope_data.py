"""Corpus, n-gram baseline and report of the Hope example."""

import io
import json
import math
import struct
import sys
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.hope import data, ngram, report


@pytest.fixture(scope="module")
def library() -> data.Corpus:
    return data.load(length=256)


def folder(root: Path, files: int, text: str = "line {} of a file\n") -> Path:
    for i in range(files):
        path = root / "sub" / f"{i:03}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(i), encoding="utf-8")
    return root


def texts(part: torch.Tensor) -> list[bytes]:
    return bytes(part.tolist()).split(bytes([data.SEPARATOR]))


def test_held_out_names_are_a_matter_of_the_name_alone():
    names = [f"package/module_{i}.py" for i in range(2000)]
    held = [name for name in names if data.held_out(name)]
    assert 0.04 < len(held) / len(names) < 0.06
    assert held[:3] == [f"package/module_{i}.py" for i in (2, 23, 43)]


def test_the_library_is_split_by_file(library):
    train, valid = texts(library.train), texts(library.valid)
    assert library.size == library.train.numel() + library.valid.numel() > 5_000_000
    assert 0.02 < library.valid.numel() / library.size < 0.09
    assert len(train) + len(valid) > 300
    assert not set(train) & set(valid)
    assert library.train.dtype == library.valid.dtype == torch.uint8
    record = library.record()
    assert record["python"] in str(record["corpus"]) and len(str(record["sha256"])) == 64
    assert json.loads(json.dumps(record))["bytes"] == library.size


def test_the_library_holds_sources_and_no_tests_or_tables():
    names = [name for name, _ in data._standard_library()]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "lib2to3"}
    assert not any(name.startswith(("_sysconfigdata", "config-")) for name in names)


def test_every_file_lands_whole_on_the_side_its_name_says(tmp_path):
    corpus = data.load(folder(tmp_path, 120))
    sides = {True: texts(corpus.valid), False: texts(corpus.train)}
    for side, documents in sides.items():
        here = [i for i in range(120) if data.held_out(f"sub/{i:03}.txt") == side]
        assert here and documents == [f"line {i} of a file\n".encode() for i in here]
    assert corpus.size == sum(len(f"line {i} of a file\n") for i in range(120)) + 118


def test_the_digest_follows_the_bytes_not_the_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = data.load(folder(tmp_path / "a", 60)), data.load(folder(tmp_path / "b", 60))
    assert first.sha256 == second.sha256 and torch.equal(first.valid, second.valid)
    (tmp_path / "b" / "sub" / "007.txt").write_text("another line\n", encoding="utf-8")
    assert data.load(tmp_path / "b").sha256 != first.sha256


def test_hidden_binary_and_empty_files_are_no_documents(tmp_path):
    before = data.load(folder(tmp_path, 40)).sha256
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref\n", encoding="utf-8")
    (tmp_path / ".hidden").write_text("hidden\n", encoding="utf-8")
    (tmp_path / "image.bin").write_bytes(b"ab\0cd")
    (tmp_path / "empty.txt").touch()
    assert data.load(tmp_path).sha256 == before
    (tmp_path / "seen.txt").write_text("seen\n", encoding="utf-8")
    assert data.load(tmp_path).sha256 != before


def test_one_file_is_cut_into_blocks_at_line_ends(tmp_path):
    lines = [f"{i:06} {'word ' * (i % 17)}\n".encode() for i in range(20_000)] + [b"end"]
    path = tmp_path / "book.txt"
    path.write_bytes(b"".join(lines))
    corpus = data.load(path)
    train, valid = texts(corpus.train), texts(corpus.valid)
    assert corpus.description == "book.txt"
    assert 0.01 < corpus.valid.numel() / corpus.size < 0.12
    blocks = sorted(train + valid)
    assert b"".join(blocks) == path.read_bytes() and len(blocks) > 200
    assert all(block.endswith(b"\n") and len(block) <= data.BLOCK for block in blocks[:-1])
    assert blocks[-1].endswith(b"\nend")
    for index, block in enumerate(blocks):
        assert (block in valid) == data.held_out(f"book.txt#{index}")


def test_a_text_without_line_ends_is_cut_too(tmp_path):
    path = tmp_path / "row.txt"
    path.write_bytes(b"x" * 10_000)
    corpus = data.load(path)
    sizes = [len(block) for block in texts(corpus.train) + texts(corpus.valid)]
    assert sorted(sizes) == [10_000 - 9 * 1024] + 9 * [1024]
    assert not any(map(data.held_out, (f"row.txt#{i}" for i in range(10))))
    assert len(texts(corpus.valid)) == 1  # where no name is held out, the nearest to it is


@pytest.mark.parametrize(
    ("content", "length", "error", "message"),
    [
        (None, 1, FileNotFoundError, r"no such file or folder: '.*given\.txt'"),
        (b"", 1, ValueError, r"given\.txt' holds no text"),
        (b"a\0b", 1, ValueError, r"given\.txt' holds no text: .* NUL bytes"),
        (b"short\n", 1, ValueError, r"given\.txt' is too small: its training part has 0 "),
        (b"1234567\n" * 900, 2000, ValueError, r"given\.txt' .* validation .* length of 2000 "),
    ],
)
def test_errors_quote_the_path(tmp_path, content, length, error, message):
    path = tmp_path / "given.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        data.load(path, length)


def test_batches_are_crops_and_depend_on_the_seed_alone():
    text = torch.arange(200, dtype=torch.uint8)
    torch.manual_seed(1)
    first = next(data.batches(text, 64, 10, seed=3))
    torch.manual_seed(2)
    assert torch.equal(first, next(data.batches(text, 64, 10, seed=3)))
    assert not torch.equal(first, next(data.batches(text, 64, 10, seed=4)))
    assert first.shape == (64, 11) and first.dtype == torch.int64
    assert torch.equal(first - first[:, :1], torch.arange(11).expand(64, 11))


def test_batches_reach_both_ends():
    crops = next(data.batches(torch.arange(6, dtype=torch.uint8), 500, 3, seed=0))
    assert set(crops[:, 0].tolist()) == {0, 1, 2}


def test_batches_resume_bit_for_bit():
    text = torch.randint(256, (5000,), dtype=torch.uint8)
    source = data.batches(text, 8, 32, seed=0)
    for _ in range(5):
        next(source)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    expected = [next(source) for _ in range(4)]
    buffer.seek(0)
    resumed = data.batches(text, 8, 32, seed=99)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(torch.equal(next(resumed), batch) for batch in expected)


@pytest.mark.parametrize(
    ("key", "was", "now"), [("batch", 4, 5), ("length", 8, 9), ("bytes", 99, 90)]
)
def test_batches_refuse_the_state_of_another_run(key, was, now):
    def source(bytes: int = 99, batch: int = 4, length: int = 8) -> data.Batches:
        return data.batches(torch.zeros(bytes, dtype=torch.uint8), batch, length, seed=0)

    message = f"written with {key} = {was}, this run has {key} = {now}"
    with pytest.raises(ValueError, match=message):
        source(**{key: now}).load_state_dict(source().state_dict())


def test_windows_are_evenly_spaced_from_end_to_end():
    text = torch.arange(256, dtype=torch.uint8)
    rows = data.windows(text, batch=4, length=5, count=3)
    assert rows.shape == (3, 4, 6) and rows.dtype == torch.int64
    starts = sorted(rows[..., 0].flatten().tolist())
    assert starts[0] == 0 and starts[-1] == 250
    assert {b - a for a, b in pairwise(starts)} == {22, 23}
    assert torch.equal(rows - rows[..., :1], torch.arange(6).expand(3, 4, 6))
    assert all(batch[0, 0] < 64 and batch[-1, 0] > 192 for batch in rows)


def test_sizes_that_do_not_fit_are_named():
    text = torch.zeros(20, dtype=torch.uint8)
    for make in (lambda n: data.batches(text, 2, n, 0), lambda n: data.windows(text, 2, n, 1)):
        assert make(19) is not None
        with pytest.raises(ValueError, match="has 20 bytes, a context length of 20 needs at least"):
            make(20)
    with pytest.raises(ValueError, match="got 0 and 5"):
        data.batches(text, 0, 5, 0)
    with pytest.raises(ValueError, match="got 0"):
        data.windows(text, 1, 5, 0)


def slow_probability(text: bytes, context: bytes, byte: int) -> Fraction:
    """Witten-Bell by its recursion, counted anew for every question, in exact fractions."""
    size = len(context)
    after = Counter(text[i + size] for i in range(len(text) - size) if text[i:].startswith(context))
    shorter = slow_probability(text, context[1:], byte) if size else Fraction(1, 256)
    seen = sum(after.values())
    return (after[byte] + len(after) * shorter) / (seen + len(after)) if seen else shorter


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_ngram_agrees_with_dictionaries(order):
    text = b"abracadabra, abba and a cab; the \xff\x00 bar"
    rows = [b"abrac", b"a cab", b"xyzzy", b"\xff\x00 ba"]
    expected = [
        slow_probability(text, row[max(0, t - order) : t], row[t])
        for row in rows
        for t in range(1, 5)
    ]
    bits = -sum(math.log2(p) for p in expected) / len(expected)
    train = torch.tensor(list(text), dtype=torch.uint8)
    windows = torch.tensor([list(row) for row in rows]).view(2, 2, 5)
    assert ngram.bits_per_byte(train, windows, order) == pytest.approx(bits, rel=0, abs=1e-12)
    table = ngram.WittenBell(train, order).probabilities(windows)[..., 1:]
    assert np.abs(table.ravel() - [float(p) for p in expected]).max() < 1e-12


@pytest.mark.parametrize("context", [b"", b"t", b"th", b"the", b"\xfe", b"t\xfe", b"\xfeh"])
def test_ngram_probabilities_sum_to_one(context):
    text = np.frombuffer(b"the thin thread, the other thing" * 3, dtype=np.uint8)
    p = ngram.WittenBell(text, 3).distribution(context)
    assert p.shape == (256,) and p.min() > 0
    assert p.sum() == pytest.approx(1, rel=0, abs=1e-12)
    if context in (b"t", b"th"):
        assert p.argmax() == ord("h" if context == b"t" else "e")


def test_ngram_refuses_what_it_cannot_count():
    text, rows = torch.zeros(5, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int64)
    for order in (-1, 7):
        with pytest.raises(ValueError, match=f"got {order}"):
            ngram.bits_per_byte(text, rows, order)
    with pytest.raises(ValueError, match="non-empty"):
        ngram.bits_per_byte(text[:0], rows)
    with pytest.raises(ValueError, match=r"got shape \(2, 1\)"):
        ngram.bits_per_byte(text, rows[:, :1])
    # Shorter than its own context: the order in use is the longest that occurs.
    assert ngram.bits_per_byte(text[:1], rows, 2) == pytest.approx(-math.log2((1 + 1 / 256) / 2))


def test_ngram_on_the_library(library):
    rows = data.windows(library.valid, 16, 256, 4)
    costs = [ngram.bits_per_byte(library.train, rows, order) for order in range(3)]
    assert 4 < costs[0] < 5.2 and 3.2 < costs[1] < 3.9 and 2.3 < costs[2] < 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_writes_few_lines_to_a_file():
    stream, clock = io.StringIO(), Clock()
    progress = report.Progress(105, 50, start=20, stream=stream, clock=clock)
    for step in range(21, 106):
        clock.now += 0.5
        progress.update(step, loss=3.25)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [int(line.split("/")[0]) for line in lines] == [40, 60, 80, 100, 105]
    assert lines[0] == (
        " 40/105 [========            ]  3.250 bits/byte  100 tokens/s  0:10 elapsed  0:32 left"
    )
    assert lines[-1].startswith("105/105 [====================]") and "0:00 left" in lines[-1]
    assert "\r" not in stream.getvalue()


def test_progress_redraws_one_line_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    stream, clock = Terminal(), Clock()
    progress = report.Progress(10, 1, stream=stream, clock=clock)
    for step in range(1, 5):
        clock.now += 0.04
        progress.update(step, loss=math.nan)
    assert stream.getvalue().count("\r") == 1
    progress.write("a note")
    progress.close()
    assert stream.getvalue().count("\n") == 2 and "\r\x1b[Ka note\n" in stream.getvalue()
    last = stream.getvalue().rstrip("\n").split("\r\x1b[K")[-1]
    assert last.startswith(" 4/10 [========  ") and len(last) == 49


def test_log_writes_valid_json_and_names_divergence(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    log = report.Log(path)
    log.write({"step": 1, "train": 2.5, "shape": (1, 2)})
    assert path.read_text() == '{"step": 1, "train": 2.5, "shape": [1, 2]}\n'
    log.write({"step": 2, "train": math.nan, "deep": {"x": [-math.inf, 1.0]}})
    row = json.loads(path.read_text().splitlines()[1], parse_constant=pytest.fail)
    assert row == {"step": 2, "train": None, "deep": {"x": [None, 1.0]}, "status": "diverged"}
    assert report.Log(path).path.read_bytes() == b""


def test_log_resumes_after_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    log = report.Log(path)
    rows = [{"corpus": "x"}, *({"step": step} for step in range(1, 6)), {"event": "end"}]
    for row in rows:
        log.write(row)
    with path.open("a") as file:
        file.write('{"step": 6, "tr')
    assert report.read(path) == rows
    resumed = report.Log(path, resume=3)
    assert report.read(path) == rows[:4]
    resumed.write({"step": 4, "again": True})
    assert report.read(path) == [*rows[:4], {"step": 4, "again": True}]
    report.Log(tmp_path / "absent.jsonl", resume=3).write({"step": 4})
    assert report.read(tmp_path / "absent.jsonl") == [{"step": 4}]


def test_log_quotes_a_broken_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not JSON: b'nonsense"):
        report.Log(path, resume=1)
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("baselines", [{}, {"uniform": 8.0, "bigram": 3.5, "twin": 3.5}])
@pytest.mark.parametrize("losses", [[7.5, 4.0, 3.0, math.inf], [2.61, 2.6, 2.62], [0.0, 0.0]])
def test_plot_is_a_picture_of_the_size_asked_for(tmp_path, losses, baselines):
    pytest.importorskip("matplotlib")
    log = report.Log(tmp_path / "log.jsonl")
    log.write({"corpus": r"a $\nonsense$ b", "optimizer": "SGD", "params": 1234567})
    for step, loss in enumerate(losses, 1):
        log.write({"step": step, "train": loss, "valid": loss} if step % 2 else {"step": step})
    picture = tmp_path / "plots" / "loss.png"
    report.plot(log.path, picture, baselines)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 8000
    assert struct.unpack(">II", content[16:24]) == (900, 560)


def test_plot_needs_a_finite_loss(tmp_path):
    pytest.importorskip("matplotlib")
    log = report.Log(tmp_path / "log.jsonl")
    log.write({"step": 1, "train": math.nan})
    with pytest.raises(ValueError, match=r"log\.jsonl' holds no finite losses"):
        report.plot(log.path, tmp_path / "x.png", {})
    assert not (tmp_path / "x.png").exists()


def test_plot_says_how_to_get_matplotlib(tmp_path, monkeypatch):
    log = report.Log(tmp_path / "log.jsonl")
    log.write({"step": 1, "train": 3.0})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot(log.path, tmp_path / "x.png", {})
    assert not (tmp_path / "x.png").exists()
