"""The one node type of the library: an immutable, shape-checked graph of array operations.

The last two axes of a value are a matrix, those before them count matrices (blocks); a backend may
put batch axes in front of every shape written here. That is why two operands broadcast only when
their ranks are equal or one of them is a scalar, and why reductions keep their axes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from numbers import Real
from pathlib import Path
from typing import NoReturn, TypeAlias
from weakref import WeakValueDictionary

Shape: TypeAlias = tuple[int, ...]

KINDS = ("full", "eye", "dct", "lower", "strictly_lower")
COMPARISONS = frozenset({"less", "less_equal", "equal"})
COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum", "equal"})
_HERE = str(Path(__file__).parent)
_RULES = str(Path(__file__).parent / "rules")
_nodes: WeakValueDictionary[tuple[Hashable, ...], Expr] = WeakValueDictionary()


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Expr:
    """A node: what is done, to which nodes, with what shape. Equal nodes are the same object."""

    op: str
    args: tuple[Expr, ...]
    shape: Shape
    attrs: tuple[tuple[str, Hashable], ...] = ()
    source: str = field(default="", repr=False)

    # A node is not a sequence, and NumPy must not take it for one.
    __iter__ = None
    __array_ufunc__ = None

    def __getitem__(self, name: str) -> Hashable:
        """The static attribute `name`."""
        attrs = dict(self.attrs)
        if name not in attrs:
            raise TypeError(
                f"a node cannot be indexed (by {name!r}): use sum_, @, where or reshape"
            )
        return attrs[name]

    def __eq__(self, other: object) -> bool:
        """Identity; comparing a symbol with a number is a branch, and refused."""
        if isinstance(other, int | float):
            self.__bool__()
        return self is other

    __hash__ = object.__hash__

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def mT(self) -> Expr:
        return transpose(self)

    def __add__(self, other: Number) -> Expr:
        return add(self, other)

    def __radd__(self, other: float) -> Expr:
        return add(other, self)

    def __sub__(self, other: Number) -> Expr:
        return sub(self, other)

    def __rsub__(self, other: float) -> Expr:
        return sub(other, self)

    def __mul__(self, other: Number) -> Expr:
        return mul(self, other)

    def __rmul__(self, other: float) -> Expr:
        return mul(other, self)

    def __truediv__(self, other: Number) -> Expr:
        return div(self, other)

    def __rtruediv__(self, other: float) -> Expr:
        return div(other, self)

    def __pow__(self, other: Number) -> Expr:
        return elementwise("power", self, other)

    def __rpow__(self, other: float) -> Expr:
        return elementwise("power", other, self)

    def __neg__(self) -> Expr:
        return neg(self)

    def __abs__(self) -> Expr:
        return absolute(self)

    def __matmul__(self, other: Expr) -> Expr:
        return matmul(self, other)

    def __lt__(self, other: Number) -> Expr:
        return elementwise("less", self, other)

    def __gt__(self, other: Number) -> Expr:
        return elementwise("less", other, self)

    def __le__(self, other: Number) -> Expr:
        return elementwise("less_equal", self, other)

    def __ge__(self, other: Number) -> Expr:
        return elementwise("less_equal", other, self)

    def __bool__(self) -> NoReturn:
        name = dict(self.attrs).get("name", self.op)
        raise TypeError(
            f"a rule branched at {_caller()} on the value of {name!r}, which is a symbol while the "
            "rule is traced: use where(condition, a, b), or make the hyperparameter static (int, "
            "bool, str or Literal)"
        )


Number: TypeAlias = float | Expr


def _caller() -> str:
    """'file:line' of the statement outside the core that is making a node."""
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_HERE) or name.startswith(_RULES):
            break
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def node(op: str, args: Iterable[Expr], shape: Shape, **attrs: Hashable) -> Expr:
    """The one node with this operation, arguments, shape and attributes."""
    args = tuple(args)
    items = tuple(sorted(attrs.items()))
    key = (op, tuple(map(id, args)), shape, items)
    found = _nodes.get(key)
    if found is None:
        found = _nodes[key] = Expr(op, args, shape, items, _caller())
    return found


def symbol(name: str, shape: Shape = ()) -> Expr:
    """An input of a program."""
    return node("input", (), shape, name=name)


def constant(value: float) -> Expr:
    """A known scalar."""
    return node("constant", (), (), value=float(value))


def array(kind: str, shape: Shape, value: float = 1.0) -> Expr:
    """`value` times a constant: 'full' of ones, 'eye' (or several), 'dct' (orthonormal DCT-II basis
    in columns), 'lower' (ones on and below the diagonal) or 'strictly_lower'."""
    ranks = {"full": range(1, 99), "eye": range(2, 99)}.get(kind, range(2, 3))
    if kind not in KINDS or len(shape) not in ranks:
        raise ValueError(
            f"array({kind!r}, {shape}): the kind must be one of {KINDS}, all but 'full' matrices; "
            "rank 0 is for hyperparameters, use (1, 1)"
        )
    return node("array", (), shape, kind=kind, value=float(value))


def as_expr(x: Number) -> Expr:
    """A Python number as a constant node; a node as it is. TypeError for anything else."""
    if isinstance(x, Expr):
        return x
    if not isinstance(x, Real):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{x!r} is neither a number nor a node")
    return constant(x)


def broadcast(a: Shape, b: Shape, what: str) -> Shape:
    """The common shape of two operands of equal rank, or of one and a scalar."""
    if not a or not b or a == b:
        return a or b
    if len(a) != len(b) or any(m != n and 1 not in (m, n) for m, n in zip(a, b, strict=True)):
        raise ValueError(
            f"{what}: shapes {a} and {b} do not combine; ranks must be equal (or one a scalar) "
            "and sizes equal or 1"
        )
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def elementwise(op: str, *operands: Number) -> Expr:
    """A node of an elementwise operation, its operands broadcast."""
    args = tuple(as_expr(x) for x in operands)
    shape: Shape = ()
    for arg in args:
        shape = broadcast(shape, arg.shape, op)
    if op in COMMUTATIVE:
        found = _nodes.get((op, (id(args[1]), id(args[0])), shape, ()))
        if found is not None:
            return found
    return node(op, args, shape)


def _value(x: Expr) -> float | None:
    """The number that a node is in every entry, where that is known."""
    if x.op == "constant" or (x.op == "array" and x["kind"] == "full"):
        value = x["value"]
        assert isinstance(value, float)
        return value
    return None


def _known(op: Callable[[float, float], float], a: Expr, b: Expr) -> Expr | None:
    x, y = _value(a), _value(b)
    if x is None or y is None:
        return None
    shape = broadcast(a.shape, b.shape, "constants")
    return array("full", shape, op(x, y)) if shape else constant(op(x, y))


def _covers(a: Expr, b: Expr) -> bool:
    """Whether combining b into a leaves a's shape as it is."""
    return broadcast(a.shape, b.shape, "operands") == a.shape


def add(x: Number, y: Number) -> Expr:
    a, b = as_expr(x), as_expr(y)
    if (known := _known(float.__add__, a, b)) is not None:
        return known
    if _value(b) == 0 and _covers(a, b):
        return a
    if _value(a) == 0 and _covers(b, a):
        return b
    if a is b:
        return mul(2.0, a)
    if b.op == "neg":
        return sub(a, b.args[0])
    if a.op == "neg":
        return sub(b, a.args[0])
    return elementwise("add", a, b)


def sub(x: Number, y: Number) -> Expr:
    a, b = as_expr(x), as_expr(y)
    if (known := _known(float.__sub__, a, b)) is not None:
        return known
    if _value(b) == 0 and _covers(a, b):
        return a
    if _value(a) == 0 and _covers(b, a):
        return neg(b)
    if b.op == "neg":
        return add(a, b.args[0])
    return elementwise("sub", a, b)


def neg(a: Expr) -> Expr:
    if (value := _value(a)) is not None:
        return constant(-value) if not a.shape else array("full", a.shape, -value)
    if a.op == "neg":
        return a.args[0]
    if a.op == "sub":
        return sub(a.args[1], a.args[0])
    return elementwise("neg", a)


def mul(x: Number, y: Number) -> Expr:
    a, b = as_expr(x), as_expr(y)
    if (known := _known(float.__mul__, a, b)) is not None:
        return known
    if _value(b) is not None:
        a, b = b, a
    value = _value(a)
    if value is not None and _covers(b, a):
        if value == 1:
            return b
        if value == -1:
            return neg(b)
        inner = _value(b.args[0]) if b.op == "mul" and b.args[1].shape == b.shape else None
        if inner is not None:
            return mul(value * inner, b.args[1])
        return elementwise("mul", value, b)
    if value is not None and value < 0:
        return neg(mul(neg(a), b))
    if a.op == "neg":
        return neg(mul(a.args[0], b))
    if b.op == "neg":
        return neg(mul(a, b.args[0]))
    return elementwise("mul", a, b)


def div(x: Number, y: Number) -> Expr:
    a, b = as_expr(x), as_expr(y)
    if _value(b) == 1 and _covers(a, b):
        return a
    return neg(elementwise("div", a.args[0], b)) if a.op == "neg" else elementwise("div", a, b)


def sum_(x: Expr, axes: tuple[int, ...] | None = None) -> Expr:
    """The sum over `axes` (negative; all by default), which stay as axes of size one."""
    return _reduced("sum", x, axes)


def max_(x: Expr, axes: tuple[int, ...] | None = None) -> Expr:
    """The largest entry over `axes`, as `sum_`; it has no derivative."""
    return _reduced("max", x, axes)


def _reduced(op: str, x: Expr, axes: tuple[int, ...] | None) -> Expr:
    axes = tuple(range(-x.rank, 0)) if axes is None else axes
    if not x.shape or any(not -x.rank <= axis < 0 for axis in axes):
        raise ValueError(f"{op} over axes {axes} of shape {x.shape}: axes count from the end")
    shape = tuple(1 if i - x.rank in axes else n for i, n in enumerate(x.shape))
    return node(op, (x,), shape, axes=axes)


def reshape(x: Expr, shape: Shape) -> Expr:
    """The same entries in row-major order under another shape."""
    if prod(shape) != x.size or not shape:
        hint = "; rank 0 is for hyperparameters, use (1, 1)" * (not shape)
        raise ValueError(f"cannot see shape {x.shape} as {shape}{hint}")
    if shape == x.shape:
        return x
    return node("reshape", (x,), shape)


def transpose(x: Expr) -> Expr:
    if x.rank < 2:
        raise ValueError(f"a transpose needs a matrix, got shape {x.shape}")
    if x.op == "transpose":
        return x.args[0]
    if _is_eye(x):
        return x
    return node("transpose", (x,), (*x.shape[:-2], x.shape[-1], x.shape[-2]))


def stop_gradient(x: Expr) -> Expr:
    """x, which a derivative taken by `grad` regards as a constant."""
    if x.op == "neg":
        return neg(stop_gradient(x.args[0]))
    return node("stop_gradient", (x,), x.shape)


def products(*roots: Expr) -> int:
    """Multiply-adds of the matrix products in a graph, shared ones counted once."""
    return sum(x.size * x.args[0].shape[-1] for x in topological(roots) if x.op == "matmul")


def topological(roots: Iterable[Expr]) -> list[Expr]:
    """All nodes below `roots`, arguments before the nodes that use them."""
    order: list[Expr] = []
    seen: set[Expr] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        x, expanded = stack.pop()
        if expanded:
            order.append(x)
        elif x not in seen:
            seen.add(x)
            stack.append((x, True))
            stack.extend((arg, False) for arg in reversed(x.args))
    return order


def substitute(root: Expr, values: Mapping[Expr, Expr]) -> Expr:
    """The graph of `root` with other nodes in the place of some."""
    new: dict[Expr, Expr] = {}
    for x in topological([root]):
        args = tuple(new[arg] for arg in x.args)
        same = all(a is b for a, b in zip(args, x.args, strict=True))
        new[x] = (
            values[x]
            if x in values
            else (x if same else node(x.op, args, x.shape, **dict(x.attrs)))
        )
    return new[root]


def matmul(a: Expr, b: Expr) -> Expr:
    """The matrix product, re-associated or distributed once where that costs less.

    Axes in front of the matrices must be the same.
    (m gᵀ) g runs as m (gᵀ g) when g is tall, and (m gᵀ - I) g never forms m gᵀ where that is large.
    """
    if min(a.rank, b.rank) < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"cannot multiply matrices of shapes {a.shape} and {b.shape}")
    if _is_eye(a) or _is_eye(b):
        return b if _is_eye(a) else a
    for left, x in ((True, a), (False, b)):
        if x.op == "neg":
            return neg(matmul(x.args[0], b) if left else matmul(a, x.args[0]))
        if x.op == "mul" and not x.args[0].shape:
            return x.args[0] * (matmul(x.args[1], b) if left else matmul(a, x.args[1]))
    candidates = [_product(a, b)]
    for left, x in ((True, a), (False, b)):
        if x.op == "matmul":
            p, q = x.args
            other = _product(p, matmul(q, b)) if left else _product(matmul(a, p), q)
            candidates.append(other)
        elif x.op in ("add", "sub") and _of_eye(x):
            p, q = (matmul(y, b) if left else matmul(a, y) for y in x.args)
            candidates.append(p + q if x.op == "add" else p - q)
    return min(candidates, key=products)


def _product(a: Expr, b: Expr) -> Expr:
    return node("matmul", (a, b), (*a.shape[:-1], b.shape[-1]))


def _is_eye(x: Expr) -> bool:
    """Whether x is the identity: square, and not a multiple."""
    return x.op == "array" and x.attrs == (("kind", "eye"), ("value", 1.0)) and _square(x)


def _of_eye(x: Expr) -> bool:
    """Whether x is a sum or difference of two matrices, one of them the identity."""
    return any(map(_is_eye, x.args)) and all(y.shape == x.shape for y in x.args)


def _square(x: Expr) -> bool:
    return x.shape[-2] == x.shape[-1]


def _unary(op: str) -> Callable[[Number], Expr]:
    def apply(x: Number) -> Expr:
        return elementwise(op, x)

    apply.__name__ = apply.__qualname__ = op
    return apply


def _binary(op: str) -> Callable[[Number, Number], Expr]:
    def apply(x: Number, y: Number) -> Expr:
        return elementwise(op, x, y)

    apply.__name__ = apply.__qualname__ = op
    return apply


sqrt = _unary("sqrt")
rsqrt = _unary("rsqrt")
exp = _unary("exp")
log = _unary("log")
sigmoid = _unary("sigmoid")
tanh = _unary("tanh")
sign = _unary("sign")
absolute = _unary("absolute")
floor = _unary("floor")
maximum = _binary("maximum")
minimum = _binary("minimum")
equal = _binary("equal")


def where(condition: Expr, x: Number, y: Number) -> Expr:
    """x where the condition holds, else y."""
    return elementwise("where", condition, x, y)
