"""The algebra of torch tensors, compiled programs, and functions of `deepopt` lifted to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial, wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from deepopt.algebra import Algebra, Arrays, Program, apply, constant_array, traced
from deepopt.expr import COMPARISONS, Expr, Shape
from deepopt.functions import FUNCTIONS, definition, static_of
from deepopt.oracle import NUMPY

IN_PLACE = {"add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "exp", "log", "sigmoid", "tanh"}
TWO_SIDED = {"add", "mul"}
OPERATORS = {
    **{"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}"},
    **{"matmul": "{} @ {}", "transpose": "{}.mT"},
}
VIEWS = {"transpose", "reshape", "stop_gradient"}
# Values that nobody may write into: shared constants, and truth values, which hold no numbers.
READ_ONLY = {"array", "constant", *COMPARISONS}


class Torch(Arrays[Any]):
    """The algebra of tensors of one dtype on one device; scalars may be Python numbers."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device

    def constant(self, value: float) -> float:
        return value

    def array(self, kind: str, shape: Shape, value: float) -> Tensor:
        if kind == "full":
            return torch.full((), value, dtype=self.dtype, device=self.device).expand(shape)
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
        # torch.sign calls NaN 0; a NaN must stay one, as in NumPy and jax.
        return torch.where(torch.isnan(a), a, torch.sign(a))

    def absolute(self, a: Any) -> Any:
        return torch.abs(a)

    def floor(self, a: Any) -> Any:
        return torch.floor(a)

    def maximum(self, a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.maximum(a, b)
        return torch.clamp(a, min=b) if isinstance(a, Tensor) else torch.clamp(b, min=a)

    def minimum(self, a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.minimum(a, b)
        return torch.clamp(a, max=b) if isinstance(a, Tensor) else torch.clamp(b, max=a)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        # Of two numbers, torch would make a tensor of the default dtype.
        number = not isinstance(a, Tensor) and not isinstance(b, Tensor)
        a = torch.tensor(a, dtype=self.dtype, device=self.device) if number else a
        return torch.where(torch.as_tensor(condition, device=self.device).bool(), a, b)

    def transpose(self, a: Any) -> Any:
        return a.mT

    def sum(self, a: Any, axes: tuple[int, ...]) -> Any:
        return torch.sum(a, dim=axes, keepdim=True)

    def max(self, a: Any, axes: tuple[int, ...]) -> Any:
        if not a.numel():
            return torch.sum(a, dim=axes, keepdim=True)
        return torch.amax(a, dim=axes, keepdim=True)

    def solve(self, a: Any, b: Any, lower: bool, upper: bool) -> Any:
        if a.dtype.itemsize < 4:  # solvers know no narrower numbers
            return self.solve(a.float(), b.float(), lower, upper).to(a.dtype)
        if lower or upper:
            if a.ndim == b.ndim > 2 and a.shape[-3] == 1 < b.shape[-3]:
                # One system for several right sides: next to each other they are one.
                beside = b.movedim(-3, -2).flatten(-2)
                x = torch.linalg.solve_triangular(a.squeeze(-3), beside, upper=upper)
                return x.unflatten(-1, (b.shape[-3], b.shape[-1])).movedim(-2, -3)
            return torch.linalg.solve_triangular(a, b, upper=upper)
        return torch.linalg.solve_ex(a, b).result

    def eigenvectors(self, a: Any) -> Any:
        # LAPACK gives up on what is not finite; a NaN must stay one.
        known = torch.isfinite(a).all(-1, keepdim=True).all(-2, keepdim=True)
        a = torch.where(known, a, 0.0)
        try:
            v = torch.linalg.eigh(a).eigenvectors
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            # Narrow solvers may not converge where entries differ by many orders of magnitude.
            v = torch.linalg.eigh(a.double()).eigenvectors.to(a.dtype)
        return torch.where(known, v, torch.nan)

    def orthonormal(self, a: Any) -> Any:
        q, r = torch.linalg.qr(a)
        signs = torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
        return q * signs.unsqueeze(-2)


@lru_cache(maxsize=256)
def _constant(
    kind: str, shape: Shape, value: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.from_numpy(constant_array(kind, shape, value)).to(device, dtype)


Step = tuple[Callable[..., Any], tuple[int, ...], int, tuple[int, ...]]


class Compiled:
    """A program unrolled into a list of calls.

    Scalars (rank 0) of numbers are computed on the host in float64. Unless `donate` is None,
    operations overwrite intermediate values, and the inputs named there, at their last use (the
    arithmetic is the same); then all inputs of rank 1 and more must have the same batch axes.
    """

    # Constants outlive the call that makes them, so they must not be inference tensors.
    @torch.inference_mode(False)
    def __init__(
        self, program: Program, algebra: Algebra[Any], donate: Sequence[str] | None = None
    ) -> None:
        self.program = program
        self._algebra = algebra
        self._donate = donate
        self._where: dict[Expr, int] = {x: i for i, x in enumerate(program.nodes)}
        self._inputs = [(i, str(x["name"])) for i, x in enumerate(program.nodes) if x.op == "input"]
        self._outputs = [(name, self._where[x]) for name, x in program.outputs.items()]
        self._homes: dict[Expr, str] = {}
        self._storage_use: dict[Expr, int] = {}
        self._batched: set[Expr] = set()
        host: set[Expr] = set()
        for x in program.nodes:
            source, last = _storage(x), program.last_use.get(x, -1)
            self._storage_use[source] = max(self._storage_use.get(source, -1), last)
            if (x.op == "input" and x.shape) or any(a in self._batched for a in x.args):
                self._batched.add(x)
            if not x.shape and all(a in host for a in x.args):
                host.add(x)
        called = [(i, x) for i, x in enumerate(program.nodes) if x.op != "input"]
        self._on_host = [self._scalar_step(i, x) for i, x in called if x in host]
        self._steps = [self._step(i, x) for i, x in called if x not in host]
        shared = [x for name, x in program.outputs.items() if self._is_shared(name, x)]
        self._copies = [] if donate is None else [self._where[x] for x in shared]

    def _scalar_step(self, i: int, x: Expr) -> Step:
        native = _native(x, self._algebra)

        def call(*args: Any) -> Any:
            if any(isinstance(a, Tensor) for a in args):
                return native(*args)
            return float(apply(NUMPY, x, args))

        return call, tuple(self._where[arg] for arg in x.args), i, ()

    def _step(self, i: int, x: Expr) -> Step:
        places = tuple(self._where[arg] for arg in x.args)
        last = self.program.last_use
        dead = tuple({self._where[arg] for arg in x.args if last[arg] == i})
        if x.op in IN_PLACE:
            for position, arg in enumerate(x.args):
                usable = position == 0 or x.op in TWO_SIDED
                # Another operand may be a view of what would be overwritten.
                rest = x.args[:position] + x.args[position + 1 :]
                usable = usable and all(_storage(y) is not _storage(arg) for y in rest)
                if usable and arg.shape == x.shape and self._overwritable(arg, i):
                    self._homes[x] = (
                        str(arg["name"]) if arg.op == "input" else self._homes.get(arg, "")
                    )
                    rest = places[:position] + places[position + 1 :]
                    return getattr(Tensor, f"{x.op}_"), (places[position], *rest), i, dead
        full = all(arg in self._batched or not arg.shape for arg in x.args)
        donate = () if self._donate is not None and full else None
        return _native(x, self._algebra, donate), places, i, dead

    def _overwritable(self, x: Expr, i: int) -> bool:
        """Whether x's value has its whole shape and storage that is not read after node i."""
        if self._donate is None or x not in self._batched or _storage(x) is not x:
            return False
        if self._storage_use[x] > i or x.op in READ_ONLY:
            return False
        return x.op != "input" or str(x["name"]) in self._donate

    def _is_shared(self, name: str, x: Expr) -> bool:
        """Whether writing other outputs home, one after the other, could change this one."""
        foreign = self._homes.get(x, name) not in ("", "w", "g", name)
        return x.op == "input" or _storage(x) is not x or (foreign and name != "update")

    def scalars(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The values of all scalars; inputs of rank 1 and more may still be missing."""
        values: list[Any] = [None] * len(self.program.nodes)
        for i, name in self._inputs:
            values[i] = inputs.get(name)
        for call, places, i, _ in self._on_host:
            values[i] = call(*[values[p] for p in places])
        return values

    def __call__(
        self, inputs: Mapping[str, Any], scalars: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """The outputs; `scalars` may have been computed before, for several calls."""
        values = list(self.scalars(inputs) if scalars is None else scalars)
        for i, name in self._inputs:
            if name in inputs:
                values[i] = inputs[name]
        for call, places, i, dead in self._steps:
            values[i] = call(*[values[p] for p in places])
            for p in dead:
                values[p] = None
        for i in self._copies:
            values[i] = values[i].clone()
        return {name: values[i] for name, i in self._outputs}

    def straight(self, names: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
        """The outputs in their order as a function of the inputs of these names, without a loop.

        Torch's compiler follows it. Nothing is overwritten: `donate` must be None.
        """
        place, known = {name: i for i, name in self._inputs}, dict[str, Any]()
        lines = list[str]()
        for call, places, i, dead in (*self._on_host, *self._steps):
            x, values = self.program.nodes[i], [f"v{p}" for p in places]
            if not places:
                known[f"v{i}"] = call()
                continue
            operator = OPERATORS.get(x.op)
            if operator is None or any(a.op in COMPARISONS for a in x.args):
                known[f"f{i}"] = call
                operator = f"f{i}({', '.join(['{}'] * len(values))})"
            lines.append(f"v{i} = {operator.format(*values)}")
            gone = [f"v{p}" for p in dead if f"v{p}" not in known]
            lines += [f"del {', '.join(gone)}"] if gone else []
        arguments = [f"v{place[n]}" if n in place else f"_{i}" for i, n in enumerate(names)]
        results = "".join(f"v{i}, " for _, i in self._outputs)
        head = f"def straight({', '.join(arguments)}):"
        exec("\n    ".join([head, *lines, f"return ({results})"]), known)
        return known["straight"]


def _storage(x: Expr) -> Expr:
    """The node whose storage the value of x may share: x itself, or what it is a view of."""
    if x.op in VIEWS:
        return _storage(x.args[0])
    if x.op == "call" and x["name"] in FUNCTIONS:
        body, symbols = definition(x)
        source = _storage(body)
        if source in symbols:
            return _storage(x.args[symbols.index(source)])
    return x


def _native(
    x: Expr, algebra: Algebra[Any], donate: Sequence[str] | None = None
) -> Callable[..., Any]:
    """The function of its arguments' values that a node is, a definition compiled in place."""
    if x.op == "call":
        known = getattr(algebra, str(x["name"]), None)
        if known is not None:
            return partial(known, **static_of(x))
        body, symbols = definition(x)
        inner, names = (
            Compiled(Program({"": body}), algebra, donate),
            [str(s["name"]) for s in symbols],
        )
        if donate is None:
            straight = inner.straight(names)
            return lambda *args: straight(*args)[0]
        return lambda *args: inner(dict(zip(names, args, strict=True)))[""]
    if x.op in ("array", "constant"):
        value = apply(algebra, x, ())
        return lambda: value
    operation = getattr(algebra, x.op)
    if x.op in ("sum", "max"):
        return partial(operation, axes=x["axes"])
    if x.op == "reshape":
        return partial(operation, rank=x.args[0].rank, shape=x.shape)
    truths = [arg.op in COMPARISONS for arg in x.args]
    if x.op == "where" or not any(truths):
        return operation
    # Of truth values torch would make numbers of its default dtype.
    dtype = algebra.dtype if isinstance(algebra, Torch) else None
    return lambda *args: operation(
        *(
            a.to(dtype) if t and isinstance(a, Tensor) else a
            for a, t in zip(args, truths, strict=True)
        )
    )


def lift(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of graph nodes as a function of tensors, differentiable by autograd.

    `lift(f)(*tensors, **static)`: the last two axes of each tensor are the matrix that f sees, any
    axes before broadcast as batch; Python numbers are scalars. f may return one node or a tuple.
    The graph is traced once per shape and set of static keywords.

    >>> write_once = lift(lambda m, k, v: write(l2(Linear(m), v, k), rate=0.5).weight)
    >>> new = write_once(memory, keys, values)
    """
    programs, names = SimpleNamespace(), dict[Any, str]()

    def name_of(shapes: tuple[Shape, ...], static: Any, *kind: Any) -> str:
        key = shapes, static, kind
        if key not in names:
            program, several = traced(function, shapes, **dict(static))
            inputs = [f"argument {i}" for i in range(len(shapes))]
            straight = Compiled(program, Torch(*kind)).straight(inputs)
            names[key] = f"program_{len(names)}"
            once = straight if several else lambda *args: straight(*args)[0]
            setattr(programs, names[key], once)
        return names[key]

    # Torch's compiler takes the name as it is, without a look at how it was found.
    constant = torch.compiler.assume_constant_result(name_of)

    @wraps(function)
    def run(*args: Tensor | float, **static: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not tensors:
            raise TypeError(f"{function!r} was lifted to tensors, but none is among {args!r}")
        shapes = tuple(tuple(a.shape[-2:]) if isinstance(a, Tensor) else () for a in args)
        named = constant if torch.compiler.is_compiling() else name_of
        kind = tensors[0].dtype, tensors[0].device
        return getattr(programs, named(shapes, tuple(static.items()), *kind))(*args)

    return run
