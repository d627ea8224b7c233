"""The fused step of one parameter group, kept from step to step while its tensors stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from deepopt.kernels.plan import Plan, plan
from deepopt.kernels.source import Storage
from deepopt.rule import Rule
from torch_backend.fused import (
    LOW_HALF,
    STORAGE,
    Call,
    How,
    Member,
    Part,
    Rounding,
    build,
    obstacle,
    parts,
    storages,
)
from torch_backend.graphs import Capture, Graph
from torch_backend.kernels import native
from torch_backend.seen import Seen, arithmetic, places_of, remember, seen_of

# Sets of parts that a group keeps, one for each pattern of clocks and of steps taken.
MOST_VARIANTS = 64
_said: set[str] = set()

# Which members step now, at which step, and the clocks of each.
Moment = tuple[int, tuple[int, ...], tuple[frozenset[str], ...]]


class Asked(NamedTuple):
    """A step that a group is to take: by which rule and gradients, and how."""

    group: Mapping[str, Any]
    rule: Rule
    gradients: Sequence[Tensor | None]
    scaled: bool
    how: How
    state: Mapping[Tensor, dict[str, Any]]
    turns: Callable[[], Sequence[int]]


class Work:
    """The parameters of a group that kernels step.

    rest: the positions of those that the plain path has to take, although they have gradients.
    Raises RuntimeError that names a parameter where kernels are required and cannot take it.
    """

    def __init__(self, asked: Asked, name: Callable[[int], str]) -> None:
        group, rule, gradients, scaled, how, state, turns = asked
        self.rule = rule
        self.how = how
        self.scaled = scaled
        self.maximize: bool = group["maximize"]
        self.all = list(group["params"])
        self.without = [g is None for g in gradients]
        self.rest: list[int] = []
        self.params: list[Tensor] = []
        self.positions: list[int] = []
        self.places: list[int] = []
        self.seen: list[Seen] = []
        self.gradients: list[torch.dtype] = []
        self._plans: dict[tuple[Seen, frozenset[str], frozenset[str]], Plan] = {}
        self._turns = turns() if rule.stagger else ()
        self.variants: dict[Any, list[Part]] = {}
        self.graphs: dict[Part, Graph] = {}
        self.copies: dict[int, Tensor] = {}
        # Filled by the first step, which makes the state.
        self.states: list[dict[str, Any]] = []
        self.kept: list[Tensor] = []
        self.layouts: list[Any] = []
        always = rule.ticks(rule.every) | frozenset(rule.clocks())
        live = [
            (i, p, g)
            for i, (p, g) in enumerate(zip(self.all, gradients, strict=True))
            if g is not None
        ]
        shared = _sharing([p for _, p, _ in live])
        every = [seen_of(rule, p.shape, group["seen_as"]) for p in self.all]
        places = places_of(every)
        for j, (position, p, g) in enumerate(live):
            # The plain path refuses gradients that are sparse or of another shape, and an empty
            # tensor needs no kernel.
            if not p.numel() or g.layout is not torch.strided or g.shape != p.shape:
                self.rest.append(position)
                continue
            seen, own = every[position], state.get(p, {})
            _check_shapes(own, seen, name(position))
            why = obstacle(p, self._plan(seen, always), not seen.count, bool(rule.clocks()))
            why = why or _unfit(g) or _unknown(own, seen)
            if j in shared:
                why = why or "it shares memory with another parameter"
            if why:
                self._cannot(name(position), why)
                self.rest.append(position)
                continue
            self.params.append(p)
            self.positions.append(position)
            self.places.append(places[position])
            self.seen.append(seen)
            self.gradients.append(g.dtype)
        self.layouts = _layouts(self.params)
        self.shapes = [p.shape for p in self.params]
        self._everyone = tuple(range(len(self.params)))
        self._kinds = set(self.seen)

    def _cannot(self, name: str, why: str) -> None:
        if self.how.required:
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported "
                f"devices and layouts; it cannot step {name}: {why}"
            )
        kind = why.split(" (")[0]
        say_once(f"deepopt steps {name} by the plain path, which is slower: {why}", kind)

    def fits(self, asked: Asked) -> bool:
        """Whether this is still the work of a group: the same tensors at the same places."""
        group, rule, gradients, scaled, how, state, _ = asked
        same = self.rule is rule and self.maximize == group["maximize"]
        same = same and self.scaled == scaled and self.how == how
        params = group["params"]
        if not same or len(params) != len(self.all) or not all(map(is_, params, self.all)):
            return False
        if [g is None for g in gradients] != self.without:
            return False
        own = cast(list[Tensor], [gradients[i] for i in self.positions])
        if [g.dtype for g in own] != self.gradients or [g.shape for g in own] != self.shapes:
            return False
        if set(map(type, own)) - {Tensor} or any(g.layout is not torch.strided for g in own):
            return False
        if not self.states:
            return _layouts(self.params) == self.layouts
        found = [state.get(p) for p in self.params]
        if not all(map(is_, found, self.states)):
            return False
        now = [*self.params, *(x for s in self.states for x in s.values())]
        if len(now) != len(self.kept) or not all(map(is_, now, self.kept)):
            return False
        return _layouts(now) == self.layouts

    def moments(self, state: Mapping[Tensor, dict[str, Any]]) -> list[Moment]:
        """The steps to take: parameters that have taken as many go together."""
        if self.states:
            least, greatest = native.counts(self._steps)
            if least == greatest:
                return [self._moment(int(least) + 1, self._everyone)]
        groups: dict[int, list[int]] = {}
        for i, p in enumerate(self.params):
            taken = state[p].get("step", 0) if p in state else 0
            groups.setdefault(int(taken) + 1, []).append(i)
        return [self._moment(step, tuple(own)) for step, own in sorted(groups.items())]

    def _moment(self, step: int, members: tuple[int, ...]) -> Moment:
        if not self.rule.stagger:
            return step, members, (self.rule.ticks(step),)
        turn = [self._turns[self.positions[i]] for i in members]
        return step, members, tuple(self.rule.ticks(step, x) for x in turn)

    def _plan(
        self, seen: Seen, ticking: frozenset[str], narrow: frozenset[str] = frozenset()
    ) -> Plan:
        """The plan of a step as a rule sees a parameter, looked up once for all that are alike."""
        key = seen, ticking, narrow
        if key not in self._plans:
            options = {"maximize": self.maximize, "scaled": self.scaled}
            self._plans[key] = plan(self.rule, seen.shape, ticking, **options, narrow=narrow)
        return self._plans[key]

    def _members(self, moment: Moment, states: Sequence[dict[str, Any]]) -> list[Member]:
        _, members, ticks = moment
        known: dict[Any, dict[str, Storage]] = {}
        found: list[Member] = []
        for j, i in enumerate(members):
            p, seen, state = self.params[i], self.seen[i], states[i]
            dtypes = seen.dtypes(p, state, self.how.state_dtype)
            narrow = frozenset(k for k, x in dtypes.items() if x != arithmetic(p.dtype))
            whole = self._plan(seen, ticks[j % len(ticks)], narrow)
            key = id(whole), p.dtype, p.device, self.gradients[i], *dtypes.values()
            if key not in known:
                known[key] = storages(p, self.gradients[i], seen, dtypes, whole, self.how)
            own = p, i, self.positions[i], self.places[i], state
            found.append(Member(*own, seen, whole, known[key]))
        return found

    def prepare(self, moments: Sequence[Moment], state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Build the kernels that are missing. Raises native.Unavailable."""
        for moment in moments:
            if moment[1:] not in self.variants:
                build(self._members(moment, [state.get(p, {}) for p in self.params]))

    def moved(self, moments: Sequence[Moment], gradients: Sequence[Tensor | None]) -> list[int]:
        """The positions whose gradients are not where the graphs to be replayed read them."""
        due = [part for moment in moments for part in self.variants.get(moment[1:], ())]
        graphs = [self.graphs[part] for part in due if part in self.graphs]
        return [i for graph in graphs for i in graph.moved(gradients)]

    def reads_norm(self, moments: Sequence[Moment]) -> bool:
        """Whether the norm of all gradients is among the scalars."""
        ticks = {t for moment in moments for t in moment[2]}
        plans = (self._plan(seen, t) for seen in self._kinds for t in ticks)
        return any("gradient_norm" in x.scalars for x in plans)

    def run(
        self,
        moments: Sequence[Moment],
        state: Mapping[Tensor, dict[str, Any]],
        scalars: Mapping[str, Any],
        gradients: Sequence[Tensor | None],
        context: Callable[[Tensor, str], Tensor],
        key: tuple[int, int],
        buffers: dict[torch.device, Tensor],
        capture: Capture | None,
    ) -> None:
        """Take the steps, as graphs where a capture is given. What `prepare` built is there."""
        if not self.states:
            self._adopt(state)
        given: dict[str, list[Tensor]] = {}
        fixed = capture is not None
        given["g"] = [self._like(j, gradients[i], fixed) for j, i in enumerate(self.positions)]
        for name in self.rule.context((1, 1)):
            given[name] = [context(p, name) for p in self.params]
        native.count(self._steps)
        for moment in moments:
            step = moment[0]
            if moment[1:] not in self.variants:
                if len(self.variants) >= MOST_VARIANTS:
                    self.variants.clear()
                    self.graphs.clear()
                self.variants[moment[1:]] = parts(self._members(moment, self.states))
            for part in self.variants[moment[1:]]:
                device = part.members[0].p.device
                buffer = buffers.get(device)
                if buffer is None or buffer.numel() < part.size:
                    buffer = buffers[device] = torch.empty(
                        part.size, dtype=torch.uint8, device=device
                    )
                call = Call(step, key, {**scalars, "step": float(step)}, given, buffer)
                if capture is None:
                    part.run(call)
                else:
                    if part not in self.graphs:
                        self.graphs[part] = Graph(part)
                    self.graphs[part].run(call, capture)
        # So that a backward pass that needs the old weights raises.
        increment_version(p for p in self.params if not p.is_inference())

    def _like(self, index: int, g: Tensor | None, fixed: bool) -> Tensor:
        """A gradient, in the order of entries that its parameter has.

        fixed: a copy lies where the last one did, as graphs need it.
        """
        p = self.params[index]
        assert g is not None
        if g.is_neg() or g._is_zerotensor():
            g = g.clone()
        if g.stride() == p.stride():
            return g
        copy = self.copies.get(index)
        if copy is None:
            copy = torch.empty_like(p, dtype=g.dtype)
            if fixed:
                self.copies[index] = copy
        return copy.copy_(g)

    def _adopt(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Make what state there is not, and note where it is."""
        for p, seen in zip(self.params, self.seen, strict=True):
            lay_out(p, state[p], seen, self.how.rounding, self.how.state_dtype)
        self.states = [state[p] for p in self.params]
        self.kept = [*self.params, *(x for s in self.states for x in s.values())]
        self.layouts = _layouts(self.kept)
        self._steps = np.array([s["step"].data_ptr() for s in self.states], np.int64)


def lay_out(
    p: Tensor,
    own: dict[str, Any],
    seen: Seen,
    rounding: Rounding,
    wanted: torch.dtype | None = None,
) -> None:
    """Make what state a parameter does not have, and lay it out as the parameter is."""
    remember(p, own, seen, wanted)
    step = own["step"]
    if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.device.type != "cpu":
        own["step"] = torch.tensor(float(step))
    if rounding == "exact" and p.dtype == torch.bfloat16 and LOW_HALF not in own:
        own[LOW_HALF] = torch.zeros_like(p, dtype=torch.int16)
    for name, x in own.items():
        if name != "step" and not _laid_out(x, p):
            like = p if x.shape == p.shape else x.contiguous()
            own[name] = torch.empty_like(like, dtype=x.dtype).copy_(x)


def _layouts(tensors: Sequence[Tensor]) -> list[Any]:
    """Where tensors lie, and how: what kernels go by."""
    maps = (Tensor.data_ptr, Tensor.numel, Tensor.stride)
    return [*(list(map(f, tensors)) for f in maps), [x.dtype for x in tensors]]


def _check_shapes(state: Mapping[str, Any], seen: Seen, what: str) -> None:
    """Raise ValueError where a memory is not as large as its parameter wants it now."""
    for name, (_, stored) in seen.memories.items():
        if name in state and state[name].shape != stored:
            raise ValueError(
                f"the memory {name} of {what} has shape {tuple(state[name].shape)}; it should be "
                f"{tuple(stored)}: a parameter that changes its shape needs new state"
            )


def _unknown(state: Mapping[str, Any], seen: Seen) -> str:
    """Why memories of a parameter are nothing for kernels; empty where they are."""
    dtypes = {k: state[k].dtype for k in seen.memories if k in state}
    return next((f"its memory {k} is {x}" for k, x in dtypes.items() if x not in STORAGE), "")


def _laid_out(x: Tensor, p: Tensor) -> bool:
    """Whether a memory lies in the order of its parameter, or row by row."""
    return x.stride() == p.stride() if x.shape == p.shape else x.is_contiguous()


def _unfit(g: Tensor) -> str:
    if type(g) is not Tensor:
        return f"its gradient is a {type(g).__name__}, not a plain tensor"
    return "" if g.dtype in STORAGE else f"its gradient's dtype is {g.dtype}"


def _sharing(tensors: Sequence[Tensor]) -> set[int]:
    """The places of tensors that share memory with another one before them."""
    spans = sorted(
        (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), i)
        for i, x in enumerate(tensors)
        if x.numel()
    )
    found: set[int] = set()
    reach, owner = 0, -1
    for start, end, i in spans:
        if start < reach:
            found.add(max(i, owner))
        if end > reach:
            reach, owner = end, i
    return found


def say_once(text: str, kind: str = "") -> None:
    """Warn of each kind of thing once in a process."""
    if (kind or text) not in _said:
        _said.add(kind or text)
        warnings.warn(text, RuntimeWarning, stacklevel=4)
