"""What an optimizer is: hyperparameters, memories with clocks, a direction; and its trace."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from itertools import chain, combinations
from math import lcm
from numbers import Integral, Real
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeAlias,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np

from deepopt.algebra import Program, constant_array
from deepopt.expr import Expr, Number, Shape, array, symbol
from deepopt.memory import Level, recording


@dataclass(frozen=True)
class Domain:
    """The values that a hyperparameter may take; scalars are symbols in a trace, others static."""

    text: str
    holds: Callable[[Any], bool]
    scalar: bool = True
    number: bool = True


_finite = Domain("a finite number", math.isfinite)
_rate = Domain("a finite number >= 0", lambda x: math.isfinite(x) and x >= 0)
_retention = Domain("a number in [0, 1)", lambda x: 0 <= x < 1)
_period = Domain(
    "an integer >= 1", lambda x: isinstance(x, int | Integral) and int(x) >= 1, scalar=False
)

Scalar: TypeAlias = Annotated[Number, _finite]
Rate: TypeAlias = Annotated[Number, _rate]
Retention: TypeAlias = Annotated[Number, _retention]
Period: TypeAlias = Annotated[int, _period]
# One value, or a tuple with one value per level.
Scalars: TypeAlias = Annotated[Number | tuple[Number, ...], _finite]
Retentions: TypeAlias = Annotated[Number | tuple[Number, ...], _retention]
Periods: TypeAlias = Annotated[int | tuple[int, ...], _period]
Betas: TypeAlias = Annotated[tuple[Number, Number], _retention]

# What a rule promises of its direction d on streams of gradients: d(-g) = -d(g); the same for
# entries in another order; d(gᵀ) = d(g)ᵀ; d(Qg) = Q d(g) and d(gQ) = d(g) Q for orthogonal Q, on a
# side that is one block; and d(cg) = c^degree d(g) for c > 0, as far as `eps` is zero.
Symmetry: TypeAlias = Literal[
    "odd",
    "permutation",
    "transposition",
    "left rotation",
    "right rotation",
    "degree -1",
    "degree 0",
    "degree 1",
]


@dataclass(frozen=True)
class Slot:
    """One memory of a parameter: its shape, its start, and its clock.

    `kind` and `value` are those of `expr.array`. `clock` names the clock that its frequency is
    counted in (None: every step). Slots are stored in the precision of the arithmetic (float32 for
    narrower parameters), whatever the parameter's dtype, unless a backend is asked for less. Raises
    ValueError for an unknown kind.
    """

    shape: Shape
    kind: str = "full"
    value: float = 0.0
    clock: str | None = None

    def __post_init__(self) -> None:
        array(self.kind, self.shape, self.value)

    def start(self) -> np.ndarray[Any, Any]:
        """The initial value in float64, the same bits for every backend."""
        return constant_array(self.kind, self.shape, self.value)

    @property
    def initial(self) -> Expr:
        """The initial value as a node."""
        return array(self.kind, self.shape, self.value)


@dataclass(frozen=True)
class Time:
    """The step being taken (a symbol, from 1) and the clocks that tick at its end.

    norm: the Frobenius norm of all gradients of the step together, of every parameter.
    """

    step: Expr
    ticking: frozenset[str]
    clocks: frozenset[str]
    norm: Expr = field(default_factory=lambda: symbol("gradient_norm"))

    def when(self, clock: str, new: Expr, old: Expr) -> Expr:
        """new on the steps on which the clock ticks, else old. ValueError for an unknown clock."""
        if clock not in self.clocks:
            raise ValueError(f"there is no clock {clock!r}; clocks() has {sorted(self.clocks)}")
        return new if clock in self.ticking else old


Symmetries: TypeAlias = frozenset[Symmetry]


def symmetric(*names: Symmetry) -> Symmetries:
    """A set of symmetries."""
    return frozenset(names)


Memories: TypeAlias = Mapping[str, Expr]
# A direction and the new memories, and where a rule has one, a move of w that lr does not scale.
Update: TypeAlias = tuple[Expr, dict[str, Expr], *tuple[Expr, ...]]


@dataclass_transform(frozen_default=True, kw_only_default=True)
class _Frozen:
    """Makes every subclass a frozen dataclass of its annotated fields."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Without one of its own a dataclass would write its signature there.
        cls.__doc__ = cls.__doc__ or f"{cls.__name__} has no description."
        domain = getattr(cls, "domain", "any")
        if domain not in ("any", "matrix"):
            raise ValueError(f"{cls.__name__}.domain={domain!r} must be 'any' or 'matrix'")
        dataclass(frozen=True, kw_only=True)(cls)


class Rule(_Frozen, ABC):
    """An optimizer as mathematics: subclass it, annotate hyperparameters, write `update`.

    A subclass becomes a frozen dataclass; to make one with a bad value raises ValueError. Fields
    annotated `Scalar`, `Rate` or `Retention` are symbols inside `update`, so that a schedule never
    retraces; `int`, `bool` and `Literal` fields are static and may branch. The library applies
    w ← w − lr·(direction + weight_decay·w).

    lr: size of a step per unit of direction; each rule says what that is in.
    weight_decay: fraction of w removed per unit of lr and step.
    decoupled: decay w itself; False adds weight_decay·w to the gradient, as in the first Adam.
    every: steps per update; the gradients in between are summed and the rule sees the sum.
    stagger: shift slow clocks by the parameter's turn (`turns`): slow work spreads over steps.
    """

    lr: Rate = 1e-3
    weight_decay: Rate = 0.0
    decoupled: bool = True
    every: Period = 1
    stagger: bool = False
    domain: ClassVar[Literal["any", "matrix"]] = "any"

    def __post_init__(self) -> None:
        for name in hints(type(self)):
            check_value(type(self), name, getattr(self, name))
        if self.every > 1 and self.context((1, 1)):
            raise ValueError(
                f"{type(self).__name__}(every={self.every!r}): its {[*self.context((1, 1))]} go by "
                "the gradients of one step; accumulate gradients in the loop instead"
            )
        self.clocks()

    @abstractmethod
    def update(self, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        """The direction to step against and the new memories, for one parameter of g's shape."""

    def prepare(self, g: Expr, t: Time) -> Expr:
        """The gradient that the rule sees, before weight decay joins it."""
        del t
        return g

    def after(self, memories: Memories, change: Expr, s: Memories, t: Time) -> dict[str, Expr]:
        """The memories that depend on what is added to w, from those of `update`."""
        del memories, change, s, t
        return {}

    def change(self, w: Expr, direction: Expr, shift: Expr | None = None) -> Expr:
        """What is added to w: -lr·(direction + weight_decay·w), and the shift."""
        decayed = direction + self.weight_decay * w if self.decoupled else direction
        change = -(self.lr * decayed)
        return change if shift is None else shift + change

    def symmetries(self) -> Symmetries:
        """What the rule promises of its direction, weight decay aside."""
        return frozenset()

    def slots(self, shape: Shape) -> dict[str, Slot]:
        """The memories of a parameter of this shape, by name."""
        del shape
        return {}

    def context(self, shape: Shape) -> dict[str, Shape]:
        """What the rule needs of a parameter of this shape beyond its gradient: names and shapes.

        They stand beside the memories in `update`.
        """
        del shape
        return {}

    def clocks(self) -> dict[str, int]:
        """The slow clocks by name, with their periods in updates."""
        return {}

    def all_slots(self, shape: Shape) -> dict[str, Slot]:
        """`slots` and, for a rule that updates every few steps, the sum of gradients."""
        extra = {"gradient_sum": Slot(shape, clock="every")} if self.every > 1 else {}
        return self.slots(shape) | extra

    def ticks(self, step: int, index: int = 0) -> frozenset[str]:
        """The clocks that tick at the end of this step for the parameter with this turn."""
        if step % self.every:
            return frozenset()
        phase = index if self.stagger else 0
        slow = {
            c for c, period in self.clocks().items() if (step // self.every + phase) % period == 0
        }
        return frozenset(slow | {"every"})

    def check(self, shape: Shape, what: str) -> None:
        """Raise ValueError where a parameter of this shape is outside the rule's domain."""
        if self.domain == "matrix" and len(shape) < 2:
            raise ValueError(
                f"{type(self).__name__} needs matrices; {what} has shape {tuple(shape)}. "
                "Give it a rule for any shape, such as AdamW, in a group of its own"
            )

    def check_context(self, shape: Shape, given: Mapping[str, Shape], what: str) -> None:
        """Raise ValueError where the context of a parameter is missing or of another shape."""
        for name, needed in self.context(shape).items():
            if given.get(name) != needed:
                found = f"got shape {given[name]}" if name in given else "there is none"
                raise ValueError(
                    f"{type(self).__name__} needs the {name} of {what}, of shape {needed}: {found}"
                )

    def scalars(self, **given: Any) -> dict[str, float]:
        """The values of the symbols by input name; `given` ones instead of the rule's own."""
        values: dict[str, float] = {}
        for name in scalar_names(type(self)):
            value: Any = given.get(name, getattr(self, name))
            if isinstance(value, tuple):
                several = cast(tuple[float, ...], value)
                values.update({f"{name}[{i}]": v for i, v in enumerate(several)})
            else:
                values[name] = value
        return {k: float(v) if isinstance(v, Real) else v for k, v in values.items()}

    def with_values(self, values: Mapping[str, Any]) -> Rule:
        """This rule with other hyperparameters; names that are not fields are ignored."""
        known = {f.name for f in fields(self)}
        return replace(self, **{k: v for k, v in values.items() if k in known})


def turns(shapes: Sequence[Shape]) -> list[int]:
    """The turn of each parameter under `stagger`: the costly first, then by position.

    Dealt out over the steps of a period like cards, they leave every step about as much slow work.
    """
    costs = [math.prod(shape) * min(shape, default=1) for shape in shapes]
    order = sorted(range(len(shapes)), key=lambda i: -costs[i])
    return [turn for _, turn in sorted(zip(order, range(len(order)), strict=True))]


def ticking_together(periods: Mapping[str, int]) -> list[frozenset[str]]:
    """Every set of clocks that can tick together: all whose periods divide one common multiple."""
    different = set(periods.values())
    subsets = chain.from_iterable(combinations(different, n) for n in range(len(different) + 1))
    multiples = {lcm(*subset) for subset in subsets}
    sets = {frozenset(k for k, n in periods.items() if m % n == 0) for m in multiples}
    return sorted(sets, key=sorted)


@cache
def hints(cls: type[Rule]) -> dict[str, Any]:
    """The annotation of each hyperparameter."""
    found = get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in fields(cls)}


def checked_rule(value: Any, what: str = "rule") -> Rule:
    """The value if it is a rule; else TypeError, as for a class that was not called."""
    if not isinstance(value, Rule):
        raise TypeError(
            f"{what}={value!r} must be a rule of deepopt.rules, or of your own, such as AdamW()"
        )
    return value


def check_hyperparameters(cls: type[Rule], names: Iterable[str]) -> None:
    """Raise TypeError, with a suggestion, for a name that the rule does not have."""
    known = hints(cls)
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {sorted(known)}"
            raise TypeError(f"{cls.__name__} has no hyperparameter {name!r}; {hint}")


def check_scalars(cls: type[Rule], values: Mapping[str, Any]) -> None:
    """Raise ValueError where a scalar hyperparameter has a value that the rule cannot have."""
    for name in scalar_names(cls):
        check_value(cls, name, values[name])


def domain_of(hint: Any) -> Domain | None:
    """The `Domain` in an annotation, if it has one."""
    return next((x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Domain)), None)


@cache
def scalar_names(cls: type[Rule]) -> tuple[str, ...]:
    """The hyperparameters that are symbols in a trace."""
    domains = {name: domain_of(hint) for name, hint in hints(cls).items()}
    return tuple(name for name, domain in domains.items() if domain and domain.scalar)


def check_value(cls: type[Rule], name: str, value: Any) -> None:
    """Raise ValueError where a hyperparameter has a value that the rule cannot have."""
    hint = hints(cls)[name]
    domain, wrong = domain_of(hint), ""
    if domain is not None:
        inner = get_args(hint)[0]
        length = len(get_args(inner)) if get_origin(inner) is tuple else None
        several = length is not None or any(get_origin(a) is tuple for a in get_args(inner))
        given = isinstance(value, tuple) and several
        values = cast(tuple[Any, ...], value if given else (value,))
        fits = len(values) == length if length else len(values) > 0
        typed = all(_is_number(v) or not domain.number for v in values)
        if not fits or not typed or not all(domain.holds(v) for v in values):
            wrong = f"{length} numbers, each " * bool(length) + domain.text
            wrong += ", or a tuple of such" * (several and not length)
    elif get_origin(hint) is Literal:
        choices = get_args(hint)
        wrong = "" if value in choices else "one of " + ", ".join(map(repr, choices))
    elif hint in (bool, int, str) and type(value) is not hint:
        wrong = f"of type {hint.__name__}"
    elif hint is float or hint == Number:
        wrong = "annotated Scalar, Rate or Retention, which a schedule can change, not float"
    if wrong:
        raise ValueError(f"{cls.__name__}({name}={value!r}) must be {wrong}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and value is not True and value is not False


def _arity(value: Any) -> int | None:
    """How many values a hyperparameter has; None for a single one."""
    return len(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else None


def _symbolic(rule: Rule) -> Rule:
    """The rule with a symbol in the place of every scalar; it skips validation."""
    twin = object.__new__(type(rule))
    for f in fields(rule):
        value = getattr(rule, f.name)
        if f.name in scalar_names(type(rule)):
            n = _arity(value)
            names = [f"{f.name}[{i}]" for i in range(n or 0)]
            value = symbol(f.name) if n is None else tuple(map(symbol, names))
        object.__setattr__(twin, f.name, value)
    return twin


def _static_key(rule: Rule) -> tuple[Any, ...]:
    """What of a rule a trace depends on: the static fields, and how many values a scalar has."""
    scalars = scalar_names(type(rule))
    values = {f.name: getattr(rule, f.name) for f in fields(rule)}
    return tuple(_arity(v) if name in scalars else v for name, v in values.items())


_traces: dict[tuple[Any, ...], tuple[Program, tuple[Level, ...]]] = {}


def trace(rule: Rule, shape: Shape, ticking: frozenset[str]) -> Program:
    """The program of one step: outputs "direction", "update" (to add to w) and the new memories.

    A rule that moves w in another way than along a direction has no "direction".
    Cached by the rule's static fields, the shape and the clocks that tick; a memory that a step
    leaves alone is not an output, and a step without update has only "gradient_sum".
    """
    return traced(rule, shape, ticking)[0]


def traced(
    rule: Rule, shape: Shape, ticking: frozenset[str], *, anew: bool = False
) -> tuple[Program, tuple[Level, ...]]:
    """`trace`, and the memory writes that were recorded on the way; anew: not the one before."""
    key = (type(rule), _static_key(rule), shape, ticking)
    if anew or key not in _traces:
        with recording() as levels:
            program = _trace(_symbolic(rule), shape, ticking)
        _traces[key] = (program, tuple(levels))
    return _traces[key]


def _trace(rule: Rule, shape: Shape, ticking: frozenset[str]) -> Program:
    w, g, step = symbol("w", shape), symbol("g", shape), symbol("step")
    slots, clocks = rule.all_slots(shape), rule.clocks()
    shapes = {name: slot.shape for name, slot in slots.items()} | rule.context(shape)
    _check_names(rule, shapes, slots, clocks)
    s = _Slots({name: symbol(name, x) for name, x in shapes.items()})
    if rule.every > 1:
        g = s["gradient_sum"] + g
        if "every" not in ticking:
            return Program({"gradient_sum": g})
        step = step / float(rule.every)
    time = Time(step, ticking, frozenset(clocks))
    g = rule.prepare(g, time)
    if not rule.decoupled:
        g = g + rule.weight_decay * w
    result: Any = rule.update(w, g, s, time)
    if not _is_update(result):
        raise TypeError(
            f"{type(rule).__name__}.update must return (direction, {{name: memory}}) of nodes, got "
            f"{result!r}"
        )
    direction, memories, *shift = cast(Update, result)
    if direction.shape == shape:
        change = rule.change(w, direction, *shift)
        memories = memories | rule.after(memories, change, s, time)
    forgotten = set(slots) - set(memories) - {"gradient_sum"}
    if forgotten:
        raise ValueError(
            f"{type(rule).__name__}.update does not return {sorted(forgotten)}; return s[name] for "
            "a memory that stays as it is"
        )
    for name, new in memories.items():
        if name not in slots or new.shape != slots[name].shape:
            declared = slots[name].shape if name in slots else "no slot"
            raise ValueError(
                f"{type(rule).__name__}.update returned memory {name!r} of shape {new.shape}; "
                f"slots() declares {declared}"
            )
    if direction.shape != shape:
        raise ValueError(
            f"{type(rule).__name__}.update returned a direction of shape {direction.shape} for a "
            f"parameter of shape {shape}"
        )
    outputs = {"direction": direction, "update": rule.change(w, direction, *shift)}
    if shift:
        # There is no direction that lr alone would scale.
        del outputs["direction"]
    outputs |= {name: new for name, new in memories.items() if new is not s[name]}
    if rule.every > 1:
        outputs["gradient_sum"] = array("full", shape, 0.0)
    program = Program(outputs)
    if rule.every > 1 and "gradient_norm" in program.inputs:
        raise ValueError(
            f"{type(rule).__name__}(every={rule.every!r}): the norm of a sum over several steps is "
            "not known; accumulate gradients in the loop instead"
        )
    return program


class _Slots(dict[str, Expr]):
    """The memories as symbols; an unknown one is an error that names the known ones."""

    def __missing__(self, name: str) -> Expr:
        raise KeyError(f"no memory {name!r}; slots() has {sorted(self)}")


def _is_update(x: Any) -> bool:
    if not isinstance(x, tuple) or len(cast(tuple[Any, ...], x)) not in (2, 3):
        return False
    direction, memories, *shift = cast(tuple[Any, ...], x)
    return isinstance(memories, dict) and all(
        isinstance(y, Expr) for y in (direction, *cast(dict[str, Any], memories).values(), *shift)
    )


def _check_names(
    rule: Rule, names: Iterable[str], slots: Mapping[str, Slot], clocks: Mapping[str, int]
) -> None:
    """Inputs, outputs and clocks share name spaces with a rule's own names."""
    name = type(rule).__name__
    own = {f.name for f in fields(rule)}
    reserved = {"w", "g", "step", "gradient_norm", "direction", "update"}
    taken = (reserved & (own | set(names))) | (own & set(names))
    if taken:
        raise ValueError(f"{name}: {sorted(taken)} names two things; rename the memory or field")
    if "every" in clocks or any(period < 1 for period in clocks.values()):
        raise ValueError(f"{name}.clocks() is {clocks}: periods must be >= 1, 'every' is taken")
    unknown = {s.clock for s in slots.values()} - {None, "every", *clocks}
    if unknown:
        raise ValueError(f"{name}: a slot has clock {unknown}; clocks() has {sorted(clocks)}")
