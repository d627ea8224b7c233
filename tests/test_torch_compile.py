"""A step that is compiled, replayed from graphs, or given scaled gradients is the plain one."""

import copy
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


def shrink(run: Run) -> None:
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(0.99)


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
        shrink(compiled)
        compiled.optimizer.step()
        return before - sum(p.detach().sum() for p in compiled.model.parameters())

    counter = CompileCounterWithBackend(backend)
    fast = torch.compile(train, backend=counter, fullgraph=True)
    for i in range(STEPS):
        eager.backward(i)
        compiled.optimizer.zero_grad()
        before = sum(p.detach().sum() for p in eager.model.parameters())
        shrink(eager)
        eager.optimizer.step()
        moved = fast(compiled.inputs(i))
        after = sum(p.detach().sum() for p in eager.model.parameters())
        torch.testing.assert_close(moved, before - after, rtol=1e-3, atol=1e-5)
        same(eager, compiled, **CLOSE)
        for schedule in schedules:
            schedule.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_follows_what_happens_to_its_optimizer(backend):
    eager, compiled = made(RULES["M3"]), made(RULES["M3"])
    counter = CompileCounterWithBackend(backend)
    fast = torch.compile(compiled.optimizer.step, backend=counter, fullgraph=True)
    pairs = ((eager, eager.optimizer.step), (compiled, fast))
    for i in range(STEPS):
        for run, step in pairs:
            run.backward(i)
            first = next(iter(run.model.parameters()))
            if i < 2:
                first.grad = None
            if i == 4:
                run.optimizer.load_state_dict(run.optimizer.state_dict())
                state = run.optimizer.state[first]
                state[max(state.keys() - {"step"})] = torch.full_like(first, 0.01)
            step()
            assert (first in run.optimizer.state) == (i >= 2)
        same(eager, compiled)
    # Without and with the gradient of the first parameter, and as a load puts states in order.
    assert counter.frame_count == 3


def test_optimizers_that_share_a_compiled_function_keep_apart():
    eager, compiled = [
        [made(rules.AdamW(lr=lr)) for lr in (0.05, 0.01)] for _ in ("eager", "compiled")
    ]

    def take(optimizer: Optimizer) -> None:
        optimizer.step()

    fast = torch.compile(take, backend="eager", fullgraph=True)
    for i in range(3):
        for which, step in ((eager, take), (compiled, fast)):
            for seed, run in enumerate(which):
                run.backward(i + 10 * seed)
                step(run.optimizer)
    same(eager[0], compiled[0])
    same(eager[1], compiled[1])


def test_a_closure_of_a_compiled_step_is_called_once_and_gives_the_loss():
    eager, compiled = made(RULES["AdamW"]), made(RULES["AdamW"])
    fast = torch.compile(compiled.optimizer.step, backend="eager")
    losses: list[list[float]] = [[], []]
    for i in range(3):
        for run, step, seen in (
            (eager, eager.optimizer.step, losses[0]),
            (compiled, fast, losses[1]),
        ):

            def closure(run=run, i=i):
                run.backward(i)
                return run.loss(i).detach()

            seen.append(float(step(closure)))
    assert losses[0] == losses[1]
    same(eager, compiled)


def test_the_operator_keeps_its_promises_to_the_compiler():
    run = made(RULES["M3"])
    params = list(run.model.parameters())
    run.backward(0)
    number = run.optimizer.entered(tuple(range(len(params))))
    states = [x.clone() for p in params for x in run.optimizer.state[p].values()]
    gradients = [torch.ones_like(p) for p in params]
    given = [p.detach().clone() for p in params]
    before, own = run.everything(), [p.grad for p in params]
    places = list(range(len(params)))
    torch.library.opcheck(
        torch.ops.deepopt.step.default, (number, places, given, gradients, states)
    )
    torch.ops.deepopt.step(number, places, given, gradients, states)
    for x, y in zip(before, run.everything(), strict=True):
        assert torch.equal(x, y)
    assert not any(torch.equal(p, x) for p, x in zip(params, given, strict=True))
    assert float(states[0]) == 1 and all(p.grad is g for p, g in zip(params, own, strict=True))
    with pytest.raises(RuntimeError, match="the optimizer that this step was compiled for"):
        torch.ops.deepopt.step(1 << 40, places, given, gradients, states)


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
            patch.delattr(native.Launch, "send")
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


REPLAYED: dict[str, Rule] = {
    "AdamW": rules.AdamW(lr=0.05),
    "Muon": rules.Muon(lr=0.05),
    "Nest": rules.Nest(lr=0.05, memory=("table", "deep"), period=(1, 2), weight=0.5, width=3),
    "Lion": rules.Lion(lr=0.05, every=2),
}
# Their functions ask the host, or take a number from it, where the slow clock ticks.
PARTLY: dict[str, Rule] = {
    "SOAP": rules.SOAP(lr=0.05, period=3),
    "Shampoo": rules.Shampoo(lr=0.05, period=2),
}


@pytest.mark.parametrize("name", [*REPLAYED, *PARTLY])
def test_replayed_steps_are_the_plain_ones(name):
    rule = (REPLAYED | PARTLY)[name]
    eager, graphed = matrices(rule), matrices(rule, capturable=True)
    graphed.optimizer.capture = graphs = Graphs()
    for i in range(3 * 4):
        # A step without graphs leaves those that there are as they were.
        graphed.optimizer.capturable = i != 8
        stepped(eager, i)
        stepped(graphed, i)
        same(eager, graphed)
    moments = [rule.ticks(i + 1) for i in range(3 * 4)]
    patterns = set(moments)
    if name in PARTLY:
        assert len(graphs.graphs) < len(patterns)
    else:
        assert len(graphs.graphs) == len(patterns)
        assert len(graphs.replayed) == len(moments) - len(patterns) - 1


def test_a_part_with_a_context_is_never_captured():
    rule = rules.PreconditionedMomentum(values="given")
    runs = matrices(rule), matrices(rule, capturable=True)
    runs[1].optimizer.capture = graphs = Graphs()
    for i in range(4):
        for run in runs:
            for p in run.model.parameters():
                run.optimizer.context[p] = {"preconditioner": torch.eye(4) * (1 + i)}
            stepped(run, i)
        same(*runs)
    assert not graphs.graphs


def test_replays_round_at_random_by_step_and_copy_gradients_of_another_layout():
    runs = [
        matrices(rules.AdamW(lr=0.05), capturable=c, rounding="stochastic") for c in (False, True)
    ]
    for run in runs:
        run.model.bfloat16()
        run.optimizer.capture = Graphs()
    for i in range(STEPS):
        for run in runs:
            for p in run.model.parameters():
                p.grad = torch.full_like(p, 1e-3 * (i + 1)).mT.contiguous().mT
            run.optimizer.step()
        same(*runs)
    assert len(runs[1].optimizer.capture.replayed) == STEPS - 1


def test_a_gradient_that_moved_is_refused_before_anything_changes():
    run = matrices(CLOCKS, capturable=True)
    run.optimizer.capture = Graphs()
    for i in range(6):
        stepped(run, i)
    before = run.everything()
    last = list(run.model.parameters())[-1]
    kept, last.grad = last.grad, torch.ones_like(last)
    with pytest.raises(RuntimeError, match=r"that of parameter 1 of group 0 is elsewhere now"):
        run.optimizer.step()
    for x, y in zip(before, run.everything(), strict=True):
        assert torch.equal(x, y)
    last.grad = kept
    run.optimizer.step()


def test_a_load_drops_the_graphs():
    eager, graphed = matrices(CLOCKS), matrices(CLOCKS, capturable=True)
    graphed.optimizer.capture = graphs = Graphs()
    for i in range(12):
        stepped(eager, i)
        stepped(graphed, i)
        if i == 6:
            for run in (eager, graphed):
                run.optimizer.load_state_dict(run.optimizer.state_dict())
            dropped, done = len(graphs.graphs), len(graphs.replayed)
        same(eager, graphed)
    assert min(graphs.replayed[done:]) >= dropped > 0


def test_somebody_elses_graph_is_refused(monkeypatch):
    run = matrices(CLOCKS)
    run.backward(0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="the host counts steps"):
        run.optimizer.step()
    assert not run.optimizer.state


def test_graphs_need_kernels():
    with pytest.raises(ValueError, match="capturable=True needs kernels"):
        made(RULES["M3"], fused=False, capturable=True)
    with pytest.raises(ValueError, match="capturable='yes' must be one of True, False"):
        made(RULES["M3"], capturable="yes")


def scaled(run: Run, scaler: torch.amp.GradScaler, i: int) -> None:
    run.optimizer.zero_grad()
    scaler.scale(run.loss(i)).backward()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_scaled_training_is_unscaled_training(fused, unscale):
    rule = rules.M3(lr=0.05, period=3, eps=1e-3)
    plain, run = made(rule, fused=fused), made(rule, fused=fused)
    # A power of two, so that scaling is exact.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(STEPS):
        plain.backward(i)
        scaled(run, scaler, i)
        if unscale:
            scaler.unscale_(run.optimizer)
            for each in (plain, run):
                nn.utils.clip_grad_norm_(each.model.parameters(), 0.5)
        plain.optimizer.step()
        before = [p.grad.clone() for p in run.model.parameters()]
        scaler.step(run.optimizer)
        scaler.update()
        # A scaler unscales before the step what the step does not unscale itself.
        expected = before if fused or unscale else [p.grad for p in plain.model.parameters()]
        assert all(map(torch.equal, expected, [p.grad for p in run.model.parameters()]))
        same(plain, run)


@pytest.mark.parametrize("fused", [True, None, False])
def test_gradients_stay_scaled_only_where_kernels_were_asked_for(fused):
    """Trainers do not clip what stays scaled, and torch's classes say so of fused=True alone."""
    optimizer = made(RULES["M3"], fused=fused).optimizer
    for each in (optimizer, copy.deepcopy(optimizer)):
        assert getattr(each, "_step_supports_amp_scaling", False) == (fused is True)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_an_infinite_gradient_leaves_out_the_step_and_lowers_the_scale(fused, unscale):
    run = made(RULES["M3"], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(STEPS):
        before = run.everything()
        scaled(run, scaler, i)
        bad = i in (0, 3)
        if bad:
            run.model[0].bias.grad[1] = torch.inf
        if unscale:
            scaler.unscale_(run.optimizer)
        scaler.step(run.optimizer)
        scaler.update()
        after = run.everything()
        assert bad == (len(before) == len(after) and all(map(torch.equal, before, after)))
    assert scaler.get_scale() == 1024.0 / 4
    steps = {float(s["step"]) for s in run.optimizer.state.values()}
    assert steps == {STEPS - 2}
