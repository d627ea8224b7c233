"""The step of parameters on a device mesh: shards by themselves, a whole matrix on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from deepopt.algebra import Program
from deepopt.expr import Shape
from deepopt.rule import Rule, hints, trace, turns
from deepopt.split import Split, is_local, replicated, split, variants
from torch_backend.algebra import Compiled, Torch
from torch_backend.exchange import Blocks, Exchange, Layout, Parcel
from torch_backend.fused import Batched, Precision, is_narrow
from torch_backend.layers import whole_tensor
from torch_backend.plain import Norm
from torch_backend.seen import Seen, arithmetic, rounds_at_random, seen_of, stored_as
from torch_backend.stochastic import rounded
from torch_backend.values import host, instance, made

if TYPE_CHECKING:
    from torch_backend.optimizer import Optimizer

# The numbers that one rank sends in a round, about; a larger model takes several rounds.
ROUND = 1 << 26


class Shard(Torch):
    """The algebra of shards; arrays of one value have no shape, which would be the whole's."""

    def array(self, kind: str, shape: Shape, value: float) -> Tensor:
        return torch.full((), value, dtype=self.dtype, device=self.device)


class Narrow(Batched):
    """The algebra of whole matrices where Newton-Schulz iterations multiply bfloat16 ones."""

    def newton_schulz(self, x: Tensor, *, steps: int, coefficients: str) -> Tensor:
        narrow = super().newton_schulz(x.bfloat16(), steps=steps, coefficients=coefficients)
        return narrow.to(x.dtype)


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor on a mesh; any other tensor as it is."""
    return x._local_tensor if isinstance(x, DTensor) else x


def placed(value: Tensor, p: Tensor, name: str, seen: Seen, rule: Rule) -> Tensor:
    """A whole memory of a parameter, or one from another mesh, cut as the parameter's are."""
    if not isinstance(p, DTensor):
        return whole_tensor(value)
    placements = placements_of(Layout.of(p, "a parameter"), name, seen, rule)
    if isinstance(value, DTensor):
        if value.device_mesh == p.device_mesh and tuple(value.placements) == placements:
            return value
        value = value.full_tensor()
    device = local(p).device
    return distribute_tensor(value.to(device), p.device_mesh, placements, src_data_rank=None)


def placements_of(layout: Layout, name: str, seen: Seen, rule: Rule) -> tuple[Any, ...]:
    """How a memory lies on the mesh: as the parameter where it is as large, else cut along its
    first axis, or the same everywhere."""
    slot, _ = seen.memories[name] if name in seen.memories else (None, None)
    if slot is None or slot.shape == seen.shape:
        return layout.placements
    if name in replicated(rule, seen.shape):
        return tuple(Replicate() for _ in layout.placements)
    return layout.along_first()


@dataclass(eq=False)
class Cut:
    """A matrix in shards that takes a step: its part here, and how far the step has come.

    place: its group and position there, by which memories are rounded at random.
    """

    p: DTensor
    name: str
    seen: Seen
    layout: Layout
    rule: Rule
    parts: Split
    state: dict[str, Any]
    scalars: Mapping[str, Any]
    gradient: Tensor
    context: Mapping[str, Tensor]
    precision: Precision
    place: tuple[int, int]
    owner: int = 0
    # What was computed for this shard, and, on the owner, for the whole.
    known: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return arithmetic(self.p.dtype)

    @property
    def algebra(self) -> type[Torch]:
        """What the matrix functions are computed in."""
        narrow = self.dtype == torch.float32 and is_narrow(self.precision, local(self.p).device)
        return Narrow if narrow else Batched

    @property
    def cost(self) -> int:
        """Of the matrix functions, about: what owners are chosen by."""
        return self.p.numel() * min(self.seen.shape)

    def inputs(self) -> dict[str, Any]:
        """What programs on the shard go by."""
        found: dict[str, Any] = {**self.scalars, "g": self.gradient}
        found["w"] = local(self.p).to(self.dtype)
        for name in self.seen.memories:
            value = local(self.state[name])
            if self.seen.memories[name][0].shape == self.seen.shape:
                found[name] = value.to(self.dtype)
            elif name in replicated(self.rule, self.seen.shape):
                # All its matrices have the same.
                found[name] = value.reshape(-1)[0].to(self.dtype)
        # Not the new memories, which have the names of the old ones.
        return found | {k: x for k, x in self.known.items() if k.startswith("scattered")}

    def run(self, program: Program) -> None:
        """Compute a program on the shard."""
        found = _compiled(program, Shard, self.dtype, local(self.p).device)(
            {k: v for k, v in self.inputs().items() if k in program.inputs}
        )
        self.known |= {k: torch.as_tensor(x) for k, x in found.items()}

    def is_single(self, name: str) -> bool:
        """Whether a value to be sent is a number that all shards need."""
        node = self.parts.whole.outputs.get(name)
        return name not in self.seen.memories and node is not None and node.shape != self.seen.shape

    def blocks(self, name: str) -> tuple[Shape, Blocks]:
        """The shape of a value to be sent, and where the shards' parts of it are."""
        if self.is_single(name):
            return (1,), self.layout.everywhere((1,))
        if name in self.seen.memories and self.seen.memories[name][0].shape != self.seen.shape:
            stored = tuple(self.seen.memories[name][1])
            return stored, self.layout.spread(stored)
        return tuple(self.p.shape), self.layout.blocks(self.p.shape)

    def all_of(self, name: str) -> Tensor:
        """The whole of an input of the matrix functions."""
        if name in self.whole:
            return self.whole[name]
        if name in self.seen.memories:
            return local(self.state[name]).to(self.dtype)
        given = self.context[name].to(local(self.p).device, self.dtype)
        return given.expand(self.seen.stack(self.seen.context[name]))

    @property
    def needed(self) -> list[str]:
        """What the whole is computed from and each shard has a part of."""
        gathered = [k for k in self.parts.before.outputs if k.startswith("gathered")]
        one = replicated(self.rule, self.seen.shape)
        own = set(self.parts.whole.inputs) - one
        return gathered + [k for k in self.seen.memories if k in own]

    def part(self, name: str) -> Tensor:
        """This shard's part of what is needed."""
        if name in self.seen.memories:
            return local(self.state[name])
        return self.known[name].expand(local(self.p).shape)

    def write(self) -> None:
        """Store the results: the step is taken."""
        self.state["step"] += 1
        update = self.known.pop("update", None)
        if update is not None:
            local(self.p).add_(update)  # In the wider dtype of the two, then rounded once.
        for name, (slot, _) in self.seen.memories.items():
            if name not in self.known:
                continue
            stored, value = local(self.state[name]), self.known[name]
            if rounds_at_random(slot, stored.dtype) and stored.numel():
                # Each part draws numbers of its own, the same on all ranks that have it.
                part = self.layout.index
                if slot.shape != self.seen.shape:
                    part //= prod(self.layout.sizes[1:])
                place = self.place[1] * self.layout.size + part
                step = int(self.state["step"])
                value = rounded(
                    value.expand(stored.shape), stored, name, self.place[0], step, [place]
                )
            stored.copy_(value)


@lru_cache(maxsize=4096)
def _compiled(
    program: Program, algebra: type[Torch], dtype: torch.dtype, device: torch.device
) -> Compiled:
    return Compiled(program, algebra(dtype, device))


@dataclass(frozen=True)
class Part:
    """Of each group of an optimizer of local tensors: the turns of its parameters, and the number
    of its random numbers."""

    turns: list[list[int]]
    streams: list[int]


class Distributed:
    """The step of an optimizer some of whose parameters are DTensors.

    What is local entry by entry, and whatever is no DTensor, is stepped by `inner`, an optimizer of
    the same rules over the local tensors; for matrices that are cut, see `Cut`. State is that of
    the outer optimizer: DTensors like the parameters.
    """

    def __init__(self, outer: Optimizer) -> None:
        if outer.differentiable:
            raise RuntimeError("differentiable=True takes no DTensors; step plain tensors")
        self.outer = outer
        self.params = [p for group in outer.param_groups for p in group["params"]]
        self.sources = [local(p) for p in self.params]
        self.meshes = list(
            dict.fromkeys(p.device_mesh for p in self.params if isinstance(p, DTensor))
        )
        self.layouts: dict[Tensor, Layout] = {
            p: Layout.of(p, outer.name_of(i, j))
            for i, group in enumerate(outer.param_groups)
            for j, p in enumerate(group["params"])
            if isinstance(p, DTensor)
        }
        self._check_alike()
        # Of this step; static hyperparameters may change between steps.
        self.rules = [self._rule(i) for i in range(len(outer.param_groups))]
        self.groups_of = {p: i for i, g in enumerate(outer.param_groups) for p in g["params"]}
        self.cut = {p for i, group in enumerate(outer.param_groups) for p in group["params"]
                    if p in self.layouts and self._needs_others(i, p)}  # fmt: skip
        # The local tensors by parameter, without the history of the parameter.
        self.local: dict[Tensor, Tensor] = {
            p: local(p).detach() for p in self.layouts if p not in self.cut
        }
        for p in self.cut:
            _ = self.layouts[p].group  # Refused here, before anything steps.
        self.links: dict[tuple[Tensor, str], Tensor] = {}
        self.known = self._groups()
        self.inner, self.groups = self._inner()

    def fits(self) -> bool:
        """Whether the optimizer still has the parameters, and where they were."""
        if self._groups() != self.known:
            return False
        return all(local(p) is x for p, x in zip(self.params, self.sources, strict=True))

    def _groups(self) -> list[Any]:
        return [(g["rule"], g["seen_as"], *map(id, g["params"])) for g in self.outer.param_groups]

    def _rule(self, i: int) -> Rule:
        group = self.outer.param_groups[i]
        cls = self.outer.rules[group["rule"]]
        return instance(cls, {k: host(group[k], k) for k in hints(cls)})

    def _needs_others(self, i: int, p: Tensor) -> bool:
        """Whether a shard cannot be stepped without the others."""
        rule, layout = self._rule(i), self.layouts[p]
        seen = seen_of(rule, p.shape, self.outer.param_groups[i]["seen_as"])
        return layout.size > 1 and not is_local(rule, seen.shape)

    def _check_alike(self) -> None:
        """Raise ValueError that names the first parameter that is not the same on all ranks."""
        mine: list[str] = []
        for i, group in enumerate(self.outer.param_groups):
            cls = self.outer.rules[group["rule"]]
            rule = made(cls, {k: group[k] for k in hints(cls)})
            for j, p in enumerate(group["params"]):
                where = f" placed {p.placements}" if isinstance(p, DTensor) else ""
                what = f"{self.outer.name_of(i, j)} of shape {tuple(p.shape)}, {p.dtype}{where}"
                mine.append(f"{what}, stepped by {rule} seen as {group['seen_as']!r}")
        for mesh in self.meshes:
            for axis in _shared_axes(mesh):
                group = mesh.get_group(axis)
                found: list[Any] = [None] * dist.get_world_size(group)
                dist.all_gather_object(found, mine, group=group)
                for rank, other in enumerate(found):
                    if other != found[0]:
                        ranks = (dist.get_global_rank(group, i) for i in (0, rank))
                        raise ValueError(_difference(found[0], other, *ranks))

    def _inner(self) -> tuple[Optimizer | None, list[int]]:
        """The optimizer of local tensors, and which of the outer's groups its groups are.

        Shards have groups of their own, whose random numbers are those of their part; what several
        ranks have whole takes the same numbers on all of them.
        """
        outer, groups, which = self.outer, list[dict[str, Any]](), list[int]()
        part = Part([], [])
        for i, group in enumerate(outer.param_groups):
            kinds: dict[Layout | None, list[int]] = {}
            for j, p in enumerate(group["params"]):
                layout = self.layouts.get(p)
                if p not in self.cut:
                    cut = layout is not None and layout.size > 1
                    kinds.setdefault(layout if cut else None, []).append(j)
            turn = turns([p.shape for p in group["params"]])
            view = {"seen_as": group["seen_as"]} if group["seen_as"] else {}
            for layout, places in kinds.items():
                params = [group["params"][j] for j in places]
                own = [(outer.name_of(i, j), self.local.get(p, p))
                       for j, p in zip(places, params, strict=True)]  # fmt: skip
                groups.append({"params": own, "rule": self._rule(i), **view})
                which.append(i)
                part.turns.append([turn[j] for j in places])
                shard = 0 if layout is None else 1 + layout.index
                part.streams.append(i + (shard << 12))
        if not groups:
            return None, which
        inner = outer.like(groups)
        inner.part_of = part
        return inner, which

    def _seen(self, p: Tensor) -> tuple[Seen, Rule]:
        """How a parameter is seen, and by which rule."""
        i = self.groups_of[p]
        rule = self.rules[i]
        return seen_of(rule, p.shape, self.outer.param_groups[i]["seen_as"]), rule

    def step(self) -> None:
        """Take the step; every rank of the meshes must come here."""
        outer = self.outer
        flags = self._agreed(bool(getattr(outer, "found_inf", False)))
        if any(flags.found_inf) or not outer.accepts(flags.bad):
            return
        stepped = [p for p, live in zip(self.params, flags.live, strict=True) if live]
        gradients = {p: self._gradient(p) for p in stepped}
        norm = self.norm(gradients)
        cut = self._cuts(gradients, norm)
        if self.inner is not None:
            self._step_inner(gradients, norm)
        for batch in _rounds(cut):
            _step(batch)

    def _agreed(self, found_inf: bool = False) -> _Flags:
        """Which parameters step, and which are not finite, as any rank of a mesh finds them.

        Raises on all ranks what would have kept one of them from its part of the step.
        """
        self.rules = [self._rule(i) for i in range(len(self.outer.param_groups))]
        errors = {k: error for k, p in enumerate(self.params) if (error := self._unfit(p))}
        own = _Flags(
            [p.grad is not None for p in self.params],
            [any(not bool(x.isfinite().all()) for x in self._checked(p)) for p in self.params],
            [k in errors for k in range(len(self.params))],
            [p.grad is None for p in self.params],
            [self._is_moved(p) for p in self.params],
            [found_inf],
        )
        for mesh in self.meshes:
            flags = torch.tensor([x for part in own for x in part], dtype=torch.int32)
            found = _over(mesh, _shared_axes(mesh), flags.to(_device(mesh)), dist.ReduceOp.MAX)
            known = iter(found.tolist())
            own = _Flags(*([bool(next(known)) for _ in part] for part in own))
        for k, unfit in enumerate(own.unfit):
            if unfit:
                name = self.name(self.params[k])
                raise errors.get(k) or ValueError(f"another rank cannot step {name}; see its error")
            if own.moved[k] and own.lacking[k]:
                name = self.name(self.params[k])
                raise ValueError(
                    f"some ranks have a gradient of {name} that is placed in another way than it, "
                    "and others none; redistribute it, or give all ranks one"
                )
        return own

    def name(self, p: Tensor) -> str:
        """What errors call a parameter."""
        i = self.groups_of[p]
        own = self.outer.param_groups[i]["params"]
        return self.outer.name_of(i, next(j for j, q in enumerate(own) if q is p))

    def _unfit(self, p: Tensor) -> Exception | None:
        """What keeps this rank from stepping a parameter."""
        if p.grad is None:
            return None
        if p in self.layouts and not isinstance(p.grad, DTensor):
            return TypeError(f"the gradient of a DTensor must be one, not {type(p.grad).__name__}")
        seen, rule = self._seen(p)
        if seen.context:
            try:
                self.outer.check_context(rule, p, seen, self.name(p))
            except (TypeError, ValueError) as error:
                return error
        return None

    def _is_moved(self, p: Tensor) -> bool:
        layout, g = self.layouts.get(p), p.grad
        return isinstance(g, DTensor) and (
            layout is not None and tuple(g.placements) != layout.placements
        )

    def _checked(self, p: Tensor) -> list[Tensor]:
        """What must be finite of a parameter: its context, and its gradient where that is asked."""
        found: list[Tensor] = []
        if p.grad is not None and p in self.outer.context:
            known = self.outer.context[p]
            found = [known[k] for k in self._seen(p)[0].context if isinstance(known.get(k), Tensor)]
        if self.outer.on_nonfinite != "propagate" and p.grad is not None:
            found.append(local(p.grad))
        return found

    def live(self) -> dict[Tensor, Tensor]:
        """This process's parts of the gradients of what a step would step; all ranks call."""
        flags = self._agreed()
        return {p: self._gradient(p) for p, x in zip(self.params, flags.live, strict=True) if x}

    def whole(self, i: int, gradients: Mapping[Tensor, Tensor]) -> Optimizer:
        """An optimizer of the whole tensors of a group, with these gradients and its state.

        All ranks call. What it does shows in copies of DTensors only.
        """
        outer, group = self.outer, self.outer.param_groups[i]
        cls = outer.rules[group["rule"]]
        rule = made(cls, {k: group[k] for k in hints(cls)})
        twins = [whole_tensor(p).detach() for p in group["params"]]
        names = [outer.name_of(i, j) for j in range(len(twins))]
        view = {"seen_as": group["seen_as"]} if group["seen_as"] else {}
        own = {"params": list(zip(names, twins, strict=True)), "rule": rule, **view}
        twin = outer.like([own | {"maximize": group["maximize"]}])
        for p, q in zip(group["params"], twins, strict=True):
            if p in gradients:
                g, layout = gradients[p], self.layouts.get(p)
                if layout is not None:
                    g = whole_tensor(_on_mesh(g, layout.mesh, layout.placements, p.shape))
                q.grad = g
            if p in outer.state:
                twin.state[q] = {k: whole_tensor(x) for k, x in outer.state[p].items()}
            if p in outer.context:
                twin.context[q] = outer.context[p]
        return twin

    def _gradient(self, p: Tensor) -> Tensor:
        """This process's part of a gradient; zeros where only other ranks have one."""
        g, layout = p.grad, self.layouts.get(p)
        if layout is None:
            return torch.zeros_like(p) if g is None else g
        if g is None:
            return torch.zeros_like(local(p))
        assert isinstance(g, DTensor)
        if tuple(g.placements) != layout.placements:
            g = g.redistribute(layout.mesh, layout.placements)
        return local(g)

    def norm(self, gradients: Mapping[Tensor, Tensor]) -> Norm:
        """The norm of all gradients, whole; computed by all ranks, or by none."""
        if not any(_reads_norm(self._rule(i)) for i in range(len(self.outer.param_groups))):
            return Norm(())
        square: Tensor | None = None
        for layout in dict.fromkeys([None, *self.layouts.values()]):
            own = [g for p, g in gradients.items() if self.layouts.get(p) == layout]
            parts = [torch.linalg.vector_norm(g, dtype=arithmetic(g.dtype)).square() for g in own]
            if parts:
                total = torch.stack([x.to(parts[0].device, torch.float64) for x in parts]).sum()
                if layout is not None:
                    total = _over(layout.mesh, layout.axes, total, dist.ReduceOp.SUM)
                square = total if square is None else square + total.to(square.device)
        wide = any(g.dtype == torch.float64 for g in gradients.values())
        dtype = torch.float64 if wide else torch.float32
        return Norm((), None if square is None else square.sqrt().to(dtype))

    def _cuts(self, gradients: Mapping[Tensor, Tensor], norm: Norm) -> list[Cut]:
        """The matrices in shards that take the step."""
        outer, found = self.outer, list[Cut]()
        for i, group in enumerate(outer.param_groups):
            own = [
                (j, p) for j, p in enumerate(group["params"]) if p in self.cut and p in gradients
            ]
            if not own:
                continue
            rule = self._rule(i)
            values: dict[str, Any] = rule.scalars(
                **{k: host(group[k], k) for k in hints(type(rule))}
            )
            factor = -1.0 if group["maximize"] else 1.0
            scale: Tensor | None = getattr(outer, "grad_scale", None)
            factor = factor if scale is None else factor / float(scale)
            if _reads_norm(rule):
                values["gradient_norm"] = float(norm.on(torch.device("cpu"))) * abs(factor)
            turn = turns([p.shape for p in group["params"]])
            for j, p in own:
                name, layout = outer.name_of(i, j), self.layouts[p]
                self._check_options(p, name)
                seen = seen_of(rule, p.shape, group["seen_as"])
                outer.check_context(rule, p, seen, name)
                state = self._remembered(p, rule, seen)
                step = int(state["step"]) + 1
                parts = split(rule, seen.shape, rule.ticks(step, turn[j]), seen.count > 1)
                g = gradients[p].to(arithmetic(p.dtype)) * factor
                scalars = {**values, "step": float(step)}
                context = outer.context[p] if p in outer.context else {}
                found.append(
                    Cut(
                        *(p, name, seen, layout, rule, parts, state, scalars, g, context),
                        precision=outer.precision,
                        place=(i, j),
                    )
                )
        return found

    def _check_options(self, p: Tensor, name: str) -> None:
        outer = self.outer
        if outer.fused:
            raise RuntimeError(
                f"fused=True cannot step {name}: it is in shards, and its rule needs the whole; "
                "leave fused=None"
            )
        if outer.rounding != "nearest" and p.dtype == torch.bfloat16:
            raise RuntimeError(
                f"rounding={outer.rounding!r} needs kernels, which cannot step {name}: it is in "
                "shards, and its rule needs the whole; keep float32 shards, as FSDP2's "
                "MixedPrecisionPolicy does"
            )

    def _remembered(self, p: Tensor, rule: Rule, seen: Seen) -> dict[str, Any]:
        """The state of a parameter in shards, made where there is none."""
        state, layout, part = self.outer.state[p], self.layouts[p], local(p)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name, (slot, stored) in seen.memories.items():
            if name in state:
                continue
            placements = placements_of(layout, name, seen, rule)
            dtype = stored_as(slot, p.dtype, self.outer.state_dtype)
            if slot.shape == seen.shape and slot.kind == "full":
                own = torch.full_like(part, slot.value, dtype=dtype)
                state[name] = _on_mesh(own, layout.mesh, placements, stored)
            else:
                start = torch.from_numpy(slot.start()).to(part.device, dtype)
                whole = start.expand(seen.stack(slot.shape)).reshape(stored).contiguous()
                state[name] = distribute_tensor(whole, layout.mesh, placements, src_data_rank=None)
        return state

    def _step_inner(self, gradients: Mapping[Tensor, Tensor], norm: Norm) -> None:
        """Step all that needs no other rank, by the optimizer of local tensors."""
        inner, outer = self.inner, self.outer
        assert inner is not None
        for group, i in zip(inner.param_groups, self.groups, strict=True):
            own = set(group) - {"params", "param_names", "rule", "seen_as"}
            group |= {k: v for k, v in outer.param_groups[i].items() if k in own}
        scale = {k: v for k, v in vars(outer).items() if k == "grad_scale"}
        vars(inner).update(scale)
        given = {p: g for p, g in gradients.items() if p not in self.cut}
        for p in given:
            if p in self.local:
                # By the whole shape; an inner step would go by that of the part.
                seen, rule = self._seen(p)
                self._remembered(p, rule, seen)
        for p in self.params:
            if p not in self.cut:
                self._lend(p)
        before = {self.local.get(p, p): p.grad for p in given if p not in self.local}
        try:
            for p, g in given.items():
                self.local.get(p, p).grad = g
            inner.take_step(norm)
        finally:
            for p in given:
                q = self.local.get(p, p)
                q.grad = before.get(q)
            for name in scale:
                delattr(inner, name)
        for p in given:
            self._take_back(p)

    def _lend(self, p: Tensor) -> None:
        """Give the inner optimizer the local part of a parameter's state, and its context."""
        inner, state = self.inner, self.outer.state
        assert inner is not None
        q = self.local.get(p, p)
        if p in self.outer.context:
            inner.context[q] = self.outer.context[p]
        else:
            inner.context.pop(q, None)
        if p not in self.local:
            if p in state:
                inner.state[p] = state[p]
            else:
                inner.state.pop(p, None)
            return
        own, given = inner.state[self.local[p]], state.get(p, {})
        for name in own.keys() - given.keys():
            del own[name]
        for name, value in given.items():
            if name not in own or self.links.get((p, name)) is not value:
                own[name], self.links[p, name] = local(value), value

    def _take_back(self, p: Tensor) -> None:
        """Show what the inner optimizer has made as state of the parameter."""
        inner, state = self.inner, self.outer.state
        assert inner is not None
        if p not in self.local:
            state[p] = inner.state[p]
            return
        for name, value in inner.state[self.local[p]].items():
            if name in state[p] and local(state[p][name]) is value:
                continue
            if name != "step":
                layout, seen, rule = self.layouts[p], *self._seen(p)
                stored = seen.memories[name][1] if name in seen.memories else p.shape
                placements = placements_of(layout, name, seen, rule)
                value = _on_mesh(value, layout.mesh, placements, stored)
                inner.state[self.local[p]][name] = local(value)
            state[p][name] = self.links[p, name] = value


class _Flags(NamedTuple):
    """What all ranks know of a step: which parameters take it, of which a gradient or context is
    not finite or not fit, or a gradient missing or placed in another way; whether one found an inf.
    """

    live: list[bool]
    bad: list[bool]
    unfit: list[bool]
    lacking: list[bool]
    moved: list[bool]
    found_inf: list[bool]


def _shared_axes(mesh: DeviceMesh) -> list[int]:
    return [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]


def _device(mesh: DeviceMesh) -> torch.device:
    """Where the tensors lie that the processes of a mesh send each other."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(
        mesh.device_type, torch.get_device_module(mesh.device_type).current_device()
    )


def _over(mesh: DeviceMesh, axes: Iterable[int], x: Tensor, op: Any) -> Tensor:
    """A value reduced over axes of a mesh."""
    home, x = x.device, x.to(_device(mesh))
    for axis in axes:
        dist.all_reduce(x, op, group=mesh.get_group(axis))
    return x.to(home)


def _on_mesh(
    part: Tensor, mesh: DeviceMesh, placements: Sequence[Any], shape: Sequence[int]
) -> DTensor:
    """The tensor of this shape of which a process has this part."""
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    size = torch.Size(shape)
    if part.device.type != mesh.device_type:
        # `from_local` would move what is offloaded to where the mesh is.
        meta = TensorMeta(size, strides, part.dtype)
        spec = DTensorSpec(mesh, tuple(placements), tensor_meta=meta)
        return DTensor(part, spec, requires_grad=False)
    return DTensor.from_local(part, mesh, placements, shape=size, stride=strides)


def _difference(first: Sequence[str], other: Sequence[str], rank: int, elsewhere: int) -> str:
    """What to say of two ranks whose parameters are not the same."""
    pairs = zip(first, other, strict=False)
    here = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(other)))
    found = [x[here] if here < len(x) else "nothing more" for x in (first, other)]
    return (
        f"the ranks of a mesh must step the same parameters; at place {here}, rank {rank} has "
        f"{found[0]}; rank {elsewhere} has {found[1]}"
    )


@lru_cache(maxsize=256)
def _reads_norm(rule: Rule) -> bool:
    """Whether a rule goes by the norm of all gradients."""
    return any("gradient_norm" in trace(rule, (1, 1), t).inputs for t in variants(rule))


def _rounds(cuts: Sequence[Cut]) -> list[list[Cut]]:
    """What goes through the matrix functions together: of one group and dtype, and not too much.

    Within each round the matrices are dealt to the ranks of their group, the costly ones first.
    """
    kinds: dict[Any, list[Cut]] = {}
    for x in cuts:
        kinds.setdefault((x.layout.mesh, x.layout.axes, x.dtype), []).append(x)
    rounds: list[list[Cut]] = []
    for same in kinds.values():
        rounds.append([])
        for x in same:
            most = ROUND * x.layout.size
            if rounds[-1] and sum(y.p.numel() for y in rounds[-1]) + x.p.numel() > most:
                rounds.append([])
            rounds[-1].append(x)
    for some in rounds:
        loads = [0] * some[0].layout.size
        for x in sorted(some, key=lambda x: -x.cost):
            x.owner = loads.index(min(loads))
            loads[x.owner] += x.cost
    return rounds


def _step(cuts: Sequence[Cut]) -> None:
    """Take the step of matrices in shards, by one gathering and one scattering for all of them."""
    for x in cuts:
        x.run(x.parts.before)
    others = [x for x in cuts if not x.parts.is_local]
    if others:
        layout = others[0].layout
        exchange = Exchange(layout.group, others[0].dtype, _device(layout.mesh))
        sent = [(x, name) for x in others for name in x.needed]
        parcels = [Parcel(*x.blocks(name), x.owner) for x, name in sent]
        wholes = exchange.gather(parcels, [x.part(name) for x, name in sent])
        for (x, name), whole in zip(sent, wholes, strict=True):
            if whole is not None:
                x.whole[name] = whole.to(local(x.p).device)
        _functions([x for x in others if x.owner == layout.rank])
        back = [(x, name) for x in others for name in x.parts.whole.outputs]
        parcels = [Parcel(*x.blocks(name), x.owner) for x, name in back]
        parts = exchange.scatter(parcels, [x.whole.get(name) for x, name in back])
        for (x, name), part in zip(back, parts, strict=True):
            x.known[name] = (part[0] if x.is_single(name) else part).to(local(x.p).device)
    for x in cuts:
        x.run(x.parts.after)
        x.write()


def _functions(cuts: Sequence[Cut]) -> None:
    """Compute the matrix functions of the matrices that this rank owns, equal shapes together."""
    kinds: dict[Any, list[Cut]] = {}
    for x in cuts:
        alone = -1 if x.seen.count else id(x)
        key = x.parts.whole, x.seen, tuple(sorted(x.scalars.items())), alone
        kinds.setdefault(key, []).append(x)
    for (program, seen, scalars, _), some in kinds.items():
        first, inputs = some[0], dict[str, Any](scalars)
        device = local(first.p).device
        for name in program.inputs:
            if name not in inputs:
                inputs[name] = seen.gather([x.all_of(name) for x in some], seen.entry(name))
        for name, value in _compiled(program, first.algebra, first.dtype, device)(inputs).items():
            shape = program.outputs[name].shape
            for j, x in enumerate(some):
                own = seen.part(torch.as_tensor(value), shape, j).expand(seen.stack(shape))
                x.whole[name] = own.reshape(x.blocks(name)[0])
