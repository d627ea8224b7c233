"""Rules of deepopt as `torch.optim.Optimizer`s: groups, state, clocks and the step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain, count
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeAlias,
    get_args,
)

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepopt.rule import (
    Rule,
    checked_rule,
    hints,
    turns,
)
from deepopt.rules import DESCENT, SGD, AdamW
from torch_backend.checkpoint import SCHEMA, checked, migrated
from torch_backend.compiled import (
    announces_itself,
    handle,
    is_traced,
    step_in_sight_of_autograd,
    trace_step,
)
from torch_backend.flags import refuse_contradictions, wants_kernels
from torch_backend.fused import How, Precision, Rounding
from torch_backend.graphs import Capture, cuda, refuse_foreign
from torch_backend.kernels import native
from torch_backend.layers import Context, Recorder, layers_of, on_mesh
from torch_backend.metrics import metrics
from torch_backend.plain import Batch, Norm, batches, run
from torch_backend.routing import (
    Named,
    Route,
    Routing,
    check_view,
    needs_gram,
    of_iterable,
    route,
)
from torch_backend.seen import Seen, arithmetic, seen_of
from torch_backend.stochastic import KEY
from torch_backend.values import host, instance, made, values_of
from torch_backend.work import Asked, Moment, Work, lay_out, say_once

if TYPE_CHECKING:
    from torch_backend.distributed import Distributed, Part

Parameters: TypeAlias = nn.Module | Iterable[Any]
OnNonfinite: TypeAlias = Literal["propagate", "skip", "raise"]

# Keys of a group that belong to the binding, and those that schedulers and trainers leave there.
OWN = {"params", "param_names", "rule", "seen_as", "maximize", "schema"}
FOREIGN = {*"initial_lr base_lr max_lr min_lr base_momentum max_momentum swa_lr name".split()}
FOREIGN |= {"lr_scale", "use_fallback"}
# The attributes that a copy or a pickle keeps beside those of torch's base class.
KEPT = (
    *("_rule", "_fallback", "_views", "_strict", "rules", "_why", "_tensors"),
    *("_recorder", "on_nonfinite", "skipped_steps", "fused", "precision", "rounding"),
    *("capturable", "foreach", "differentiable", "state_dtype"),
)


class Optimizer(torch.optim.Optimizer):
    """Steps parameters by rules of deepopt, each group by its own.

    params: a module, an iterable of tensors or of (name, tensor) pairs, or of group dicts. A group
        may name its `rule` and override any hyperparameter; groups hold plain numbers, so learning
        rate schedulers and checkpoints work on them. `use_fallback=True` gives it to the fallback.
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
    foreach: take the plain path, with parameters of one shape stacked (True) or one by one (False).
    differentiable: let gradients flow through the step, to parameters (which then are no leaves),
        gradients, state and hyperparameters given as tensors; by the plain path, out of place.
    on_nonfinite: "propagate" NaN and Inf gradients into the parameters as torch does, "skip" the
        step (counted in `skipped_steps`), or "raise" naming the parameter.
    capturable: on a CUDA device, replay the kernels of a step as graphs, one for each set of clocks
        that tick; schedules work, and gradients must stay where they are: call
        zero_grad(set_to_none=False). Steps in a graph of yours are refused.
    fused: take the step by kernels over all tensors (docs/performance.md); None where they can be
        had, with a warning once that says why not, True to raise RuntimeError instead.
    precision: of the products of Newton-Schulz iterations in kernels, for float32 steps: "float32",
        "bfloat16", or "auto", bfloat16 where the device multiplies it faster.
    rounding: how bfloat16 parameters take a step, in kernels: to the "nearest", "stochastic", or
        "exact" with 16 more bits as state `low_half`, a float32 master.
    capturable: replay CUDA graphs of fused steps, one for each set of clocks that tick; gradients
        must stay in place.
    state_dtype: of memories of more than one number: torch.float32, torch.bfloat16, or None, the
        precision of the step. What a checkpoint brings keeps its own (docs/memory.md).

    State is one flat dict of tensors per parameter, with the names of the rule's memories. Each
    step runs in float32 at least and rounds once: memories in bfloat16 at random, so that their
    mean is right, by numbers that group, parameter, step and name determine.
    What a rule needs beyond gradients stands in `context`. A "gram" is recorded where the rule got
    a module; copies and pickles of the optimizer record nothing until they are told to `record`.
    Raises ValueError or TypeError that quote what was given; then nothing has changed.
    """

    # What `capturable=True` makes graphs with.
    capture: Capture = staticmethod(cuda)
    # The processes whose Gram matrices a step takes the mean of: by default all there are.
    gram_group: Any = None
    # Of the optimizer of local tensors that an optimizer of DTensors has: what its groups are.
    part_of: Part | None = None
    # Hyperparameters of the rule that were given as tensors: groups keep the tensors themselves.
    _tensors: Mapping[str, Tensor] = {}
    # Of pickles that were made before there was a choice.
    state_dtype: torch.dtype | None = None

    def __init__(
        self,
        params: Parameters,
        rule: Rule | None = None,
        *,
        fallback: Rule | None = None,
        views: Mapping[str, str] | None = None,
        strict: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        on_nonfinite: OnNonfinite = "propagate",
        fused: bool | None = None,
        precision: Precision = "auto",
        rounding: Rounding = "nearest",
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        for name, value, known in (
            ("fused", fused, (None, True, False)),
            ("precision", precision, get_args(Precision)),
            ("rounding", rounding, get_args(Rounding)),
            ("capturable", capturable, (True, False)),
            ("state_dtype", state_dtype, (None, torch.float32, torch.bfloat16)),
            ("maximize", maximize, (True, False)),
            ("foreach", foreach, (None, True, False)),
            ("differentiable", differentiable, (True, False)),
        ):
            if not any(value is x or (isinstance(x, str) and value == x) for x in known):
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")
        if differentiable and state_dtype is torch.bfloat16:
            raise ValueError(
                "differentiable=True cannot follow state_dtype=torch.bfloat16, rounded at random"
            )
        refuse_contradictions(fused, foreach, differentiable, capturable, rounding)
        if on_nonfinite not in ("propagate", "skip", "raise"):
            raise ValueError(
                f"on_nonfinite={on_nonfinite!r} must be 'propagate', 'skip' or 'raise'"
            )
        if isinstance(params, Tensor | set):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Tensors or dicts "
                f"in some order, or a module, but got {type(params)}"
            )
        self._rule: Rule = AdamW() if rule is None else checked_rule(rule)
        self._fallback = None if fallback is None else checked_rule(fallback, "fallback")
        self._views = dict(views or {})
        self._strict = strict
        # Kept by name and by parameter, not by position, so that users may rearrange the groups.
        self.rules: dict[str, type[Rule]] = {}
        self._why: dict[Tensor, str] = {}
        self._recorder = Recorder()
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.fused = fused
        self.precision: Precision = precision
        self.rounding: Rounding = rounding
        self.capturable = capturable
        self.state_dtype = state_dtype
        self.foreach = foreach
        self.differentiable = differentiable
        self._forget_work()
        self.skipped_steps = 0
        for view in self._views.values():
            check_view(view)
        groups: Any = of_iterable(params) if isinstance(params, nn.Module) else params
        shared = {"maximize": maximize, "differentiable": differentiable}
        super().__init__(groups, {**values_of(self._rule), **shared})
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        for pattern in self._views:
            if not any(fnmatch(name, pattern) for name in names):
                raise ValueError(f"views={{{pattern!r}: ...}} matches no parameter; names: {names}")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a scaler leaves gradients scaled, and sets `grad_scale` and `found_inf`.

        As in torch where fused=True was asked for: trainers refuse to clip scaled gradients. The
        scaler deletes both again and multiplies what it finds, so that neither has a default.
        """
        return self.fused is True

    def _forget_work(self) -> None:
        """Drop what is kept between fused steps."""
        self._works: dict[tuple[int, int | None], Work] = {}
        self._buffers: dict[torch.device, Tensor] = {}
        self._without_kernels = False
        self._distributed: Distributed | None = None
        params = (p for group in getattr(self, "param_groups", ()) for p in group["params"])
        self.is_on_mesh = any(map(on_mesh, params))

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
            cls = self.rules[group["rule"]]
            rule = instance(cls, {k: host(group[k], k) for k in hints(cls)})
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
        """Plain numbers to log, by names such as "0/M3/update_rms"; see `torch_backend.metrics`.

        Computed when asked, and waits for the device; changes nothing.
        """
        return metrics(self)

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
        known = self._checked(of_iterable(params))
        chosen = param_group.get("rule")
        base = self._base(param_group)
        given = {k: v for k, v in param_group.items() if k not in OWN | FOREIGN}
        if chosen is None:
            given = {k: x for k, x in self._tensors.items() if k in hints(type(base))} | given
        rule, rest = made(type(base), given, base), self._fallback
        shared: dict[str, Any] = {}
        if rest is None:
            shared = {k: given.get(k, getattr(base, k)) for k in ("lr", "weight_decay", "every")}
            rest = made(SGD if isinstance(rule, DESCENT) else AdamW, shared)
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
        before = len(self.param_groups), dict(self.rules), dict(self._why)
        try:
            for (own, view), members in (parts or {(True, ""): []}).items():
                values = given if own else shared
                self._add(rule if own else rest, values, {**extra, "seen_as": view}, members)
            taken = [x for (own, _), members in parts.items() if own for x, _ in members]
            self._watch(rule, {x.tensor: x.layers for x in taken if x.layers})
        except Exception:
            del self.param_groups[before[0] :]
            _, self.rules, self._why = before
            raise

    def _base(self, group: Mapping[str, Any]) -> Rule:
        """The rule of a group, before its own hyperparameters."""
        chosen, falls = group.get("rule"), group.get("use_fallback", False)
        if not isinstance(falls, bool) or (falls and chosen is not None):
            raise ValueError(
                f"use_fallback={falls!r} of a group must be True or False, and a group with a rule "
                "of its own has no use for it"
            )
        if not falls:
            return self._rule if chosen is None else checked_rule(chosen)
        shared = {k: getattr(self._rule, k) for k in ("lr", "weight_decay", "every")}
        descends = isinstance(self._rule, DESCENT)
        return self._fallback or made(SGD if descends else AdamW, shared)

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
        cls, values = type(rule), values_of(rule)
        values |= {k: v for k, v in given.items() if isinstance(v, Tensor)}
        full = f"{cls.__module__}.{cls.__qualname__}"
        names = chain([cls.__name__, full], (f"{full}#{i}" for i in count(2)))
        name = next(x for x in names if self.rules.get(x, cls) is cls)
        params = [(x.name, x.tensor) if x.name else x.tensor for x, _ in members]
        keep = {"params": params, "rule": name, **values, **extra, "schema": SCHEMA}
        super().add_param_group(keep)
        self.is_on_mesh = self.is_on_mesh or any(map(on_mesh, keep["params"]))
        for key in set(self.defaults) - set(values) - OWN:
            del keep[key]
        self.rules[name] = cls
        self._why.update({x.tensor: why for x, why in members})

    def _checked(self, known: Sequence[Named]) -> list[Named]:
        """Parameters that can be stepped, each once; warns of repeated ones as torch does."""
        present = {id(p) for group in self.param_groups for p in group["params"]}
        found: dict[int, Named] = {}
        repeated: list[str] = []
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
                raise ValueError(
                    f"some parameters appear in more than one parameter group: {what} is in an "
                    "earlier one; give each parameter once"
                )
            repeated += [what] * (id(x.tensor) in found)
            found.setdefault(id(x.tensor), x)
        if repeated:
            warnings.warn(
                "optimizer contains a parameter group with duplicate parameters: "
                f"{', '.join(repeated)}; each is stepped once",
                UserWarning,
                stacklevel=4,
            )
        return [*found.values()]

    @announces_itself
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's loss.

        `torch.compile` takes it as one operator, `deepopt::step`: neither a schedule nor a clock
        compiles it anew. A closure is called as it stands, and may break the graph.

        Raises RuntimeError for sparse gradients, and ValueError where `on_nonfinite="raise"` meets
        a NaN or Inf, where a group has a hyperparameter that its rule cannot have, and where a
        context is missing, of another shape, or not finite (which "skip" skips); then nothing has
        changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.differentiable:
            step_in_sight_of_autograd(self)
        elif is_traced():
            trace_step(self)
        else:
            with torch.no_grad():
                self.take_step()
        return loss

    def take_step(self, norm: Norm | None = None, only: Tensor | None = None) -> None:
        """The step itself, without hooks; of one parameter where it is given.

        norm: of all gradients, where these are but a part.
        """
        refuse_foreign()
        self._opt_called = True
        if dist.is_available() and dist.is_initialized():
            self._recorder.average(self.gram_group)
        if self.is_on_mesh:
            self._step_on_mesh()
            return
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        norm = norm or Norm(p.grad for g in self.param_groups for p in g["params"])
        if only is None:
            groups = [self._group(i, norm) for i in range(len(self.param_groups))]
        else:
            i, position = self._place_of(only)
            groups = [self._group(i, norm, position)]
        if self._finite(groups):
            for group in groups:
                group.run()
            self._recorder.used()

    def _step_on_mesh(self) -> None:
        self.shards().step()
        self._recorder.used()

    def shards(self) -> Distributed:
        """What steps the parameters on device meshes."""
        from torch_backend.distributed import Distributed

        if self._distributed is None or not self._distributed.fits():
            self._distributed = Distributed(self)
        return self._distributed

    @torch.compiler.assume_constant_result
    def entered(self, places: tuple[int, ...]) -> int:
        """Make the state of the parameters at these places of all groups'; the `handle`.

        The compiler calls this as it traces, so that the state is there in the first graph.
        """
        everyone = [(p, group) for group in self.param_groups for p in group["params"]]
        for p, group in (everyone[i] for i in places):
            cls = self.rules[group["rule"]]
            rule = instance(cls, {k: host(group[k], k) for k in hints(cls)})
            seen = seen_of(rule, p.shape, group["seen_as"])
            lay_out(p, self.state[p], seen, self.rounding, self.state_dtype)
        return handle(self)

    def _finite(self, groups: Sequence[_Group]) -> bool:
        """Whether what must be finite is; counts the step as skipped, or raises, if not."""
        for stepped in groups:
            i = stepped.index
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
                            f"the {what} of {self.name_of(i, j)} has NaN or Inf entries; it must "
                            "be finite (on_nonfinite='skip' would leave this step out)"
                        )
                    self.skipped_steps += 1
                    return False
        return True

    def accepts(self, bad: Sequence[bool]) -> bool:
        """Whether no parameter is bad: its gradient, or its context, not finite.

        Counts the step as skipped, or raises, if one is.
        """
        if not any(bad):
            return True
        if self.on_nonfinite == "skip":
            self.skipped_steps += 1
            return False
        places = [(i, j) for i, g in enumerate(self.param_groups) for j in range(len(g["params"]))]
        name = self.name_of(*places[[*bad].index(True)])
        raise ValueError(
            f"the gradient or context of {name} has NaN or Inf entries; it must be finite "
            "(on_nonfinite='skip' would leave this step out)"
        )

    def like(self, groups: Sequence[dict[str, Any]]) -> Optimizer:
        """An optimizer of other parameters that steps them in the same way."""
        options = {
            k: getattr(self, k)
            for k in ("fused", "precision", "rounding", "capturable", "state_dtype")
        }
        return Optimizer(groups, **options)

    def _place_of(self, p: Tensor) -> tuple[int, int]:
        """The group of a parameter, and its position there."""
        for i, group in enumerate(self.param_groups):
            for j, own in enumerate(group["params"]):
                if own is p:
                    return i, j
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is none of this optimizer's")

    def turns(self, group: int) -> Sequence[int]:
        """The turn of each parameter of a group under `stagger`."""
        if self.part_of is not None:
            return self.part_of.turns[group]
        return turns([p.shape for p in self.param_groups[group]["params"]])

    def stream(self, group: int) -> int:
        """The number of a group's random numbers."""
        return group if self.part_of is None else self.part_of.streams[group]

    def name_of(self, group: int, position: int) -> str:
        """What errors call a parameter."""
        names = self.param_groups[group].get("param_names")
        return names[position] if names else f"parameter {position} of group {group}"

    def check_context(self, rule: Rule, p: Tensor, seen: Seen, what: str) -> None:
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

    def _group(self, i: int, norm: Norm, only: int | None = None) -> _Group:
        """All that the step of a group, or of one position of it, needs; changes nothing."""
        group = self.param_groups[i]
        cls = self.rules[group["rule"]]
        values = {k: host(group[k], k) for k in hints(cls)}
        rule = instance(cls, values)
        scalars: dict[str, Any] = rule.scalars(**values)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None:
            scalars["inverse_scale"] = 1.0 / float(scale)
        every = enumerate(group["params"])
        gradients = [p.grad if only in (None, j) else None for j, p in every]
        if self.differentiable:
            given = {k: group[k] for k in scalars if isinstance(group.get(k), Tensor)}
            scalars |= {k: x.double().reshape(()) for k, x in given.items()}
        context = rule.context((1, 1))
        if context:
            for position, p in enumerate(group["params"]):
                if gradients[position] is not None:
                    seen = seen_of(rule, p.shape, group["seen_as"])
                    self.check_context(rule, p, seen, self.name_of(i, position))
        work, rest = self._fused(i, rule, gradients, only)
        plain = batches(self, i, rule, scalars, norm, rest)
        moments = [] if work is None else work.moments(self.state)
        if work is not None:
            try:
                work.prepare(moments, self.state)
            except native.Unavailable as error:
                self._unavailable(error)
                return self._group(i, norm, only)
            if self.capturable and (moved := work.moved(moments, gradients)):
                raise RuntimeError(
                    "capturable=True replays graphs, which read gradients where they were; that of "
                    f"{self.name_of(i, moved[0])} is elsewhere now: keep gradients in place by "
                    "zero_grad(set_to_none=False)"
                )
            if work.reads_norm(moments):
                scalars["gradient_norm"] = float(norm.on(torch.device("cpu")))
                scalars["gradient_norm"] *= scalars.get("inverse_scale", 1.0)
        return _Group(self, i, [*context], plain, work, moments, scalars, gradients)

    def _unavailable(self, error: Exception) -> None:
        """Take the plain path from now on, or raise where kernels were asked for."""
        if self.fused:
            raise RuntimeError(f"fused=True: {error}") from error
        say_once(f"deepopt takes the plain path, which is slower: {error}")
        self._without_kernels = True

    def _fused(
        self, i: int, rule: Rule, gradients: Sequence[Tensor | None], only: int | None
    ) -> tuple[Work | None, Sequence[int]]:
        """The work of a group that kernels do, and the positions that are left."""
        group = self.param_groups[i]
        wanted = wants_kernels(self.fused, self.foreach, self.differentiable)
        if not wanted or self._without_kernels:
            return None, range(len(gradients)) if only is None else [only]
        how = How(bool(self.fused), self.precision, self.rounding, self.state_dtype)
        scaled = getattr(self, "grad_scale", None) is not None
        work = self._works.get((i, only))
        asked = Asked(group, rule, gradients, scaled, how, self.state, lambda: self.turns(i))
        if work is None or not work.fits(asked):
            work = self._works[i, only] = Work(asked, lambda j: self.name_of(i, j))
        return (work if work.params else None), work.rest

    def run_work(self, work: Work, group: _Group) -> None:
        """Take the fused step of a group."""

        def context(p: Tensor, name: str) -> Tensor:
            return self.context[p][name].to(p.device, arithmetic(p.dtype)).contiguous()

        key, capture = (self.stream(group.index), KEY), self.capture if self.capturable else None
        step = (group.moments, self.state, group.scalars, group.gradients)
        work.run(*step, context, key, self._buffers, capture)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, or set them to zero, and drop the Gram matrices recorded beside them."""
        super().zero_grad(set_to_none)
        self._recorder.forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of the same rules, or of torch's optimizer that a rule is the equal of.

        State keeps the dtype it was saved in. Hyperparameters become those of the checkpoint, as in
        torch. Parameters are matched by name where both have names, else by position. Raises
        ValueError that lists where groups, names, rules, shapes or values do not fit, and for a
        checkpoint of a newer schema than this version knows; then nothing has changed.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}

        def check(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            given = migrated(given)
            groups, state = checked(self, given)
            loaded.update(state)
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

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{k: getattr(self, k) for k in KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_work()
        for name, parameter in inspect.signature(Optimizer.__init__).parameters.items():
            if name in KEPT:
                self.__dict__.setdefault(name, parameter.default)
        for group in self.param_groups:
            group.setdefault("schema", SCHEMA)
            hyper = inspect.signature(self.rules[group["rule"]]).parameters
            for name, parameter in hyper.items():
                group.setdefault(name, parameter.default)


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
            run(self.owner, batch)
