"""A program as stages: elementwise kernels, each over whole tensors, between matrix functions.

What counts as elementwise is judged on arrays laid out flat: a value has as many entries as the
arrays beside it, or one ("single"), which a sum over all entries also makes. So reshapes cost
nothing, and dot products of vectors belong here. Everything else - products of matrices, their
transposes, sums along one axis - is left to whole-matrix functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import TypeAlias

from deepopt.algebra import Program
from deepopt.expr import (
    Expr,
    Shape,
    add,
    array,
    constant,
    div,
    elementwise,
    mul,
    neg,
    node,
    reshape,
    substitute,
    sum_,
    symbol,
    topological,
)
from deepopt.functions import FUNCTIONS, definition
from deepopt.rule import Rule, trace

MATRIX = frozenset({"matmul", "transpose"})
REDUCTIONS = frozenset({"sum", "max"})
SAME = frozenset({"reshape", "stop_gradient"})
# Constants that are part of a kernel's text; others, which may depend on a shape, are parameters.
LITERALS = frozenset({0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0})


@dataclass(frozen=True, eq=False)
class Sweep:
    """One pass over the entries: single values computed before, a body, sums taken on the way."""

    before: tuple[Expr, ...]
    body: tuple[Expr, ...]
    reductions: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Region:
    """One kernel: sweeps over tensors of one size, of which the last stores.

    loads, stores: the nodes read and written, by the name of their tensor.
    singles: the tensors among them that have one entry. parameters: scalars computed on the host.
    epilogue: single values to compute after the last sweep, for stores that have one entry.
    """

    size: int
    loads: Mapping[str, Expr]
    stores: Mapping[str, Expr]
    singles: frozenset[str]
    parameters: tuple[Expr, ...]
    sweeps: tuple[Sweep, ...]
    epilogue: tuple[Expr, ...]

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors, in the order in which a kernel takes their addresses."""
        return tuple(dict.fromkeys((*self.loads, *self.stores)))

    @cached_property
    def reductions(self) -> tuple[Expr, ...]:
        """Every reduction, in the order in which a kernel keeps their results."""
        return tuple(x for sweep in self.sweeps for x in sweep.reductions)


Stage: TypeAlias = tuple[Region, ...] | Program


@dataclass(frozen=True, eq=False)
class Plan:
    """The stages of a step in order, and the values that pass between them.

    A stage is a tuple of regions of different sizes, or the Program of matrix functions.
    values: the shape of what is neither input nor output, by name. constants: arrays to be given.
    """

    stages: tuple[Stage, ...]
    values: Mapping[str, Shape]
    constants: Mapping[str, Expr]

    @cached_property
    def scalars(self) -> frozenset[str]:
        """The names of the scalars that kernels and functions go by."""
        nodes = topological(x for r in self.regions for x in r.parameters)
        functions = (x for f in self.functions for x in f.nodes if not x.shape)
        return frozenset(str(x["name"]) for x in (*nodes, *functions) if x.op == "input")

    @property
    def regions(self) -> list[Region]:
        return [r for stage in self.stages if not isinstance(stage, Program) for r in stage]

    @property
    def functions(self) -> list[Program]:
        return [stage for stage in self.stages if isinstance(stage, Program)]


def plan(
    rule: Rule,
    shape: Shape,
    ticking: frozenset[str],
    *,
    maximize: bool = False,
    scaled: bool = False,
    narrow: frozenset[str] = frozenset(),
) -> Plan:
    """The plan of one step of a rule for a parameter of this shape; the new weights are "w".

    maximize: the rule sees -g. scaled: the gradient is to be multiplied by "inverse_scale".
    narrow: the memories that are stored in less than the arithmetic's precision.
    """
    return _planned(trace(rule, shape, ticking), shape, maximize, scaled, narrow)


@cache
def _planned(
    program: Program, shape: Shape, maximize: bool, scaled: bool, narrow: frozenset[str]
) -> Plan:
    outputs = {k: x for k, x in program.outputs.items() if k != "direction"}
    if "update" in outputs:
        outputs["w"] = add(symbol("w", shape), outputs.pop("update"))
    g = seen = symbol("g", shape)
    seen = mul(symbol("inverse_scale"), seen) if scaled else seen
    seen = neg(seen) if maximize else seen
    outputs = {k: substitute(x, {g: seen}) for k, x in outputs.items()}
    return _Planner(expanded(outputs), shape, narrow | {"w"}).plan()


def expanded(outputs: Mapping[str, Expr]) -> dict[str, Expr]:
    """The graph with elementwise functions in place of their calls, and vectors as such."""
    new: dict[Expr, Expr] = {}
    for x in topological(outputs.values()):
        args = tuple(new[arg] for arg in x.args)
        if x.op == "call" and _elementwise_call(str(x["name"]), x):
            body, symbols = definition(x)
            inner = expanded({"": substitute(body, dict(zip(symbols, args, strict=True)))})
            new[x] = inner[""]
        else:
            new[x] = _simpler(x, args)
    return {name: new[x] for name, x in outputs.items()}


def _elementwise_call(name: str, x: Expr) -> bool:
    """Whether the definition of a call has no matrix function in it."""
    if name not in FUNCTIONS:
        return False
    body, _ = definition(x)
    nodes = topological([body])
    calls = (y for y in nodes if y.op == "call")
    return not any(y.op in MATRIX for y in nodes) and all(
        _elementwise_call(str(y["name"]), y) for y in calls
    )


def _simpler(x: Expr, args: tuple[Expr, ...]) -> Expr:
    """x of these arguments; products and transposes of vectors as what they are entry by entry."""
    if x.op == "transpose" and x.size == max(x.shape):
        return reshape(args[0], x.shape)
    if x.op in REDUCTIONS and args[0].size == 1:
        return reshape(args[0], x.shape)
    if x.op == "matmul" and x.rank == 2:
        a, b = args
        if x.size == 1:
            terms = mul(a, reshape(b, a.shape))
            return sum_(terms) if terms.size > 1 else terms
        if a.shape[1] == 1 and 1 in (a.size, b.size):
            return elementwise("mul", a, b)
    if x.op == "array" and x["kind"] == "eye" and x.size == 1:
        value = x["value"]
        assert isinstance(value, float)
        return array("full", x.shape, value)
    if x.op == "div" and args[1].size == 1 and x.size > 1:
        # Divide once instead of for every entry.
        return _at(x, mul(_at(x, div(1.0, args[1])), args[0]))
    return _at(x, node(x.op, args, x.shape, **dict(x.attrs)))


def _at(x: Expr, new: Expr) -> Expr:
    """A node that stands for x, said to come from where x does."""
    if new.args and new is not x:
        object.__setattr__(new, "source", x.source)
    return new


class _Planner:
    """Gives every node a time: even ones are for kernels, odd ones for matrix functions."""

    def __init__(self, outputs: Mapping[str, Expr], shape: Shape, narrow: frozenset[str]) -> None:
        self.outputs = dict(outputs)
        # Nobody reads these again, as they were rounded.
        self.narrow = narrow
        self.shape = shape
        self.one = prod(shape) == 1
        self.matrix: set[Expr] = set()
        self.space: dict[Expr, int] = {}
        self.time: dict[Expr, int] = {}
        self.values: dict[Expr, str] = {}
        self.constants: dict[str, Expr] = {}
        for x in topological(outputs.values()):
            self._place(x)

    def _place(self, x: Expr) -> None:
        args = [arg for arg in x.args if arg.shape]
        self.time[x] = 0
        if x.op == "array" and not is_filled(x):
            self.constants[f"constant {len(self.constants)}"] = x
        if not x.shape or x.op in ("input", "array"):
            if self._is_full(x) and not is_filled(x):
                self.space[x] = x.size
            return
        full = [arg for arg in args if self._is_full(arg)]
        times = [self.time[arg] for arg in args]
        if not self._is_elementwise(x, full):
            self.matrix.add(x)
            self.time[x] = max([1, *(t + 1 - t % 2 for t in times)])
            if self._is_full(x):
                self.space[x] = x.size
            return
        self.time[x] = max([0, *(t + t % 2 for t in times)])
        spaces = [self.space[arg] for arg in (*full, *args) if arg in self.space]
        if self._is_full(x):
            spaces = [x.size, *spaces]
        if not spaces:
            return
        self.space[x] = spaces[0]
        # A single value of arrays of another size is there only after their kernel.
        foreign = [arg for arg in args if self.space.get(arg, spaces[0]) != spaces[0]]
        now = [arg for arg in foreign if arg not in self.matrix and arg.args]
        if any(self.time[arg] == self.time[x] for arg in now):
            self.time[x] += 2

    def _is_full(self, x: Expr) -> bool:
        """Whether x has an entry for each of an array; of a parameter of one entry all have."""
        return bool(x.shape) and (x.size > 1 or self.one)

    def _is_elementwise(self, x: Expr, full: Sequence[Expr]) -> bool:
        if x.op in MATRIX or x.op == "call" or (x.op in SAME and x.args[0] in self.matrix):
            return False
        if x.op in REDUCTIONS and self.one:
            # Beside a parameter of one entry nothing is single.
            return False
        if x.op in REDUCTIONS:
            axes = x["axes"]
            assert isinstance(axes, tuple)
            return all(
                n == 1 for i, n in enumerate(x.args[0].shape, -x.args[0].rank) if i not in axes
            )
        return all(arg.size == x.size for arg in full)

    def plan(self) -> Plan:
        due = {name: self.time[x] + self.time[x] % 2 for name, x in self.outputs.items()}
        needed = self._between(due)
        while True:
            late = self._read_late(due, needed)
            if not late:
                break
            due |= late
            needed = self._between(due)
        return self._staged(due, needed)

    def _roots(self, due: Mapping[str, int], needed: Iterable[Expr], time: int) -> dict[str, Expr]:
        """What the kernels at this time store, by name."""
        roots = {self.values[x]: x for x in needed if x not in self.matrix and self.time[x] == time}
        return roots | {name: x for name, x in self.outputs.items() if due[name] == time}

    def _between(self, due: Mapping[str, int]) -> list[Expr]:
        """The nodes whose values must be stored for a later stage, beside the outputs."""
        needed: dict[Expr, None] = {}
        self.values = {}

        def need(x: Expr) -> None:
            if x not in needed:
                needed[x] = None
                self.values[x] = f"value {len(needed)}"

        for x in topological(self.outputs.values()):
            if x in self.matrix:
                for arg in x.args:
                    if arg.shape and arg not in self.matrix and arg.op != "array":
                        need(arg)
        size = -1
        while size != len(needed):
            size = len(needed)
            for time in self._times(due, needed):
                for x in self._closure(self._roots(due, needed, time).values(), due, time):
                    if x in self.matrix or self._is_past(x, time):
                        need(x)
        return list(needed)

    def _is_past(self, x: Expr, time: int) -> bool:
        """Whether x is a single value that an earlier kernel computed."""
        return self._single(x) and self.time[x] < time and bool(x.args)

    def _single(self, x: Expr) -> bool:
        return bool(x.shape) and not self._is_full(x)

    def _times(self, due: Mapping[str, int], needed: Iterable[Expr]) -> list[int]:
        return sorted({*due.values(), *(self.time[x] for x in needed if x not in self.matrix)})

    def _cut(self, x: Expr, due: Mapping[str, int], time: int) -> str:
        """The name of the tensor that x is loaded from at this time; empty where it is computed."""
        if x.op == "input":
            return str(x["name"]) if x.shape else ""
        if x.op == "array" and not is_filled(x):
            return next(k for k, v in self.constants.items() if v is x)
        if x in self.values and (x in self.matrix or self.time[x] < time):
            return self.values[x]
        for name, output in self.outputs.items():
            if output is x and due[name] < time and name not in self.narrow:
                return name
        return ""

    def _closure(self, roots: Iterable[Expr], due: Mapping[str, int], time: int) -> list[Expr]:
        """The shaped nodes below roots down to what is loaded, arguments first."""

        def there(x: Expr) -> bool:
            return bool(self._cut(x, due, time)) or x in self.matrix or self._is_past(x, time)

        return _below(roots, there)

    def _spaces(self, roots: Mapping[str, Expr]) -> dict[int, dict[str, Expr]]:
        """What is stored at one time, by the size of the arrays that it goes along with."""
        sizes = {n: self.space.get(x, 0) if self._single(x) else x.size for n, x in roots.items()}
        spaces: dict[int, dict[str, Expr]] = {}
        for name, x in roots.items():
            # What depends on no array at all goes along with the largest.
            spaces.setdefault(sizes[name] or max(sizes.values()), {})[name] = x
        return spaces

    def _read_late(self, due: Mapping[str, int], needed: Iterable[Expr]) -> dict[str, int]:
        """When outputs may be written that a kernel beside or after their own still reads."""
        late: dict[str, int] = {}
        for time in self._times(due, needed):
            for stored in self._spaces(self._roots(due, needed, time)).values():
                for x in self._closure(stored.values(), due, time):
                    name = str(x["name"]) if x.op == "input" else ""
                    if (
                        name not in due
                        or due[name] > time
                        or (due[name] == time and name in stored)
                    ):
                        continue
                    # Kernels of one time run in some order.
                    then = time + 2 if due[name] == time else time
                    late[name] = max(then, late.get(name, 0))
        return late

    def _staged(self, due: Mapping[str, int], needed: Sequence[Expr]) -> Plan:
        stages: list[Stage] = []
        times = {*self._times(due, needed), *(self.time[x] for x in self.matrix)}
        for time in sorted(times):
            if time % 2:
                stages.append(self._functions(time, needed))
                continue
            spaces = self._spaces(self._roots(due, needed, time))
            stages.append(tuple(self._region(n, r, due, time) for n, r in spaces.items()))
        return Plan(tuple(stages), {k: x.shape for x, k in self.values.items()}, self.constants)

    def _functions(self, time: int, needed: Sequence[Expr]) -> Program:
        """The matrix functions of one time as a program of the values stored before."""
        inputs = {x: symbol(self.values[x], x.shape) for x in needed if self.time[x] < time}
        results = [x for x in self.values if x in self.matrix and self.time[x] == time]
        return Program({self.values[x]: substitute(x, inputs) for x in results})

    def _region(
        self,
        size: int,
        stores: Mapping[str, Expr],
        due: Mapping[str, int],
        time: int,
    ) -> Region:
        closure = self._closure(stores.values(), due, time)
        cuts = {x: self._cut(x, due, time) for x in closure}
        loads = {name: x for x, name in cuts.items() if name}
        computed = [x for x in closure if not cuts[x]]
        depth: dict[Expr, int] = {}
        for x in closure:
            below = [depth.get(arg, 0) for arg in x.args if not cuts[x]]
            depth[x] = max(below, default=0) + (x in computed and x.op in REDUCTIONS)
        single = {x for x in closure if self._single(x)}
        ends = {name: x for name, x in stores.items() if self._single(x)}
        full = [x for name, x in stores.items() if name not in ends]
        last = max([1, *depth.values(), *(depth[x] + 1 for x in full)])
        sweeps: list[Sweep] = []
        for i in range(1, last + 1):
            reductions = [x for x in computed if x.op in REDUCTIONS and depth[x] == i]
            roots = [arg for x in reductions for arg in x.args]
            roots += full if i == last else []
            below = self._within(roots, cuts)
            before = [x for x in below if x in single and x not in loads.values()]
            body = [x for x in below if x not in single and x not in loads.values()]
            sweeps.append(Sweep(tuple(before), tuple(body), tuple(reductions)))
        epilogue = [x for x in self._within(ends.values(), cuts) if not cuts[x]]
        tensors = {**stores, **loads}
        singles = {name for name, x in tensors.items() if self._single(x)}
        scalars = dict.fromkeys(
            arg for x in computed for arg in x.args if not arg.shape and not is_literal(arg)
        )
        fills = [x for x in closure if is_filled(x)]
        scalars |= dict.fromkeys(y for x in fills if not is_literal(y := filling(x)))
        return Region(
            size,
            loads,
            dict(stores),
            frozenset(singles),
            tuple(scalars),
            tuple(sweeps),
            tuple(epilogue),
        )

    def _within(self, roots: Iterable[Expr], cuts: Mapping[Expr, str]) -> list[Expr]:
        """The nodes below roots, not below loads or reductions: those are there already."""
        return _below(roots, lambda x: bool(cuts[x]) or x.op in REDUCTIONS)


def _below(roots: Iterable[Expr], there: Callable[[Expr], bool]) -> list[Expr]:
    """The shaped nodes below roots, arguments first, and none below those that are there."""
    order: dict[Expr, None] = {}
    seen: set[Expr] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        x, ready = stack.pop()
        if ready:
            order[x] = None
        elif x not in seen and x.shape:
            seen.add(x)
            stack.append((x, True))
            if not there(x):
                stack.extend((arg, False) for arg in reversed(x.args))
    return list(order)


def is_filled(x: Expr) -> bool:
    """Whether x is an array of equal entries."""
    return x.op == "array" and x["kind"] == "full"


def filling(x: Expr) -> Expr:
    """The scalar that an array of equal entries is filled with."""
    value = x["value"]
    assert isinstance(value, float)
    return constant(value)


def is_literal(x: Expr) -> bool:
    """Whether a scalar node is written into a kernel's text."""
    if x.op != "constant":
        return False
    value = x["value"]
    assert isinstance(value, float)
    return abs(value) in LITERALS
