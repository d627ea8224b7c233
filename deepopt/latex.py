"""Formulas: the algebra of texts, in LaTeX for documents and in Unicode for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from deepopt.algebra import Algebra, Program, apply
from deepopt.expr import Expr, Shape
from deepopt.functions import FUNCTIONS
from deepopt.oracle import canonical
from deepopt.rule import Rule, checked_rule, trace

Style = Literal["latex", "plain"]

# How tightly a text binds.
CHOICE, SUM, PRODUCT, MATRIX, PREFIX, POWER, ATOM = range(7)

# Texts longer than this get a line of their own, shared ones sooner.
LONG, SHARED = 72, 20

GREEK = {
    "weight_decay": r"\lambda",
    "momentum": r"\alpha",
    "retention": r"\alpha",
    "rate": r"\eta",
    "eps": r"\varepsilon",
    "beta2": r"\beta_2",
    "betas[0]": r"\beta_1",
    "betas[1]": r"\beta_2",
    "step": "t",
    "direction": "d",
}
PLAIN = {"step": "t", "betas[0]": "beta1", "betas[1]": "beta2"}


@dataclass(frozen=True)
class Text:
    """A formula, how tightly it binds, and whether it is a scalar."""

    text: str
    binds: int = ATOM
    scalar: bool = False

    def at(self, level: int) -> str:
        return self.text if self.binds >= level else f"({self.text})"


class Formulas(Algebra[Text]):
    """The operations of the graph as texts of one style."""

    def __init__(self, style: Style) -> None:
        self.latex = style == "latex"

    def __getattr__(self, name: str) -> Callable[..., Text]:
        """A named function prints as a call of its own name."""
        if name not in FUNCTIONS:
            raise AttributeError(name)
        return lambda *args, **static: self._function(name, *args)

    def _pick(self, latex: str, plain: str) -> str:
        return latex if self.latex else plain

    def _function(self, name: str, *args: Text) -> Text:
        inside = ", ".join(a.text for a in args)
        shown = r"\operatorname{" + name.replace("_", r"\_") + "}" if self.latex else name
        return Text(f"{shown}({inside})")

    def symbol(self, name: str, mark: str = "") -> Text:
        if not self.latex:
            return Text(PLAIN.get(name, name) + mark)
        plain = name if len(name) == 1 else r"\mathrm{" + name.replace("_", r"\_") + "}"
        return Text(GREEK.get(name, plain) + mark)

    def constant(self, value: float) -> Text:
        digits, _, exponent = f"{value:g}".partition("e")
        if self.latex and exponent:
            digits = rf"{digits} \cdot 10^{{{int(exponent)}}}"
        elif exponent:
            digits = f"{digits}e{exponent}"
        return Text(digits, ATOM if value >= 0 else SUM)

    def array(self, kind: str, shape: Shape, value: float) -> Text:
        number = self.constant(value)
        if kind == "full":
            return number
        name = Text("I") if kind == "eye" else self.symbol(kind.upper())
        return name if value == 1 else self.mul(replace(number, scalar=True), name)

    def add(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(SUM)} + {b.at(SUM)}", SUM)

    def sub(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(SUM)} - {b.at(PRODUCT)}", SUM)

    def mul(self, a: Text, b: Text) -> Text:
        if a.text == b.text:
            return Text(a.at(ATOM) + self._pick("^2", "²"), POWER)
        if a.text == "1":
            return b
        dot = " " if a.scalar or b.scalar else r" \odot "
        dot = r" \cdot " if b.text[:1].isdigit() else dot
        return Text(f"{a.at(PRODUCT)}{self._pick(dot, '·')}{b.at(PRODUCT)}", PRODUCT)

    def div(self, a: Text, b: Text) -> Text:
        if self.latex:
            return Text(rf"\frac{{{a.text}}}{{{b.text}}}")
        return Text(f"{a.at(PRODUCT)} / {b.at(PREFIX)}", PRODUCT)

    def ratio(self, a: Text, b: Text) -> Text:
        return self.div(a, b)

    def neg(self, a: Text) -> Text:
        return Text(f"-{a.at(PRODUCT)}", SUM)

    def power(self, a: Text, b: Text) -> Text:
        exponent = f"{{{b.text}}}" if self.latex else b.at(ATOM)
        return Text(f"{a.at(ATOM)}^{exponent}", POWER)

    def sqrt(self, a: Text) -> Text:
        return Text(rf"\sqrt{{{a.text}}}" if self.latex else f"√{a.at(ATOM)}", PREFIX)

    def rsqrt(self, a: Text) -> Text:
        return self.div(Text("1"), self.sqrt(a))

    def norm(self, a: Text) -> Text:
        return Text(self._pick(rf"\lVert {a.text} \rVert", f"‖{a.text}‖"))

    def absolute(self, a: Text) -> Text:
        return Text(f"|{a.text}|")

    def floor(self, a: Text) -> Text:
        return Text(self._pick(rf"\lfloor {a.text} \rfloor", f"⌊{a.text}⌋"))

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
        return Text(f"{a.at(SUM)} < {b.at(SUM)}", CHOICE)

    def less_equal(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(SUM)} {self._pick(chr(92) + 'le', '≤')} {b.at(SUM)}", CHOICE)

    def equal(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(SUM)} = {b.at(SUM)}", CHOICE)

    def where(self, condition: Text, a: Text, b: Text) -> Text:
        if self.latex:
            cases = rf"{a.text} & {condition.text} \\ {b.text} & \text{{else}}"
            return Text(rf"\begin{{cases}} {cases} \end{{cases}}")
        return Text(f"{a.at(SUM)} if {condition.text} else {b.at(SUM)}", CHOICE)

    def matmul(self, a: Text, b: Text) -> Text:
        return Text(f"{a.at(MATRIX)} {b.at(MATRIX)}", MATRIX)

    def transpose(self, a: Text) -> Text:
        mark = self._pick(r"^{\top}", "ᵀ")
        if a.binds == POWER and a.text.endswith(mark):
            return Text(a.text.removesuffix(mark))
        return Text(a.at(ATOM) + mark, POWER)

    def sum(self, a: Text, axes: tuple[int, ...]) -> Text:
        return Text(f"{self._pick(chr(92) + 'sum', 'Σ')} {a.at(ATOM)}", PREFIX)

    def max(self, a: Text, axes: tuple[int, ...]) -> Text:
        return self._function("max", a)

    def reshape(self, a: Text, rank: int, shape: Shape) -> Text:
        return a

    def stop_gradient(self, a: Text) -> Text:
        return a

    def solve(self, a: Text, b: Text, lower: bool, upper: bool) -> Text:
        return Text(f"({a.text}){self._pick('^{-1}', '⁻¹')} {b.at(MATRIX)}", MATRIX)

    def eigenvectors(self, a: Text) -> Text:
        return self._function("eigenvectors", a)

    def orthonormal(self, a: Text) -> Text:
        return self._function("orthonormal", a)


def text_of(x: Expr, style: Style = "plain") -> str:
    """One node as a formula."""
    return formulas(Program({"": x}), style, split=False)[0][1]


def formulas(
    program: Program, style: Style = "latex", *, split: bool = True
) -> list[tuple[str, str]]:
    """(left, right) of each line, in an order in which names come before they are used.

    A new memory is its name with a prime. With `split`, long or shared parts get lines x1, x2, ...
    """
    algebra = Formulas(style)
    uses = Counter(arg for x in program.nodes for arg in x.args)
    names = {x: name for name, x in program.outputs.items() if x.op != "input"}
    values: dict[Expr, Text] = {}
    lines: list[tuple[str, str]] = []
    parts = 0
    for x in program.nodes:
        if x.op == "input":
            values[x] = replace(algebra.symbol(str(x["name"])), scalar=not x.shape)
            continue
        text = apply(algebra, x, [values[arg] for arg in x.args])
        shared = uses[x] > 1 and len(text.text) > SHARED and x.op != "array"
        if x in names:
            mark = "" if names[x] in ("direction", "update") else "'"
            name = algebra.symbol(names[x], mark)
        elif split and x.shape and (shared or len(text.text) > LONG):
            parts += 1
            name = Text(f"x_{{{parts}}}" if style == "latex" else f"x{parts}")
        else:
            values[x] = replace(text, scalar=not x.shape)
            continue
        values[x] = name
        lines.append((name.text, text.text))
    written = {left for left, _ in lines}
    for name, x in program.outputs.items():
        left = algebra.symbol(name, "" if name in ("direction", "update") else "'").text
        if left not in written:
            # An output that is an input or another output: before the update, which may use it.
            lines.insert(-1 if name == "direction" else len(lines), (left, values[x].text))
    return [_step_of_w(left, right, algebra) for left, right in lines]


def _step_of_w(left: str, right: str, algebra: Formulas) -> tuple[str, str]:
    """The line of the update as a line of w."""
    if left != algebra.symbol("update").text:
        return left, right
    return "w'", f"w - {right[1:]}" if right.startswith("-") else f"w + {right}"


def ticks(rule: Rule, shape: Shape, style: Style) -> dict[str, list[tuple[str, str]]]:
    """The lines of an ordinary step (key ""), and for each slow clock those that replace them."""
    ordinary = formulas(trace(rule, shape, frozenset({"every"})), style)
    lines = {"": ordinary}
    for clock in rule.clocks():
        ticking = formulas(trace(rule, shape, frozenset({"every", clock})), style)
        lines[clock] = [line for line in ticking if line not in ordinary]
    return lines


def latex(rule: Rule, shape: Shape = (8, 8)) -> str:
    """The step of a rule as a LaTeX `aligned` block, from its own graph.

    Raises ValueError where the rule cannot take the shape.
    """
    checked_rule(rule).check(canonical(shape), "the example")
    rows: list[str] = []
    for clock, lines in ticks(rule, canonical(shape), "latex").items():
        if clock:
            rows.append(rf"&\text{{every {rule.clocks()[clock]} updates instead:}}")
        rows += [rf"{left} &= {right}" for left, right in lines]
    body = " \\\\\n".join(rows)
    size = " × ".join(map(str, shape))
    note = f"% factors that depend on the shape are those of {size}"
    return f"{note}\n\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
