"""What a backend must be able to do, and the fold that runs a program in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from deepopt.expr import Expr, Shape, symbol, topological
from deepopt.functions import definition, static_of

V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class Program:
    """Named outputs over named inputs: what one step of a rule computes for one parameter."""

    outputs: Mapping[str, Expr]

    @cached_property
    def nodes(self) -> tuple[Expr, ...]:
        """Every node, arguments before users."""
        return tuple(topological(self.outputs.values()))

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that are read."""
        return tuple(str(x["name"]) for x in self.nodes if x.op == "input")

    @cached_property
    def last_use(self) -> dict[Expr, int]:
        """The position of the last node that reads each node; outputs are never dropped."""
        last = {arg: i for i, x in enumerate(self.nodes) for arg in x.args}
        return last | {x: len(self.nodes) for x in self.outputs.values()}


def traced(
    function: Callable[..., Expr | tuple[Expr, ...]], shapes: Sequence[Shape], **static: Any
) -> tuple[Program, bool]:
    """The program of a function of nodes, and whether it returns a tuple of them.

    Its inputs are "argument 0", "argument 1", … of these shapes, its outputs "0", "1", …
    """
    found = function(*(symbol(f"argument {i}", shape) for i, shape in enumerate(shapes)), **static)
    outputs = found if isinstance(found, tuple) else (found,)
    return Program({str(i): x for i, x in enumerate(outputs)}), outputs is found


class Algebra(ABC, Generic[V]):
    """The operations of the graph on values of one kind.

    A value may have batch axes in front of the shape its node declares. An algebra may also offer
    methods with the names of `deepopt.functions`; they must agree with the definitions there.
    """

    @abstractmethod
    def constant(self, value: float) -> V: ...
    @abstractmethod
    def array(self, kind: str, shape: Shape, value: float) -> V: ...
    @abstractmethod
    def add(self, a: V, b: V) -> V: ...
    @abstractmethod
    def sub(self, a: V, b: V) -> V: ...
    @abstractmethod
    def mul(self, a: V, b: V) -> V: ...
    @abstractmethod
    def div(self, a: V, b: V) -> V: ...
    @abstractmethod
    def neg(self, a: V) -> V: ...
    @abstractmethod
    def power(self, a: V, b: V) -> V: ...
    @abstractmethod
    def sqrt(self, a: V) -> V: ...
    @abstractmethod
    def rsqrt(self, a: V) -> V: ...
    @abstractmethod
    def exp(self, a: V) -> V: ...
    @abstractmethod
    def log(self, a: V) -> V: ...
    @abstractmethod
    def sigmoid(self, a: V) -> V: ...
    @abstractmethod
    def tanh(self, a: V) -> V: ...
    @abstractmethod
    def sign(self, a: V) -> V: ...
    @abstractmethod
    def absolute(self, a: V) -> V: ...
    @abstractmethod
    def floor(self, a: V) -> V: ...
    @abstractmethod
    def maximum(self, a: V, b: V) -> V: ...
    @abstractmethod
    def minimum(self, a: V, b: V) -> V: ...
    @abstractmethod
    def less(self, a: V, b: V) -> V: ...
    @abstractmethod
    def less_equal(self, a: V, b: V) -> V: ...
    @abstractmethod
    def equal(self, a: V, b: V) -> V: ...
    @abstractmethod
    def where(self, condition: V, a: V, b: V) -> V: ...
    @abstractmethod
    def matmul(self, a: V, b: V) -> V: ...
    @abstractmethod
    def transpose(self, a: V) -> V: ...
    @abstractmethod
    def sum(self, a: V, axes: tuple[int, ...]) -> V: ...
    @abstractmethod
    def max(self, a: V, axes: tuple[int, ...]) -> V: ...
    @abstractmethod
    def reshape(self, a: V, rank: int, shape: Shape) -> V:
        """Replace the last `rank` axes by `shape`."""

    @abstractmethod
    def stop_gradient(self, a: V) -> V:
        """a itself: only the derivatives of `deepopt.grad` stop here."""

    @abstractmethod
    def solve(self, a: V, b: V, lower: bool, upper: bool) -> V: ...
    @abstractmethod
    def eigenvectors(self, a: V) -> V: ...
    @abstractmethod
    def orthonormal(self, a: V) -> V: ...


class Arrays(Algebra[V]):
    """The part of an algebra that every array library spells with Python's operators."""

    def add(self, a: Any, b: Any) -> V:
        return a + b

    def sub(self, a: Any, b: Any) -> V:
        return a - b

    def mul(self, a: Any, b: Any) -> V:
        return a * b

    def div(self, a: Any, b: Any) -> V:
        return a / b

    def neg(self, a: Any) -> V:
        return -a

    def power(self, a: Any, b: Any) -> V:
        return a**b

    def less(self, a: Any, b: Any) -> V:
        return a < b

    def less_equal(self, a: Any, b: Any) -> V:
        return a <= b

    def equal(self, a: Any, b: Any) -> V:
        return a == b

    def matmul(self, a: Any, b: Any) -> V:
        return a @ b

    def reshape(self, a: Any, rank: int, shape: Shape) -> V:
        return a.reshape((*a.shape[: a.ndim - rank], *shape))

    def stop_gradient(self, a: V) -> V:
        return a


def apply(algebra: Algebra[V], x: Expr, args: Sequence[V]) -> V:
    """The value of one node (not an input) from the values of its arguments."""
    match x.op:
        case "constant" | "array" | "sum" | "max":
            attrs: dict[str, Any] = dict(x.attrs)
            if x.op == "array":
                attrs["shape"] = x.shape
            return getattr(algebra, x.op)(*args, **attrs)
        case "reshape":
            return algebra.reshape(args[0], x.args[0].rank, x.shape)
        case "call":
            return _call(algebra, x, args)
        case op:
            return getattr(algebra, op)(*args)


def _call(algebra: Algebra[V], x: Expr, args: Sequence[V]) -> V:
    name, static = str(x["name"]), static_of(x)
    native = getattr(algebra, name, None)
    if native is not None:
        return native(*args, **static)
    body, symbols = definition(x)
    inputs = {str(s["name"]): value for s, value in zip(symbols, args, strict=True)}
    return fold(Program({"": body}), algebra, inputs)[""]


def fold(program: Program, algebra: Algebra[V], inputs: Mapping[str, V]) -> dict[str, V]:
    """The outputs of a program for these inputs; each value is dropped after its last use."""
    values: dict[Expr, V] = {}
    for i, x in enumerate(program.nodes):
        if x.op == "input":
            values[x] = inputs[str(x["name"])]
        else:
            values[x] = apply(algebra, x, [values[arg] for arg in x.args])
            for arg in x.args:
                if program.last_use[arg] == i:
                    values.pop(arg, None)
    return {name: values[x] for name, x in program.outputs.items()}


def constant_array(kind: str, shape: Shape, value: float = 1.0) -> np.ndarray[Any, Any]:
    """The float64 entries of `expr.array`: the same bits for every backend."""
    match kind:
        case "full":
            return np.full(shape, value)
        case "eye":
            return np.tile(value * np.eye(shape[-2], shape[-1]), (*shape[:-2], 1, 1))
        case "lower" | "strictly_lower":
            return np.tril(np.full(shape, value), 0 if kind == "lower" else -1)
        case "dct":
            rows, columns = shape
            j = np.arange(columns)
            basis = np.cos(np.pi * (np.arange(rows)[:, None] + 0.5) * j / max(rows, 1))
            scale = np.where(j == 0, np.sqrt(0.5), 1.0) * (j < rows)
            return value * basis * scale * np.sqrt(2.0 / max(rows, 1))
        case _:
            raise ValueError(f"unknown constant array {kind!r}")
