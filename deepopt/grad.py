"""Reverse-mode derivative of a graph, itself a graph.

The operations are closed under it. Scalars (rank 0) are hyperparameters and are not differentiated;
`stop_gradient` and the conditions of `where` are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deepopt import expr as ex
from deepopt.expr import Expr, array, mul, reshape, sum_, topological, transpose, where
from deepopt.functions import expand, solve

Adjoints = Sequence[Expr | None]


def grad(objective: Expr, wrt: Sequence[Expr]) -> list[Expr]:
    """The derivative of a size-one `objective` by each node of `wrt`, of that node's shape.

    Raises ValueError where the objective has more than one entry or does not depend on a node.
    """
    if objective.size != 1 or not objective.shape:
        raise ValueError(
            f"an objective must be one number per matrix, got shape {objective.shape}; "
            "sum it over its axes"
        )
    order = topological([objective])
    targets = set(wrt)
    reaches: set[Expr] = set()
    for x in order:
        if x in targets or (x.op != "stop_gradient" and any(a in reaches for a in x.args)):
            reaches.add(x)
    for target in wrt:
        if target not in order:
            raise ValueError(f"the objective does not depend on {target.op} {target.attrs}")
    adjoints: dict[Expr, Expr] = {objective: array("full", objective.shape)}
    for x in reversed(order):
        if x not in reaches or x not in adjoints or not x.args:
            continue
        for arg, adjoint in zip(x.args, _pull_back(x, adjoints[x]), strict=True):
            if adjoint is None or arg not in reaches or not arg.shape:
                continue
            adjoint = _unbroadcast(adjoint, arg)
            adjoints[arg] = adjoints[arg] + adjoint if arg in adjoints else adjoint
    return [adjoints.get(target, array("full", target.shape, 0.0)) for target in wrt]


def _unbroadcast(adjoint: Expr, arg: Expr) -> Expr:
    axes = tuple(
        i - arg.rank
        for i, (n, m) in enumerate(zip(arg.shape, adjoint.shape, strict=True))
        if n == 1 and m != 1
    )
    return sum_(adjoint, axes) if axes else adjoint


def _pull_back(x: Expr, adjoint: Expr) -> Adjoints:
    """The adjoints of the arguments of x, before broadcasting is undone."""
    if x.op == "call":
        return _pull_back_call(x, adjoint)
    try:
        rule = _RULES[x.op]
    except KeyError:
        raise ValueError(f"{x.op!r} (made at {x.source}) has no derivative") from None
    return rule(x, adjoint, *x.args)


def _pull_back_call(x: Expr, adjoint: Expr) -> Adjoints:
    """A primitive by its rule; any other named function by its definition."""
    if x["name"] == "solve":
        a, _ = x.args
        lower = bool(dict(x.attrs).get("lower", False))
        back = solve(transpose(a), adjoint, upper=lower)
        return (-(back @ transpose(x)), back)
    body = expand(x)
    wanted = [arg for arg in x.args if arg in topological([body])]
    derived = grad(sum_(body * ex.stop_gradient(adjoint)), wanted)
    by_arg = dict(zip(wanted, derived, strict=True))
    return [by_arg.get(arg) for arg in x.args]


def _sum(x: Expr, adjoint: Expr, a: Expr) -> Adjoints:
    return (mul(adjoint, array("full", a.shape)),)


def _maximum(larger: bool) -> Callable[..., Adjoints]:
    def rule(x: Expr, d: Expr, a: Expr, b: Expr) -> Adjoints:
        first = (b <= a) if larger else (a <= b)
        return (where(first, d, 0.0), where(first, 0.0, d))

    return rule


def _nothing(x: Expr, d: Expr, *args: Expr) -> Adjoints:
    return [None] * len(args)


# Each rule takes the node, its adjoint d and its arguments.
_RULES: dict[str, Callable[..., Adjoints]] = {
    "add": lambda x, d, a, b: (d, d),
    "sub": lambda x, d, a, b: (d, -d),
    "mul": lambda x, d, a, b: (d * b, d * a),
    "div": lambda x, d, a, b: (d / b, -(d * x / b)),
    "neg": lambda x, d, a: (-d,),
    "power": lambda x, d, a, b: (d * b * a ** (b - 1.0), None),
    "sqrt": lambda x, d, a: (0.5 * d / x,),
    "rsqrt": lambda x, d, a: (-0.5 * d * x / a,),
    "exp": lambda x, d, a: (d * x,),
    "log": lambda x, d, a: (d / a,),
    "sigmoid": lambda x, d, a: (d * x * (1.0 - x),),
    "tanh": lambda x, d, a: (d * (1.0 - x * x),),
    "sign": _nothing,
    "absolute": lambda x, d, a: (d * ex.sign(a),),
    "maximum": _maximum(True),
    "minimum": _maximum(False),
    "less": _nothing,
    "less_equal": _nothing,
    "equal": _nothing,
    "where": lambda x, d, c, a, b: (None, where(c, d, 0.0), where(c, 0.0, d)),
    "matmul": lambda x, d, a, b: (d @ transpose(b), transpose(a) @ d),
    "transpose": lambda x, d, a: (transpose(d),),
    "reshape": lambda x, d, a: (reshape(d, a.shape),),
    "sum": _sum,
    "stop_gradient": _nothing,
}
