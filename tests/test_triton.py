"""Kernels in Triton: run in its interpreter, and compiled for a GPU that need not be there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepopt import rules
from deepopt.kernels.plan import plan
from deepopt.kernels.source import Storage
from deepopt.kernels.triton import Triton
from torch_backend.kernels import gpu

HERE = Path(__file__).parent
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@with_triton
@pytest.mark.parametrize("part", ["rule", "not rule"])
def test_the_interpreted_step(part):
    """Triton decides when it is imported whether it interprets, hence a process of its own."""
    variables = {"TRITON_INTERPRET": "1", "DEEPOPT_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(HERE / "interpreted.py"), "-k", part],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:]


SIGNATURE = dict.fromkeys(("TABLE", "ROWS", "SIZES", "FIRST", "OWNER", "PLACES"), "*i64")
SIGNATURE |= {"VALUES": "*fp64", "PARTIAL": "*fp64", "FOUND_INF": "*fp32"}
SIGNATURE |= {"CHUNKS": "i32", "ENTRIES": "i32"}
LENGTHS = {"CHUNK": gpu.GRAIN.chunk, "BLOCK": gpu.GRAIN.block, "SUMS": gpu.GRAIN.sums}
# Per thread and block four entries of each tensor, of two bytes as of four.
NARROW: dict[str, Storage] = {"w": "stochastic", "g": "bfloat16"}
ACCESSES = [
    (rules.AdamW(), {}, {"ld.global.v4.b32": 4, "st.global.v4.b32": 3}),
    (
        rules.AdamW(),
        NARROW,
        {"ld.global.v4.b32": 2, "ld.global.v2.b32": 2}
        | {"st.global.v4.b32": 2, "st.global.v2.b32": 1},
    ),
    (rules.M3(), {}, {"ld.global.v4.b32": 4, "st.global.v4.b32": 4}),
]


@with_triton
@pytest.mark.parametrize(("rule", "storage", "accesses"), ACCESSES, ids=["AdamW", "bf16", "M3"])
def test_whole_blocks_are_read_and_written_by_vectors(
    rule, storage, accesses, tmp_path, monkeypatch
):
    """In the code for an H200, which is made without one."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    region = plan(rule, (64, 32), frozenset({"every"})).regions[0]
    kinds = dict.fromkeys(region.tensors, "float32") | storage
    function = gpu._module(Triton(region, kinds).source())["sweep_0"]
    names = function.arg_names
    signature = {name: SIGNATURE.get(name, "constexpr") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(9)}
    source = ASTSource(function, signature, LENGTHS, attributes)
    options = {"num_warps": gpu.GRAIN.warps, "enable_fp_fusion": False}
    text = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found = re.findall(r"(?:ld|st)\.global\.v\d\.b\d+", text)
    assert {x: found.count(x) for x in set(found)} == accesses
    assert "fma.rn.f32" not in text


def test_the_text_quotes_the_rule_only_where_it_is_read():
    region = plan(rules.AdamW(), (64,), frozenset({"every"})).regions[0]
    kinds: dict[str, Storage] = dict.fromkeys(region.tensors, "float32")
    assert re.search(r"# adaptive\.py:\d+", Triton(region, kinds, comments=True).source())
    assert ".py:" not in Triton(region, kinds).source()


def test_what_is_missing_is_said(monkeypatch):
    said = gpu.obstacle.__wrapped__
    assert "mps" in said("mps")
    assert "TRITON_INTERPRET" in said("cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton" in said("cuda") and "not installed" in said("cuda")
