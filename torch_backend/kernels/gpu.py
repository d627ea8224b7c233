"""Triton kernels: built by Triton from files in our folder, launched over tables of addresses."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepopt.kernels.triton import HEAD, Triton
from torch_backend.kernels.native import Array, Unavailable, chunks_of, folder, runtime

# Copies of a table that may be on their way at once before the host waits for the first.
SLOTS = 3


@dataclass(frozen=True)
class Grain:
    """Entries of a chunk and of a block, partial sums per block, programs per processor.

    Four entries a thread: of eight, AdamW needs 144 registers instead of 71 (Triton 3.9, sm_90).
    """

    chunk: int = 1 << 16
    block: int = 1 << 10
    sums: int = 1 << 8
    programs: int = 8
    warps: int = 8


GRAIN = Grain()


@cache
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on tensors of the CPU, as tests have it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serves(device: torch.device) -> bool:
    """Whether a device's kernels are these, rather than the CPU's own."""
    return device.type == "cuda" or (
        device.type == "cpu" and os.environ.get("DEEPOPT_KERNELS") == "triton"
    )


@cache
def obstacle(kind: str) -> str:
    """Why a kind of device cannot run these kernels; empty where it can."""
    if kind == "cpu" and not interpreted():
        return "Triton runs on a CPU only with TRITON_INTERPRET=1"
    if kind not in ("cpu", "cuda"):
        return f"it is on {kind}; kernels run on CPUs and on CUDA devices"
    if importlib.util.find_spec("triton") is None:
        return "kernels for CUDA need the package triton, which is not installed"
    return ""


class Kernel:
    """A region in Triton on a device; `launch` it over parameters of any number and size."""

    def __init__(self, written: Triton, source: str, device: torch.device) -> None:
        region = written.region
        self.tensors = written.tensors
        self.parameters = len(region.parameters)
        self.reductions = len(region.reductions)
        self.device = device
        space = _module(source)
        names = [*(f"sweep_{i}" for i in range(len(region.sweeps))), "epilogue"]
        self.functions = [space[name] for name in names if name in space]
        if device.type == "cuda":
            self._compile()

    def _compile(self) -> None:
        """Compile before anything is stepped. Raises Unavailable."""
        integers, real = [torch.int64] * 5, torch.float64
        given = (torch.int64, real, *integers, real, torch.float32, 1, 1)
        try:
            with torch.cuda.device(self.device):
                for function in self.functions:
                    function.warmup(*given, grid=(1,), **self.options())
        except Exception as error:
            said = "\n".join(str(error).splitlines()[:6])
            raise Unavailable(f"Triton failed on a kernel: {said}") from error

    def options(self) -> dict[str, Any]:
        """Lengths, and no fused multiply-adds, which round otherwise than the plain path does."""
        lengths = {"CHUNK": GRAIN.chunk, "BLOCK": GRAIN.block, "SUMS": GRAIN.sums}
        return {**lengths, "num_warps": GRAIN.warps, "enable_fp_fusion": False}

    def launch(self, sizes: Array, rows: Array, places: Array) -> Launch:
        return Launch(self, sizes, rows, places)


_kernels: dict[tuple[str, torch.device], Kernel] = {}


def kernels(written: Sequence[Triton], device: torch.device) -> list[Kernel]:
    """Regions built for a device. Raises Unavailable."""
    if why := obstacle(device.type):
        raise Unavailable(why)
    runtime()  # It counts the steps, on the host.
    keys = [(x.source(), device) for x in written]
    for key, x in zip(keys, written, strict=True):
        if key not in _kernels:
            _kernels[key] = Kernel(x, *key)
    return [_kernels[key] for key in keys]


def _module(source: str) -> dict[str, Any]:
    """What a text defines. Triton reads the text again from the file, whose name is its digest."""
    path = folder() / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.py"
    if not path.exists() or path.read_text() != source:
        with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".tmp", delete=False) as file:
            file.write(source)
        os.replace(file.name, path)
    space: dict[str, Any] = {"__name__": f"deepopt_{path.stem}", "__file__": str(path)}
    exec(compile(source, str(path), "exec"), space)
    return space


class _Copied:
    """An array of the host and its copy on a device, which is sent when it has changed."""

    def __init__(self, host: Array, device: torch.device) -> None:
        self.host = host
        self.sent = np.zeros_like(host)
        self.there = torch.from_numpy(host).to(device, copy=True)
        slots = SLOTS if device.type == "cuda" else 0
        self._slots = [
            (torch.empty_like(torch.from_numpy(host), pin_memory=True), torch.cuda.Event())
            for _ in range(slots)
        ]
        self._next = 0

    def send(self) -> Tensor:
        """The copy, equal to the array in the order of the device's current stream."""
        if np.array_equal(self.host, self.sent):
            return self.there
        np.copyto(self.sent, self.host)
        source = torch.from_numpy(self.host)
        if not self._slots:
            return self.there.copy_(source)
        pinned, event = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        # The device may still read what this slot held.
        event.synchronize()
        pinned.copy_(source)
        self.there.copy_(pinned, non_blocking=True)
        event.record()
        return self.there


class Launch:
    """A kernel over certain parameters: tables of addresses and parameters to fill, and a run.

    sizes: entries of each parameter's arrays. rows: which row of `values` holds its scalars.
    places: which random numbers round its weights.
    """

    def __init__(self, kernel: Kernel, sizes: Array, rows: Array, places: Array) -> None:
        self.kernel = kernel
        self.entries = len(sizes)
        self.table = np.zeros((len(kernel.tensors), self.entries), np.int64)
        count = int(rows.max(initial=-1)) + 1
        self._numbers = np.zeros(HEAD + count * kernel.parameters)
        self.values = self._numbers[HEAD:].reshape(count, kernel.parameters)
        self._options = kernel.options()
        first, owner = chunks_of(sizes, self._options["CHUNK"])
        self.chunks = len(owner)
        device = kernel.device
        self._arrays = [
            torch.from_numpy(x.astype(np.int64)).to(device)
            for x in (rows, sizes, first, owner, places)
        ]
        self._partial = torch.zeros(
            max(1, self.chunks * kernel.reductions), dtype=torch.float64, device=device
        )
        self._never = torch.zeros((), device=device)
        self._table, self._given = _Copied(self.table, device), _Copied(self._numbers, device)

    def run(self, step: int, key: tuple[int, int], found_inf: Tensor | None = None) -> None:
        """Run the kernel at the addresses in `table` with the scalars in `values`.

        found_inf: a float32 on the device; nothing is stored where it is not 0.
        """
        self.send(step, key)
        self.start(found_inf)

    def send(self, step: int, key: tuple[int, int]) -> None:
        """Send the device what has changed in `table` and `values`, and the step and the key."""
        self._numbers[:3] = step, *key
        with self._guard():
            self._table.send()
            self._given.send()

    def start(self, found_inf: Tensor | None = None) -> None:
        """Run the kernel with what was sent last."""
        if not self.chunks:
            return
        found = self._never if found_inf is None else found_inf
        device = self.kernel.device
        with self._guard():
            there = (self._table.there, self._given.there)
            given = (*there, *self._arrays, self._partial, found)
            grid = (min(_processors(device) * GRAIN.programs, self.chunks),)
            for function in self.kernel.functions:
                function[grid](*given, self.chunks, self.entries, **self._options)

    def _guard(self) -> AbstractContextManager[Any]:
        device = self.kernel.device
        # In Python lanes behind the end of a tensor warn of what they compute for nobody.
        return torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore")


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
