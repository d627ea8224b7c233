"""Regions as Triton: one kernel per sweep, launched once over all chunks of all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from deepopt.expr import COMPARISONS, Expr
from deepopt.kernels.plan import REDUCTIONS, Sweep, filling
from deepopt.kernels.source import LOW, Writer, salt

# Square roots and quotients of float32 are rounded to the nearest, as everywhere else.
OPERATIONS = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "tl.div_rn({0}, {1})",
    "neg": "(-{0})",
    "power": "_power({0}, {1}).to({T})",
    "sqrt": "tl.sqrt_rn({0})",
    "rsqrt": "tl.div_rn(1.0, tl.sqrt_rn({0}))",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sigmoid": "tl.div_rn(1.0, 1.0 + tl.exp(-{0}))",
    "tanh": "_tanh({0})",
    # Each of these gives NaN where an operand is NaN.
    "sign": "tl.where({0} != {0}, {0}, ({0} > 0).to({T}) - ({0} < 0).to({T}))",
    "absolute": "tl.abs({0})",
    "floor": "tl.floor({0})",
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "less": "({0} < {1})",
    "less_equal": "({0} <= {1})",
    "equal": "({0} == {1})",
    "where": "tl.where({0}, {1}, {2})",
    "reshape": "{0}",
    "stop_gradient": "{0}",
}
DOUBLE = OPERATIONS | {
    "div": "({0} / {1})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "(1.0 / tl.sqrt({0}))",
    "sigmoid": "(1.0 / (1.0 + tl.exp(-{0})))",
}
# What stands before the parameters: the step, and two words of the key of random numbers.
HEAD = 4
# What the host gives is in capitals. A chunk is CHUNK entries of one parameter ("entry" in the text
# too); the programs share out the chunks. TABLE has the addresses [tensors, ENTRIES], PARTIAL the
# reductions [reductions, CHUNKS], added up by the next sweep in an order that no grid changes.
ARGUMENTS = """\
    TABLE, VALUES, ROWS, SIZES, FIRST, OWNER, PLACES, PARTIAL, FOUND_INF, CHUNKS, ENTRIES,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):"""
# As their bits, so that rounding is the same everywhere.
NARROW = frozenset({"bfloat16", "stochastic", "exact"})
WIDTHS = {"float64": 8, "float32": 4}


@cache
def _prelude() -> str:
    """The functions that kernels call."""
    return Path(__file__).with_name("on_device.py").read_text().partition("\n\n")[2]


class Triton(Writer):
    """A region as a module with kernels `sweep_0`, `sweep_1`, … and `epilogue` if there is one.

    All take the same arguments. A sweep that has nothing to do is left out.
    """

    comment = "#"

    @property
    def type(self) -> str:
        return "tl.float32" if self.single_precision else "tl.float64"

    def literal(self, value: float) -> str:
        return repr(value)

    def spelled(self, x: Expr, args: Sequence[str]) -> str:
        operations = OPERATIONS if self.single_precision else DOUBLE
        given: list[str] = []
        for i, (arg, text) in enumerate(zip(x.args, args, strict=True)):
            inline = arg.op in COMPARISONS and bool(arg.shape) and arg not in self._names
            if x.op == "where" and i == 0:
                given.append(text if inline or text.endswith("!= 0)") else f"({text} != 0)")
            else:
                given.append(f"{text}.to({self.type})" if inline else text)
        return operations[x.op].format(*given, T=self.type)

    def _number(self, x: Expr) -> str:
        """How a node is read where it must not be a truth value."""
        inline = x.op in COMPARISONS and x not in self._names
        return f"{self.value(x)}.to({self.type})" if inline else self.value(x)

    def source(self) -> str:
        """The whole module."""
        last = len(self.region.sweeps) - 1
        parts = [_prelude()]
        for i, sweep in enumerate(self.region.sweeps):
            stores = {k: x for k, x in self.region.stores.items() if k not in self.region.singles}
            if sweep.reductions or (i == last and stores):
                parts.append(self._sweep(f"sweep_{i}", sweep, stores if i == last else {}))
        if any(k in self.region.singles for k in self.region.stores):
            parts.append(self._epilogue())
        return "\n\n".join(parts)

    def _kernel(self, name: str, over: str, index: str, used: Sequence[Expr]) -> list[str]:
        """The signature, the loop over chunks or entries, and what each reads once."""
        region, t = self.region, self.type
        lines = [
            '@triton.jit(do_not_specialize=["CHUNKS", "ENTRIES"])',
            f"def {name}(\n{ARGUMENTS}",
            f"    END = tl.where(tl.load(FOUND_INF) == 0, {over}, 0)",
            f"    for {index} in range(tl.program_id(0), END, tl.num_programs(0)):",
        ]
        lines += ["        entry = tl.load(OWNER + t)"] if index == "t" else []
        if region.parameters:
            at = f"{HEAD} + tl.load(ROWS + entry) * {len(region.parameters)}"
            lines.append(f"        VALUE = VALUES + {at}")
        for i, x in enumerate(region.parameters):
            if x in used:
                lines.append(f"        c{i} = tl.load(VALUE + {i}).to({t})")
        if any(x in used for x in region.reductions):
            lines.append("        START = tl.load(FIRST + entry)")
            lines.append("        COUNT = tl.load(FIRST + entry + 1) - START")
        for i, x in enumerate(region.reductions):
            if x in used:
                function = "_total" if x.op == "sum" else "_highest"
                at = f"PARTIAL + {i} * CHUNKS + START"
                lines.append(f"        s{i} = {function}({at}, COUNT, SUMS).to({t})")
        for tensor, x in region.loads.items():
            if tensor in region.singles and x in used:
                read = self._loaded(tensor, f"tl.load({self._pointer(tensor)})")
                lines.append(f"        {self.name(x)} = {read}")
        return lines

    def _address(self, tensor: str) -> str:
        return f"tl.load(TABLE + {self.tensors.index(tensor)} * ENTRIES + entry)"

    def _stored_as(self, tensor: str) -> str:
        kind = "exact" if tensor == LOW else self.storage[tensor]
        return f"tl.pointer_type(tl.{'uint16' if kind in NARROW else kind})"

    def _pointer(self, tensor: str) -> str:
        return f"{self._address(tensor)}.to({self._stored_as(tensor)})"

    def _loaded(self, tensor: str, text: str, low: str = "") -> str:
        """What was read from a tensor, in the type of the arithmetic."""
        kind = self.storage[tensor]
        if kind in NARROW:
            text = f"_joined({text}, {low})" if kind == "exact" else f"_wide({text})"
            kind = "float32"
        return text if f"tl.{kind}" == self.type else f"{text}.to({self.type})"

    def _used(self, nodes: Sequence[Expr], roots: Sequence[Expr]) -> list[Expr]:
        """What the lines of nodes read: them, and their arguments."""
        found = [*nodes, *roots]
        found += [filling(x) for x in found if x.op == "array" and x["kind"] == "full"]
        return found + [arg for x in nodes for arg in x.args if x.op not in REDUCTIONS]

    def _sweep(self, name: str, sweep: Sweep, stores: dict[str, Expr]) -> str:
        region, t = self.region, self.type
        inputs = [arg for x in sweep.reductions for arg in x.args]
        used = self._used((*sweep.before, *sweep.body), (*stores.values(), *inputs))
        lines = self._kernel(name, "CHUNKS", "t", used)
        lines += [f"        {n} = {e}{note}" for n, e, note in self.statements(sweep.before)]
        loads = {k: x for k, x in region.loads.items() if k not in region.singles and x in used}
        tensors = [*dict.fromkeys((*loads, *stores))]
        tensors += [LOW] if any(self.storage[k] == "exact" for k in tensors) else []
        words = {k: self.word(k) for k in tensors}
        random = any(self.storage[k] == "stochastic" for k in stores)
        lines += [
            "        lo = (t - tl.load(FIRST + entry)) * CHUNK",
            "        hi = tl.minimum(tl.load(SIZES + entry), lo + CHUNK)",
            *(f"        {words[k]}_in = {self._address(k)}" for k in tensors),
            # Whole blocks of vectors only where every address allows it; the rest goes by masks.
            f"        ADDRESSES = {' | '.join(f'{words[k]}_in' for k in tensors) or '0'}",
            "        n = tl.where(ADDRESSES % 16 == 0, (hi - lo) // BLOCK * BLOCK, 0)",
        ]
        if random:
            lines.append("        PLACE = tl.load(PLACES + entry).to(tl.uint32)")
            for i, word in enumerate(("STEP", "K0", "K1")):
                lines.append(f"        {word} = tl.load(VALUES + {i}).to(tl.int64).to(tl.uint32)")
        places = {x: i for i, x in enumerate(region.reductions)}
        for x in sweep.reductions:
            start = f"tl.zeros([BLOCK], {t})"
            if x.op == "max":
                start = f'tl.full([BLOCK], float("-inf"), {t})'
            lines.append(f"        A{places[x]} = {start}")
        lines.append("        for TAIL in tl.static_range(2):")
        widths = {k: WIDTHS.get(self.storage.get(k, ""), 2) for k in tensors}
        for k in tensors:
            at = f"            {words[k]}_at = "
            # As many entries of each tensor at a time: else they would change threads in between.
            hint = f"tl.multiple_of({words[k]}_at, {16 * widths[k] // max(widths.values())})"
            lines.append(f"{at}{words[k]}_in.to({self._stored_as(k)})")
            lines.append(f"{at}{words[k]}_at if TAIL else {hint}")
        lines += [
            "            for at in range(lo + n if TAIL else lo, hi if TAIL else lo + n, BLOCK):",
            "                i = at + tl.arange(0, BLOCK)",
            "                MASK = i < hi if TAIL else None",
        ]
        inner = [
            f"{self.name(x)} = "
            + self._loaded(k, f"tl.load({words[k]}_at + i, MASK)", self._low("tl.load({}, MASK)"))
            for k, x in loads.items()
        ]
        inner += [f"{n} = {e}{note}" for n, e, note in self.statements(sweep.body)]
        for x in sweep.reductions:
            a, value = f"A{places[x]}", self._number(x.args[0])
            if x.op == "sum":
                inner.append(f"{a} += tl.where(MASK, {value}, 0.0) if TAIL else {value}")
            else:
                inner.append(f"HIGHER = ({value} > {a}) | ({value} != {value})")
                inner.append(f"{a} = tl.where(HIGHER & MASK if TAIL else HIGHER, {value}, {a})")
        for k, x in stores.items():
            inner += self._store(k, self._number(x), f"{words[k]}_at + i", ", MASK")
        lines += [f"                {line}" for line in inner]
        for x in sweep.reductions:
            r = places[x]
            value = f"tl.sum(A{r})" if x.op == "sum" else f"_peak(A{r})"
            lines.append(f"        tl.store(PARTIAL + {r} * CHUNKS + t, {value}.to(tl.float64))")
        return "\n".join([*lines, ""])

    def _low(self, text: str) -> str:
        return text.format(f"{self.word(LOW)}_at + i")

    def _store(self, tensor: str, value: str, at: str, mask: str = "") -> list[str]:
        """Lines that write a value of the arithmetic's type; widths that differ are rounded."""
        kind = self.storage[tensor]
        value = value if self.single_precision or kind not in NARROW else f"{value}.to(tl.float32)"
        match kind:
            case "exact":
                return [
                    f"BITS = _bits({value})",
                    f"tl.store({at}, ((BITS + 0x8000) >> 16).to(tl.uint16){mask})",
                    f"tl.store({self._low('{}')}, (BITS & 0xFFFF).to(tl.uint16){mask})",
                ]
            case "stochastic":
                value = f"_stochastic({value}, at, STEP, PLACE, K0, K1 ^ {salt(tensor)}, BLOCK)"
            case "bfloat16":
                value = f"_nearest({value})"
            case _:
                pass
        return [f"tl.store({at}, {value}{mask})"]

    def _epilogue(self) -> str:
        region = self.region
        stores = {k: x for k, x in region.stores.items() if k in region.singles}
        used = self._used(region.epilogue, tuple(stores.values()))
        lines = self._kernel("epilogue", "ENTRIES", "entry", used)
        lines += [f"        {n} = {e}{note}" for n, e, note in self.statements(region.epilogue)]
        for k, x in stores.items():
            at = self._pointer(k)
            lines += [f"        {line}" for line in self._store(k, self._number(x), at)]
        return "\n".join([*lines, ""])
