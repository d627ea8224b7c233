"""Training steps in torch and in JAX, under one schedule, with any optimizer."""

import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

from deepopt import rules
from examples.compare.contenders import ONLY_MATRICES, Contender
from examples.compare.problem import Problem, paths_of
from torch_backend import Optimizer

BETAS = (0.9, 0.95)  # of the AdamW that steps the rest


class Clock:
    """Seconds of steps; the first, in which compilers run, counts as much as the second."""

    def __init__(self, read: Callable[[], float] = time.perf_counter) -> None:
        self.total, self._read, self._count, self._begun = 0.0, read, 0, 0.0

    def __enter__(self) -> None:
        self._begun = self._read()

    def __exit__(self, *error: object) -> None:
        self._count += 1
        if self._count > 1:
            self.total += (self._read() - self._begun) * (2 if self._count == 2 else 1)


class Aside:
    """Numbers that an optimizer draws, apart from the task's: its batches are the same for all."""

    def __init__(self) -> None:
        self._own = self._task = torch.get_rng_state()

    def __enter__(self) -> None:
        self._task = torch.get_rng_state()
        torch.set_rng_state(self._own)

    def __exit__(self, *error: object) -> None:
        self._own = torch.get_rng_state()
        torch.set_rng_state(self._task)


def factor(step: int, problem: Problem) -> float:
    """Of the learning rate at a step, from 0."""
    steps, schedule = problem.total, problem.schedule
    warm = round(problem.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warm) / max(1, steps - warm))
    return 1 - done if schedule == "linear" else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


class Torch:
    """An `nn.Module` in training."""

    def __init__(
        self,
        problem: Problem,
        contender: Contender,
        lr: float,
        settings: Mapping[str, Any],
        rest: float | None,
    ) -> None:
        self._problem, self._model = problem, problem.model
        # A task may train with some modules as in evaluation, such as frozen statistics.
        self._training = {module: module.training for module in self._model.modules()}
        self._aside = Aside()
        with self._aside:
            self.optimizers = optimizers(self._model, contender, lr, settings, rest)
        self._schedulers = [
            LambdaLR(x, lambda step: factor(step, problem)) for x in self.optimizers
        ]
        self.clock = Clock()
        self._mode("train")
        self._scored = False
        cuda = [p.device for p in self._model.parameters() if p.device.type == "cuda"]
        self.device = cuda[0] if cuda else None
        if self.device is not None:
            gc.collect()  # what trials before it held is not this one's
            torch.cuda.reset_peak_memory_stats(self.device)

    def step(self, batch: Any) -> float:
        if self._scored:
            for module, training in self._training.items():
                module.training = training
            self._mode("train")
            self._scored = False
        loss = self._problem.loss(self._model, batch)
        value = loss.item()
        if not math.isfinite(value):
            return value
        loss.backward()
        clip = math.inf if self._problem.clip is None else self._problem.clip
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), clip)
        if not math.isfinite(norm.item()):  # which also waits for a GPU
            return math.nan
        with self._aside, self.clock:
            for optimizer in self.optimizers:
                optimizer.step()
            if self.device is not None:
                torch.cuda.synchronize(self.device)
        for optimizer, scheduler in zip(self.optimizers, self._schedulers, strict=True):
            scheduler.step()
            optimizer.zero_grad()
        return value

    def model(self) -> nn.Module:
        self._model.eval()
        self._mode("eval")
        self._scored = True
        return self._model

    def state_bytes(self) -> int:
        held = {
            x.data_ptr(): x.nbytes
            for optimizer in self.optimizers
            for x in tree_leaves(dict(optimizer.state))
            if isinstance(x, Tensor)
        }
        return sum(held.values())

    def parameter_bytes(self) -> int:
        return sum(p.nbytes for p in self._model.parameters())

    def peak_bytes(self) -> int | None:
        return None if self.device is None else torch.cuda.max_memory_allocated(self.device)

    def _mode(self, name: str) -> None:
        # Schedule-free optimizers keep one set of weights to train and another to evaluate.
        for optimizer in self.optimizers:
            switch = getattr(optimizer, name, None)
            if callable(switch):
                switch()


def optimizers(
    model: nn.Module,
    contender: Contender,
    lr: float,
    settings: Mapping[str, Any],
    rest: float | None,
) -> list[torch.optim.Optimizer]:
    """The contender for hidden matrices and AdamW at `rest` for all else, or it for everything.

    What is a hidden matrix is the same for all contenders: the model's own `hidden_matrices()`, as
    in the Hope example, or what a matrix rule takes by routing. Without `rest` a rule of matrices
    leaves the others to its fallback, AdamW with its own rate and decay, and so does torch's Muon.
    """
    views = hidden(model)
    matrices = [p for parameters in views.values() for p in parameters]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    make = contender.make(lr, settings)
    rule = make() if contender.kind == "rule" else None
    takes_all = rule.domain == "any" if rule else contender.name not in ONLY_MATRICES
    if not matrices and not (takes_all and rest is None):
        raise ValueError(f"{contender.label}: the model has no hidden matrices to step")
    if rule is not None:
        if rest is None and (takes_all or not hasattr(model, "hidden_matrices")):
            return [Optimizer(model, rule)]
        needs_layers = bool(rule.context((2, 2)))
        if needs_layers:  # the module tells which they are; a matrix outside of one has no inputs
            return [Optimizer(model, rule, fallback=None if rest is None else adamw(rest))]
        groups: list[dict[str, Any]] = [
            {"params": p, "seen_as": view} for view, p in views.items() if p
        ]
        if rest is None:
            return [Optimizer([*groups, {"params": others, "use_fallback": True}], rule)]
        groups = [{**group, "rule": rule} for group in groups]
        return [Optimizer([*groups, {"params": others, "rule": adamw(rest)}])]
    if rest is None and takes_all:
        return [make(list(model.parameters()))]
    own = make(matrices)
    if not others:
        return [own]
    if rest is None:
        decay = own.param_groups[0]["weight_decay"]
        return [own, torch.optim.AdamW(others, lr=lr, weight_decay=decay)]
    return [own, torch.optim.AdamW(others, lr=rest, betas=BETAS, weight_decay=0.0)]


def adamw(lr: float) -> rules.AdamW:
    return rules.AdamW(lr=lr, betas=BETAS, weight_decay=0.0)


def hidden(model: nn.Module) -> dict[str, list[Tensor]]:
    """Hidden matrices by the view that a matrix rule should have of them."""
    own = getattr(model, "hidden_matrices", None)
    if own is not None:
        return own()
    named = dict(model.named_parameters())
    try:
        routes = Optimizer(model, rules.Muon()).routing.routes
    except ValueError:  # nothing but vectors
        return {}
    taken = [named[r.name] for r in routes if r.rule == "Muon"]
    found: dict[str, list[Tensor]] = {}
    for p in taken:
        found.setdefault("flatten" if p.ndim != 3 else "stacked", []).append(p)
    return found


class Jax:
    """A tree of arrays in training."""

    def __init__(
        self,
        problem: Problem,
        contender: Contender,
        lr: float,
        settings: Mapping[str, Any],
        rest: float | None,
    ) -> None:
        import jax
        import optax

        import jax_backend
        from jax_backend.transform import fallback_of

        total = problem.total
        factors = jax.numpy.asarray([factor(i, problem) for i in range(total)])

        def at(rate: float) -> Any:
            return lambda count: rate * factors[jax.numpy.minimum(count, total - 1)]

        if contender.kind == "rule":
            rule = contender.make(lr, settings)()
            if rule.context((2, 2)):
                raise ValueError(
                    f"{contender.label} needs the inputs of layers, which studies record in torch "
                    "only: a task whose model is an nn.Module"
                )
            own = jax_backend.transform(rule, lr=at(lr))
            takes_all = rule.domain == "any"
            other = None if takes_all else jax_backend.transform(fallback_of(rule, None), lr=at(lr))
        else:
            own = contender.make(at(lr), settings)()
            takes_all, decay = (
                contender.name not in ONLY_MATRICES,
                settings.get("weight_decay", 0.0),
            )
            other = None if takes_all else optax.adamw(at(lr), weight_decay=decay)
        if rest is not None:
            other = optax.adamw(at(rest), *BETAS, weight_decay=0.0)
        if other is not None:
            labels = jax.tree.map(
                lambda path, x: "own" if x.ndim > 1 and path not in problem.outside else "rest",
                *(paths_of(problem.model), problem.model),
            )
            if "own" not in jax.tree.leaves(labels):
                raise ValueError(f"{contender.label}: the model has no hidden matrices to step")
            own = optax.partition({"own": own, "rest": other}, labels)
        clip = [] if problem.clip is None else [optax.clip_by_global_norm(problem.clip)]
        self.device: torch.device | None = None
        self._transform = optax.chain(*clip, own)
        self._model = problem.model
        self._state = self._transform.init(self._model)

        def slope(model: Any, batch: Any) -> Any:
            loss, gradients = jax.value_and_grad(problem.loss)(model, batch)
            finite = [jax.numpy.isfinite(g).all() for g in jax.tree.leaves(gradients)]
            return loss, jax.numpy.isfinite(loss) & jax.numpy.stack(finite).all(), gradients

        self._loss = jax.jit(slope)

        def update(model: Any, state: Any, gradients: Any) -> Any:
            updates, state = self._transform.update(gradients, state, model)
            return optax.apply_updates(model, updates), state

        self._update, self._jax = jax.jit(update), jax
        self.clock = Clock()

    def step(self, batch: Any) -> float:
        loss, finite, gradients = self._loss(self._model, batch)
        if not finite:
            return math.nan
        with self.clock:
            found = self._update(self._model, self._state, gradients)
            self._model, self._state = self._jax.block_until_ready(found)
        return float(loss)

    def model(self) -> Any:
        return self._model

    def state_bytes(self) -> int:
        return sum(x.nbytes for x in self._jax.tree.leaves(self._state) if hasattr(x, "nbytes"))

    def parameter_bytes(self) -> int:
        return sum(x.nbytes for x in self._jax.tree.leaves(self._model))

    def peak_bytes(self) -> int | None:
        return None
