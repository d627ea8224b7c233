"""Rules of deepopt as `torch.optim.Optimizer`s: groups, state, clocks and the step."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from itertools import chain, count
from math import prod
from numbers import Integral, Real
from typing import (
    Any,
    Generic,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeAlias,
    cast,
    get_args,
    overload,
)

import torch
from torch import Tensor, nn

from deepopt.algebra import Program
from deepopt.rule import (
    Rule,
    check_hyperparameters,
    check_scalars,
    checked_rule,
    hints,
    scalar_names,
    trace,
    turns,
)
from deepopt.rules import DESCENT, SGD, AdamW, AMSGrad
from torch_backend.algebra import Compiled, Torch
from torch_backend.compiled import announces_itself, handle, trace_step
from torch_backend.fused import LOW_HALF, How, Precision, Rounding
from torch_backend.graphs import Capture, cuda, refuse_foreign
from torch_backend.kernels import native
from torch_backend.layers import Context, Recorder, layers_of
from torch_backend.routing import (
    Named,
    Route,
    Routing,
    check_view,
    needs_gram,
    of_iterable,
    route,
)
from torch_backend.seen import Seen, arithmetic, remember, seen_of
from torch_backend.work import Moment, Work, lay_out, say_once

P = ParamSpec("P")
Parameters: TypeAlias = nn.Module | Iterable[Any]
OnNonfinite: TypeAlias = Literal["propagate", "skip", "raise"]

# The most numbers that same-shape matrices are stacked into at a time: what a CPU's cache holds,
# and what keeps an accelerator busy.
BATCH = {"cpu": 1 << 18}
BATCH_ELSEWHERE = 1 << 24
# With the group and the step, of the random numbers that round weights.
KEY = 0x64656570
# Keys of a group that belong to the binding, and those that schedulers and trainers leave there.
OWN = {"params", "param_names", "rule", "seen_as", "maximize"}
FOREIGN = {*"initial_lr base_lr max_lr min_lr base_momentum max_momentum swa_lr name".split()}
# Keys of torch's optimizers: how they compute, and what must have this value to mean nothing here.
TORCH = {"foreach", "capturable", "differentiable"}
NEUTRAL = {"amsgrad": False, "centered": False, "dampening": 0, "momentum": 0, "nesterov": False}
# The attributes that a copy or a pickle keeps beside those of torch's base class.
KEPT = (
    *("_rule", "_fallback", "_views", "_strict", "_rules", "_why", "_tensors"),
    *("_recorder", "on_nonfinite", "skipped_steps", "fused", "precision", "rounding"),
    "capturable",
)


class Optimizer(torch.optim.Optimizer):
    """Steps parameters by rules of deepopt, each group by its own.

    params: a module, an iterable of tensors or of (name, tensor) pairs, or of group dicts. A group
        may name its `rule` and override any hyperparameter; groups hold plain numbers, so learning
        rate schedulers and checkpoints work on them.
    rule: of groups that name none; AdamW by default.
    fallback: the rule of parameters that a matrix rule cannot take, and of embeddings and output
        heads where a module or names tell them apart (bare tensors cannot be told apart: give
        embeddings a group of their own). By default AdamW with the group's lr and weight decay,
        or SGD where the rule is one of descent, whose lr is in another unit.
    views: how tensors are seen as matrices, by name pattern: {"*.qkv.weight": "split:3"}; a group
        may say `seen_as` for all of its tensors. See `routing.matrices`. Print
        `optimizer.routing` to see what was decided.
    strict: raise where the routing would have to guess, or to use a fallback that was not given.
    maximize: step uphill.
    on_nonfinite: "propagate" NaN and Inf gradients into the parameters as torch does, "skip" the
        step (counted in `skipped_steps`), or "raise" naming the parameter.

    State is one flat dict of tensors per parameter, with the names of the rule's memories, in
    float32 at least; each step runs in that precision and rounds once.
    What a rule needs beyond gradients stands in `context`. A "gram" is recorded where the rule got
    a module; copies and pickles of the optimizer record nothing until they are told to `record`.
    Raises ValueError or TypeError that quote what was given; then nothing has changed.
    """

    # A scaler of gradients tells the step what it knows in `grad_scale` and `found_inf`, which it
    # sets and deletes again; it multiplies the one that it finds, so that neither has a default.
    _step_supports_amp_scaling = True
    # What `capturable=True` makes graphs with.
    capture: Capture = staticmethod(cuda)
    # Hyperparameters of the rule that were given as tensors: groups keep the tensors themselves.
    _tensors: Mapping[str, Tensor] = {}

    def __init__(
        self,
        params: Parameters,
        rule: Rule | None = None,
        *,
        fallback: Rule | None = None,
        views: Mapping[str, str] | None = None,
        strict: bool = False,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "propagate",
        fused: bool | None = None,
        precision: Precision = "auto",
        rounding: Rounding = "nearest",
        capturable: bool = False,
    ) -> None:
        for name, value, known in (
            ("fused", fused, (None, True, False)),
            ("precision", precision, get_args(Precision)),
            ("rounding", rounding, get_args(Rounding)),
            ("capturable", capturable, (True, False)),
        ):
            if not any(value is x or (isinstance(x, str) and value == x) for x in known):
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")
        if fused is False and rounding != "nearest":
            raise ValueError(f"rounding={rounding!r} needs kernels, and fused=False")
        if fused is False and capturable:
            raise ValueError("capturable=True needs kernels, and fused=False")
        if on_nonfinite not in ("propagate", "skip", "raise"):
            raise ValueError(
                f"on_nonfinite={on_nonfinite!r} must be 'propagate', 'skip' or 'raise'"
            )
        if isinstance(params, Tensor | set):
            raise TypeError(
                f"params must be a module or an ordered iterable of tensors, got {type(params)}"
            )
        self._rule: Rule = AdamW() if rule is None else checked_rule(rule)
        self._fallback = None if fallback is None else checked_rule(fallback, "fallback")
        self._views = dict(views or {})
        self._strict = strict
        # Kept by name and by parameter, not by position, so that users may rearrange the groups.
        self._rules: dict[str, type[Rule]] = {}
        self._why: dict[Tensor, str] = {}
        self._recorder = Recorder()
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.fused = fused
        self.precision: Precision = precision
        self.rounding: Rounding = rounding
        self.capturable = capturable
        self._forget_work()
        self.skipped_steps = 0
        for view in self._views.values():
            check_view(view)
        groups: Any = of_iterable(params) if isinstance(params, nn.Module) else params
        super().__init__(groups, {**_values(self._rule), "maximize": maximize})
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        for pattern in self._views:
            if not any(fnmatch(name, pattern) for name in names):
                raise ValueError(f"views={{{pattern!r}: ...}} matches no parameter; names: {names}")

    def _forget_work(self) -> None:
        """Drop what is kept between fused steps."""
        self._works: dict[int, Work] = {}
        self._buffers: dict[torch.device, Tensor] = {}
        self._without_kernels = False

    @property
    def context(self) -> Context:
        """What rules need of a parameter beyond its gradient: parameter -> name -> tensor.

        optimizer.context[p]["preconditioner"] = P sets one. It is no part of state_dict. Shapes are
        those of the rule, with a first axis where p is seen as several matrices, unless they share
        one. The "gram" of watched layers is written by each backward pass, see
        `layers.Recorder`, and dropped by zero_grad.
        """
        return self._recorder.context

    def record(self, module: nn.Module) -> None:
        """Record the inputs of the module's layers whose weights' rules need their Gram matrix.

        A module given as `params` is recorded already. Linear and Conv layers are, where they are
        called as modules. Raises ValueError where the module has no such layer.
        """
        layers, watched = layers_of(module), False
        for group in self.param_groups:
            cls = self._rules[group["rule"]]
            rule = _instance(cls, {k: _host(group[k], k) for k in hints(cls)})
            if needs_gram(rule):
                mine = {p: layers[p] for p in group["params"] if p in layers}
                self._watch(rule, mine)
                watched = watched or bool(mine)
        if not watched:
            raise ValueError(
                f"{type(module).__name__} has no Linear or Conv layer whose weight is stepped by a "
                "rule that needs a gram; call it with the model whose parameters were given"
            )

    def metrics(self) -> dict[str, float]:
        """Numbers to log: steps skipped so far, and eigenvalues that roots found negative.

        "negatives" is there where a rule counts them; to read it waits for the device.
        """
        states = [self.state[p] for p in self._why if p in self.state]
        counts = [s["negatives"] for s in states if "negatives" in s]
        numbers = {"skipped_steps": float(self.skipped_steps)}
        return numbers | ({"negatives": sum(float(x.sum()) for x in counts)} if counts else {})

    @property
    def routing(self) -> Routing:
        """Which parameter got which rule, seen as what, and why; prints as a table."""
        routes: list[Route] = []
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                why = self._why.get(p, "")
                routes.append(Route(name, tuple(p.shape), group["rule"], group["seen_as"], why))
        return Routing(tuple(routes))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by rule and view where its parameters need several."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        params, names = param_group["params"], param_group.get("param_names")
        if names is not None:
            params = list(zip(names, params, strict=True))
        known = of_iterable(params)
        self._check_tensors(known)
        chosen = param_group.get("rule")
        base = self._rule if chosen is None else checked_rule(chosen)
        given = {k: v for k, v in param_group.items() if k not in OWN | FOREIGN}
        if chosen is None:
            given = {**self._tensors, **given}
        rule, rest = _made(type(base), given, base), self._fallback
        shared: dict[str, Any] = {}
        if rest is None:
            shared = {k: given.get(k, getattr(base, k)) for k in ("lr", "weight_decay", "every")}
            rest = _made(SGD if isinstance(rule, DESCENT) else AdamW, shared)
        seen_as = param_group.get("seen_as")
        if seen_as is not None:
            check_view(seen_as)
        certain = self._fallback is not None
        options = {"chosen": chosen is not None, "strict": self._strict, "certain": certain}
        parts: dict[tuple[bool, str], list[tuple[Named, str]]] = {}
        for x in known:
            asked = seen_as or next((v for k, v in self._views.items() if fnmatch(x.name, k)), "")
            taken, view, why = route(x, rule, rest, asked, **options)
            parts.setdefault((taken is rule, view), []).append((x, why))
        extra = {k: v for k, v in param_group.items() if k in FOREIGN}
        extra["maximize"] = param_group.get("maximize", self.defaults["maximize"])
        before = len(self.param_groups), dict(self._rules), dict(self._why)
        try:
            for (own, view), members in (parts or {(True, ""): []}).items():
                values = given if own else shared
                self._add(rule if own else rest, values, {**extra, "seen_as": view}, members)
            taken = [x for (own, _), members in parts.items() if own for x, _ in members]
            self._watch(rule, {x.tensor: x.layers for x in taken if x.layers})
        except Exception:
            del self.param_groups[before[0] :]
            _, self._rules, self._why = before
            raise

    def _watch(self, rule: Rule, layers: Mapping[Tensor, Sequence[nn.Module]]) -> None:
        """Record what the layers of each weight are given, where the rule needs to know."""
        if not layers or not needs_gram(rule):
            return
        if rule.context((1, 2))["gram"] != (2, 2):
            raise ValueError(
                f"{type(rule).__name__} wants the gram of what meets a weight's first axis; in "
                "torch the inputs of a layer meet the last: choose inputs='last'"
            )
        for weight, several in layers.items():
            self._recorder.watch(weight, several)

    def _add(
        self,
        rule: Rule,
        given: Mapping[str, Any],
        extra: Mapping[str, Any],
        members: Sequence[tuple[Named, str]],
    ) -> None:
        """Add a group of one rule and view; hyperparameters given as tensors stay the same ones."""
        for x, _ in members:
            # A shape that the rule's memories cannot have is refused here, not in the first step.
            seen_of(rule, x.tensor.shape, extra["seen_as"])
        cls, values = type(rule), _values(rule)
        values |= {k: v for k, v in given.items() if isinstance(v, Tensor)}
        full = f"{cls.__module__}.{cls.__qualname__}"
        names = chain([cls.__name__, full], (f"{full}#{i}" for i in count(2)))
        name = next(x for x in names if self._rules.get(x, cls) is cls)
        params = [(x.name, x.tensor) if x.name else x.tensor for x, _ in members]
        keep = {"params": params, "rule": name, **values, **extra}
        super().add_param_group(keep)
        for key in set(self.defaults) - set(values) - OWN:
            del keep[key]
        self._rules[name] = cls
        self._why.update({x.tensor: why for x, why in members})

    def _check_tensors(self, known: Sequence[Named]) -> None:
        present = {id(p) for group in self.param_groups for p in group["params"]}
        for i, x in enumerate(known):
            what = x.name or f"parameter {i}"
            if not isinstance(x.tensor, Tensor):
                raise TypeError(
                    f"optimizer can only optimize Tensors, but {what} is {type(x.tensor)}"
                )
            if not x.tensor.is_floating_point() or x.tensor.layout is not torch.strided:
                raise ValueError(
                    f"{what} is of dtype {x.tensor.dtype} and layout {x.tensor.layout}; only real, "
                    "dense floating-point parameters can be stepped (see a complex one by "
                    "torch.view_as_real)"
                )
            if id(x.tensor) in present:
                raise ValueError(f"{what} appears more than once; give each parameter once")
            present.add(id(x.tensor))

    @announces_itself
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's loss.

        Raises RuntimeError for sparse gradients, and ValueError where `on_nonfinite="raise"` meets
        a NaN or Inf, where a group has a hyperparameter that its rule cannot have, and where a
        context is missing, of another shape, or not finite (which "skip" skips); then nothing has
        changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if torch.compiler.is_dynamo_compiling():
                trace_step(self)
            else:
                self.take_step()
        return loss

    def take_step(self) -> None:
        """The step itself, without hooks."""
        refuse_foreign()
        self._opt_called = True
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        norm = _Norm(p.grad for g in self.param_groups for p in g["params"])
        groups = [self._group(i, norm) for i in range(len(self.param_groups))]
        if self._finite(groups):
            for group in groups:
                group.run()
            self._recorder.used()

    @torch.compiler.assume_constant_result
    def entered(self, places: tuple[int, ...]) -> int:
        """Make the state of the parameters at these places of all groups'; the `handle`.

        The compiler calls this as it traces, so that the state is there in the first graph.
        """
        everyone = [(p, group) for group in self.param_groups for p in group["params"]]
        for p, group in (everyone[i] for i in places):
            cls = self._rules[group["rule"]]
            rule = _instance(cls, {k: _host(group[k], k) for k in hints(cls)})
            seen = seen_of(rule, p.shape, group["seen_as"])
            lay_out(p, self.state[p], seen, self.rounding)
        return handle(self)

    def _finite(self, groups: Sequence[_Group]) -> bool:
        """Whether what must be finite is; counts the step as skipped, or raises, if not."""
        for i, stepped in enumerate(groups):
            if self.on_nonfinite == "propagate" and not stepped.context:
                continue
            for j, p in enumerate(self.param_groups[i]["params"]):
                if p.grad is None:
                    continue
                values = {k: self.context[p][k] for k in stepped.context if p in self.context}
                if self.on_nonfinite != "propagate":
                    values["gradient"] = p.grad
                for what, value in values.items():
                    if bool(value.isfinite().all()):
                        continue
                    if self.on_nonfinite != "skip":
                        raise ValueError(
                            f"the {what} of {self._name(i, j)} has NaN or Inf entries; it must be "
                            "finite (on_nonfinite='skip' would leave this step out)"
                        )
                    self.skipped_steps += 1
                    return False
        return True

    def _name(self, group: int, position: int) -> str:
        names = self.param_groups[group].get("param_names")
        return names[position] if names else f"parameter {position} of group {group}"

    def _check_context(self, rule: Rule, p: Tensor, seen: Seen, what: str) -> None:
        """Raise an error that says what to do where a context does not fit the rule."""
        given: dict[str, tuple[int, ...]] = {}
        for name, value in (self.context[p] if p in self.context else {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"the {name} of {what} must be a tensor, not {type(value)}")
            shape = tuple(value.shape)
            shared = seen.context.get(name, ())
            given[name] = shared if seen.count and shape == seen.stack(shared) else shape
        try:
            rule.check_context(seen.shape, given, what)
        except ValueError as error:
            name = next(k for k, x in seen.context.items() if given.get(k) != x)
            each = f" (or {seen.stack(seen.context[name])}, one per matrix)" * (seen.count > 1)
            hint = f"{error}{each}. Set optimizer.context[p][{name!r}] before the step"
            if name == "gram":
                hint += (
                    f", or give {type(self).__name__} the module, whose Linear and Conv layers are "
                    "recorded where they are called as modules (not by F.linear on the weight), "
                    "before backward; optimizer.record(module) does so after a copy"
                )
            raise ValueError(hint) from None

    def _group(self, i: int, norm: _Norm) -> _Group:
        """All that the step of a group needs; changes nothing."""
        group = self.param_groups[i]
        cls = self._rules[group["rule"]]
        values = {k: _host(group[k], k) for k in hints(cls)}
        rule = _instance(cls, values)
        scalars: dict[str, Any] = rule.scalars(**values)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None:
            scalars["inverse_scale"] = 1.0 / float(scale)
        gradients = [p.grad for p in group["params"]]
        context = rule.context((1, 1))
        if context:
            for position, p in enumerate(group["params"]):
                if p.grad is not None:
                    seen = seen_of(rule, p.shape, group["seen_as"])
                    self._check_context(rule, p, seen, self._name(i, position))
        work, rest = self._fused(i, rule, gradients)
        batches = self._batches(i, rule, scalars, norm, rest)
        moments = [] if work is None else work.moments(self.state)
        if work is not None:
            try:
                work.prepare(moments, self.state)
            except native.Unavailable as error:
                self._unavailable(error)
                return self._group(i, norm)
            if self.capturable and (moved := work.moved(moments, gradients)):
                raise RuntimeError(
                    "capturable=True replays graphs, which read gradients where they were; that of "
                    f"{self._name(i, moved[0])} is elsewhere now: keep gradients in place by "
                    "zero_grad(set_to_none=False)"
                )
            if work.reads_norm(moments):
                scalars["gradient_norm"] = float(norm.on(torch.device("cpu")))
                scalars["gradient_norm"] *= scalars.get("inverse_scale", 1.0)
        return _Group(self, i, [*context], batches, work, moments, scalars, gradients)

    def _unavailable(self, error: Exception) -> None:
        """Take the plain path from now on, or raise where kernels were asked for."""
        if self.fused:
            raise RuntimeError(f"fused=True: {error}") from error
        say_once(f"deepopt takes the plain path, which is slower: {error}")
        self._without_kernels = True

    def _fused(
        self, i: int, rule: Rule, gradients: Sequence[Tensor | None]
    ) -> tuple[Work | None, Sequence[int]]:
        """The work of a group that kernels do, and the positions that are left."""
        group = self.param_groups[i]
        if self.fused is False or self._without_kernels:
            return None, range(len(gradients))
        how = How(bool(self.fused), self.precision, self.rounding)
        scaled = getattr(self, "grad_scale", None) is not None
        work = self._works.get(i)
        if work is None or not work.fits(group, rule, gradients, scaled, how, self.state):
            work = Work(group, rule, gradients, scaled, how, lambda j: self._name(i, j))
            self._works[i] = work
        return (work if work.params else None), work.rest

    def _batches(
        self,
        i: int,
        rule: Rule,
        scalars: Mapping[str, Any],
        norm: _Norm,
        positions: Sequence[int],
    ) -> list[Batch]:
        """What the plain path is to run for a group; changes nothing."""
        group = self.param_groups[i]
        view, maximize = group["seen_as"], group["maximize"]
        turn = turns([p.shape for p in group["params"]]) if rule.stagger else []
        ticking: dict[tuple[int, int], frozenset[str]] = {}
        members: dict[tuple[Any, ...], list[Tensor]] = {}
        for position in positions:
            p = group["params"][position]
            if p.grad is None:
                continue
            if p.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients; "
                    f"{self._name(i, position)} has one (use sparse=False in its embedding)"
                )
            if self.rounding != "nearest" and p.dtype == torch.bfloat16:
                raise RuntimeError(
                    f"rounding={self.rounding!r} needs kernels, which cannot step "
                    f"{self._name(i, position)}"
                )
            seen = seen_of(rule, p.shape, view)
            state = self.state[p] if p in self.state else {}
            step = int(state["step"]) + 1 if "step" in state else 1
            moment = (step, turn[position] if rule.stagger else 0)
            if moment not in ticking:
                ticking[moment] = rule.ticks(step, index=moment[1])
            alone = -1 if seen.count else position
            key = (seen, p.dtype, p.device, step, ticking[moment], alone)
            members.setdefault(key, []).append(p)
        prepared: dict[tuple[Any, ...], tuple[Compiled, list[Any]]] = {}
        batches: list[Batch] = []
        for (seen, dtype, device, step, ticks, _), params in members.items():
            most = max(1, BATCH.get(device.type, BATCH_ELSEWHERE) // max(1, seen.largest))
            for start in range(0, len(params), most):
                part = params[start : start + most]
                key = (seen, dtype, device, step, ticks, len(part) > 1)
                if key not in prepared:
                    run = _compiled(rule, seen.shape, ticks, dtype, device, len(part) > 1)
                    own: dict[str, Any] = {**scalars, "step": float(step)}
                    if "gradient_norm" in run.program.inputs:
                        own["gradient_norm"] = norm.on(device) * own.get("inverse_scale", 1.0)
                    prepared[key] = run, run.scalars(own)
                sign = -1.0 if maximize else 1.0
                factor = sign * scalars.get("inverse_scale", 1.0)
                batches.append(Batch(*prepared[key], seen, part, factor))
        return batches

    def run_work(self, work: Work, group: _Group) -> None:
        """Take the fused step of a group."""

        def context(p: Tensor, name: str) -> Tensor:
            return self.context[p][name].to(p.device, arithmetic(p.dtype)).contiguous()

        key, capture = (group.index, KEY), self.capture if self.capturable else None
        step = (group.moments, self.state, group.scalars, group.gradients)
        work.run(*step, context, key, self._buffers, capture)

    def run_batch(self, batch: Batch) -> None:
        """Step parameters of one shape, one by one or stacked along a first axis."""
        run, scalars, seen, params, factor = batch
        dtype = arithmetic(params[0].dtype)
        for p in params:
            remember(p, self.state[p], seen)
            self.state[p]["step"] += 1
        states = [self.state[p] for p in params]
        gradients = [cast(Tensor, p.grad).to(dtype) for p in params]
        inputs = {
            "w": seen.gather([p.to(dtype) for p in params], seen.shape),
            "g": seen.gather([factor * g if factor != 1 else g for g in gradients], seen.shape),
        }
        for name in run.program.inputs:
            if name in seen.memories:
                shape = seen.memories[name][0].shape
                inputs[name] = seen.gather([s[name].to(dtype) for s in states], shape)
            elif name in seen.context:
                shape = seen.context[name]
                given = [self.context[p][name].to(p.device, dtype) for p in params]
                inputs[name] = seen.gather([x.expand(seen.stack(shape)) for x in given], shape)
        out = run(inputs, scalars)
        del inputs, gradients
        update = out.pop("update", None)
        for j, p in enumerate(params):
            if update is not None:
                step = seen.part(update, seen.shape, j)
                step = step.expand(seen.stack(seen.shape)).reshape(p.shape)
                p.add_(step)  # In the wider dtype of the two, then rounded once.
            for name, value in out.items():
                stored, slot = states[j][name], seen.memories[name][0]
                value = seen.part(torch.as_tensor(value), slot.shape, j)
                # A memory that was overwritten in place is there already.
                if stored.data_ptr() != value.data_ptr() or stored.dtype != value.dtype:
                    stored.copy_(value.expand(seen.stack(slot.shape)).reshape(stored.shape))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, or set them to zero, and drop the Gram matrices recorded beside them."""
        super().zero_grad(set_to_none)
        self._recorder.forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of the same rules, or of torch's optimizer that a rule is the equal of.

        State keeps the dtype it was saved in. Hyperparameters become those of the checkpoint, as in
        torch. Raises ValueError where rule, names or shapes differ; then nothing has changed.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}

        def check(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            groups = self._checked_groups(given["param_groups"])
            ours = ["rule" in group for group in given["param_groups"]]
            loaded.update(self._checked_state(groups, given["state"], ours))
            keys = {key for group in groups for key in group["params"]}
            foreign = {k: v for k, v in given["state"].items() if k not in keys}
            return {**given, "param_groups": groups, "state": foreign}

        # torch would cast every tensor to its parameter's dtype; nothing of ours passes through it.
        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self.state.update(loaded), True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _checked_groups(self, saved_groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups of a checkpoint in our terms."""
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the checkpoint has {len(saved_groups)} parameter groups, this optimizer has "
                f"{len(self.param_groups)}"
            )
        groups: list[dict[str, Any]] = []
        for i, (saved, mine) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            if len(saved["params"]) != len(mine["params"]):
                raise ValueError(
                    f"group {i} of the checkpoint has {len(saved['params'])} parameters, this "
                    f"optimizer's has {len(mine['params'])}"
                )
            cls = self._rules[mine["rule"]]
            group = {k: v for k, v in mine.items() if k != "params"} | _translated(saved, cls)
            for key, verb in (("rule", "stepped by"), ("seen_as", "seen as")):
                if group[key] != mine[key]:
                    raise ValueError(
                        f"group {i} of the checkpoint was {verb} {group[key]!r}; in this "
                        f"optimizer it is {verb} {mine[key]!r}"
                    )
            groups.append(group)
        return groups

    def _checked_state(
        self, groups: Sequence[Mapping[str, Any]], saved: Mapping[Any, Any], ours: Sequence[bool]
    ) -> dict[Tensor, dict[str, Any]]:
        """Copies of a checkpoint's state on the parameters' devices, names and shapes checked.

        ours: which groups this library saved; theirs may hold memories that a change of a static
        hyperparameter left behind, and they are dropped.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}
        for i, (group, mine) in enumerate(zip(groups, self.param_groups, strict=True)):
            cls = self._rules[mine["rule"]]
            rule = _made(cls, {k: group[k] for k in hints(cls)})
            for j, (key, p) in enumerate(zip(group["params"], mine["params"], strict=True)):
                state = {k: v for k, v in saved.get(key, {}).items() if v is not None}
                if not state:
                    continue
                memories = seen_of(rule, p.shape, mine["seen_as"]).memories
                shapes = {name: stored for name, (_, stored) in memories.items()}
                if self.rounding == "exact" and LOW_HALF in state:
                    shapes[LOW_HALF] = p.shape
                what, names = self._name(i, j), set(state) - {"step"}
                if set(shapes) - names or (names - set(shapes) and not ours[i]):
                    raise ValueError(
                        f"the checkpoint has memories {sorted(names)} for {what}; "
                        f"{cls.__name__} keeps {sorted(shapes)}"
                    )
                step = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32)
                loaded[p] = {"step": step.detach().reshape(()).cpu().clone()}
                for name, shape in shapes.items():
                    value = torch.as_tensor(state[name])
                    if value.numel() == 1 == prod(shape):
                        value = value.reshape(shape)
                    if value.shape != shape:
                        raise ValueError(
                            f"the checkpoint's {name} for {what} has shape {tuple(value.shape)}; "
                            f"it should be {tuple(shape)}"
                        )
                    loaded[p][name] = value.detach().to(p.device, copy=True)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{k: getattr(self, k) for k in KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_work()
        for group in self.param_groups:
            hyper = inspect.signature(self._rules[group["rule"]]).parameters
            for name, parameter in hyper.items():
                group.setdefault(name, parameter.default)


class Batch(NamedTuple):
    """Parameters that are stepped by one call, and all that it needs but their tensors."""

    run: Compiled
    scalars: list[Any]
    seen: Seen
    params: list[Tensor]
    factor: float


@dataclass(frozen=True, eq=False)
class _Group:
    """The step of a group, checked and ready to run."""

    owner: Optimizer
    index: int
    context: Sequence[str]
    batches: Sequence[Batch]
    work: Work | None
    moments: Sequence[Moment]
    scalars: Mapping[str, Any]
    gradients: Sequence[Tensor | None]

    def run(self) -> None:
        """Take the step."""
        if self.work is not None:
            self.owner.run_work(self.work, self)
        for batch in self.batches:
            self.owner.run_batch(batch)


class _Norm:
    """The Frobenius norm of several gradients together, computed when it is first asked for."""

    def __init__(self, gradients: Iterable[Tensor | None]) -> None:
        self._gradients = [g for g in gradients if g is not None]
        self._value: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """The norm as a tensor of rank 0 on a device, in float32 at least."""
        value = self._value
        if value is None:
            norm = torch.linalg.vector_norm
            parts = [norm(g, dtype=arithmetic(g.dtype)).to(device) for g in self._gradients]
            dtype = max((x.dtype for x in parts), key=lambda x: x.itemsize)
            value = self._value = norm(torch.stack([x.to(dtype) for x in parts]))
        return value.to(device)


@lru_cache(maxsize=4096)
def _compiled(
    rule: Rule,
    shape: tuple[int, ...],
    ticking: frozenset[str],
    dtype: torch.dtype,
    device: torch.device,
    stacked: bool,
) -> Compiled:
    """The program of a step; it may overwrite what it is to write, and stacks, which are copies."""
    outputs = dict(trace(rule, shape, ticking).outputs)
    outputs.pop("direction", None)
    # A memory that this step only reads must survive it.
    written = [k for k in rule.all_slots(shape) if k in outputs]
    donate = ["w", "g", *written] if stacked else written
    return Compiled(Program(outputs), Torch(arithmetic(dtype), device), donate)


_instances: dict[tuple[Any, ...], Rule] = {}


def _instance(cls: type[Rule], values: Mapping[str, Any]) -> Rule:
    """A rule with these static values; its scalars are those of the first call."""
    scalars = {k: len(v) if isinstance(v, tuple) else None for k, v in values.items()}
    key = (cls, *({**values, **{k: scalars[k] for k in scalar_names(cls)}}.values()))
    if key in _instances:
        check_scalars(cls, values)
    else:
        _instances[key] = cls(**values)
    return _instances[key]


def _host(value: Any, name: str) -> Any:
    """A hyperparameter as a plain Python value."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        return value.item()
    if isinstance(value, tuple | list):
        return tuple(_host(x, name) for x in value)
    if isinstance(value, bool | float | int | str) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _values(rule: Rule) -> dict[str, Any]:
    """The hyperparameters of a rule as plain values."""
    return {k: _host(getattr(rule, k), k) for k in hints(type(rule))}


def _made(cls: type[Rule], given: Mapping[str, Any], base: Rule | None = None) -> Rule:
    """The rule with the given hyperparameters; TypeError for a name that it does not have."""
    check_hyperparameters(cls, given)
    values = {k: _host(v, k) for k, v in given.items()}
    return cls(**(_values(base) if base else {}) | values)


def _translated(saved: Mapping[str, Any], cls: type[Rule]) -> dict[str, Any]:
    """A saved group in the terms of a rule: torch's own optimizers spell some things differently.

    Raises ValueError for what the rule does not have.
    """
    group = {k: v for k, v in saved.items() if k not in TORCH}
    if "rule" in saved:
        return group
    if "decoupled_weight_decay" in saved:
        group["decoupled"] = group.pop("decoupled_weight_decay")
    elif "dampening" in saved:
        group["decoupled"] = False
    if "adjust_lr_fn" in saved:
        group["scale"] = "rms" if group.pop("adjust_lr_fn") == "match_rms_adamw" else "spectral"
        group["steps"] = group.pop("ns_steps")
        for name in ("ns_coefficients", "eps"):
            group.pop(name)
    needed = {**NEUTRAL, "amsgrad": issubclass(cls, AMSGrad)}
    for name, neutral in needed.items():
        if name in group and name not in hints(cls) and group.pop(name) != neutral:
            raise ValueError(f"the checkpoint has {name}={saved[name]!r}; {cls.__name__} has not")
    return group


class Binding(Protocol, Generic[P]):
    """The class that `bind` makes, as type checkers see it."""

    @overload
    def __call__(self, params: Parameters, *args: P.args, **kwargs: P.kwargs) -> Optimizer: ...
    @overload
    def __call__(
        self, params: Parameters, lr: float | Tensor = ..., **options: Any
    ) -> Optimizer: ...


_bound: dict[type[Rule], Any] = {}
# The options of `Optimizer` that the classes of rules take too.
SHARED = (
    *("fallback", "views", "strict", "maximize", "on_nonfinite"),
    *("fused", "precision", "rounding", "capturable"),
)


def bind(rule: Callable[P, Rule], module: str | None = None) -> Binding[P]:
    """The torch optimizer class of a rule: `M3 = bind(rules.M3)`; then `M3(model, lr=3e-4)`.

    It takes params, lr and every hyperparameter of the rule by name, and the options of
    `Optimizer`. There is one class per rule, and its objects can be pickled under any name.
    """
    cls = cast(type[Rule], rule)
    if not (isinstance(cls, type) and issubclass(cls, Rule)):
        raise TypeError(f"bind takes a class of rules, such as deepopt.rules.M3, not {rule!r}")
    if cls in _bound:
        return _bound[cls]
    options = dict(inspect.signature(Optimizer.__init__).parameters)
    shared = [options[k] for k in SHARED]

    def __init__(self: Any, params: Any, lr: Any = None, **given: Any) -> None:
        chosen = {x.name: given.pop(x.name) for x in shared if x.name in given}
        # Flags of torch's classes that ask for nothing may stay in the line that is replaced.
        for name in (TORCH | set(NEUTRAL)) & set(given) - set(hints(cls)):
            if given[name] in (None, False, 0):
                del given[name]
        given |= {} if lr is None else {"lr": lr}
        self._tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
        Optimizer.__init__(self, params, _made(cls, given), **chosen)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if type(self) is not bound:
            return object.__reduce_ex__(self, protocol)
        return _unpickled, (cls, bound.__module__), self.__getstate__()

    hyper = dict(inspect.signature(cls).parameters)
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter("self", positional), inspect.Parameter("params", positional)]
    lr = hyper.pop("lr").replace(kind=positional)
    signature = inspect.Signature([*first, lr, *hyper.values(), *shared])
    __init__.__qualname__ = f"{cls.__name__}.__init__"
    __init__.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    namespace = {
        "__init__": __init__,
        "__reduce_ex__": __reduce_ex__,
        "__doc__": cls.__doc__,
        "__module__": module or sys._getframe(1).f_globals["__name__"],
    }
    bound = _bound[cls] = type(cls.__name__, (Optimizer,), namespace)
    return cast(Binding[P], bound)


def _unpickled(rule: type[Rule], module: str) -> Any:
    cls = cast(type[Optimizer], bind(rule, module))
    return cls.__new__(cls)
