"""Time optimizer steps side by side: `python -m benchmarks.step SECTION ...`, all by default.

Contenders take turns in random order in one process, and ratios are of one turn. Steps that should
be equal are compared first; where they are not, nothing is timed and no number is printed.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks import alone
from benchmarks.device import Setting, conditions
from benchmarks.peers import (
    LR,
    copy,
    gemm,
    in_jax,
    matrix_functions,
    of_torch,
    others,
    ours,
    region_bytes,
)
from benchmarks.race import CLOSE, NARROW, ROUNDED, Broken, Contender, Record, parameters, race
from benchmarks.report import merged, table
from benchmarks.shapes import GPT2, LLAMA, SMALL, TINY, Shapes, hidden
from torch_backend.kernels.newton_schulz import fast_precision

RESULTS = Path("results/step.jsonl")
QUICK_RESULTS = Path("runs/step-quick.jsonl")
# A billion numbers.
BILLION: Shapes = [(4096, 4096)] * 60


def narrow(s: Setting) -> torch.dtype:
    """The dtype of weights and gradients of rules that move bytes."""
    return torch.bfloat16 if s.device == "cuda" else torch.float32


def torch_adamw(**how: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """torch's own, in one of its ways."""
    return lambda p: torch.optim.AdamW(p, 1e-2, **how)


def torch_muon(p: Any) -> torch.optim.Optimizer:
    """torch's own, with steps of the size that those of our rules have."""
    return torch.optim.Muon(
        p, 1e-2, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )


def adamw(s: Setting) -> list[Record]:
    """AdamW beside torch's, optax's and others."""
    cuda, dtype, twin = s.device == "cuda", narrow(s), "torch AdamW, fused"
    shapes = s.few(BILLION if cuda else SMALL)
    fresh = partial(parameters, shapes, s.device, dtype)
    # Weights and two moments are read and written, gradients read; torch's moments are as narrow.
    count = sum(map(prod, shapes))
    mine = {"bytes": count * (3 * dtype.itemsize + 4 * 4)}
    near = {"twin": twin, "tolerance": ROUNDED if cuda else CLOSE}
    theirs: dict[str, Any] = {"bytes": count * 7 * dtype.itemsize}
    first = {**mine, **near, "target": "≥ 92% of copy" if cuda else ""}
    foreach = {**theirs, **near, "target": "" if cuda else "≤ 0.3"}
    contenders = [
        ours("AdamW", fresh(), first, weight_decay=0.01),
        of_torch(
            twin, torch_adamw(fused=True), fresh(), target=s.pick("≤ 0.95", "≤ 0.91"), **theirs
        ),
        of_torch("torch AdamW, foreach", torch_adamw(foreach=True), fresh(), **foreach),
    ]
    if s.compiled:
        facts = {**theirs, **near, "compiled": True}
        contenders.append(of_torch("torch AdamW, compiled", torch_adamw(), fresh(), **facts))
    if not cuda:
        contenders += in_jax(s, "adamw", fresh, **theirs, **near)
    contenders += others("AdamW", fresh, **theirs, **near)
    return race(s, [*contenders, copy(s)], 30)


def delta(s: Setting) -> list[Record]:
    """Delta momentum beside heavy ball; its step is one region."""
    shapes, dtype = s.few(s.pick(hidden(SMALL), BILLION)), narrow(s)
    fresh = partial(parameters, shapes, s.device, dtype)
    # Weights and the memory are read and written, gradients read.
    facts = {
        "bytes": sum(map(prod, shapes)) * (3 * dtype.itemsize + 2 * 4),
        "tolerance": s.pick(CLOSE, ROUNDED),
    }
    contenders: list[Contender] = []
    for view in ("flat", "scalar"):
        name, options = f"DeltaMomentum, {view}", {"view": view, "output": "identity"}
        own = {**facts, "twin": f"{name}, plain path", "target": "≥ 80% of copy"}
        contenders.append(ours(name, fresh(), own, **options))
        contenders.append(ours(own["twin"], fresh(), facts, fused=False, **options))
    twin = "torch SGD with momentum, fused"
    contenders.append(
        ours("HeavyBall", fresh(), {**facts, "twin": twin, "target": s.pick("", "≤ 1.05")})
    )
    contenders.append(
        of_torch(twin, partial(torch.optim.SGD, lr=LR, momentum=0.9, fused=True), fresh())
    )
    return race(s, [*contenders, copy(s)], 30)


def muon(s: Setting) -> list[Record]:
    """Muon beside torch's and others, all of five iterations; flops are the textbook form's."""
    shapes, twin = s.few(s.pick(hidden(GPT2), hidden(LLAMA))), "torch Muon"
    fresh = partial(parameters, shapes, s.device)
    flops = 5.0 * sum(4 * min(x) ** 2 * max(x) + 2 * min(x) ** 3 for x in shapes)
    facts = {"flops": flops, "twin": twin, "tolerance": NARROW}
    contenders = [
        ours("Muon", fresh(), facts, momentum=0.95),
        of_torch(twin, torch_muon, fresh(), flops=flops, target=s.pick("≤ 0.85", "≤ 0.56")),
        ours("Muon, float32", fresh(), facts, momentum=0.95, precision="float32"),
    ]
    if s.compiled:
        more = {"flops": flops, "compiled": True}
        contenders.append(of_torch("torch Muon, compiled", torch_muon, fresh(), **more))
    contenders += others("Muon", fresh, flops=flops)
    return race(s, [*contenders, gemm(s, fast_precision(s.device))], 5, orthogonal=True)


def jax(s: Setting) -> list[Record]:
    """Muon in JAX, on a processor."""
    fresh = partial(parameters, s.few(hidden(SMALL)), "cpu")
    contenders = [*in_jax(s, "muon", fresh), ours("Muon, in torch", fresh(), momentum=0.95)]
    return race(s, contenders, 5, orthogonal=True)


def m3(s: Setting) -> list[Record]:
    """M3 over two periods of its slow memory, and its regions less the matrix functions."""
    shapes, twin = s.few(s.pick(hidden(SMALL), hidden(LLAMA))), "M3, plain path"
    fresh = partial(parameters, shapes, s.device)
    own = {"twin": twin, "tolerance": NARROW}
    contenders = [
        ours("M3, staggered", fresh(), {**own, "target": "p99 ≤ 1.1 p50"}, stagger=True),
        ours("M3", fresh(), own),
        ours(twin, fresh(), {"timed": False}, fused=False),
        ours("Muon", fresh(), {"target": s.pick("", "≤ 1.25")}),
        of_torch("torch Muon", torch_muon, fresh(), target=s.pick("", "≤ 0.75")),
    ]
    if s.device == "cpu":
        own |= {"less": matrix_functions(), "target": "≥ 80% of copy", "bytes": region_bytes}
        contenders.append(ours("M3, regions", fresh(), own))
    return race(s, [*contenders, copy(s)], 32)


def tiny(s: Setting) -> list[Record]:
    """What the host does for each of 20,000 tensors."""
    fresh, twin = partial(parameters, s.few(TINY), s.device), "torch AdamW, fused"
    mine = {"twin": twin, "target": s.pick("", "≤ 0.5 µs")}
    contenders = [
        ours("AdamW", fresh(), mine, weight_decay=0.01),
        of_torch(twin, torch_adamw(fused=True), fresh()),
        of_torch("torch AdamW, foreach", torch_adamw(foreach=True), fresh()),
    ]
    return race(s, contenders, 15)


def plain(s: Setting) -> list[Record]:
    """AdamW on the plain path beside torch's own loop, 100 matrices of 256²."""
    fresh = partial(parameters, s.few([(256, 256)] * 100), s.device)
    twin = "torch AdamW, loop"
    mine = ours("AdamW, plain path", fresh(), {"twin": twin}, fused=False, weight_decay=0.01)
    theirs = of_torch(twin, torch_adamw(foreach=False), fresh(), target="≤ 4")
    return race(s, [mine, theirs], 30)


SECTIONS: dict[str, Callable[[Setting], list[Record]]] = {
    "adamw": adamw,
    "delta": delta,
    "muon": muon,
    "m3": m3,
    "jax": jax,
    "tiny": tiny,
    "plain": plain,
    "first": alone.first,
    "memory": alone.memory,
}


def run(section: str, s: Setting) -> list[Record]:
    """The records of a section. Raises Broken."""
    torch.set_num_threads(s.threads)
    before = conditions(s.device)
    head = {"section": section, "device": s.device, "threads": s.threads}
    return [{**head, **record, **before} for record in SECTIONS[section](s)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 where parity is broken."""
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="default: 1")
    parser.add_argument("--quick", action="store_true", help="few small tensors, three turns")
    parser.add_argument("--compiled", action="store_true", help="torch.compile as a peer, slow")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}; --quick: {QUICK_RESULTS}")
    parser.add_argument("--page", type=Path, help="write tables and a picture into this page")
    args = parser.parse_args(argv)
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
    out: Path = args.out or (QUICK_RESULTS if args.quick else RESULTS)
    jobs = [(name, n) for name in args.sections or SECTIONS for n in args.threads]
    status = 0
    if len(jobs) == 1:
        try:
            s = Setting(args.device, args.threads[0], args.quick, args.compiled)
            records = run(jobs[0][0], s)
        except Broken as error:
            print(f"\nparity is broken, so there are no numbers: {error}", file=sys.stderr)
            return 1
        merged(out, records)
        print(table(records))
    else:
        # A process of its own for each, so that none inherits threads, caches or memory.
        same = ["--device", args.device, "--out", str(out)]
        same += [f"--{x}" for x in ("quick", "compiled") if getattr(args, x)]
        for name, n in jobs:
            print(f"{name}, {n} thread{'s' * (n > 1)}", file=sys.stderr)
            command = [sys.executable, "-m", "benchmarks.step", name, "--threads", str(n), *same]
            status = max(status, subprocess.run(command).returncode)
    if args.page and not status:
        from benchmarks.page import write_page

        write_page(args.page, [json.loads(x) for x in out.read_text().splitlines()])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
