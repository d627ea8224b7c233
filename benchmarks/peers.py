"""Who takes part: our rules, those of torch and optax, and of other libraries where installed."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import torch_backend
from benchmarks.device import Setting
from benchmarks.race import Contender
from torch_backend import fused

LR = 1e-2
Fresh = Callable[[], list[Tensor]]


def of_torch(
    name: str,
    make: Callable[[Any], torch.optim.Optimizer],
    params: list[Tensor],
    compiled: bool = False,
    **facts: Any,
) -> Contender:
    """An optimizer of torch's interface."""
    optimizer = make(params)
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    return Contender(name, step, lambda: params, optimizer, **facts)


def ours(name: str, params: list[Tensor], facts: Any = None, **options: Any) -> Contender:
    """The rule of ours that is the first word of the name; facts: the rest of the contender."""
    make = partial(getattr(torch_backend, name.split(",")[0]), lr=LR, **options)
    return of_torch(name, make, params, **(facts or {}))


def in_jax(s: Setting, rule: str, fresh: Fresh, **facts: Any) -> Iterator[Contender]:
    """adamw or muon of optax and of ours, under jit with weights and state donated."""
    import jax
    import jax.numpy as jnp
    import optax

    import jax_backend

    # JAX has as many threads as there are cores where it starts.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[: s.threads])
    jax.devices()
    os.sched_setaffinity(0, cores)

    def contender(name: str, transform: Any) -> Contender:
        def step(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = transform.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state

        jitted = jax.jit(step, donate_argnums=(0, 1))
        params = fresh()
        weights, gradients = (
            [jnp.array(x.numpy()) for x in xs]
            for xs in ([p.detach() for p in params], [p.grad for p in params if p.grad is not None])
        )
        now: list[Any] = [weights, transform.init(weights)]

        def run() -> None:
            now[:] = jax.block_until_ready(jitted(*now, gradients))

        return Contender(name, run, lambda: [torch.from_dlpack(x) for x in now[0]], **facts)

    if rule == "adamw":
        yield contender("AdamW, in JAX", jax_backend.adamw(LR, weight_decay=0.01))
        yield contender("optax adamw", optax.adamw(LR, weight_decay=0.01))
    else:
        yield contender("Muon, in JAX", jax_backend.muon(LR, momentum=0.95))
        yield contender("optax muon", optax.contrib.muon(LR))


# The momentum of others' rules, where each library has it; dion is not in the package registry.
ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.01}
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "AdamW": {"heavyball": {**ADAMW, "consume_grad": False}, "pytorch_optimizer": ADAMW},
    "Muon": {
        "heavyball": {"betas": (0.95, 0.95), "consume_grad": False},
        "pytorch_optimizer": {"momentum": 0.95},
        "dion": {"mu": 0.95, "weight_decay": 0.0, "nesterov": True},
    },
}


def others(rule: str, fresh: Fresh, **facts: Any) -> Iterator[Contender]:
    """The rule of other libraries, where they are installed; what fails is named on stderr."""

    def make(library: str, params: Any) -> Any:
        if (library, rule) == ("pytorch_optimizer", "Muon"):
            params = [{"params": params, "use_muon": True}]
        return getattr(import_module(library), rule)(params, lr=LR, **OTHERS[rule][library])

    for library in filter(find_spec, OTHERS[rule]):
        try:
            of_torch(library, partial(make, library), fresh()).step()
        except Exception as error:
            print(f"{rule} of {library} takes no part: {error!r}"[:300], file=sys.stderr)
        else:
            yield of_torch(f"{library} {rule}", partial(make, library), fresh(), **facts)


def copy(s: Setting) -> Contender:
    """A copy of many bytes: each is read once and written once."""
    size = 1 << (20 if s.quick else 32 if s.device == "cuda" else 28)
    source, target = (torch.ones(size, dtype=torch.uint8, device=s.device) for _ in range(2))
    return Contender("copy", lambda: target.copy_(source), list, bytes=2.0 * size)


def gemm(s: Setting, dtype: torch.dtype) -> Contender:
    """A product of square matrices."""
    n = 64 if s.quick else 8192 if s.device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=s.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Contender("GEMM", lambda: torch.mm(a, b, out=out), list, flops=2.0 * n**3)


def region_bytes(optimizer: Any) -> float:
    """What the kernels of a first step must move: each operand of a region, once each way."""
    parts = [p for x in optimizer._works.values() for p in next(iter(x.variants.values()))]
    total = 0.0
    for bucket in (b for part in parts for b in part.buckets):
        for region in bucket.plan.regions:
            names = [x for x in (*region.loads, *region.stores) if x not in region.singles]
            each = sum(fused.DTYPE[bucket.storage[x]].itemsize for x in names)
            total += each * region.size * bucket.entries
    return total


def matrix_functions() -> Callable[[], tuple[float, float]]:
    """Watch all matrix functions: what they took since the last call, as `Contender.less`."""
    inner, spent = fused._Functions.run, [0.0, 0.0]
    clocks = time.perf_counter, time.process_time

    def run(self: Any, call: Any) -> None:
        start = [clock() for clock in clocks]
        inner(self, call)
        spent[:] = [x + 1e3 * (f() - t) for x, f, t in zip(spent, clocks, start, strict=True)]

    def taken() -> tuple[float, float]:
        wall, cpu = spent
        spent[:] = 0.0, 0.0
        return wall, cpu

    fused._Functions.run = run
    return taken
