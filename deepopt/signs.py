"""Which memories turn with the gradient: read off the graph of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

from deepopt.expr import Expr, Shape, topological
from deepopt.functions import FUNCTIONS, definition
from deepopt.rule import Rule, trace

# The signs that a node may be said to take when gradient and weights change theirs: -1 of what is
# odd, 1 of what is even, both of zero, none of what is neither.
Signs: TypeAlias = frozenset[int]
ODD, EVEN, ZERO, NEITHER = (frozenset[int](x) for x in ((-1,), (1,), (-1, 1), ()))
FOLLOW = frozenset("neg transpose reshape sum stop_gradient sign tanh orthonormal".split())
PRODUCTS = frozenset("mul div matmul solve".split())
SUMS = frozenset("add sub".split())


@lru_cache(maxsize=1024)
def signed_memories(rule: Rule, shape: Shape) -> tuple[str, ...]:
    """The memories of a parameter's shape that are odd in the gradient, such as averages of it.

    Averages of its square are not, nor are bases and networks.
    """
    slots = rule.all_slots(shape)
    empty = {k for k, s in slots.items() if s.kind == "full" and s.value == 0.0}
    signs = {k: ZERO if k in empty else EVEN for k in slots}
    everything = frozenset(rule.clocks()) | {"every"}
    programs = [dict(trace(rule, shape, x).outputs) for x in (everything, frozenset[str]())]
    before: Mapping[str, Signs] = {}
    while before != signs:
        before = dict(signs)
        for outputs in programs:
            found = _signs({k: x for k, x in outputs.items() if k in slots}, signs)
            signs |= {k: signs[k] & x for k, x in found.items()}
    return tuple(k for k, s in slots.items() if s.shape == shape and signs[k] == ODD)


def _signs(outputs: Mapping[str, Expr], known: Mapping[str, Signs]) -> dict[str, Signs]:
    """The signs of nodes, from those of inputs; gradients and weights are odd, others even."""
    inputs = {"g": ODD, "w": ODD, **known}
    signs: dict[Expr, Signs] = {}
    for x in topological(outputs.values()):
        if x.op == "input":
            signs[x] = inputs.get(str(x["name"]), EVEN)
        elif x.op in ("constant", "array"):
            full = x.op == "constant" or x["kind"] == "full"
            signs[x] = ZERO if full and x["value"] == 0.0 else EVEN
        else:
            signs[x] = _of(x, [signs[arg] for arg in x.args])
    return {name: signs[x] for name, x in outputs.items()}


def _of(x: Expr, args: Sequence[Signs]) -> Signs:
    """The signs of a node, from those of its arguments."""
    op = str(x["name"]) if x.op == "call" else x.op
    if op in FUNCTIONS:
        body, symbols = definition(x)
        names = (str(symbol["name"]) for symbol in symbols)
        return _signs({"": body}, dict(zip(names, args, strict=True)))[""]
    common = args[0].intersection(*args[1:])
    if op in FOLLOW:
        return args[0]
    if op in PRODUCTS:
        return frozenset(a * b for a in args[0] for b in args[1])
    if op in SUMS:
        return common
    if op == "where":
        return args[1] & args[2] if 1 in args[0] else NEITHER
    if op in ("absolute", "equal"):
        return EVEN if common else NEITHER
    if op == "power" and x.args[1].op == "constant" and float(str(x.args[1]["value"])) % 1 == 0:
        return frozenset(a ** int(float(str(x.args[1]["value"]))) for a in args[0])
    return EVEN if 1 in common else NEITHER
