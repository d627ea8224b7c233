"""Building and keeping C kernels: compilers that fail, folders that cannot be used, races."""

import contextlib
import io
import os
import textwrap
import traceback
from multiprocessing.connection import Connection

import pytest
import torch
from ranks import forkserver

from torch_backend import AdamW, DeltaMomentum, Optimizer
from torch_backend.kernels import native

STEP = """
import sys, warnings
import torch
from torch_backend import AdamW
def take(**options):
    p = torch.nn.Parameter(torch.ones(5, 3))
    q = torch.nn.Parameter(torch.ones(5, 3))
    for x, o in ((p, AdamW([p], **options)), (q, AdamW([q], fused=False))):
        for _ in range(3):
            x.grad = torch.full((5, 3), 0.5)
            o.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    {body}
print(*[f"{{x.category.__name__}}: {{x.message}}" for x in said], sep="\\n")
"""


def run(body: str, environment: dict[str, str], pipe: Connection) -> None:
    """Send what the body prints, in a process of its own."""
    os.environ |= environment
    text = STEP.format(body=textwrap.dedent(body).replace("\n", "\n    "))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(text, {"__name__": "body"})
        except BaseException:
            pipe.send(traceback.format_exc())
            raise
    pipe.send(printed.getvalue())


def python(body: str, count: int = 1, **environment: str) -> str:
    """What fresh processes print that run the body, several at once."""
    fresh = forkserver()
    pipes = [fresh.Pipe(duplex=False) for _ in range(count)]
    started = [fresh.Process(target=run, args=(body, environment, put)) for _, put in pipes]
    for process in started:
        process.start()
    for _, put in pipes:
        put.close()
    found = [take.recv() for take, _ in pipes]
    for process, text in zip(started, found, strict=True):
        process.join()
        assert process.exitcode == 0, text
    return "".join(found)


REFUSED = """
try:
    take(fused=True)
except RuntimeError as error:
    print("refused:", error)
take()
take()
"""


def test_without_a_compiler_the_plain_path_is_taken_and_said_once(tmp_path):
    out = python(REFUSED, CC="/no/such/compiler", DEEPOPT_CACHE=str(tmp_path))
    assert "refused: fused=True: no C compiler was found (CC='/no/such/compiler'" in out
    assert out.count("deepopt takes the plain path, which is slower: no C compiler") == 1


def test_what_a_failing_compiler_says_is_quoted(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'kernel.c:1: no such luck' >&2\nexit 3\n")
    compiler.chmod(0o755)
    out = python(REFUSED, CC=str(compiler), DEEPOPT_CACHE=str(tmp_path / "cache"))
    assert "kernel.c:1: no such luck" in out and out.count("refused: fused=True:") == 1
    assert out.count("which is slower") == 1


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said_once(tmp_path):
    tmp_path.chmod(0o500)
    out = python("take(fused=True)\ntake(fused=True)", DEEPOPT_CACHE=str(tmp_path / "cache"))
    assert out.count("keeps its kernels in memory only") == 1


def test_a_folder_that_others_can_write_is_not_used(tmp_path):
    tmp_path.chmod(0o777)
    out = python("take(fused=True)\ntake(fused=True)", DEEPOPT_CACHE=str(tmp_path))
    assert out.count("keeps its kernels in memory only") == 1 and "chmod 700" in out
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    out = python("take(fused=True)", DEEPOPT_CACHE=str(tmp_path / "file"))
    assert "keeps its kernels in memory only" in out


def test_kernels_are_kept_and_damaged_ones_built_anew(tmp_path):
    cache = tmp_path / "cache"
    assert python("take(fused=True)", DEEPOPT_CACHE=str(cache)).strip() == ""
    assert cache.stat().st_mode & 0o777 == 0o700
    kept = {p: p.read_bytes() for p in cache.glob("*/*.so")}
    assert len(kept) == 2 and not list(cache.glob("build-*"))
    # With the compiler gone, what is kept still runs.
    stamps = {p: p.stat().st_mtime_ns for p in kept}
    python("take(fused=True)", DEEPOPT_CACHE=str(cache))
    assert {p: p.stat().st_mtime_ns for p in cache.glob("*/*.so")} == stamps
    for p in kept:
        p.write_bytes(b"\x7fELF damaged")
    python("take(fused=True)", DEEPOPT_CACHE=str(cache))
    found = {p.parent: p.read_bytes() for p in cache.glob("*/*.so")}
    assert len(found) == 2 and all(len(x) > 1000 for x in found.values())


def test_processes_that_build_the_same_at_once_do_not_disturb_each_other(tmp_path):
    cache = tmp_path / "cache"
    assert python("take(fused=True)", count=4, DEEPOPT_CACHE=str(cache)).strip() == ""
    assert len(list(cache.glob("*/*.so"))) == 2 and not list(cache.glob("build-*"))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(700, 900), (3, 5)])
def test_results_do_not_depend_on_the_number_of_threads(threads, shape):
    """Large tensors are summed in parts, which are added up in one order."""
    found = []
    for n in (1, 2, 5):
        threads(n)
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
        optimizer = DeltaMomentum(params, view="flat", output="identity", fused=True)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(shape)
            optimizer.step()
        found.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_forked_child_has_threads_of_its_own():
    body = """
    import os
    torch.set_num_threads(3)
    p = torch.nn.Parameter(torch.ones(700, 900))
    o = AdamW([p], fused=True)
    p.grad = torch.ones(700, 900)
    o.step()
    child = os.fork()
    before = float(p.detach().numpy()[0, 0])
    o.step()
    assert float(p.detach().numpy()[0, 0]) < before
    if child == 0:
        # The thread pool of torch itself does not live in a forked child.
        os._exit(0 if (p.detach().numpy() < 1).all() else 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print("done")
    """
    assert "done" in python(body)


REFUSALS = {
    "float8": (lambda: torch.zeros(4, 4).to(torch.float8_e5m2), "its dtype is torch.float8_e5m2"),
    "strided": (lambda: torch.zeros(4, 8)[:, ::2], "it is not contiguous"),
    "meta": (lambda: torch.zeros(4, 4, device="meta"), "it is on meta"),
    "expanded": (lambda: torch.zeros(1, 4).expand(4, 4), "it is not contiguous"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_kernels_cannot_take_is_refused_by_name(name):
    make, why = REFUSALS[name]
    good, bad = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(make())
    optimizer = AdamW([("good", good), ("layer.bad", bad)], fused=True)
    good.grad = torch.ones(4)
    bad.grad = torch.zeros_like(bad)
    with pytest.raises(RuntimeError, match=f"it cannot step layer.bad: {why}"):
        optimizer.step()
    assert torch.equal(good, torch.ones(4)) and not optimizer.state


def test_parameters_that_share_memory_are_refused_by_name():
    base = torch.zeros(6)
    one, two = torch.nn.Parameter(base[:4]), torch.nn.Parameter(base[3:])
    optimizer = AdamW([("one", one), ("two", two)], fused=True)
    one.grad, two.grad = torch.ones(4), torch.ones(3)
    with pytest.raises(RuntimeError, match="cannot step two: it shares memory with another"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": "yes"}, "fused='yes' must be one of None, True, False"),
        ({"precision": "float16"}, "precision='float16' must be one of 'auto', 'float32'"),
        ({"rounding": "up"}, "rounding='up' must be one of 'nearest', 'stochastic', 'exact'"),
        ({"rounding": "exact", "fused": False}, "rounding='exact' needs kernels, and fused=False"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Optimizer([torch.nn.Parameter(torch.ones(2))], **options)


def test_a_library_of_another_user_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "folder", lambda: tmp_path)
    place = tmp_path / "0123"
    place.mkdir()
    (place / "0123.so").write_bytes(b"not what its name says")
    assert not native._load("0123")
