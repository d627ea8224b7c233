"""Functions around rules: each takes a rule, or a class of rules, and returns one that does more.

They compose, and what they return is a rule like any other: `cautious(M3(lr=3e-4))` in a group,
`bind(cautious(M3))` as a class of its own. Numbers given here are hyperparameters of the result, so
no function goes around a rule twice. Weights that are stepped in half precision are rounded after
the step, which averages do not see: average float32 weights.
"""

from __future__ import annotations

import copyreg
from abc import ABCMeta
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache
from math import lcm
from typing import Any, Literal, TypeVar, cast, get_args

from deepopt.expr import Expr, array, floor, maximum, sign, sum_, where
from deepopt.functions import mean, norm, ratio
from deepopt.readout import DEGREES, ROTATIONS, Coefficients, Output, mapped, through
from deepopt.rule import (
    Memories,
    Period,
    Rate,
    Retention,
    Rule,
    Slot,
    Symmetries,
    Time,
    Update,
    hints,
    symmetric,
)

# A rule or a class of rules.
R = TypeVar("R")
Base = type[Rule]
Made = dict[str, Any]


class _Around(ABCMeta):
    """The type of the classes made here, which are pickled as the calls that make them."""

    recipe: tuple[Callable[..., Any], tuple[Any, ...]]


def _reduced(cls: _Around) -> Any:
    return cls.recipe if "recipe" in vars(cls) else cls.__qualname__


copyreg.pickle(cast(Any, _Around), _reduced)


@cache
def _class(make: Callable[[Base], Made], base: Base) -> Base:
    """The subclass of a rule that `make` describes."""
    words, own = make.__name__.strip("_"), make(base)
    name = words.title().replace("_", "") + base.__name__
    taken = sorted({f.name for f in fields(base)} & {*own.get("__annotations__", ())})
    if taken:
        raise ValueError(
            f"{words}({base.__name__}): it has a hyperparameter {taken[0]!r} already, which would "
            "be both; the same function goes around a rule only once"
        )
    if any(vars(x).get("recipe", (None, (None,)))[1][0] is make for x in base.__mro__):
        raise ValueError(f"{words}({base.__name__}): it goes around a rule only once")
    members = {
        "__doc__": f"{make.__doc__}\n\n    Around: {base.__doc__}",
        "__module__": __name__,
        "__qualname__": name,
        "recipe": (_class, (make, base)),
        **own,
    }
    return cast(Base, _Around(name, (base,), members))


@cache
def _defaulted(cls: Base, items: tuple[tuple[str, Any], ...]) -> Base:
    """The class with other defaults."""
    members = {
        "__doc__": cls.__doc__,
        "__module__": __name__,
        "__qualname__": cls.__qualname__,
        "recipe": (_defaulted, (cls, items)),
        "__annotations__": {k: hints(cls)[k] for k, _ in items},
    }
    return cast(Base, _Around(cls.__name__, (cls,), members | dict(items)))


def _around(make: Callable[[Base], Made], rule: R, **values: Any) -> R:
    """The rule, or class of rules, with what `make` puts around it."""
    if isinstance(rule, Rule):
        given = {f.name: getattr(rule, f.name) for f in fields(rule)}
        return cast(R, _class(make, type(rule))(**given | values))
    base = cast(Any, rule)
    if not isinstance(base, type) or not issubclass(base, Rule):
        words = make.__name__.strip("_")
        raise TypeError(f"{words} takes a rule or a class of rules, not {base!r}")
    cls = _class(make, base)
    other = tuple((k, v) for k, v in values.items() if v != getattr(cls, k))
    if other:
        cls(**dict(other))  # Refuses what cannot be.
    return cast(R, _defaulted(cls, other) if other else cls)


def _along(base: Base, result: Update, what: str) -> tuple[Expr, dict[str, Expr]]:
    """The direction and memories of a rule that moves along a direction alone."""
    d, memories, *shift = result
    if shift:
        raise ValueError(
            f"{what} goes by the direction, but {base.__name__} also moves the weights otherwise; "
            f"it cannot go around that, only inside of schedule_free"
        )
    return d, memories


def cautious(rule: R) -> R:
    """Leave out the entries of a direction that point against the gradient, the rest scaled up.

    The rest is divided by its share of all entries, at least 0.001. Source: Liang et al. 2024.
    """
    return _around(_cautious, rule)


def _cautious(base: Base) -> Made:
    """The direction without the entries that point against the gradient."""

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        d, memories = _along(base, base.update(self, w, g, s, t), "cautious")
        agrees = where(sign(d) * sign(g) > 0.0, 1.0, 0.0)
        return d * agrees / maximum(mean(agrees), 1e-3), memories

    def symmetries(self: Any) -> Symmetries:
        return base.symmetries(self) - ROTATIONS

    return {"update": update, "symmetries": symmetries}


def centralized(rule: R, outputs: Literal["first", "last"] = "first") -> R:
    """Subtract from a gradient its mean over all axes but that of the layer's outputs.

    outputs: the "first" axis in torch, the "last" in flax. Gradients of one axis stay as they are.
    Source: Yong et al. 2020.
    """
    return _around(_centralized, rule, outputs=outputs)


def _centralized(base: Base) -> Made:
    """The rule of the gradient minus its mean over the inputs of each output."""

    def prepare(self: Any, g: Expr, t: Time) -> Expr:
        if g.rank > 1:
            axes = range(-g.rank, 0)
            axes = tuple(axes[1:] if self.outputs == "first" else axes[:-1])
            rest = g.size // max(g.shape[0 if self.outputs == "first" else -1], 1)
            g = g - sum_(g, axes) * (1.0 / max(rest, 1))
        return base.prepare(self, g, t)

    def symmetries(self: Any) -> Symmetries:
        side = "left rotation" if self.outputs == "first" else "right rotation"
        return base.symmetries(self) & (DEGREES | symmetric("odd", side))

    return {
        "__annotations__": {"outputs": Literal["first", "last"]},
        "outputs": "first",
        "prepare": prepare,
        "symmetries": symmetries,
    }


def clipped(rule: R, max_norm: float = 1.0) -> R:
    """Scale a gradient down to the Frobenius norm `max_norm` where it is longer, tensor by tensor.

    A tensor seen as several matrices is clipped matrix by matrix. Weight decay is not clipped.
    """
    return _around(_clipped, rule, max_norm=max_norm)


def _clipped(base: Base) -> Made:
    """The rule of the gradient at a norm of at most max_norm, tensor by tensor."""

    def prepare(self: Any, g: Expr, t: Time) -> Expr:
        return base.prepare(self, g * _share(norm(g), self.max_norm), t)

    return _clipping(base, "max_norm", prepare)


def clipped_globally(rule: R, max_global_norm: float = 1.0) -> R:
    """Scale all gradients down together where their joint norm is longer than `max_global_norm`.

    The norm is taken over all parameters of the optimizer, whatever their rules; those that are to
    be scaled need this function around their rule. Weight decay is not clipped. Raises ValueError
    where `every` is above 1: the norm of a sum of gradients to come is not known.
    """
    return _around(_clipped_globally, rule, max_global_norm=max_global_norm)


def _clipped_globally(base: Base) -> Made:
    """The rule of the gradient, scaled so that the norm of all of them is at most as given."""

    def prepare(self: Any, g: Expr, t: Time) -> Expr:
        return base.prepare(self, g * _share(t.norm, self.max_global_norm), t)

    def post_init(self: Any) -> None:
        base.__post_init__(self)
        if self.every > 1:
            raise ValueError(
                f"clipped_globally({base.__name__}(every={self.every!r})): the norm of a sum over "
                "several steps is not known; accumulate gradients in the loop instead"
            )

    return _clipping(base, "max_global_norm", prepare) | {"__post_init__": post_init}


def _share(size: Expr, most: Expr) -> Expr:
    """What to multiply something of this size by, so that it is at most that."""
    longer = size > most
    return where(longer, most / where(longer, size, 1.0), 1.0)


def _clipping(base: Base, name: str, prepare: Callable[..., Expr]) -> Made:
    def symmetries(self: Any) -> Symmetries:
        return base.symmetries(self) - DEGREES

    return {
        "__annotations__": {name: Rate},
        name: 1.0,
        "prepare": prepare,
        "symmetries": symmetries,
    }


def averaged(rule: R, average_retention: float = 0.999) -> R:
    """Keep an exponential moving average of the weights beside them, of this retention per update.

    The memory average_offset is the average minus the weights: evaluate inside
    `torch_backend.averaged(optimizer)`, or at `jax_backend.averaged(params, state)`. The fallback
    of a matrix rule is a rule of its own: put the function around it as well.
    """
    return _around(_averaged, rule, average_retention=average_retention)


def _averaged(base: Base) -> Made:
    """The rule with a moving average of the weights."""

    def slots(self: Any, shape: tuple[int, ...]) -> dict[str, Slot]:
        return _with(base.slots(self, shape), {"average_offset": Slot(shape)})

    def after(self: Any, memories: Memories, change: Expr, s: Memories, t: Time) -> Made:
        offset = self.average_retention * (s["average_offset"] - change)
        return base.after(self, memories, change, s, t) | {"average_offset": offset}

    return {
        "__annotations__": {"average_retention": Retention},
        "average_retention": 0.999,
        "slots": slots,
        "after": after,
    }


def schedule_free(rule: R, free_beta: float = 0.9) -> R:
    """Step without a schedule: weights between an iterate z of the rule and the average x of all z.

    The weights are y = (1 - free_beta)·z + free_beta·x, where gradients are taken. The memory
    average_offset is x - y: evaluate at x, inside `torch_backend.averaged(optimizer)` or at
    `jax_backend.averaged(params, state)`. Steps are weighted by lr², that of the step itself (other
    codes take the largest lr so far, which is the same until lr falls). The average takes the place
    of momentum, so give the rule none. Weight decay acts on y.
    Source: Defazio et al. 2024.
    """
    return _around(_schedule_free, rule, free_beta=free_beta)


def _schedule_free(base: Base) -> Made:
    """The rule stepping an iterate of which the weights follow the average."""

    def slots(self: Any, shape: tuple[int, ...]) -> dict[str, Slot]:
        weights = Slot((1,) * len(shape))
        return _with(base.slots(self, shape), {"average_offset": Slot(shape), "weights": weights})

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        d, memories, *shift = base.update(self, w, g, s, t)
        beta, offset = self.free_beta, s["average_offset"]
        weights = s["weights"] + self.lr * self.lr * array("full", s["weights"].shape)
        share = ratio(self.lr * self.lr * array("full", weights.shape), weights)
        # z - y from x - y, and where both go: x by a share of the way to the new z.
        ahead = -(beta / (1.0 - beta)) * offset
        moved = ahead + self.change(w, d, *shift)
        new = (1.0 - share) * offset + share * moved
        memories = memories | {"average_offset": new, "weights": weights}
        # All of it is a move; weight decay is in there already.
        rest = -self.weight_decay * w if self.decoupled else 0.0 * w
        return rest, memories, (1.0 - beta) * moved + beta * new

    def after(self: Any, memories: Memories, change: Expr, s: Memories, t: Time) -> Made:
        offset = memories["average_offset"] - change
        return base.after(self, memories, change, s, t) | {"average_offset": offset}

    def symmetries(self: Any) -> Symmetries:
        return symmetric()

    return {
        "__annotations__": {"free_beta": Retention},
        "free_beta": 0.9,
        "slots": slots,
        "update": update,
        "after": after,
        "symmetries": symmetries,
    }


def restarted(rule: R, restart_period: int = 960) -> R:
    """Set all memories of gradients back to their start after every `restart_period` updates.

    The rule counts its steps anew from there, so bias corrections and clocks begin again; the
    period must be a multiple of those of the rule's clocks. Memories of weights (averages, past
    weights) stay. Combine it with a schedule of warm restarts of the same period.
    """
    return _around(_restarted, rule, restart_period=restart_period)


def _restarted(base: Base) -> Made:
    """The rule with memories that start again after every restart_period updates."""

    def clocks(self: Any) -> dict[str, int]:
        inner, period = base.clocks(self), self.restart_period
        if self.stagger:
            raise ValueError(
                f"restarted({base.__name__}(stagger=True)): staggered clocks cannot start again "
                "together; use stagger=False"
            )
        whole = lcm(*inner.values())
        if period % whole:
            raise ValueError(
                f"restarted({base.__name__}, restart_period={period!r}): it must be a multiple of "
                f"the periods of the rule's clocks {inner}, such as {-(-period // whole) * whole}"
            )
        return inner | {"restart": period}

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        before = t.step - 1.0
        since = before - self.restart_period * floor(before / float(self.restart_period))
        d, memories, *shift = base.update(self, w, g, s, replace(t, step=since + 1.0))
        if "average_offset" in memories:
            raise ValueError(
                f"restarted({base.__name__}): its iterates are memories of weights, which must not "
                "start again; put schedule_free outside"
            )
        starts = {k: x.initial for k, x in base.slots(self, g.shape).items()}
        kept = {k: t.when("restart", starts[k], x) for k, x in memories.items()}
        return d, kept, *shift

    return {
        "__annotations__": {"restart_period": Period},
        "restart_period": 960,
        "clocks": clocks,
        "update": update,
    }


def nonlinear(rule: R, output: Output, iterations: int = 5) -> R:
    """Read the rule's direction through an output map σ: its "sign", at "rms" one, orthogonalised.

    "newton_schulz" makes it a rule of matrices, with `iterations` of Jordan's polynomial;
    "identity" leaves it as it is. Source: paper Eq. 52.
    """
    if output not in get_args(Output):
        raise ValueError(f"nonlinear(output={output!r}) must be one of {get_args(Output)}")
    if output == "newton_schulz":
        return _around(_orthogonalized, rule, sigma=output, iterations=iterations)
    return _around(_nonlinear, rule, sigma=output, iterations=iterations)


def _nonlinear(base: Base) -> Made:
    """The rule's direction through an output map."""

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        d, memories = _along(base, base.update(self, w, g, s, t), "nonlinear")
        coefficients: Coefficients = "quintic"
        return mapped(d, self.sigma, self.iterations, coefficients), memories

    def symmetries(self: Any) -> Symmetries:
        return through(base.symmetries(self), self.sigma, "none")

    return {
        "__annotations__": {"sigma": Output, "iterations": Period},
        "sigma": "identity",
        "iterations": 5,
        "update": update,
        "symmetries": symmetries,
    }


def _orthogonalized(base: Base) -> Made:
    """The rule's direction, orthogonalised."""
    return _nonlinear(base) | {"domain": "matrix", "sigma": "newton_schulz"}


def _with(slots: Mapping[str, Slot], own: Mapping[str, Slot]) -> dict[str, Slot]:
    """The memories of a rule and those of a function around it."""
    twice = [k for k in own if k in slots]
    if twice:
        raise ValueError(f"two functions around one rule keep a memory {twice}: use one of them")
    return {**slots, **own}
