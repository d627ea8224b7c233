"""Functions around rules: each takes a rule, or a class of rules, and returns one that does more.

They compose, and what they return is a rule like any other: `cautious(M3(lr=3e-4))` in a group,
`bind(cautious(M3))` as a class of its own. Numbers given here are hyperparameters of the result.
"""

from __future__ import annotations

import copyreg
from abc import ABCMeta
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, Literal, TypeVar, cast

from deepopt.expr import Expr, array, floor, maximum, minimum, sum_, where
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
def _class(make: Callable[[Base], Made], base: Base, items: tuple[tuple[str, Any], ...]) -> Base:
    """The subclass of a rule that `make` describes, its new fields with these defaults."""
    values = dict(items)
    name = make.__name__.title().replace("_", "") + base.__name__
    own = make(base)
    members = {
        "__doc__": f"{make.__doc__}\n\n    Around: {base.__doc__}",
        "__module__": __name__,
        "__qualname__": name,
        "recipe": (_class, (make, base, items)),
        **own,
        **values,
    }
    return cast(Base, _Around(name, (base,), members))


def _around(make: Callable[[Base], Made], rule: R, **values: Any) -> R:
    """The rule, or class of rules, with what `make` puts around it."""
    if isinstance(rule, type) and issubclass(rule, Rule):
        return cast(R, _class(make, rule, tuple(values.items())))
    if not isinstance(rule, Rule):
        raise TypeError(
            f"{make.__name__.strip('_')} takes a rule or a class of rules, not {rule!r}"
        )
    given = {f.name: getattr(rule, f.name) for f in fields(rule)}
    return cast(R, _class(make, type(rule), ())(**given | values))


def cautious(rule: R) -> R:
    """Leave out the entries of a direction that point against the gradient, the rest scaled up.

    The rest is divided by its share of all entries, at least 0.001. Source: Liang et al. 2024.
    """
    return _around(_cautious, rule)


def _cautious(base: Base) -> Made:
    """The direction without the entries that point against the gradient."""

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        d, memories, *shift = base.update(self, w, g, s, t)
        agrees = where(d * g > 0.0, 1.0, 0.0)
        return d * agrees / maximum(mean(agrees), 1e-3), memories, *shift

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

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        if g.rank > 1:
            axes = range(-g.rank, 0)
            axes = tuple(axes[1:] if self.outputs == "first" else axes[:-1])
            rest = g.size // max(g.shape[0 if self.outputs == "first" else -1], 1)
            g = g - sum_(g, axes) * (1.0 / max(rest, 1))
        return base.update(self, w, g, s, t)

    def symmetries(self: Any) -> Symmetries:
        side = "left rotation" if self.outputs == "first" else "right rotation"
        return base.symmetries(self) & (DEGREES | symmetric("odd", side))

    return {
        "__annotations__": {"outputs": Literal["first", "last"]},
        "outputs": "first",
        "update": update,
        "symmetries": symmetries,
    }


def clipped(rule: R, max_norm: float = 1.0) -> R:
    """Scale a gradient down to the Frobenius norm `max_norm` where it is longer, tensor by tensor.

    A tensor seen as several matrices is clipped matrix by matrix.
    """
    return _around(_clipped, rule, max_norm=max_norm)


def _clipped(base: Base) -> Made:
    """The rule of the gradient at a norm of at most max_norm, tensor by tensor."""

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        return base.update(self, w, g * minimum(1.0, ratio(self.max_norm, norm(g))), s, t)

    return _clipping(base, update)


def clipped_globally(rule: R, max_norm: float = 1.0) -> R:
    """Scale all gradients down together where their joint norm is longer than `max_norm`.

    The norm is taken over all parameters of the optimizer, whatever their rules.
    """
    return _around(_clipped_globally, rule, max_norm=max_norm)


def _clipped_globally(base: Base) -> Made:
    """The rule of the gradient, scaled so that the norm of all of them is at most max_norm."""

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        return base.update(self, w, g * minimum(1.0, ratio(self.max_norm, t.norm)), s, t)

    return _clipping(base, update)


def _clipping(base: Base, update: Callable[..., Update]) -> Made:
    def symmetries(self: Any) -> Symmetries:
        return base.symmetries(self) - DEGREES

    return {
        "__annotations__": {"max_norm": Rate},
        "max_norm": 1.0,
        "update": update,
        "symmetries": symmetries,
    }


def averaged(rule: R, average_retention: float = 0.999) -> R:
    """Keep an exponential moving average of the weights beside them, with this retention per step.

    The memory average_offset is the average minus the weights: evaluate inside
    `torch_backend.averaged(optimizer)`, or at `jax_backend.averaged(params, state)`. The fallback
    of a matrix rule is a rule of its own: put the function around it as well.
    """
    return _around(_averaged, rule, average_retention=average_retention)


def _averaged(base: Base) -> Made:
    """The rule with a moving average of the weights."""

    def slots(self: Any, shape: tuple[int, ...]) -> dict[str, Slot]:
        return _with(base.slots(self, shape), {"average_offset": Slot(shape)})

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        d, memories, *shift = base.update(self, w, g, s, t)
        offset = self.average_retention * (s["average_offset"] - self.change(w, d, *shift))
        return d, memories | {"average_offset": offset}, *shift

    return {
        "__annotations__": {"average_retention": Retention},
        "average_retention": 0.999,
        "slots": slots,
        "update": update,
    }


def schedule_free(rule: R, free_beta: float = 0.9) -> R:
    """Step without a schedule: weights between an iterate z of the rule and the average x of all z.

    The weights are y = (1 - free_beta)·z + free_beta·x, where gradients are taken. The memory
    average_offset is x - y: evaluate at x, inside `torch_backend.averaged(optimizer)` or at
    `jax_backend.averaged(params, state)`. Steps are weighted by lr². The average takes the place of
    momentum, so give the rule none. Weight decay acts on y.
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
        change = (1.0 - beta) * moved + beta * new
        memories = memories | {"average_offset": new - change, "weights": weights}
        # All of it is a move; weight decay is in there already.
        rest = -self.weight_decay * w if self.decoupled else 0.0 * w
        return rest, memories, change

    def symmetries(self: Any) -> Symmetries:
        return symmetric()

    return {
        "__annotations__": {"free_beta": Retention},
        "free_beta": 0.9,
        "slots": slots,
        "update": update,
        "symmetries": symmetries,
    }


def restarted(rule: R, restart_period: int = 1000) -> R:
    """Set all memories back to their start after every `restart_period` updates.

    The rule counts its steps anew from there, so bias corrections and clocks begin again; the
    period must be a multiple of those of the rule's clocks. Combine it with a schedule of warm
    restarts of the same period.
    """
    return _around(_restarted, rule, restart_period=restart_period)


def _restarted(base: Base) -> Made:
    """The rule with memories that start again after every restart_period updates."""

    def clocks(self: Any) -> dict[str, int]:
        inner, period = base.clocks(self), self.restart_period
        wrong = {k: n for k, n in inner.items() if period % n}
        if wrong or self.stagger:
            raise ValueError(
                f"restarted({base.__name__}, restart_period={period!r}): it must be a multiple of "
                f"the periods of the rule's clocks {inner}, and stagger={self.stagger!r} be False"
            )
        return inner | {"restart": period}

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        before = t.step - 1.0
        since = before - self.restart_period * floor(before / float(self.restart_period))
        d, memories, *shift = base.update(self, w, g, s, replace(t, step=since + 1.0))
        starts = {k: x.initial for k, x in base.slots(self, g.shape).items()}
        kept = {k: t.when("restart", starts[k], x) for k, x in memories.items()}
        return d, kept, *shift

    return {
        "__annotations__": {"restart_period": Period},
        "restart_period": 1000,
        "clocks": clocks,
        "update": update,
    }


def nonlinear(rule: R, output: Output, iterations: int = 5) -> R:
    """Read the rule's direction through an output map σ: its "sign", at "rms" one, orthogonalised.

    "newton_schulz" makes it a rule of matrices, with `iterations` of Jordan's polynomial;
    "identity" leaves it as it is. Source: paper Eq. 52.
    """
    if output == "newton_schulz":
        return _around(_orthogonalized, rule, sigma=output, iterations=iterations)
    return _around(_nonlinear, rule, sigma=output, iterations=iterations)


def _nonlinear(base: Base) -> Made:
    """The rule's direction through an output map."""

    def update(self: Any, w: Expr, g: Expr, s: Memories, t: Time) -> Update:
        d, memories, *shift = base.update(self, w, g, s, t)
        coefficients: Coefficients = "quintic"
        return mapped(d, self.sigma, self.iterations, coefficients), memories, *shift

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
