"""Steps of kernels as CUDA graphs: one for each set of clocks that tick, replayed by the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from deepopt.algebra import Program
from deepopt.describe import PRIMITIVES
from deepopt.functions import definition
from torch_backend.fused import Batched, Call, Part


class Capture(Protocol):
    """Makes a graph of the work that `run` gives a device, without doing it; returns its replay.

    None where the device has no graphs.
    """

    def __call__(
        self, run: Callable[[], None], device: torch.device
    ) -> Callable[[], None] | None: ...


def cuda(run: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """The `Capture` of CUDA graphs."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    # Threads that watch over communication go on asking the device while it captures.
    mode = "thread_local"
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode=mode):
        run()
    return graph.replay


def refuse_foreign() -> None:
    """Raise RuntimeError where somebody else's graph would get the step."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step cannot be part of a CUDA graph of yours: the host counts steps, decides which "
            "clocks tick and reads hyperparameters. Call step() after your graph is replayed; with "
            "capturable=True it replays graphs of its own"
        )


class Graph:
    """A part's step: run as ever at first, then captured, then replayed.

    The first run builds and allocates what a capture must not. Before each replay the host sends
    the scalars of the step. Parts that cannot be captured are run as ever each time: those whose
    functions ask the host or take its numbers, and those with a context, which moves.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        # What functions take from elsewhere is a number of the host, in a graph for ever.
        values = part.buckets[0].plan.values.keys()
        programs = part.programs
        self.capturable = not any(_asks(x) or set(x.inputs) - values for x in programs)
        self.warm = False
        self.replay: Callable[[], None] | None = None

    def run(self, call: Call, capture: Capture) -> None:
        """Step the members."""
        if self.warm and self.capturable and not self.replay:
            self._capture(call, capture)
        if self.replay:
            for kernel, table in zip(self.part.kernels, self.tables, strict=True):
                kernel.launch.table[:] = table
                kernel.send(call)
            self.replay()
        else:
            self.capturable &= call.given.keys() == {"g"}
            self.warm = True
            self.part.run(call)

    def moved(self, gradients: Sequence[Tensor | None]) -> Iterator[int]:
        """The positions of members whose gradients are not where a replay would read them."""
        if self.replay:
            for m, place in zip(self.part.members, self.places, strict=True):
                g = gradients[m.position]
                if g is not None and g.stride() == m.p.stride() and g.data_ptr() != place:
                    yield m.position

    def _capture(self, call: Call, capture: Capture) -> None:
        call.captured = True
        self.replay = capture(lambda: self.part.run(call), self.part.members[0].p.device)
        call.captured = False
        self.capturable = self.replay is not None
        # Functions leave their results at new addresses, which kernels are told by their tables.
        self.tables = [kernel.launch.table.copy() for kernel in self.part.kernels]
        self.places = [call.given["g"][m.index].data_ptr() for m in self.part.members]
        # The graph writes into it for as long as it is there.
        self.buffer = call.buffer


def _asks(program: Program) -> bool:
    """Whether a program has solvers, which ask the host as they run."""
    for x in program.nodes:
        if x.op == "call":
            own = hasattr(Batched, str(x["name"]))
            if x["name"] in PRIMITIVES or (not own and _asks(Program({"": definition(x)[0]}))):
                return True
    return False
