"""What a step takes of a device: time, launches, memory; and what stands beside every figure."""

import ctypes
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shapes import Shapes

# More than the caches of any device hold.
FLUSHED = 1 << 28
Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly to measure; compiled: with torch.compile as a peer."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    compiled: bool = False

    def few(self, shapes: Shapes) -> Shapes:
        """The shapes, or a few small ones."""
        return [tuple(min(n, 64) for n in x) for x in shapes[-6:]] if self.quick else shapes

    def pick(self, cpu: Any, cuda: Any) -> Any:
        """What is for this device."""
        return cuda if self.device == "cuda" else cpu


class Watch:
    """Times a step: `watch(step)` is milliseconds, and milliseconds of the host.

    On CUDA these are those between two events on the stream, after the caches were overwritten, and
    those until the call returns. On a processor: those of the clock, and of all threads of the
    process together.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.scratch = torch.empty(FLUSHED if self.cuda else 0, dtype=torch.uint8, device=device)

    def __call__(self, step: Step) -> tuple[float, float]:
        if not self.cuda:
            start, spent = time.perf_counter(), time.process_time()
            step()
            return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - spent)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        first.record()
        step()
        last.record()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return first.elapsed_time(last), 1e3 * host


def launches(step: Step) -> int:
    """Kernels and copies that a step starts on CUDA."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events() or ())


def held(device: str, peak: bool = False) -> int:
    """Bytes that the process holds on the device, now or at most since `forget_peak`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    field = "VmHWM" if peak else "VmRSS"
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def forget_peak(device: str) -> None:
    """Let the peak of `held` begin anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # What the heap keeps for later is not in use.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def quartiles(values: list[float]) -> list[float]:
    """The median, and the first and the third quartile."""
    return [float(f"{x:.4g}") for x in np.percentile(values, [50, 25, 75])]


def progress(done: int, of: int, what: str) -> None:
    """One line on stderr that is written over."""
    end = "\n" if done == of else ""
    print(f"\r[{done}/{of}] {what:48.48}", end=end, file=sys.stderr, flush=True)


def conditions(device: str) -> dict[str, Any]:
    """What every record says of its run."""
    cpu = platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else found[1] if found else cpu,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
