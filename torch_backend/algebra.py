"""The algebra of torch tensors, compiled programs, and functions of `deepopt` lifted to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from deepopt.algebra import Algebra, Arrays, Program, apply, constant_array
from deepopt.expr import Expr, Shape, symbol
from deepopt.functions import definition_of, static_of
from deepopt.oracle import NUMPY

IN_PLACE = {"add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "exp", "log", "sigmoid", "tanh"}
TWO_SIDED = {"add", "mul"}


class Torch(Arrays[Any]):
    """The algebra of tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device

    def constant(self, value: float) -> float:
        return value

    def array(self, kind: str, shape: Shape, value: float) -> Tensor:
        return _constant(kind, shape, value, self.dtype, self.device)

    def sqrt(self, a: Any) -> Any:
        return torch.sqrt(a)

    def rsqrt(self, a: Any) -> Any:
        return torch.rsqrt(a)

    def exp(self, a: Any) -> Any:
        return torch.exp(a)

    def log(self, a: Any) -> Any:
        return torch.log(a)

    def sigmoid(self, a: Any) -> Any:
        return torch.sigmoid(a)

    def tanh(self, a: Any) -> Any:
        return torch.tanh(a)

    def sign(self, a: Any) -> Any:
        return torch.sign(a)

    def absolute(self, a: Any) -> Any:
        return torch.abs(a)

    def maximum(self, a: Any, b: Any) -> Any:
        return torch.maximum(*_both(a, b)) if _tensors(a, b) else torch.clamp(*_tensor_first(a, b))

    def minimum(self, a: Any, b: Any) -> Any:
        return -self.maximum(-a, -b)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return torch.where(condition, a, b)

    def transpose(self, a: Any) -> Any:
        return a.mT

    def sum(self, a: Any, axes: tuple[int, ...]) -> Any:
        return torch.sum(a, dim=axes, keepdim=True)

    def solve(self, a: Any, b: Any, lower: bool, upper: bool) -> Any:
        if lower or upper:
            return torch.linalg.solve_triangular(a, b, upper=upper)
        return torch.linalg.solve_ex(a, b).result


def _tensors(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor)


def _both(a: Any, b: Any) -> tuple[Any, Any]:
    return a, b


def _tensor_first(a: Any, b: Any) -> tuple[Any, Any]:
    return (a, b) if isinstance(a, Tensor) else (b, a)


@lru_cache(maxsize=256)
def _constant(
    kind: str, shape: Shape, value: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.from_numpy(constant_array(kind, shape, value)).to(device, dtype)


Step = tuple[Callable[..., Any], tuple[int, ...], int, tuple[int, ...]]


class Compiled:
    """A program unrolled into a list of calls.

    Scalars (rank 0) that come from numbers are computed on the host in float64. With `donate`, an
    operation may overwrite an intermediate value, or one of the inputs named there, after its last
    use; the arithmetic is the same.
    """

    def __init__(self, program: Program, algebra: Algebra[Any], donate: Sequence[str] = ()) -> None:
        self.program = program
        self._where: dict[Expr, int] = {x: i for i, x in enumerate(program.nodes)}
        self._inputs = [(i, str(x["name"])) for i, x in enumerate(program.nodes) if x.op == "input"]
        self._outputs = [(name, self._where[x]) for name, x in program.outputs.items()]
        self._donate = frozenset(donate)
        self._in_place = bool(donate)
        self._steps: list[Step] = [
            self._step(i, x, algebra) for i, x in enumerate(program.nodes) if x.op != "input"
        ]

    def _step(self, i: int, x: Expr, algebra: Algebra[Any]) -> Step:
        places = tuple(self._where[arg] for arg in x.args)
        last = self.program.last_use
        dead = tuple({self._where[arg] for arg in x.args if last[arg] == i})
        host = not x.shape and all(not arg.shape for arg in x.args)
        call = _native(x, algebra)
        if host:
            call = _on_host(x, call)
        elif self._in_place and x.op in IN_PLACE:
            for position, arg in enumerate(x.args):
                first = position == 0 or x.op in TWO_SIDED
                if first and arg.shape == x.shape and last[arg] == i and self._owned(arg, set()):
                    rest = x.args[:position] + x.args[position + 1 :]
                    places = (self._where[arg], *(self._where[r] for r in rest))
                    return getattr(Tensor, f"{x.op}_"), places, i, dead
        return call, places, i, dead

    def _owned(self, x: Expr, seen: set[Expr]) -> bool:
        """Whether x's storage belongs to nobody else: fresh from an operation, or donated."""
        if x.op == "input":
            return str(x["name"]) in self._donate
        if x.op in ("transpose", "reshape", "stop_gradient"):
            return False
        return x.op not in ("array", "constant")

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        values: list[Any] = [None] * len(self.program.nodes)
        for i, name in self._inputs:
            values[i] = inputs[name]
        for call, places, i, dead in self._steps:
            values[i] = call(*[values[p] for p in places])
            for p in dead:
                values[p] = None
        return {name: values[i] for name, i in self._outputs}


def _native(x: Expr, algebra: Algebra[Any]) -> Callable[..., Any]:
    """The function of its arguments' values that a node is, a definition compiled in place."""
    if x.op == "call" and getattr(algebra, str(x["name"]), None) is None:
        static = tuple(sorted(static_of(x).items()))
        body, symbols = definition_of(str(x["name"]), tuple(a.shape for a in x.args), static)
        inner = Compiled(Program({"": body}), algebra)
        names = [str(s["name"]) for s in symbols]
        return lambda *args: inner(dict(zip(names, args, strict=True)))[""]
    if x.op == "array":
        value = apply(algebra, x, ())
        return lambda: value
    simple = getattr(algebra, x.op, None)
    if x.op in ("constant", "sum", "reshape", "call") or simple is None:
        return lambda *args: apply(algebra, x, args)
    return simple


def _on_host(x: Expr, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if any(isinstance(a, Tensor) for a in args):
            return call(*args)
        return float(apply(NUMPY, x, args))

    return run


def lift(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of graph nodes as a function of tensors, differentiable by autograd.

    `lift(f)(*tensors, **static)`: the last two axes of each tensor are the matrix that f sees, any
    axes before broadcast as batch; Python numbers are scalars. f may return one node or a tuple.
    The graph is traced once per shape and set of static keywords.

    >>> write_once = lift(lambda m, k, v: write(l2(Linear(m), v, k), rate=0.5).weight)
    >>> new = write_once(memory, keys, values)
    """
    traces: dict[Any, Compiled] = {}

    @wraps(function)
    def run(*args: Tensor | float, **static: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        shapes = tuple(tuple(a.shape[-2:]) if isinstance(a, Tensor) else () for a in args)
        key = (shapes, tuple(sorted(static.items())), tensors[0].dtype, tensors[0].device)
        if key not in traces:
            symbols = [symbol(f"argument {i}", shape) for i, shape in enumerate(shapes)]
            result = function(*symbols, **static)
            several: tuple[Expr, ...] = result if isinstance(result, tuple) else (result,)
            outputs = {str(i): x for i, x in enumerate(several)}
            if not isinstance(result, tuple):
                outputs = {"": result}
            traces[key] = Compiled(Program(outputs), Torch(tensors[0].dtype, tensors[0].device))
        out = traces[key]({f"argument {i}": a for i, a in enumerate(args)})
        return out[""] if "" in out else tuple(out.values())

    return run
