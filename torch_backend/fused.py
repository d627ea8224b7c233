"""The fused step: kernels over all tensors of a group, and matrix functions over equal shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from deepopt.algebra import Program, constant_array
from deepopt.expr import Expr
from deepopt.kernels.c import C
from deepopt.kernels.host import is_constant, scalar_function
from deepopt.kernels.plan import Plan, Region
from deepopt.kernels.source import LOW, Storage
from deepopt.kernels.triton import Triton
from torch_backend.algebra import Compiled, Torch
from torch_backend.kernels import gpu, native
from torch_backend.kernels.native import Array
from torch_backend.kernels.newton_schulz import fast_precision, newton_schulz
from torch_backend.seen import Seen, arithmetic, rounds_at_random

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
Rounding: TypeAlias = Literal["nearest", "stochastic", "exact"]
Kernel: TypeAlias = native.Kernel | gpu.Kernel
STORAGE: dict[torch.dtype, Storage] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
DTYPE = {kind: dtype for dtype, kind in STORAGE.items()}
# The name of the state in which "exact" rounding keeps the 16 bits that bfloat16 lacks.
LOW_HALF = "low_half"
# Bytes of the values that pass between stages at a time: on a CPU what its caches hold.
SLAB = {"cpu": 1 << 24}
SLAB_ELSEWHERE = 1 << 27
ALIGNMENT = 256


class Batched(Torch):
    """The algebra of tensors with our own Newton-Schulz iteration."""

    def newton_schulz(self, x: Tensor, *, steps: int, coefficients: str) -> Tensor:
        return newton_schulz(x, steps=steps, coefficients=coefficients)


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter to step: what it holds, how it is seen, and the plan of its step.

    index: its place among the tensors that change with every step. position: in its group.
    place: of its first matrix among those of its group; it says what random numbers round it.
    """

    p: Tensor
    index: int
    position: int
    place: int
    state: dict[str, Any]
    seen: Seen
    plan: Plan
    storage: Mapping[str, Storage]

    @property
    def count(self) -> int:
        return self.seen.count or 1

    def held(self, name: str) -> Tensor | None:
        """The tensor of this name that stays from step to step."""
        if name == "w":
            return self.p
        return self.state.get(LOW_HALF if name == LOW else name)


def is_dense(x: Tensor) -> bool:
    """Whether a tensor's entries fill a stretch of memory, each once, in any order of axes."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def obstacle(p: Tensor, plan: Plan, whole: bool, clocked: bool) -> str:
    """Why a parameter cannot be stepped by kernels; empty where it can be.

    whole: the rule sees it in its own shape. clocked: other steps have other plans.
    """
    if gpu.serves(p.device) or p.device.type != "cpu":
        if why := gpu.obstacle(p.device.type):
            return why
    if p.dtype not in STORAGE:
        return f"its dtype is {p.dtype}; kernels know {', '.join(STORAGE.values())}"
    if type(p) not in (Tensor, torch.nn.Parameter):
        return f"it is a {type(p).__name__}, not a plain tensor"
    if not p.is_contiguous() and not (
        whole and not clocked and _in_any_order(plan) and is_dense(p)
    ):
        return f"it is not contiguous (strides {p.stride()} for shape {tuple(p.shape)})"
    return ""


def _in_any_order(plan: Plan) -> bool:
    """Whether the order of a parameter's axes in memory means nothing to a plan."""
    nodes = (x for r in plan.regions for sweep in r.sweeps for x in sweep.body)
    moved = any(x.op == "reshape" and x.size > 1 for x in nodes)
    shapes = {x.shape for r in plan.regions for x in r.loads.values() if x.size > 1}
    return not moved and not plan.functions and not plan.constants and len(shapes) < 2


@dataclass(frozen=True)
class How:
    """How an optimizer wants its kernels.

    required: raise where there are none. precision: of the products of Newton-Schulz iterations on
    a float32 step; "auto" is bfloat16 where the device multiplies that faster. state_dtype: of new
    memories.
    """

    required: bool
    precision: Precision
    rounding: Rounding
    state_dtype: torch.dtype | None


def storages(
    p: Tensor,
    gradient: torch.dtype,
    seen: Seen,
    memories: Mapping[str, torch.dtype],
    plan: Plan,
    how: How,
) -> dict[str, Storage]:
    """How each tensor of a plan is stored, of memories in these dtypes."""
    wide = STORAGE[arithmetic(p.dtype)]
    storage: dict[str, Storage] = dict.fromkeys((*plan.values, *plan.constants), wide)
    if wide == "float32" and is_narrow(how.precision, p.device):
        storage |= dict.fromkeys(_orthogonalised(plan), "bfloat16")
    storage |= dict.fromkeys((k for r in plan.regions for k in r.tensors if k not in storage), wide)
    for name, dtype in memories.items():
        at_random = rounds_at_random(seen.memories[name][0], dtype)
        storage[name] = "stochastic" if at_random else STORAGE[dtype]
    storage |= {"w": STORAGE[p.dtype], "g": STORAGE[gradient]}
    if p.dtype == torch.bfloat16 and how.rounding != "nearest":
        storage["w"] = how.rounding
    return storage


def is_narrow(precision: Precision, device: torch.device) -> bool:
    """Whether Newton-Schulz iterations of float32 steps multiply bfloat16 matrices."""
    narrow = torch.bfloat16
    return precision == "bfloat16" or (precision == "auto" and fast_precision(device) == narrow)


def _orthogonalised(plan: Plan) -> set[str]:
    """The values that only Newton-Schulz iterations read or make."""
    into: set[str] = set()
    other: set[str] = set()
    for program in plan.functions:
        results = {x: name for name, x in program.outputs.items()}
        for x in program.nodes:
            call = x.op == "call" and x["name"] == "newton_schulz"
            if x in results:
                (into if call else other).add(results[x])
            names = {str(arg["name"]) for arg in x.args if arg.op == "input"}
            (into if call else other).update(names)
    return into - other


@dataclass(eq=False)
class Call:
    """What a step is given beside the tensors that stay: scalars, and tensors by member.

    key: of the random numbers that round, together with the step. addresses, stacks: of
    the values that the stages have made so far, by entry and by bucket. captured: kernels and
    functions become a graph, before which the host sends what has changed.
    """

    step: int
    key: tuple[int, int]
    scalars: Mapping[str, Any]
    given: Mapping[str, Sequence[Tensor]]
    buffer: Tensor
    captured: bool = False
    addresses: dict[str, Array] = field(default_factory=dict)
    stacks: dict[tuple[str, int], Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Entries first to last of a part: matrices of one shape, of members with one plan."""

    plan: Plan
    storage: Mapping[str, Storage]
    dtype: torch.dtype
    first: int
    last: int

    @property
    def entries(self) -> int:
        return self.last - self.first

    def bytes_of(self, name: str) -> int:
        """The bytes that one entry has of a value."""
        return prod(self.plan.values[name]) * DTYPE[self.storage[name]].itemsize


class Part:
    """Parameters that take the same kernels in the same order, with functions in between.

    Members of one plan, which have one shape, lie side by side: they are a bucket, that functions
    take as a stack. An entry is a parameter, or one of the matrices that it is seen as.
    """

    def __init__(self, members: Sequence[Member], kernels: Sequence[Sequence[Kernel]]) -> None:
        self.members = members
        counts = [m.count for m in members]
        self.owner = np.repeat(np.arange(len(members)), counts)
        self.matrix = np.concatenate([np.arange(n) for n in counts])
        self.places = np.array([m.place for m in members])[self.owner] + self.matrix
        self.buckets: list[Bucket] = []
        for _, group in groupby(members, key=lambda m: id(m.plan)):
            own = list(group)
            first = self.buckets[-1].last if self.buckets else 0
            last = first + sum(m.count for m in own)
            dtype = arithmetic(own[0].p.dtype)
            self.buckets.append(Bucket(own[0].plan, own[0].storage, dtype, first, last))
        self.rows = np.repeat(np.arange(len(self.buckets)), [b.entries for b in self.buckets])
        # Where each value of each entry lies in the buffer, bucket after bucket.
        self.offsets: dict[str, Array] = {}
        self.size = 0
        plan = members[0].plan
        made = {name for program in plan.functions for name in program.outputs}
        for name in plan.values:
            if name not in made:
                offsets: list[Array] = []
                for bucket in self.buckets:
                    size = bucket.bytes_of(name)
                    offsets.append(self.size + np.arange(bucket.entries) * size)
                    self.size += -(-bucket.entries * size // ALIGNMENT) * ALIGNMENT
                self.offsets[name] = np.concatenate(offsets)
        self.stages: list[_Kernels | _Functions] = []
        for i, stage in enumerate(plan.stages):
            if isinstance(stage, Program):
                self.stages.append(_Functions(self, i))
            else:
                self.stages += [_Kernels(self, kernel, i, j) for j, kernel in enumerate(kernels[i])]

    @property
    def kernels(self) -> list[_Kernels]:
        return [x for x in self.stages if isinstance(x, _Kernels)]

    @property
    def programs(self) -> list[Program]:
        """The matrix functions between kernels."""
        stages = [x for x in self.stages if isinstance(x, _Functions)]
        return [compiled.program for x in stages for compiled in x.programs]

    def run(self, call: Call) -> None:
        """Step the members. The call's buffer has `size` bytes for values between stages."""
        for name, tensors in call.given.items():
            call.addresses[name] = self.spread(name, [tensors[m.index] for m in self.members])
        for name, offsets in self.offsets.items():
            call.addresses[name] = call.buffer.data_ptr() + offsets
        for stage in self.stages:
            stage.run(call)

    def spread(self, name: str, tensors: Sequence[Tensor]) -> Array:
        """The address of each entry, from the tensors of the members."""
        first = np.array([x.data_ptr() for x in tensors], np.int64)
        if len(self.owner) == len(tensors):
            return first
        strides = np.zeros(len(tensors), np.int64)
        for i, (m, x) in enumerate(zip(self.members, tensors, strict=True)):
            one = prod(m.seen.entry(name))
            # What all matrices of a parameter share is there once.
            strides[i] = one * x.element_size() if x.numel() > one else 0
        return first[self.owner] + self.matrix * strides[self.owner]


class _Kernels:
    """A kernel over the entries of a part."""

    def __init__(self, part: Part, kernel: Kernel, stage: int, place: int) -> None:
        regions = [_regions(b.plan, stage)[place] for b in part.buckets]
        sizes = np.array([r.size for r in regions], np.int64)[part.rows]
        self.launch = kernel.launch(sizes, part.rows, part.places)
        self.changing: list[tuple[int, str]] = []
        self._constants: list[Tensor] = []  # They live as long as their addresses are in use.
        # A kernel of the same text may have been built for values of other names.
        names = regions[0].tensors
        for i, name in enumerate([*names, LOW][: len(kernel.tensors)]):
            held = [m.held(name) for m in part.members]
            if name in part.members[0].plan.constants:
                arrays = [_constant(b, name).to(part.members[0].p.device) for b in part.buckets]
                self._constants += arrays
                self.launch.table[i] = np.array([x.data_ptr() for x in arrays])[part.rows]
            elif held[0] is not None:
                self.launch.table[i] = part.spread(name, cast(list[Tensor], held))
            else:
                self.changing.append((i, name))
        # Scalars of other shapes are mostly the same nodes, and are computed once.
        distinct: dict[Expr, int] = {}
        self._places: tuple[list[int], list[int], list[int]] = ([], [], [])
        for row, region in enumerate(regions):
            for column, x in enumerate(region.parameters):
                if is_constant(x):
                    (self.launch.values[row, column],) = scalar_function((x,))({})
                    continue
                which = distinct.setdefault(x, len(distinct))
                for places, number in zip(self._places, (row, column, which), strict=True):
                    places.append(number)
        self._scalars = scalar_function(tuple(distinct))

    def run(self, call: Call) -> None:
        for i, name in self.changing:
            self.launch.table[i] = call.addresses[name]
        if not call.captured:
            self.send(call)
        self.launch.start()

    def send(self, call: Call) -> None:
        """Send the kernel its addresses, and the scalars of a call."""
        rows, columns, which = self._places
        if rows:
            values = np.array(self._scalars(call.scalars), np.float64)
            self.launch.values[rows, columns] = values[which]
        self.launch.send(call.step, call.key)


class _Functions:
    """The matrix functions of one stage, bucket by bucket."""

    def __init__(self, part: Part, stage: int) -> None:
        self.part = part
        self.programs: list[Compiled] = []
        for bucket in part.buckets:
            program = bucket.plan.stages[stage]
            assert isinstance(program, Program)
            algebra = Batched(bucket.dtype, part.members[0].p.device)
            # What the buffer holds may be read again, so no input may be overwritten.
            self.programs.append(Compiled(program, algebra, ()))

    def run(self, call: Call) -> None:
        for bucket, compiled in zip(self.part.buckets, self.programs, strict=True):
            inputs: dict[str, Any] = dict(call.scalars)
            for name in compiled.program.inputs:
                if name in bucket.plan.values:
                    inputs[name] = self._stack(bucket, name, call)
            for name, value in compiled(inputs).items():
                self._keep(bucket, name, value, call)

    def _stack(self, bucket: Bucket, name: str, call: Call) -> Tensor:
        """A value of all entries of a bucket."""
        made = call.stacks.get((name, bucket.first))
        if made is not None:
            return made
        start = int(self.part.offsets[name][bucket.first])
        raw = call.buffer[start : start + bucket.entries * bucket.bytes_of(name)]
        shape = (bucket.entries, *bucket.plan.values[name])
        return raw.view(DTYPE[bucket.storage[name]]).view(shape)

    def _keep(self, bucket: Bucket, name: str, value: Tensor, call: Call) -> None:
        """Tell the stages that follow where a function's result is."""
        shape = bucket.plan.values[name]
        value = value.to(DTYPE[bucket.storage[name]]).contiguous()
        stride = bucket.bytes_of(name) if value.ndim > len(shape) else 0
        call.stacks[name, bucket.first] = value.expand(bucket.entries, *shape)
        if name not in call.addresses:
            call.addresses[name] = np.zeros(len(self.part.owner), np.int64)
        at = value.data_ptr() + np.arange(bucket.entries) * stride
        call.addresses[name][bucket.first : bucket.last] = at


def _regions(plan: Plan, stage: int) -> Sequence[Region]:
    found = plan.stages[stage]
    assert not isinstance(found, Program)
    return found


def _constant(bucket: Bucket, name: str) -> Tensor:
    x = bucket.plan.constants[name]
    value = constant_array(str(x["kind"]), x.shape, cast(float, x["value"]))
    return torch.from_numpy(value).to(bucket.dtype)


def build(members: Sequence[Member]) -> list[list[list[Kernel]]]:
    """The kernels of each member, by stage; those that are new are built side by side.

    Raises native.Unavailable.
    """
    written: dict[Any, list[list[C | Triton]]] = {}
    # Members that are alike share plan and storage.
    keys = [(id(m.plan), id(m.storage), m.p.device) for m in members]
    for m, key in zip(members, keys, strict=True):
        if key not in written:
            written[key] = [_written(m, stage) for stage in m.plan.stages]
    built: dict[int, Kernel] = {}
    for device in dict.fromkeys(key[-1] for key in keys):
        own = [x for key, stages in written.items() if key[-1] == device for s in stages for x in s]
        if c := [x for x in own if isinstance(x, C)]:
            built |= zip(map(id, c), native.kernels(c), strict=True)
        if other := [x for x in own if isinstance(x, Triton)]:
            built |= zip(map(id, other), gpu.kernels(other, device), strict=True)
    found = {k: [[built[id(x)] for x in stage] for stage in v] for k, v in written.items()}
    return [found[key] for key in keys]


def _written(m: Member, stage: Sequence[Region] | Program) -> list[C | Triton]:
    if isinstance(stage, Program):
        return []
    single = m.p.dtype != torch.float64
    language: type[C] | type[Triton] = Triton if gpu.serves(m.p.device) else C
    found: list[C | Triton] = []
    for region in stage:
        storage: dict[str, Storage] = {k: m.storage[k] for k in region.tensors}
        found.append(language(region, storage, single))
    return found


def parts(members: Sequence[Member]) -> list[Part]:
    """The members in parts: those with the same kernels, and not too much between stages."""
    groups: dict[Any, list[tuple[Member, list[list[Kernel]]]]] = {}
    signatures: dict[tuple[int, int], Any] = {}
    for m, kernels in zip(members, build(members), strict=True):
        key = id(m.plan), id(kernels)
        if key not in signatures:
            # Plans of other shapes may pass other values between the same kernels.
            passed = [(f.inputs, *f.outputs) for f in m.plan.functions]
            stages = [tuple(map(id, stage)) for stage in kernels]
            signatures[key] = (*stages, *passed, *(r.tensors for r in m.plan.regions))
        groups.setdefault(signatures[key], []).append((m, kernels))
    found: list[Part] = []
    for group in groups.values():
        order = {id(m.plan): i for i, (m, _) in reversed([*enumerate(group)])}
        group.sort(key=lambda x: order[id(x[0].plan)])
        device = group[0][0].p.device.type
        most, size, some = SLAB.get(device, SLAB_ELSEWHERE), 0, list[Member]()
        for m, _ in group:
            need = sum(map(prod, m.plan.values.values())) * m.count * 4
            if some and size + need > most:
                found.append(Part(some, group[0][1]))
                size, some = 0, []
            size += need
            some.append(m)
        found.append(Part(some, group[0][1]))
    return found
