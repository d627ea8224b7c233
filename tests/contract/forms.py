"""The forms of a step against each other, and the steps that others take: scalers, tracers."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import swap_in_optimizer_params_and_state
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import torch_backend.fused
import torch_backend.plain
from torch_backend import Optimizer

from .subject import (
    Subject,
    check,
    equal,
    everyone,
    everything,
    feed,
    give,
    parameters,
)

# Relative and absolute, after three steps: the same arithmetic in another order, which the
# iterations of Newton-Schulz amplify; narrow weights may round to the other neighbour.
CLOSE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-11),
    torch.float32: (2e-3, 2e-5),
    torch.bfloat16: (2.0**-6, 2.0**-8),
    torch.float16: (2.0**-9, 2.0**-10),
}


def near(one: Optimizer, two: Optimizer, dtype: torch.dtype) -> None:
    """Assert that parameters and states agree key by key; bases, whose signs are free, in shape."""
    a, b = everything(one), everything(two)
    free = [k for k in a if k[1].endswith("_basis")]
    assert [a.pop(k).shape for k in free] == [b.pop(k).shape for k in free]
    rtol, atol = CLOSE[dtype]
    equal(a, b, rtol=rtol, atol=atol)


def starting(dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters of which some are alike, so that they can be stacked."""
    return [nn.Parameter(p.detach() + i) for i in range(3) for p in parameters(dtype)]


@check()
def matches_the_for_loop(s: Subject) -> None:
    """test_foreach_matches_forloop, test_fused_matches_forloop, compiled parity: key by key."""
    configurations = s.info.optim_inputs_func(device="cpu")
    for x in configurations if s.mode in "pf" else configurations[2:4]:
        wide = s.mode == "f" and x.desc == "weight_decay"
        for dtype in [*CLOSE] if wide else [torch.float64 if s.mode == "p" else torch.float32]:
            form = {"foreach": True} if s.mode == "p" else {}
            optimizer = s.make(starting(dtype), **form, **x.kwargs)
            loop = Subject(s.info, "p").make(starting(dtype), foreach=False, **x.kwargs)
            for i in range(3):
                give(optimizer, i)
                give(loop, i)
                s.step(optimizer)
                feed(loop)
                loop.step()
            near(optimizer, loop, dtype)


class Memory(TorchDispatchMode):
    """The most bytes that are held at a time by tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        old = {x.untyped_storage()._cdata for x in given if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is None or storage._cdata in old | self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


@check(c="its temporaries are those of the one operator that it calls")
def peak_memory(s: Subject) -> None:
    """test_peak_memory_foreach: temporaries do not grow with the number of parameters."""
    peaks: list[int] = []
    caps = torch_backend.plain.BATCH, torch_backend.fused.SLAB
    torch_backend.plain.BATCH, torch_backend.fused.SLAB = {"cpu": 256}, {"cpu": 1 << 12}
    try:
        for count in (16, 32):
            optimizer = s.make([nn.Parameter(torch.randn(8, 8)) for _ in range(count)])
            s.steps(optimizer, 3)
            with Memory() as memory:
                s.step(optimizer)
            peaks.append(memory.peak)
    finally:
        torch_backend.plain.BATCH, torch_backend.fused.SLAB = caps
    assert peaks[1] <= 1.1 * peaks[0], peaks


ALONE = "`fused` does not support `differentiable`, in torch's words; see the row of flags"


def differentiated(s: Subject, names: list[str], p: Tensor, g: Tensor, lr: Tensor, *state: Tensor):
    """What a step makes of copies of a parameter and its state, as functions of everything."""
    p = p.clone()
    p.grad = g
    optimizer = s.info.optim_cls([p], lr=lr, differentiable=True, **differentiable(s))
    for name, x in zip(names, state, strict=True):
        # Matrices that are symmetric are known by one triangle to their decomposition.
        square = x.ndim > 1 and x.shape[-1] == x.shape[-2] and torch.equal(x, x.mT)
        optimizer.state[p][name] = (x + x.mT) / 2 if square else x.clone()
    s.step(optimizer)
    return p, *(x for x in optimizer.state[p].values() if x.requires_grad)


def differentiable(s: Subject) -> dict[str, Any]:
    hidden = {k: 2 for k in ("width",) if k in s.rule.__annotations__}
    return {k: v for k, v in s.options.items() if k == "period"} | hidden


@check(f=ALONE, g=ALONE)
def gradients_through_a_step(s: Subject) -> None:
    """TestDifferentiableOptimizer: gradcheck by parameter, gradient, learning rate and state."""
    p = torch.randn(3, 2, dtype=torch.float64)
    optimizer = s.info.optim_cls([nn.Parameter(p.clone())], lr=0.1, **differentiable(s))
    Subject(s.info, "p").steps(optimizer, 5)
    (state,) = optimizer.state.values()
    state = {k: x.clone() for k, x in state.items()}
    own = [x.requires_grad_() for k, x in state.items() if k != "step"]
    g = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    names = [k for k in state if k != "step"]

    def step(*given: Tensor) -> Any:
        return differentiated(s, ["step", *names], *given[:3], state["step"], *given[3:])

    inputs = (p.requires_grad_(), g, rate, *own)
    if s.mode == "c":
        # The compiler leaves the step to autograd: what flows is what flows without it.
        weights = torch.randn_like(p)
        plain = Subject(s.info, "p")
        found = [
            torch.autograd.grad(
                (
                    differentiated(x, ["step", *names], p, g, rate, state["step"], *own)[0]
                    * weights
                ).sum(),
                (p, g, rate),
            )
            for x in (s, plain)
        ]
        assert all(map(torch.equal, *found)) and bool(found[0][0].any())
        return
    assert gradcheck(step, inputs, fast_mode=True)


@check(f=ALONE, g=ALONE)
def differentiable_equals_plain(s: Subject) -> None:
    """Out of place under autograd, several steps long, is the same arithmetic."""
    start = parameters(torch.float64)
    moving = [p.detach().clone().requires_grad_() * 1.0 for p in start]
    optimizer = s.info.optim_cls(moving, differentiable=True, **differentiable(s))
    plain = s.info.optim_cls(start, fused=False, **differentiable(s))
    assert {id(p) for p in everyone(optimizer)} == {id(p) for p in moving}
    for i in range(3):
        for p in moving:
            p.retain_grad()
            p.grad = torch.zeros_like(p)
        give(optimizer, i)
        give(plain, i)
        s.step(optimizer)
        feed(plain)
        plain.step()
    equal(optimizer, plain, rtol=1e-12, atol=1e-13)
    assert all(p.grad_fn is not None for p in moving)


@check()
def scaled_gradients(s: Subject) -> None:
    """GradScaler over the step: unscaled by it, exactly as if nothing had been scaled."""
    plain, run = s.make(parameters(), lr=0.05), s.make(parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for i in range(3):
        give(plain, i)
        give(run, i)
        for p in everyone(run):
            p.grad.mul_(scaler.get_scale())
        if i == 1:
            everyone(run)[0].grad.view(-1)[0] = torch.inf
            before = everything(run)
        # The scaler calls `step` of what it is given; what it knows stands in two attributes.
        scaler.step(_Stepping(s, run))
        scaler.update()
        if i == 1:
            equal(run, before)
        else:
            s.eager.step(plain)
    near(run, plain, torch.float32)
    assert scaler.get_scale() == 512.0 and {float(x["step"]) for x in run.state.values()} == {2.0}


class _Stepping:
    """An optimizer whose step is taken in a subject's mode."""

    _step_supports_amp_scaling = True

    def __init__(self, s: Subject, optimizer: Optimizer) -> None:
        object.__setattr__(self, "own", (s, optimizer))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own[1], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own[1], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.own[1], name)

    def step(self) -> Any:
        s, optimizer = self.own
        return s.step(optimizer)


@check()
def nothing_moves_where_inf_was_found(s: Subject) -> None:
    """test_fused_does_not_step_if_foundinf: neither parameters nor states, nor the step."""
    optimizer = s.make(parameters())
    s.steps(optimizer, 1)
    before = everything(optimizer)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    s.steps(optimizer, 2, 1)
    equal(optimizer, before)
    optimizer.found_inf = torch.tensor(0.0)
    s.steps(optimizer, 1, 1)
    assert float(optimizer.state[everyone(optimizer)[0]]["step"]) == 2


@check(c="make_fx is a compiler itself")
def stateless_step(s: Subject) -> None:
    """swap_in_optimizer_params_and_state: others' tensors are stepped, at once and in a graph."""
    live, expected = s.make(parameters()), s.make(parameters())
    for x in (live, expected):
        s.steps(x, 1)
    start, names = everything(live), [str(i) for i in range(len(everyone(live)))]
    s.steps(expected, 2, 1)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        imagined = pytree.tree_map_only(Tensor, fake.from_tensor, _own(live, names))

    def step(params: dict[str, Tensor], gradients: dict[str, Tensor], state: dict) -> Any:
        with swap_in_optimizer_params_and_state(live, params, state):
            for name, p in params.items():
                p.grad = gradients[name]
            if not isinstance(next(iter(params.values())), FakeTensor):
                feed(live)
            live.step()
        return params, state

    feed(live)
    graph = make_fx(step)(*imagined)
    assert sum(node.target is torch.ops.deepopt.step.default for node in graph.graph.nodes) == 1
    for run in (step, graph):
        params, _, state = given = _own(live, names)
        for i in (1, 2):
            give(live, i)
            given[1].update({k: p.grad.clone() for k, p in zip(names, everyone(live), strict=True)})
            run(*given)
        for i, (name, p) in enumerate(zip(names, everyone(expected), strict=True)):
            assert torch.equal(params[name], p), name
            assert all(torch.equal(x, state["state"][i][k]) for k, x in expected.state[p].items())
        equal(live, start)


@check(c="fake tensors are a compiler's")
def imagined_steps(s: Subject) -> None:
    """Under FakeTensorMode, where memory is estimated: the states of a real step, no numbers."""
    real = s.make(parameters())
    s.steps(real, 1)
    with FakeTensorMode():
        imagined = s.make([nn.Parameter(torch.randn(p.shape)) for p in parameters()])
        for p in everyone(imagined):
            p.grad = torch.zeros_like(p)
        for _ in range(2):
            imagined.step()
    for p, q in zip(everyone(real), everyone(imagined), strict=True):
        shapes = [
            {k: (x.shape, x.dtype) for k, x in o.state[w].items()}
            for o, w in ((real, p), (imagined, q))
        ]
        assert shapes[0] == shapes[1]
        assert {*map(type, imagined.state[q].values())} == {FakeTensor}


def _own(optimizer: Optimizer, names: list[str]) -> tuple[dict, dict, dict]:
    """Copies of an optimizer's parameters, gradients and state, as a stateless step takes them."""
    both = zip(names, everyone(optimizer), strict=True)
    pairs = [(k, p.detach().clone(), p.grad.clone()) for k, p in both]
    state = pytree.tree_map_only(Tensor, torch.clone, optimizer.state_dict())
    return {k: p for k, p, _ in pairs}, {k: g for k, _, g in pairs}, state


@check()
def hooks_of_steps(s: Subject) -> None:
    """test_step_pre_hook, test_step_post_hook, test_step_all_hooks: in torch's order."""
    called: list[str] = []
    optimizer = s.make(parameters())
    note = {
        "all before": register_optimizer_step_pre_hook,
        "before": optimizer.register_step_pre_hook,
        "after": optimizer.register_step_post_hook,
        "all after": register_optimizer_step_post_hook,
    }
    handles = [f(lambda *_, k=k: called.append(k)) for k, f in note.items()]
    try:
        give(optimizer, 0)
        feed(optimizer)
        # A compiled step is the whole of it: hooks run with the call, not in the graph.
        s.step(optimizer)
    finally:
        for handle in handles:
            handle.remove()
    assert called == [*note]
    s.steps(optimizer, 1, 1)
    assert called == [*note]
