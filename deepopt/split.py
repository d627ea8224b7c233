"""A step in three parts, for a parameter that is cut in shards: what a shard can compute by itself,
what needs the whole arrays, and what a shard can do with the result.

Entry by entry everything happens where the entry is. The whole is for the rest - products of
matrices, sums, transposes - and for what lies between such operations, so that one gathering before
it and one scattering after it are enough.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from deepopt.algebra import Program
from deepopt.expr import COMMUTATIVE, COMPARISONS, Expr, Shape, substitute, symbol, topological
from deepopt.kernels.plan import expanded
from deepopt.rule import Rule, ticking_together, trace

ELEMENTWISE = COMPARISONS | {
    *("add", "sub", "mul", "div", "neg", "power", "sqrt", "rsqrt", "exp", "log", "sigmoid"),
    *("tanh", "sign", "absolute", "floor", "maximum", "minimum", "where", "stop_gradient"),
}


@dataclass(frozen=True, eq=False)
class Split:
    """A step of a parameter in shards.

    before: on every shard: what is to be gathered, as "gathered i", and the memories that are known
    already. whole: where the whole arrays are: what is to be scattered, as "scattered i", and the
    memories of other shapes than the parameter's. after: on every shard: all the rest.
    """

    before: Program
    whole: Program
    after: Program

    @property
    def is_local(self) -> bool:
        """Whether no shard needs another one."""
        return not self.whole.outputs


@cache
def replicated(rule: Rule, shape: Shape) -> frozenset[str]:
    """The memories of one entry that every shard can keep by itself, since no gradient moves them.

    Those of the parameter's own shape are cut as it is.
    """
    slots = rule.all_slots(shape)
    kept = {k for k, slot in slots.items() if _is_single(slot.shape) and slot.shape != shape}
    programs = [_outputs(rule, shape, ticking) for ticking in variants(rule)]
    while True:
        moved = {
            name
            for outputs in programs
            for name in kept & set(outputs)
            if outputs[name] not in _local(outputs.values(), shape, _names(rule, shape, kept))
        }
        if not moved:
            return frozenset(kept)
        kept -= moved


def variants(rule: Rule) -> list[frozenset[str]]:
    """Every set of clocks that can tick at one step."""
    every = rule.every
    return ticking_together({"every": every} | {k: every * n for k, n in rule.clocks().items()})


@cache
def split(rule: Rule, shape: Shape, ticking: frozenset[str], several: bool = False) -> Split:
    """The three parts of a step of a rule, for a parameter seen as matrices of this shape.

    several: as more than one, so that a value of one entry is another one in each.
    """
    outputs = _outputs(rule, shape, ticking)
    nodes = topological(outputs.values())
    local = _local(outputs.values(), shape, _names(rule, shape, replicated(rule, shape)))
    whole = _needing_all(nodes, local, outputs, shape, several)
    given = _in_order(x for x in nodes if x in local and x.shape == shape)
    borders = {arg for x in whole for arg in x.args}
    gathered = _fewest([x for x in given if x in borders], given)
    used = {arg for x in nodes if x not in local | whole for arg in x.args}
    used |= {x for x in outputs.values() if x.shape == shape}
    scattered = _in_order(x for x in nodes if x in whole and x in used)
    before = {f"gathered {i}": x for i, x in enumerate(gathered)}
    before |= {k: x for k, x in outputs.items() if x in local}
    middle = {f"scattered {i}": x for i, x in enumerate(scattered)}
    middle |= {k: x for k, x in outputs.items() if x in whole and x.shape != shape}
    after = {k: x for k, x in outputs.items() if k not in before and k not in middle}
    arrived = {x: symbol(f"gathered {i}", x.shape) for i, x in enumerate(gathered)}
    returned = {x: symbol(f"scattered {i}", x.shape) for i, x in enumerate(scattered)}
    return Split(
        Program(before),
        Program({k: substitute(x, arrived) for k, x in middle.items()}),
        Program({k: substitute(x, returned) for k, x in after.items()}),
    )


@cache
def is_local(rule: Rule, shape: Shape) -> bool:
    """Whether shards of a parameter of this shape can step without each other, as parameters of
    their own: no step needs the whole, and none computes with the shape."""
    other = tuple(2 * n + 1 for n in shape)
    for ticking in variants(rule):
        if not split(rule, shape, ticking).is_local:
            return False
        texts = [_digests(_outputs(rule, x, ticking).values(), False) for x in (shape, other)]
        if {*texts[0].values()} != {*texts[1].values()}:
            return False
    return True


def _in_order(nodes: Iterable[Expr]) -> list[Expr]:
    """Nodes in an order that every process finds, whichever way it came to write a + b."""
    chosen = list(nodes)
    return sorted(chosen, key=_digests(chosen).__getitem__)


def _digests(nodes: Iterable[Expr], shapes: bool = True) -> dict[Expr, str]:
    """What a node computes, and all below it, as texts. shapes: of which shape."""
    digests: dict[Expr, str] = {}
    for x in topological(nodes):
        args = [digests[arg] for arg in x.args]
        args = sorted(args) if x.op in COMMUTATIVE else args
        text = repr((x.op, x.shape if shapes else x.rank, x.attrs, args))
        digests[x] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def _outputs(rule: Rule, shape: Shape, ticking: frozenset[str]) -> dict[str, Expr]:
    outputs = dict(trace(rule, shape, ticking).outputs)
    outputs.pop("direction", None)
    return expanded(outputs)


def _names(rule: Rule, shape: Shape, replicated: Iterable[str]) -> frozenset[str]:
    """The inputs that every shard has its part of."""
    slots = rule.all_slots(shape).items()
    return frozenset({"w", "g", *(k for k, x in slots if x.shape == shape), *replicated})


def _local(outputs: Iterable[Expr], shape: Shape, names: Iterable[str]) -> set[Expr]:
    """The nodes that a shard can compute by itself."""
    known = set(names)
    local: set[Expr] = set()
    for x in topological(outputs):
        if x.op == "input":
            mine = not x.shape or x["name"] in known
        elif x.op == "array":
            mine = x["kind"] == "full"
        else:
            mine = not x.shape or (_is_by_entry(x, shape) and all(arg in local for arg in x.args))
        if mine:
            local.add(x)
    return local


def _is_by_entry(x: Expr, shape: Shape) -> bool:
    """Whether each entry of x goes by the same entry of its arguments, or by what has one."""
    fits = all(y.shape == shape or _is_single(y.shape) or _is_filled(y) for y in x.args)
    return x.op in ELEMENTWISE and fits and (x.shape == shape or _is_single(x.shape))


def _needing_all(
    nodes: Sequence[Expr],
    local: set[Expr],
    outputs: Mapping[str, Expr],
    shape: Shape,
    several: bool,
) -> set[Expr]:
    """The nodes to compute on whole arrays."""
    rest = [x for x in nodes if x not in local]
    whole = {x for x in outputs.values() if x not in local and x.shape != shape}
    whole |= {x for x in rest if not _is_by_entry(x, shape)}
    if several:
        alone = {x for x in rest if x.shape != shape}
        whole |= {x for x in rest if x in alone or alone & set(x.args)}
    for x in reversed(nodes):
        if x in whole:
            whole |= {arg for arg in x.args if arg not in local}
    return whole


def _fewest(borders: Sequence[Expr], given: Sequence[Expr]) -> list[Expr]:
    """Nodes from which all borders can be computed: those that are no functions of the others, or
    the arrays that they come from, where these are fewer."""
    inputs = [x for x in given if x.op == "input"]
    kept = list(borders)
    for x in reversed(borders):
        rest = [y for y in kept if y is not x]
        if not _reached([x], rest) & set(inputs):
            kept = rest
    sources = [x for x in inputs if x in _reached(borders, ())]
    return sources if len(sources) < len(kept) else kept


def _reached(roots: Iterable[Expr], known: Iterable[Expr]) -> set[Expr]:
    """The nodes that roots are computed from, where some are known."""
    stack, found, known = list(roots), set[Expr](), set(known)
    while stack:
        x = stack.pop()
        if x not in known | found:
            found.add(x)
            stack += x.args
    return found


def _is_single(shape: Shape) -> bool:
    return all(n == 1 for n in shape)


def _is_filled(x: Expr) -> bool:
    return x.op == "array" and x["kind"] == "full"
