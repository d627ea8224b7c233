"""Rules of deepopt as `torch.optim.Optimizer`s: groups, state, clocks and the step."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from math import prod
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeAlias, cast, overload

import torch
from torch import Tensor, nn

from deepopt.algebra import Program
from deepopt.oracle import canonical
from deepopt.rule import Rule, Slot, scalar_names, trace
from deepopt.rules import AdamW
from torch_backend.algebra import Compiled, Torch
from torch_backend.routing import Named, Route, Routing, matrices, of_iterable, of_module, route

P = ParamSpec("P")
Parameters: TypeAlias = nn.Module | Iterable[Any]
OnNonfinite: TypeAlias = Literal["propagate", "skip", "raise"]

# The most numbers that same-shape matrices are stacked into at a time.
BATCH = 1 << 24
OWN = ("params", "param_names", "rule", "seen_as", "maximize")
FOREIGN = {"amsgrad": False, "dampening": 0, "centered": False}


class Optimizer(torch.optim.Optimizer):
    """Steps parameters by rules of deepopt, each group by its own.

    params: a module, an iterable of tensors or of (name, tensor) pairs, or of group dicts. A group
        may name its `rule` and override any hyperparameter; groups hold plain numbers, so learning
        rate schedulers and checkpoints work on them.
    rule: of groups that name none; AdamW by default.
    fallback: the rule of parameters that a matrix rule cannot take, and of embeddings and output
        heads where a module or names tell them apart (bare tensors cannot be told apart: give
        embeddings a group of their own). By default AdamW with the group's lr and weight decay.
    views: how tensors are seen as matrices, by name pattern: {"*.qkv.weight": "split:3"}; a group
        may say `seen_as`. See `routing.matrices`. Print `optimizer.routing` to see what was decided.
    strict: raise where the routing would have to guess.
    maximize: step uphill. on_nonfinite: "propagate" NaN and Inf gradients into the parameters as
        torch does, "skip" the step (counted in `skipped_steps`), or "raise" naming the parameter.

    State is one flat dict of tensors per parameter, with the names of the rule's memories, in
    float32 at least; each step runs in that precision and rounds once.
    Raises ValueError or TypeError that quote what was given; then nothing has changed.
    """

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
    ) -> None:
        if rule is not None and not isinstance(rule, Rule):
            raise TypeError(f"rule={rule!r} must be a rule, such as deepopt.rules.M3()")
        if on_nonfinite not in ("propagate", "skip", "raise"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r} must be 'propagate', 'skip' or 'raise'")
        if isinstance(params, Tensor):
            raise TypeError(f"params must be a module or an iterable of tensors, got {type(params)}")
        self._rule = rule or AdamW()
        self._fallback = fallback
        self._views = dict(views or {})
        self._strict = strict
        self._rules: list[Rule] = []
        self._why: list[list[str]] = []
        self._known: dict[int, list[Named]] = {}
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.skipped_steps = 0
        groups: Any = params
        if isinstance(params, nn.Module):
            named = of_module(params)
            groups = [{"params": [(x.name, x.tensor) for x in named]}]
            self._known = {id(groups[0]): named}
        super().__init__(groups, {**_values(self._rule), "maximize": maximize})
        self._known = {}

    @property
    def routing(self) -> Routing:
        """Which parameter got which rule, seen as what, and why; prints as a table."""
        routes: list[Route] = []
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
            for name, p, why in zip(names, group["params"], self._why[i], strict=True):
                view = group["seen_as"] if p.ndim > 1 else ""
                routes.append(Route(name, tuple(p.shape), group["rule"], view, why))
        return Routing(tuple(routes))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by rule and view where its parameters need several."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = dict(param_group)
        chosen = group.pop("rule", None)
        if chosen is not None and not isinstance(chosen, Rule):
            raise TypeError(f"rule={chosen!r} must be a rule, such as deepopt.rules.M3()")
        if isinstance(group["params"], set):
            raise TypeError("parameters need an order, but the order of a set changes between runs")
        known = self._known.get(id(param_group)) or of_iterable(group["params"])
        self._check_tensors(known)
        base = chosen or self._rule
        view = group.pop("seen_as", None)
        maximize = group.pop("maximize", self.defaults.get("maximize", False))
        given = {k: v for k, v in group.items() if k not in OWN}
        fallback = self._fallback or AdamW()
        common = {k: given.get(k, getattr(base, k)) for k in ("lr", "weight_decay", "every")}
        if self._fallback is None:
            fallback = _overridden(fallback, common)
        rule = _overridden(base, given)
        views = {"*": view, **self._views} if view else self._views
        parts: dict[tuple[Rule, str], list[tuple[Named, str]]] = {}
        for x in known:
            x = Named(x.name or "", x.tensor, x.kind) if view else x
            taken, seen, why = route(
                x, rule, fallback, views=views, strict=self._strict, chosen=chosen is not None
            )
            parts.setdefault((taken, seen), []).append((x, why))
        if not parts:
            super().add_param_group({**group, "params": []})
        for (taken, seen), members in parts.items():
            self._add(taken, seen, members, given, maximize)

    def _add(
        self,
        rule: Rule,
        view: str,
        members: Sequence[tuple[Named, str]],
        given: Mapping[str, Any],
        maximize: bool,
    ) -> None:
        named = all(x.name for x, _ in members)
        params = [(x.name, x.tensor) if named else x.tensor for x, _ in members]
        values = _values(rule)
        values |= {k: v for k, v in given.items() if k in values and isinstance(v, Tensor)}
        extra = {"rule": type(rule).__name__, "seen_as": view, "maximize": maximize}
        super().add_param_group({"params": params, **values, **extra})
        added = self.param_groups[-1]
        for name in set(self.defaults) - set(values) - set(OWN):
            added.pop(name, None)
        self._rules.append(rule)
        self._why.append([why for _, why in members])

    def _check_tensors(self, known: Sequence[Named]) -> None:
        present = {id(p) for group in self.param_groups for p in group["params"]}
        for i, x in enumerate(known):
            what = x.name or f"parameter {i}"
            if not isinstance(x.tensor, Tensor):
                raise TypeError(f"optimizer can only optimize Tensors, but {what} is {type(x.tensor)}")
            if not x.tensor.is_floating_point():
                raise ValueError(
                    f"{what} is of dtype {x.tensor.dtype}; only real floating-point parameters can "
                    "be stepped (view a complex one as real, freeze an integer one)"
                )
            if id(x.tensor) in present:
                raise ValueError(f"{what} appears in more than one place; give it once")
            present.add(id(x.tensor))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's loss.

        Raises RuntimeError for sparse gradients, and ValueError where `on_nonfinite="raise"` meets
        a NaN or Inf; then nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if self._gradients_usable():
                for i, group in enumerate(self.param_groups):
                    self._step_group(i, group)
        return loss

    def _gradients_usable(self) -> bool:
        """Whether to step at all; raises where a gradient is refused."""
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients; "
                        f"{self._name(i, j)} has one (use sparse=False in its embedding)"
                    )
                if self.on_nonfinite != "propagate" and not bool(p.grad.isfinite().all()):
                    if self.on_nonfinite == "raise":
                        raise ValueError(
                            f"the gradient of {self._name(i, j)} has NaN or Inf entries; "
                            "on_nonfinite='skip' would leave this step out"
                        )
                    self.skipped_steps += 1
                    return False
        return True

    def _name(self, group: int, position: int) -> str:
        names = self.param_groups[group].get("param_names")
        return names[position] if names else f"parameter {position} of group {group}"

    def _step_group(self, i: int, group: dict[str, Any]) -> None:
        rule = self._rule_of(i)
        values = rule.scalars(**{k: _host(group[k], k) for k in scalar_names(type(rule))})
        batches: dict[tuple[Any, ...], list[Tensor]] = {}
        for position, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            state = self._state_of(p, rule, group["seen_as"])
            state["step"] += 1
            step = int(state["step"])
            ticking = rule.ticks(step, index=position)
            shape = _seen(p, group["seen_as"])
            alone = position if len(shape) != 3 else -1
            key = (shape, p.dtype, p.device, step, ticking, alone)
            batches.setdefault(key, []).append(p)
        for (shape, dtype, device, step, ticking, _), params in batches.items():
            if not prod(shape):
                continue
            program = trace(rule, shape[-2:] if len(shape) == 3 else shape, ticking)
            inputs = {**values, "step": float(step)}
            slots = tuple(k for k in rule.all_slots(shape) if k in program.inputs)
            most = max(1, BATCH // prod(shape))
            for start in range(0, len(params), most):
                part = params[start : start + most]
                # A memory that this step only reads must survive it.
                written = tuple(k for k in slots if k in program.outputs)
                donate = (*written, "w", "g") if len(part) > 1 else written
                run = _compiled(program, _arithmetic(dtype), device, donate)
                self._run(run, part, shape, slots, inputs, group["maximize"])

    def _run(
        self,
        run: Compiled,
        params: Sequence[Tensor],
        shape: tuple[int, ...],
        slots: Sequence[str],
        scalars: Mapping[str, float],
        maximize: bool,
    ) -> None:
        """Step parameters of one shape, one by one or stacked along a first axis."""
        dtype = _arithmetic(params[0].dtype)
        gradients = [cast(Tensor, p.grad).to(dtype).reshape(shape) for p in params]
        tensors = {
            "w": _stack([p.to(dtype).reshape(shape) for p in params]),
            "g": _stack([-g for g in gradients] if maximize else gradients),
        }
        for name in slots:
            tensors[name] = _stack([_in_batch(self.state[p][name], shape) for p in params])
        out = run({**tensors, **scalars})
        out.pop("direction", None)
        update = out.pop("update", None)
        for j, p in enumerate(params):
            rows = slice(j * shape[0], (j + 1) * shape[0]) if len(params) > 1 else slice(None)
            if update is not None:
                step = update[rows].reshape(p.shape)
                p.add_(step) if p.dtype == dtype else p.copy_(p.to(dtype) + step)
            for name, value in out.items():
                stored = self.state[p][name]
                value = value[rows] if isinstance(value, Tensor) and value.ndim else value
                if stored.data_ptr() != value.data_ptr():
                    stored.copy_(value.expand_as(_in_batch(stored, shape)).reshape(stored.shape))

    def _rule_of(self, i: int) -> Rule:
        """The rule of a group with the static hyperparameters that the group holds now."""
        rule, group = self._rules[i], self.param_groups[i]
        scalars = scalar_names(type(rule))
        changed = {
            f.name: group[f.name]
            for f in fields(rule)
            if f.name not in scalars and group[f.name] != getattr(rule, f.name)
        }
        if changed:
            rule = self._rules[i] = _overridden(rule, changed)
        return rule

    def _state_of(self, p: Tensor, rule: Rule, view: str) -> dict[str, Tensor]:
        """The state of a parameter, made on its first gradient."""
        state = self.state[p]
        missing = _layout(p, rule, view)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name, (slot, shape) in missing.items():
            if name not in state:
                dtype = _arithmetic(p.dtype)
                if shape == p.shape and slot.kind == "full":
                    state[name] = torch.full_like(p, slot.value, dtype=dtype)
                else:
                    start = torch.from_numpy(slot.start()).to(p.device, dtype)
                    state[name] = start.expand(shape).clone()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of the same rules, or of torch's optimizer that a rule is the equal of.

        State keeps the dtype it was saved in. Raises ValueError where rule, names or shapes differ.
        """
        kept: dict[Tensor, dict[str, Any]] = {}

        def check(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            checked, loaded = self._checked(given)
            kept.update(loaded)
            return checked

        def restore(_: Any) -> None:
            for p, state in kept.items():
                self.state[p].update(state)

        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _checked(
        self, given: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]]]:
        """The checkpoint in our terms, and its state as copies in the dtypes it was saved in."""
        groups: list[dict[str, Any]] = []
        loaded: dict[Tensor, dict[str, Any]] = {}
        if len(given["param_groups"]) != len(self.param_groups):
            raise ValueError(
                f"the checkpoint has {len(given['param_groups'])} parameter groups, this optimizer "
                f"has {len(self.param_groups)}"
            )
        for i, (saved, mine) in enumerate(zip(given["param_groups"], self.param_groups, strict=True)):
            if len(saved["params"]) != len(mine["params"]):
                raise ValueError(
                    f"group {i} of the checkpoint has {len(saved['params'])} parameters, this "
                    f"optimizer's has {len(mine['params'])}"
                )
            if saved.get("rule", mine["rule"]) != mine["rule"]:
                raise ValueError(
                    f"group {i} of the checkpoint was saved by rule {saved['rule']!r}; this "
                    f"optimizer steps it by {mine['rule']!r}"
                )
            for name, neutral in FOREIGN.items():
                if saved.get(name, neutral) != neutral:
                    raise ValueError(f"the checkpoint has {name}={saved[name]!r}; no rule has that")
            group = {k: saved.get(k, v) for k, v in mine.items()}
            if "decoupled_weight_decay" in saved:
                group["decoupled"] = saved["decoupled_weight_decay"]
            group["params"] = saved["params"]
            groups.append(group)
            rule = self._rules[i].with_values(_plain(group))
            for j, (key, p) in enumerate(zip(saved["params"], mine["params"], strict=True)):
                state = given["state"].get(key)
                if state:
                    what = self._name(i, j)
                    loaded[p] = _checked_state(p, rule, group["seen_as"], state, what)
        return {**given, "param_groups": groups}, loaded

    def __getstate__(self) -> dict[str, Any]:
        own = {k: v for k, v in self.__dict__.items() if k in OWN_ATTRIBUTES}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for rule, group in zip(self._rules, self.param_groups, strict=True):
            for name, value in (_values(rule) | {"maximize": False}).items():
                group.setdefault(name, value)


OWN_ATTRIBUTES = (
    "_rule",
    "_fallback",
    "_views",
    "_strict",
    "_rules",
    "_why",
    "_known",
    "on_nonfinite",
    "skipped_steps",
)


def _values(rule: Rule) -> dict[str, Any]:
    """The hyperparameters of a rule as plain values."""
    return {f.name: getattr(rule, f.name) for f in fields(rule)}


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _host(v, k) if isinstance(v, Tensor) else v for k, v in group.items()}


def _overridden(rule: Rule, given: Mapping[str, Any]) -> Rule:
    """The rule with a group's hyperparameters; TypeError for a name that it does not have."""
    names = {f.name for f in fields(rule)}
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {sorted(names)}"
            raise TypeError(f"{type(rule).__name__} has no hyperparameter {name!r}{hint}")
    return rule.with_values(_plain(given))


def _host(value: Any, name: str) -> Any:
    """A hyperparameter as a Python number, or a tuple of them."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a step's arithmetic and state for parameters of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _seen(p: Tensor, view: str) -> tuple[int, ...]:
    """The shape a program sees: (count, rows, columns) for a matrix rule, else the parameter's."""
    return matrices(tuple(p.shape), view) if view else canonical(p.shape)


def _layout(p: Tensor, rule: Rule, view: str) -> dict[str, tuple[Slot, torch.Size]]:
    """Each memory's slot and the shape it is stored in: the parameter's own where it has that size."""
    seen = _seen(p, view)
    count, shape = (seen[0], seen[1:]) if view else (1, seen)
    layout: dict[str, tuple[Slot, torch.Size]] = {}
    for name, slot in rule.all_slots(shape).items():
        batch = () if count == 1 else (count,)
        stored = p.shape if slot.shape == shape else torch.Size((*batch, *slot.shape))
        layout[name] = (slot, stored)
    return layout


def _in_batch(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A stored memory with the leading axis (count) that a stack of matrices needs."""
    if len(shape) != 3:
        return stored.reshape(canonical(stored.shape))
    if stored.numel() == prod(shape):
        return stored.reshape(shape)
    return stored.reshape(shape[0], *stored.shape[-2:])


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


@lru_cache(maxsize=4096)
def _compiled(
    program: Program, dtype: torch.dtype, device: torch.device, donate: tuple[str, ...]
) -> Compiled:
    return Compiled(program, Torch(dtype, device), donate)


def _checked_state(
    p: Tensor, rule: Rule, view: str, state: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """Copies of a saved state on the parameter's device, its names and shapes checked."""
    layout = _layout(p, rule, view)
    names = {k for k, v in state.items() if v is not None}
    if names - {"step"} != set(layout):
        raise ValueError(
            f"the checkpoint has state {sorted(names)} for {what}; {type(rule).__name__} keeps "
            f"{sorted({'step', *layout})}"
        )
    copies: dict[str, Any] = {
        "step": torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).cpu().clone()
    }
    for name, (_, shape) in layout.items():
        if state[name].shape != shape:
            raise ValueError(
                f"the checkpoint's {name} for {what} has shape {tuple(state[name].shape)}; "
                f"it should be {tuple(shape)}"
            )
        copies[name] = state[name].detach().to(p.device, copy=True)
    return copies


class Binding(Protocol, Generic[P]):
    """The class that `bind` makes, as type checkers see it."""

    @overload
    def __call__(self, params: Parameters, *args: P.args, **kwargs: P.kwargs) -> Optimizer: ...
    @overload
    def __call__(
        self,
        params: Parameters,
        lr: float | Tensor = ...,
        *,
        fallback: Rule | None = ...,
        views: Mapping[str, str] | None = ...,
        strict: bool = ...,
        maximize: bool = ...,
        on_nonfinite: OnNonfinite = ...,
        **hyperparameters: Any,
    ) -> Optimizer: ...


def bind(rule: Callable[P, Rule], module: str | None = None) -> Binding[P]:
    """A `torch.optim.Optimizer` class of one rule: `M3 = bind(rules.M3)`; then `M3(model, lr=3e-4)`.

    It takes params, lr and every hyperparameter of the rule by name, and the options of `Optimizer`.
    To pickle its objects, assign it to the rule's name in the module that calls `bind`.
    """
    cls = cast(type[Rule], rule)
    options = dict(inspect.signature(Optimizer.__init__).parameters)
    shared = [options[k] for k in ("fallback", "views", "strict", "maximize", "on_nonfinite")]

    def __init__(self: Any, params: Any, lr: Any = None, **given: Any) -> None:
        chosen = {x.name: given.pop(x.name) for x in shared if x.name in given}
        given |= {} if lr is None else {"lr": lr}
        Optimizer.__init__(self, params, _overridden(cls(), given), **chosen)
        for group in self.param_groups:
            for name, value in given.items():
                if isinstance(value, Tensor) and name in group:
                    group[name] = value

    keyword = inspect.Parameter.KEYWORD_ONLY
    hyper = [
        inspect.Parameter(f.name, keyword, default=f.default) for f in fields(cls) if f.name != "lr"
    ]
    signature = inspect.Signature(
        [
            inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("lr", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=cls().lr),
            *hyper,
            *shared,
        ]
    )
    namespace = {
        "__init__": __init__,
        "__doc__": cls.__doc__,
        "__module__": module or sys._getframe(1).f_globals["__name__"],
        "__signature__": signature,
    }
    return cast(Binding[P], type(cls.__name__, (Optimizer,), namespace))
