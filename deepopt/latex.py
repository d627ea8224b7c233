"""Formulas: the algebra of strings, in LaTeX for documents and in Unicode for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deepopt.algebra import Algebra, Program, apply
from deepopt.expr import Expr, Shape
from deepopt.functions import FUNCTIONS
from deepopt.oracle import canonical
from deepopt.rule import Rule, trace

Style = Literal["latex", "plain"]

# How tightly a text binds: sums, products, prefixes, powers, atoms.
SUM, PRODUCT, PREFIX, POWER, ATOM = range(5)

GREEK = {
    "lr": (r"\eta", "lr"),
    "weight_decay": (r"\lambda", "weight_decay"),
    "momentum": (r"\alpha", "momentum"),
    "retention": (r"\alpha", "retention"),
    "rate": (r"\zeta", "rate"),
    "eps": (r"\varepsilon", "eps"),
    "beta2": (r"\beta_2", "beta2"),
    "betas[0]": (r"\beta_1", "beta1"),
    "betas[1]": (r"\beta_2", "beta2"),
    "step": ("t", "t"),
}


@dataclass(frozen=True)
class Text:
    """A formula and how tightly it binds."""

    text: str
    binds: int = ATOM

    def at(self, level: int) -> str:
        return self.text if self.binds >= level else f"({self.text})"


class Formulas(Algebra[Text]):
    """The operations of the graph as texts of one style."""

    def __init__(self, style: Style) -> None:
        self.style = style

    def __getattr__(self, name: str) -> Callable[..., Text]:
        """A named function prints as a call of its own name."""
        if name not in FUNCTIONS:
            raise AttributeError(name)
        return lambda *args, **static: self._function(name, *args)

    def _pick(self, latex: str, plain: str) -> str:
        return latex if self.style == "latex" else plain

    def _function(self, name: str, *args: Text) -> Text:
        inside = ", ".join(a.text for a in args)
        name = self._pick(rf"\operatorname{{{name}}}".replace("_", r"\_"), name)
        return Text(f"{name}({inside})")

    def constant(self, value: float) -> Text:
        return Text(f"{value:g}", ATOM if value >= 0 else PREFIX)

    def array(self, kind: str, shape: Shape, value: float) -> Text:
        return Text({"full": f"{value:g}", "eye": "I", "dct": "DCT"}.get(kind, kind))

    def symbol(self, name: str) -> Text:
        if name in GREEK:
            return Text(GREEK[name][0 if self.style == "latex" else 1])
        if self.style == "plain" or len(name) == 1:
            return Text(name)
        return Text(rf"\mathrm{{{name}}}".replace("_", r"\_"))

    def add(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(SUM)} + {b.at(SUM)}", SUM)

    def sub(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(SUM)} - {b.at(PRODUCT)}", SUM)

    def mul(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(PRODUCT)}{self._pick(' ', '·')}{b.at(PRODUCT)}", PRODUCT)

    def div(self, a: Text, b: Text) -> Text:
        if self.style == "latex":
            return Text(rf"\frac{{{a.text}}}{{{b.text}}}")
        return Text(f"{a.at(PRODUCT)} / {b.at(PREFIX)}", PRODUCT)

    def neg(self, a: Text) -> Text:
        return Text(f"-{a.at(PRODUCT)}", PREFIX)

    def power(self, a: Text, b: Text) -> Text:
        exponent = f"{{{b.text}}}" if self.style == "latex" else b.at(ATOM)
        return Text(f"{a.at(ATOM)}^{exponent}", POWER)

    def sqrt(self, a: Text) -> Text:
        return Text(self._pick(rf"\sqrt{{{a.text}}}", f"√({a.text})"))

    def rsqrt(self, a: Text) -> Text:
        return self.div(Text("1"), self.sqrt(a))

    def exp(self, a: Text) -> Text:
        return self._function("exp", a)

    def log(self, a: Text) -> Text:
        return self._function("log", a)

    def sigmoid(self, a: Text) -> Text:
        return self._function("sigmoid", a)

    def tanh(self, a: Text) -> Text:
        return self._function("tanh", a)

    def sign(self, a: Text) -> Text:
        return self._function("sign", a)

    def maximum(self, a: Text, b: Text) -> Text:
        return self._function("max", a, b)

    def minimum(self, a: Text, b: Text) -> Text:
        return self._function("min", a, b)

    def less(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(SUM)} < {b.at(SUM)}", SUM)

    def less_equal(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(SUM)} {self._pick(chr(92) + 'le', '≤')} {b.at(SUM)}", SUM)

    def equal(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(SUM)} = {b.at(SUM)}", SUM)

    def where(self, condition: Text, a: Text, b: Text) -> Text:
        if self.style == "latex":
            cases = rf"{a.text} & {condition.text} \\ {b.text} & \text{{else}}"
            return Text(rf"\begin{{cases}} {cases} \end{{cases}}")
        return Text(f"{a.at(PRODUCT)} if {condition.text} else {b.at(PRODUCT)}", SUM - 1)

    def absolute(self, a: Text) -> Text:
        return Text(f"|{a.text}|")

    def matmul(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(PRODUCT)} {b.at(PRODUCT)}", PRODUCT)

    def transpose(self, a: Text) -> Text:
        return Text(f"{a.at(ATOM)}{self._pick('^{' + chr(92) + 'top}', 'ᵀ')}", POWER)

    def sum(self, a: Text, axes: tuple[int, ...]) -> Text:
        return Text(f"{self._pick(chr(92) + 'sum', 'Σ')} {a.at(PREFIX)}", PREFIX)

    def reshape(self, a: Text, rank: int, shape: Shape) -> Text:
        return a

    def stop_gradient(self, a: Text) -> Text:
        return a

    def solve(self, a: Text, b: Text, lower: bool, upper: bool) -> Text:
        inverse = self._pick("^{-1}", "⁻¹")
        return Text(f"{Text(a.text, SUM).at(ATOM)}{inverse} {b.at(PRODUCT)}", PRODUCT)

    def ratio(self, a: Text, b: Text) -> Text:
        return self.div(a, b)

    def norm(self, a: Text) -> Text:
        return Text(self._pick(rf"\lVert {a.text} \rVert", f"‖{a.text}‖"))


def formulas(program: Program, style: Style = "latex") -> dict[str, str]:
    """The right-hand side of each output; in the others a new memory is its name with a prime."""
    algebra = Formulas(style)
    values: dict[Expr, Text] = {}
    lines: dict[str, str] = {}
    names = {x: name for name, x in program.outputs.items() if x.op != "input"}
    for x in program.nodes:
        if x.op == "input":
            values[x] = algebra.symbol(str(x["name"]))
            continue
        values[x] = apply(algebra, x, [values[arg] for arg in x.args])
        if x in names:
            lines[names[x]] = values[x].text
            mark = "" if names[x] in ("direction", "update") else "'"
            values[x] = Text(algebra.symbol(names[x]).text + mark)
    return {name: lines.get(name, values[x].text) for name, x in program.outputs.items()}


def latex(rule: Rule, shape: Shape = (8, 8)) -> str:
    """The step of a rule as a LaTeX `aligned` block, all clocks ticking, from its own graph.

    Raises ValueError where the rule cannot take the shape.
    """
    rule.check(canonical(shape), "the example")
    ticking = frozenset(rule.clocks()) | {"every"}
    program = trace(rule, canonical(shape), ticking)
    symbols = Formulas("latex")
    lines: list[str] = []
    for name, right in formulas(program).items():
        if name == "update":
            left, right = "w", f"w {right}" if right.startswith("-") else f"w + {right}"
        else:
            left = "d" if name == "direction" else symbols.symbol(name).text
            right = right.replace(r"\mathrm{update}", "d")
        lines.append(rf"{left} &\leftarrow {right}")
    body = " \\\\\n".join(lines).replace(r"\mathrm{direction}", "d")
    return f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
