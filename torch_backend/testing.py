"""What a rule promises of its torch optimizer, for `deepopt.testing`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from deepopt.oracle import Array, Oracle, canonical
from deepopt.rule import Rule, scalar_names
from deepopt.testing import PLAIN, Draw, Limits, Prove, Stream, difference, shapes_of, streams
from torch_backend.optimizer import Optimizer


def _leaves(weights: Sequence[Array]) -> list[Any]:
    return [torch.nn.Parameter(torch.tensor(w)) for w in weights]


def _stepped(optimizer: Any, params: Sequence[Any], gradients: Sequence[Array]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = torch.tensor(g)
    optimizer.step()


def _numbers(params: Sequence[Any]) -> list[Array]:
    return [p.detach().numpy().copy() for p in params]


def _several(draw: Draw) -> list[Stream]:
    return draw(st.lists(streams(4, 4, PLAIN), min_size=2, max_size=4))


def _torch_is_the_oracle(rule: Rule, limits: Limits, draw: Draw) -> None:
    shape = draw(st.sampled_from([x for x in shapes_of(rule) if np.prod(x)]))
    w, gradients = draw(streams(3, 3, PLAIN)).arrays(shape)
    (p,) = params = _leaves([w])
    optimizer, oracle = Optimizer(params, rule), Oracle(rule, [w])
    for g in gradients:
        _stepped(optimizer, params, [g])
        (w,) = oracle.step([w], [g])
    apart = difference(p.detach(), w)
    assert apart <= limits.tolerance, f"torch and the oracle are {apart:.1e} apart"
    for k, slot in rule.slots(canonical(shape)).items():
        assert optimizer.state[p][k].numel() == oracle.state[0][k].size == np.prod(slot.shape)


def _scheduled(rule: Rule, limits: Limits, draw: Draw) -> None:
    names = [k for k in scalar_names(type(rule)) if k != "lr"]
    scalar = draw(st.sampled_from(names))
    # At a floor or an eps of nearly nothing rounding noise is divided by itself.
    shares = draw(st.lists(st.floats(0.5, 1.0), min_size=6, max_size=6))
    rates = draw(st.lists(st.floats(0.0, 0.1), min_size=6, max_size=6))
    w, gradients = draw(streams(6, 6, PLAIN)).arrays((3, 4))
    (p,) = params = _leaves([w])
    optimizer, oracle = Optimizer(params, rule), Oracle(rule, [w])
    for g, share, lr in zip(gradients, shares, rates, strict=True):
        value: Any = getattr(rule, scalar)
        some: Any = [x * share for x in value] if isinstance(value, tuple) else value * share
        now = {"lr": lr, scalar: tuple(some) if isinstance(value, tuple) else some}
        optimizer.param_groups[0].update(now)
        _stepped(optimizer, params, [g])
        (w,) = oracle.step([w], [g], **now)
        apart = difference(p.detach(), w)
        assert apart <= limits.tolerance, f"with {now} the two are {apart:.1e} apart"


def _batched(rule: Rule, limits: Limits, draw: Draw) -> None:
    both = [x.arrays((3, 4)) for x in _several(draw)]
    together = _leaves([w for w, _ in both])
    batch = Optimizer(together, rule)
    alone = [_leaves([w]) for w, _ in both]
    singles = [Optimizer(p, rule) for p in alone]
    for t in range(4):
        _stepped(batch, together, [g[t] for _, g in both])
        for optimizer, p, (_, g) in zip(singles, alone, both, strict=True):
            _stepped(optimizer, p, [g[t]])
    for a, (b,) in zip(_numbers(together), map(_numbers, alone), strict=True):
        assert difference(a, b) <= limits.tolerance


def _grouped(rule: Rule, limits: Limits, draw: Draw) -> None:
    drawn = _several(draw)
    shapes = [(3, 4), (4, 4), (3, 4), (6, 2)][: len(drawn)]
    both = [x.arrays(shape) for x, shape in zip(drawn, shapes, strict=True)]
    indices = draw(st.permutations(range(len(both))))
    cut = draw(st.integers(1, 3))
    one, two = (_leaves([w for w, _ in both]) for _ in range(2))
    shuffled = [two[i] for i in indices]
    parts = [x for x in (shuffled[:cut], shuffled[cut:]) if x]
    plain, split = Optimizer(one, rule), Optimizer([{"params": x} for x in parts], rule)
    for t in range(4):
        _stepped(plain, one, [g[t] for _, g in both])
        _stepped(split, two, [g[t] for _, g in both])
    for a, b in zip(_numbers(one), _numbers(two), strict=True):
        assert difference(a, b) <= limits.tolerance


def _bit_equal(rule: Rule, limits: Limits, draw: Draw) -> None:
    rule = replace(rule, every=draw(st.integers(1, 2)))
    both, ends = [x.arrays((3, 4)) for x in _several(draw)], list[list[Any]]()
    for _ in range(2):
        params = _leaves([w for w, _ in both])
        optimizer = Optimizer(params, rule)
        for t in range(4):
            _stepped(optimizer, params, [g[t] for _, g in both])
            for p, (_, g) in zip(params, both, strict=True):
                np.testing.assert_array_equal(p.grad, g[t])
        ends.append([*params, *(x for p in params for x in _state(optimizer, p))])
    assert all(map(torch.equal, *ends))


def _state(optimizer: Any, p: Any) -> list[Any]:
    return [optimizer.state[p][k] for k in sorted(optimizer.state[p])]


def _resumed(rule: Rule, limits: Limits, draw: Draw) -> None:
    rule = replace(rule, every=draw(st.integers(1, 2)), stagger=draw(st.booleans()))
    stop = draw(st.integers(0, 3))
    both = [x.arrays((3, 4)) for x in _several(draw)]
    params = _leaves([w for w, _ in both])
    optimizer = Optimizer(params, rule)
    for t in range(stop):
        _stepped(optimizer, params, [g[t] for _, g in both])
    again = _leaves(_numbers(params))
    resumed = Optimizer(again, rule)
    resumed.load_state_dict(optimizer.state_dict())
    for t in range(stop, 4):
        _stepped(optimizer, params, [g[t] for _, g in both])
        _stepped(resumed, again, [g[t] for _, g in both])
    assert all(map(np.array_equal, _numbers(params), _numbers(again)))
    for p, q in zip(params, again, strict=True):
        assert list(optimizer.state[p]) == list(resumed.state[q])
        assert all(map(torch.equal, _state(optimizer, p), _state(resumed, q)))


CHECKS: dict[str, Prove] = {
    "torch is the oracle": _torch_is_the_oracle,
    "schedules of any scalar equal the oracle": _scheduled,
    "a batch is each alone": _batched,
    "order and groups do not matter": _grouped,
    "two torch runs are bit equal and gradients are kept": _bit_equal,
    "a resumed run is bit equal": _resumed,
}
