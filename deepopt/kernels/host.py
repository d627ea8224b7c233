"""The scalars of kernels, computed on the host in float64 by a function written for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from deepopt.expr import Expr, topological
from deepopt.oracle import NUMPY

# What Python spells itself; everything else is a method of the algebra of NumPy.
OPERATORS = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "neg": "(-{0})",
    "power": "({0} ** {1})",
    "less": "({0} < {1})",
    "less_equal": "({0} <= {1})",
    "equal": "({0} == {1})",
    "stop_gradient": "{0}",
}

Scalars = Callable[[Mapping[str, Any]], Sequence[float]]


@cache
def scalar_function(scalars: tuple[Expr, ...]) -> Scalars:
    """A function from the values of inputs by name to those of scalar nodes."""
    names: dict[Expr, str] = {}
    lines: list[str] = []
    for i, x in enumerate(topological(scalars)):
        names[x] = f"x{i}"
        args = [names[arg] for arg in x.args]
        match x.op:
            case "input":
                text = f"number(given[{x['name']!r}])"
            case "constant":
                text = f"number('{x['value']!r}')"
            case op if op in OPERATORS:
                text = OPERATORS[op].format(*args)
            case op:
                text = f"numpy.{op}({', '.join(args)})"
        lines.append(f"    {names[x]} = {text}")
    result = ", ".join(names[x] for x in scalars)
    text = "\n".join(["def scalars(given):", *lines, f"    return [{result}]"])
    space: dict[str, Any] = {"number": np.float64, "numpy": NUMPY}
    exec(compile(text, "<scalars of a kernel>", "exec"), space)
    function = space["scalars"]

    def run(given: Mapping[str, Any]) -> Sequence[float]:
        with np.errstate(all="ignore"):
            return function(given)

    return run


def is_constant(x: Expr) -> bool:
    """Whether a scalar depends on no input."""
    return not any(y.op == "input" for y in topological([x]))
