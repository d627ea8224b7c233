"""The nest of a rule as a table: its memories, its formula, its state and what a step costs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from deepopt.algebra import Program, apply
from deepopt.expr import Expr, Shape
from deepopt.functions import definition_of, static_of
from deepopt.latex import Formulas, Text, formulas
from deepopt.memory import Level
from deepopt.rule import Rule, traced

FREE = {"input", "constant", "array", "reshape", "transpose", "stop_gradient"}


def flops(x: Expr) -> int:
    """Floating-point operations of one node."""
    if x.op in FREE:
        return 0
    if x.op == "matmul":
        return 2 * x.size * x.args[0].shape[1]
    if x.op == "sum":
        return x.args[0].size
    if x.op == "call" and x["name"] == "solve":
        n = x.shape[0]
        return 2 * n**3 // 3 + 2 * n * x.size
    if x.op == "call":
        shapes = tuple(arg.shape for arg in x.args)
        body, _ = definition_of(str(x["name"]), shapes, tuple(sorted(static_of(x).items())))
        return total_flops(Program({"": body}))
    return x.size


def total_flops(program: Program) -> int:
    """Floating-point operations of a program on one parameter."""
    return sum(map(flops, program.nodes))


def state_numbers(rule: Rule, shape: Shape) -> float:
    """Numbers of state per number of parameter."""
    return sum(prod(s.shape) for s in rule.all_slots(shape).values()) / max(prod(shape), 1)


def _text(x: Expr | None) -> str:
    """A short Unicode rendering of a node, an ellipsis where it would be long."""
    if x is None:
        return "-"
    algebra = Formulas("plain")
    values: dict[Expr, Text] = {}
    for y in Program({"": x}).nodes:
        if y.op == "input":
            values[y] = algebra.symbol(str(y["name"]))
        else:
            values[y] = apply(algebra, y, [values[arg] for arg in y.args])
    text = values[x].text
    return text if len(text) <= 36 else text[:35] + "…"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns, a rule under the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join(row).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def describe(rule: Rule, shape: Shape = (256, 256)) -> str:
    """The memories of a rule, its formula, and its state and cost for a parameter of this shape.

    Raises ValueError where the rule cannot take the shape.
    """
    rule.check(shape, "the example")
    program, levels = traced(rule, shape, frozenset(rule.clocks()) | {"every"})
    ordinary, _ = traced(rule, shape, frozenset({"every"}))
    slots = rule.all_slots(shape)
    rows = [("memory", "structure", "keys", "values", "objective", "retention", "rate", "period")]
    by_name: dict[str, Level] = {x.name: x for x in levels if x.name}
    for level in by_name.values():
        clocks = [slots[n].clock for n in level.name.split(", ") if n in slots]
        period = rule.clocks().get(clocks[0] or "", 1) * rule.every if clocks else 1
        rows.append(
            (
                level.name,
                level.structure,
                _text(level.keys),
                _text(level.values),
                f"{level.objective} ({level.solver})",
                _text(level.retention),
                _text(level.rate),
                str(period),
            )
        )
    lines = formulas(program, "plain")
    step = [f"  {name}{_mark(name)} = {right}" for name, right in lines.items()]
    n = max(prod(shape), 1)
    cost = total_flops(program) / n, total_flops(ordinary) / n
    moved = 3 + 2 * sum(prod(slots[k].shape) for k in ordinary.outputs if k in slots) / n
    return "\n".join(
        [
            repr(rule),
            "",
            (type(rule).__doc__ or "").strip(),
            "",
            table(rows) if len(rows) > 1 else "no memory beside the weights",
            "",
            "one step (all clocks ticking; a prime marks a new memory):",
            *step,
            "",
            f"per number of a {' × '.join(map(str, shape))} parameter:",
            f"  state {state_numbers(rule, shape):.3g} numbers, "
            f"at least {4 * moved:.3g} bytes moved a step in float32",
            f"  {cost[1]:.3g} floating-point operations a step, {cost[0]:.3g} when all clocks tick",
        ]
    )


def _mark(name: str) -> str:
    return "" if name in ("direction", "update") else "'"
