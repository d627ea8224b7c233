"""Steps that others take: gradient scalers, stateless callers, tracers, hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import swap_in_optimizer_params_and_state
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils import _pytree as pytree

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
    equal(run, plain, rtol=1e-4, atol=1e-6)
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
