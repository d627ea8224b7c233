"""Reverse-mode derivative of a graph, itself a graph.

The operations are closed under it. Scalars (rank 0) are hyperparameters and are not differentiated;
`stop_gradient` and the conditions of `where` are constants.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepopt.expr import (
    Expr,
    array,
    log,
    reshape,
    sign,
    substitute,
    sum_,
    symbol,
    topological,
    transpose,
    where,
)
from deepopt.functions import definition, ratio, solve

Adjoints = Sequence[Expr | None]


def grad(objective: Expr, wrt: Sequence[Expr]) -> list[Expr]:
    """The derivative of a size-one `objective` by each node of `wrt`, of that node's shape.

    The root of zero counts as flat. Raises ValueError where the objective has more than one entry,
    where it does not depend on a node, and for scalars.
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
        if not target.shape:
            raise ValueError(f"{target.op} {target.attrs} is a hyperparameter, not differentiated")
        if target not in reaches or objective not in reaches:
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


def _pull_back(x: Expr, d: Expr) -> Adjoints:
    """The adjoints of the arguments of x from its own, d, before broadcasting is undone."""
    a, b = x.args[0], x.args[-1]
    match x.op:
        case "add":
            return d, d
        case "sub":
            return d, -d
        case "mul":
            return d * b, d * a
        case "div":
            return d / b, -(d * x / b)
        case "neg":
            return (-d,)
        case "power":
            return d * b * a ** (b - 1.0), d * x * log(a) if b.shape else None
        case "sqrt":
            return (ratio(0.5 * d, x),)
        case "rsqrt":
            return (-0.5 * d * x / a,)
        case "exp":
            return (d * x,)
        case "log":
            return (d / a,)
        case "sigmoid":
            return (d * x * (1.0 - x),)
        case "tanh":
            return (d * (1.0 - x * x),)
        case "absolute":
            return (d * sign(a),)
        case "maximum" | "minimum":
            first = b <= a if x.op == "maximum" else a <= b
            return where(first, d, 0.0), where(first, 0.0, d)
        case "where":
            return None, where(x.args[0], d, 0.0), where(x.args[0], 0.0, d)
        case "matmul":
            return d @ transpose(b), transpose(a) @ d
        case "transpose":
            return (transpose(d),)
        case "reshape":
            return (reshape(d, a.shape),)
        case "sum":
            return (d * array("full", a.shape),)
        case "call":
            return _pull_back_call(x, d)
        case "sign" | "less" | "less_equal" | "equal" | "stop_gradient":
            return [None] * len(x.args)
        case _:
            raise ValueError(f"{x.op!r} (made at {x.source}) has no derivative")


def _pull_back_call(x: Expr, adjoint: Expr) -> Adjoints:
    """A primitive by its rule; any other named function by its definition."""
    if x["name"] == "solve":
        a, _ = x.args
        lower = bool(dict(x.attrs).get("lower", False))
        back = solve(transpose(a), adjoint, upper=lower)
        return (-(back @ transpose(x)), back)
    # On symbols of its own, since one argument may be part of another.
    body, symbols = definition(x)
    wanted = [s for s in symbols if s.shape and s in topological([body])]
    seed = symbol("adjoint", x.shape)
    derived = grad(sum_(body * seed), wanted)
    actual = dict(zip(symbols, x.args, strict=True)) | {seed: adjoint}
    by_symbol = {s: substitute(d, actual) for s, d in zip(wanted, derived, strict=True)}
    return [by_symbol.get(s) for s in symbols]
