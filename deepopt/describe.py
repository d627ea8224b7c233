"""The nest of a rule as a table: its memories, its formula, its state and what a step costs."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import cleandoc
from math import prod

from deepopt.algebra import Program
from deepopt.expr import Expr, Shape, topological
from deepopt.functions import definition
from deepopt.latex import text_of, ticks
from deepopt.rule import Rule, checked_rule, traced

# Operations per n³ of a square argument, and per n entries of the result: LAPACK's usual counts.
PRIMITIVES = {"solve": (2 / 3, 2), "eigenvectors": (9, 0), "orthonormal": (4 / 3, 4 / 3)}
NO_MEMORY = "no memory that an objective writes"
FREE = {"input", "constant", "array", "reshape", "transpose", "stop_gradient"}


def flops(x: Expr) -> int:
    """Floating-point operations of one node."""
    if x.op in FREE:
        return 0
    if x.op == "matmul":
        return 2 * x.size * x.args[0].shape[-1]
    if x.op in ("sum", "max"):
        return x.args[0].size
    if x.op == "call" and x["name"] in PRIMITIVES:
        n, size = x.args[0].shape[-1], x.args[0].size
        first, second = PRIMITIVES[str(x["name"])]
        return int(first * n * size + second * n * x.size)
    if x.op == "call":
        return total_flops(Program({"": definition(x)[0]}))
    return x.size


def total_flops(program: Program) -> int:
    """Floating-point operations of a program on one parameter."""
    return sum(map(flops, program.nodes))


def state_numbers(rule: Rule, shape: Shape) -> float:
    """Numbers of state per number of parameter."""
    return sum(prod(s.shape) for s in rule.all_slots(shape).values()) / max(prod(shape), 1)


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
    checked_rule(rule).check(shape, "the example")
    program, _ = traced(rule, shape, frozenset({"every"}))
    ticking, _ = traced(rule, shape, frozenset({"every", *rule.clocks()}))
    slots = rule.all_slots(shape)
    rows = nest(rule, shape)
    n, size = max(prod(shape), 1), " × ".join(map(str, shape))
    read = {k for k in (*program.inputs, *program.outputs) if k in slots}
    written = {k for k in program.outputs if k in slots}
    given = {k: x for k, x in rule.context(shape).items() if k in program.inputs}
    moved = 3 + sum(prod(slots[k].shape) / n for names in (read, written) for k in names)
    moved += sum(prod(x) / n for x in given.values())
    return "\n".join(
        [
            repr(rule),
            "",
            cleandoc(type(rule).__doc__ or ""),
            "",
            table(rows) if len(rows) > 1 else NO_MEMORY,
            "",
            f"one step at {size}; a prime marks what is new:",
            *_lines(rule, shape),
            "",
            f"per number of a parameter of {size}:",
            f"  numbers of state: {state_numbers(rule, shape):.3g}",
            f"  bytes moved a step in float32: at least {4 * moved:.3g}",
            f"  floating-point operations a step: {total_flops(program) / n:,.0f}"
            + f", and {total_flops(ticking) / n:,.0f} when all clocks tick" * bool(rule.clocks()),
        ]
    )


def nest(rule: Rule, shape: Shape) -> list[list[str]]:
    """The memories that a step keeps, from the writes recorded in its trace: a head and rows."""
    program, levels = traced(rule, shape, frozenset({"every", *rule.clocks()}))
    rows = [["memory", "structure", "keys", "values", "objective", "retention", "rate", "period"]]
    slots = rule.all_slots(shape)
    for level in levels:
        outputs = {**program.outputs, "w": program.outputs["update"]}
        names = [n for n in level.name.split(", ") if n in outputs]
        kept = topological([outputs[n] for n in names])
        if not names or not all(x in kept for x in level.result):
            continue
        clock = slots[names[0]].clock if names[0] in slots else None
        period = rule.every * rule.clocks().get(clock or "", 1)
        pairs = [_short(x) for x in (level.keys, level.values)]
        objective = f"{level.objective} ({level.solver})"
        rates = [_short(level.retention), _short(level.rate)]
        rows.append([level.name, level.structure, *pairs, objective, *rates, str(period)])
    return rows


def _short(x: Expr | None) -> str:
    text = "-" if x is None else text_of(x)
    return text if len(text) <= 36 else text[:35] + "…"


def _lines(rule: Rule, shape: Shape) -> list[str]:
    result: list[str] = []
    for clock, lines in ticks(rule, shape, "plain").items():
        if clock:
            result.append(f"every {rule.clocks()[clock]} updates ({clock}) instead:")
        result += [f"  {left} = {right}" for left, right in lines]
    if rule.every > 1:
        result.append(f"between updates, {rule.every} steps apart: gradients are summed")
    return result
