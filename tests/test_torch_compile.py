"""A step that is compiled, replayed from graphs, or given scaled gradients is the plain one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from deepopt import Rule, rules
from torch_backend import Optimizer
from torch_backend.kernels import native

STEPS = 7
RULES: dict[str, Rule] = {
    "AdamW": rules.AdamW(lr=0.05, weight_decay=0.1),
    "M3": rules.M3(lr=0.05, period=3),
}
# Sums of a compiled model are taken in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass
class Run:
    """A model, its optimizer, and what they are trained on."""

    model: nn.Module
    optimizer: Optimizer

    def inputs(self, i: int) -> Tensor:
        return torch.randn(6, 4, generator=torch.Generator().manual_seed(i))

    def loss(self, i: int) -> Tensor:
        return self.model(self.inputs(i)).square().sum()

    def backward(self, i: int) -> None:
        self.optimizer.zero_grad()
        self.loss(i).backward()

    def everything(self) -> list[Tensor]:
        """All parameters and states."""
        states = [x for s in self.optimizer.state.values() for x in s.values()]
        return [p.detach().clone() for p in self.model.parameters()] + [x.clone() for x in states]


def made(rule: Rule, **options: Any) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Run(model, Optimizer(model, rule, **options))


def same(one: Run, two: Run, **tolerance: float) -> None:
    a, b = one.everything(), two.everything()
    assert len(a) == len(b) > len(list(one.model.parameters()))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_the_eager_one_in_one_frame(backend, name, fused):
    eager, compiled = made(RULES[name], fused=fused), made(RULES[name], fused=fused)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(compiled.optimizer.step, backend=counter, fullgraph=True)
    for i in range(STEPS):
        for run, take in ((eager, eager.optimizer.step), (compiled, step)):
            for group in run.optimizer.param_groups:
                group["lr"] = 0.05 / (1 + i)
            run.backward(i)
            take()
        same(eager, compiled)
    assert counter.frame_count == 1


# torch's own inductor says so as it is imported.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")
@torch._dynamo.config.patch(trace_autograd_ops=True)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_training_step_is_one_frame_under_a_schedule(backend):
    eager, compiled = made(RULES["M3"]), made(RULES["M3"])
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, STEPS)
        for run in (eager, compiled)
    ]

    def train(x: Tensor) -> Tensor:
        before = sum(p.detach().sum() for p in compiled.model.parameters())
        compiled.model(x).square().sum().backward()
        compiled.optimizer.step()
        return before - sum(p.detach().sum() for p in compiled.model.parameters())

    counter = CompileCounterWithBackend(backend)
    fast = torch.compile(train, backend=counter, fullgraph=True)
    for i in range(STEPS):
        eager.backward(i)
        compiled.optimizer.zero_grad()
        before = sum(p.detach().sum() for p in eager.model.parameters())
        eager.optimizer.step()
        moved = fast(compiled.inputs(i))
        after = sum(p.detach().sum() for p in eager.model.parameters())
        torch.testing.assert_close(moved, before - after, rtol=1e-3, atol=1e-5)
        same(eager, compiled, **CLOSE)
        for schedule in schedules:
            schedule.step()
    assert counter.frame_count == 1


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: notes what runs and where its results lie, and repeats it.

    Kernels only run when it is replayed. To ask for a number, as the host would, is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host asks the device"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        fresh = isinstance(out, Tensor) and func._schema.returns[0].alias_info is None

        def repeat() -> None:
            again = func(*args, **kwargs)
            if fresh:
                out.copy_(again)

        self.calls.append(repeat)
        return out


@dataclass
class Graphs:
    """A capture that keeps its graphs, and which of them were replayed when."""

    graphs: list[Tape] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)

    def __call__(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        number, tape = len(self.graphs), Tape()
        self.graphs.append(tape)
        with pytest.MonkeyPatch.context() as patch, tape:
            note = tape.calls.append
            patch.setattr(native.Launch, "start", lambda launch: note(lambda: launch.start()))
            run()

        def replay() -> None:
            self.replayed.append(number)
            for call in tape.calls:
                call()

        return replay


def matrices(rule: Rule, **options: Any) -> Run:
    """A model whose parameters are stepped by one rule in one part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    return Run(model, Optimizer(list(model.parameters()), rule, fused=True, **options))


def stepped(run: Run, i: int) -> None:
    """A step of a schedule, with gradients that stay in place."""
    for group in run.optimizer.param_groups:
        group["lr"] = 0.05 / (1 + i)
    run.optimizer.zero_grad(set_to_none=False)
    run.loss(i).backward()
    run.optimizer.step()


CLOCKS = rules.M3(lr=0.05, slow=(0.9, 0.8), period=(2, 3), weight=(0.3, 0.2), weight_decay=0.1)


def test_each_set_of_clocks_has_one_graph_that_the_host_replays():
    eager, graphed = matrices(CLOCKS), matrices(CLOCKS, capturable=True)
    graphed.optimizer.capture = graphs = Graphs()
    known: dict[frozenset[str], int | None] = {}
    for i in range(3 * 6):
        ticks = CLOCKS.ticks(i + 1)
        before = list(graphs.replayed)
        stepped(eager, i)
        stepped(graphed, i)
        same(eager, graphed)
        if ticks not in known:  # As ever.
            known[ticks] = None
            assert graphs.replayed == before
            continue
        if known[ticks] is None:  # Captured.
            known[ticks] = len(graphs.graphs) - 1
        assert graphs.replayed == [*before, known[ticks]]
    assert sorted(known.values()) == [0, 1, 2, 3] and len(graphs.graphs) == len(known)
