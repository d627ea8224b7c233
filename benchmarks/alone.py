"""What only a fresh process shows: the time of a first step, and the peak memory of a later one."""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

import torch_backend
from benchmarks.device import Setting, forget_peak, held, progress
from benchmarks.race import Record, parameters
from benchmarks.shapes import SMALL, Shapes, hidden
from deepopt import rules
from torch_backend import fused

FLAT: dict[str, Any] = {"view": "flat", "output": "identity"}
MEMORY: dict[str, Callable[[Any], Any]] = {
    "AdamW": torch_backend.AdamW,
    "torch AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "torch AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "HeavyBall": torch_backend.HeavyBall,
    "DeltaMomentum, flat": lambda p: torch_backend.DeltaMomentum(p, **FLAT),
    "Muon": torch_backend.Muon,
    "torch Muon": torch.optim.Muon,
    "M3": lambda p: torch_backend.M3(p, period=2),
}


def each_alone(what: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """The values of calls of `what`, each in a process of its own, one after the other."""
    context, found = get_context("forkserver"), []
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for i, call in enumerate(calls):
            progress(i, len(calls), str(call[1]))
            found.append(pool.submit(what, *call).result())
    progress(len(calls), len(calls), "")
    return found


def first_step(s: Setting, rule: str, count: int, kernels: bool | None, cache: str) -> float:
    """Seconds of the first step of a process, with its kernels in the folder `cache`."""
    os.environ["DEEPOPT_CACHE"] = cache
    torch.set_num_threads(s.threads)
    shapes: Shapes = [(16, 16), (16, 32), (32, 16), (8, 8), (16, 24)]
    params = parameters(shapes * (count // 5), s.device)
    optimizer = getattr(torch_backend, rule)(params, fused=kernels)
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def first(s: Setting) -> list[Record]:
    """First steps of every rule that needs no context, less those of the plain path."""
    names = [rule.__name__ for rule in rules.ALL if not rule().context((2, 2))]
    found: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="deepopt-") as folder:
        pairs = [(n, k) for n in names for k in (10, 10_000)] if not s.quick else [("SGD", 10)]
        ways = (False, None, None)
        calls = [(s, n, k, way, f"{folder}/{n}{k}") for n, k in pairs for way in ways]
        seconds = each_alone(first_step, calls)
    for i, (name, count) in enumerate(pairs):
        plain, cold, warm = seconds[3 * i : 3 * i + 3]
        more = {"cold_s": round(cold - plain, 3), "warm_s": round(warm - plain, 3)}
        row = {"row": f"{name}, {count:,} tensors", "plain_s": round(plain, 3), **more}
        found.append({**row, "target": "warm ≤ 0.1 s, cold ≤ 2 s more"})
    return found


def peak(s: Setting, name: str) -> tuple[float, float]:
    """MB that a step holds beyond weights, gradients and state, and of a slab where it has one."""
    torch.set_num_threads(s.threads)
    # Libraries, threads and kernels are there before anything is counted.
    every = s.few(hidden(SMALL))
    for shapes in (list(set(every)), every):
        optimizer = None
        params = parameters(shapes, s.device)
        forget_peak(s.device)
        before = held(s.device)
        optimizer = MEMORY[name](params)
        for _ in range(4):
            optimizer.step()
        forget_peak(s.device)
        optimizer.step()
        most = held(s.device, peak=True)
        state = [x for own in optimizer.state.values() for x in own.values()]
        kept = sum(x.nbytes for x in state if isinstance(x, torch.Tensor) and x.dim())
        slab = fused.SLAB.get(s.device, fused.SLAB_ELSEWHERE)
        slab *= any(x.nbytes for x in getattr(optimizer, "_buffers", {}).values())
    return (most - before - kept) / 1e6, slab / 1e6


def memory(s: Setting) -> list[Record]:
    """Peak memory of a step of the hidden matrices of 30 million parameters."""
    found = each_alone(peak, [(s, name) for name in MEMORY])
    return [
        {
            "row": name,
            "extra_MB": round(extra, 1),
            "slab_MB": round(slab, 1),
            **({"target": "≤ 2.5 slabs" if slab else "0"} if "torch" not in name else {}),
        }
        for name, (extra, slab) in zip(MEMORY, found, strict=True)
    ]
