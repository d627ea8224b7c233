"""The whole battery of tests for a rule of one's own, by one call.

>>> from deepopt.testing import check
>>> check(MyRule(period=3))

or, with a test of each property in pytest:

>>> @pytest.mark.parametrize("prove", checks(MyRule(period=3)), ids=str)
... def test_my_rule(prove):
...     prove()

Hypothesis looks for a shape, a stream of gradients, a schedule or a moment to resume at which the
rule breaks a promise, and shows the smallest. Periods must be short, so that clocks tick within six
steps. All is float64. Needs hypothesis, and for the backends torch, or jax and optax.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from deepopt.oracle import Array, Oracle
from deepopt.rule import Rule, Symmetry, traced

try:
    from hypothesis import Phase, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "deepopt.testing draws its data by hypothesis: pip install hypothesis"
    ) from error

Backend: TypeAlias = Literal["torch", "jax"]
Draw: TypeAlias = Callable[[st.SearchStrategy[Any]], Any]

MATRICES = [(3, 4), (6, 2), (4, 4), (1, 5), (5, 1), (1, 1), (0, 3), (3, 0)]
ANY = [(), (5,), (2, 3, 2), (0,)]
# Exactly zero, tiny, plain and huge: their squares and fourth powers are finite.
SIZES = (0.0, 1e-15, 1e-3, 1.0, 1e15)
PLAIN = SIZES[:4]
MOST = 6  # gradients of a stream
KINDS: dict[str, Callable[[Array], Array]] = {
    "dense": lambda g: g,
    "sparse": lambda g: g * (np.abs(g) > 1.0),
    "repeated": lambda g: np.round(g),
    "one": lambda g: np.ones_like(g),
    "dead row": lambda g: g * (np.arange(g[..., :1].size).reshape(g[..., :1].shape) > 0),
    "uneven": lambda g: g * 10.0 ** np.round(6 * g),
}


@dataclass(frozen=True)
class Stream:
    """A parameter and a gradient for each of the sizes; the arrays follow from what is printed."""

    sizes: tuple[float, ...]
    kind: str
    seed: int

    def arrays(self, shape: tuple[int, ...]) -> tuple[Array, list[Array]]:
        """The parameter, and its gradients."""
        chance = np.random.default_rng(self.seed)
        w = chance.standard_normal(shape)
        drawn = [np.atleast_1d(chance.standard_normal(shape)) for _ in self.sizes]
        several = zip(self.sizes, map(KINDS[self.kind], drawn), strict=True)
        return w, [(size * g).reshape(shape) for size, g in several]


def streams(
    least: int = 1, most: int = MOST, sizes: Sequence[float] = SIZES
) -> st.SearchStrategy[Stream]:
    """Streams of `least` to `most` gradients of the sizes, of all kinds."""
    return st.builds(
        Stream,
        st.lists(st.sampled_from(sizes), min_size=least, max_size=most).map(tuple),
        st.sampled_from(sorted(KINDS)),
        st.integers(0, 2**16),
    )


def shapes_of(rule: Rule) -> list[tuple[int, ...]]:
    """Shapes that a rule takes, empty ones among them."""
    return MATRICES if rule.domain == "matrix" else MATRICES + ANY


def difference(a: Any, b: Any) -> float:
    """Largest difference relative to the largest entry of b; infinite where one is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.max(np.abs(a - b), initial=0.0) / max(np.max(np.abs(b), initial=0.0), 1e-30))


def path(rule: Rule, w: Array, gradients: Sequence[Array]) -> list[Array]:
    """The parameter after each step of the oracle."""
    oracle, found = Oracle(rule, [w]), list[Array]()
    for g in gradients:
        (w,) = oracle.step([w], [g])
        found.append(w)
    return found


@dataclass(frozen=True)
class Check:
    """A promise and the rule that is to keep it; call it."""

    name: str
    rule: Rule
    run: Callable[[], None]

    def __call__(self) -> None:
        self.run()

    def __str__(self) -> str:
        return f"{self.name}-{type(self.rule).__name__}"


def checks(
    rule: Rule,
    *,
    backends: Collection[Backend] = ("torch", "jax"),
    leave_out: Collection[str] = (),
    filling: Collection[str] = (),
    tolerance: float = 1e-12,
    examples: int | None = None,
) -> list[Check]:
    """Every promise of a rule as a call that raises where it is broken.

    leave_out: names of promises that the rule does not make, such as "the first step descends".
    filling: memories with a clock that fill between its ticks, where most may not change.
    tolerance: between the backends and the oracle in float64, relative to the largest weight.
    examples: of hypothesis, for each promise; None for those of its profile.
    Raises ValueError on an unknown name, for a rule that needs more than gradients, and for a clock
    that does not tick within a stream.
    """
    if rule.context((2, 2)):
        names = ", ".join(rule.context((2, 2)))
        raise ValueError(f"{rule!r} needs {names} beside gradients, which a stream does not have")
    long = {k: n * rule.every for k, n in rule.clocks().items() if n * rule.every > MOST}
    if long:
        ticks = ", ".join(f"{k} every {n} steps" for k, n in long.items())
        raise ValueError(
            f"{rule!r}: {ticks}, and a stream has {MOST}: give it shorter periods, or what happens "
            "at a tick is not seen"
        )
    known = dict(ORACLE)
    for name in backends:
        if name not in get_args(Backend):
            raise ValueError(f"backends={backends!r}: among {get_args(Backend)}")
        known |= import_module(f"{name}_backend.testing").CHECKS
    for name in leave_out:
        if name not in known:
            raise ValueError(f"leave_out={name!r}: promises are {', '.join(map(repr, known))}")
    found = list[Check]()
    for name, prove in known.items():
        if name in leave_out:
            continue
        asked = partial(prove, rule, Limits(tolerance, frozenset(filling)))
        found.append(Check(name, rule, partial(_searched, asked, examples)))
    return found


def check(rule: Rule, **options: Any) -> None:
    """Prove all promises of a rule; options are those of `checks`.

    Raises AssertionError with every promise that is broken, and the smallest way to break it. Where
    `update` cannot be called nothing else is asked, and torch and JAX only of a sound oracle.
    """
    broken = list[str]()
    for prove in checks(rule, **options):
        if broken and (prove.name not in ORACLE or broken[0].startswith(PURE)):
            break
        try:
            prove()
        except Exception as error:
            notes = "\n  ".join(getattr(error, "__notes__", []))
            words = " ".join(f"{error}".split())[:400]
            broken.append(f"{prove.name}: {type(error).__name__} {words}\n  {notes}".rstrip())
    if broken:
        raise AssertionError(f"{rule!r} breaks {len(broken)} promises\n" + "\n".join(broken))


@dataclass(frozen=True)
class Limits:
    """How near the backends come, and which memories change between ticks."""

    tolerance: float
    filling: frozenset[str]


Prove: TypeAlias = Callable[[Rule, Limits, Draw], None]


def _searched(prove: Callable[[Draw], None], examples: int | None) -> None:
    def once(data: st.DataObject) -> None:
        with np.errstate(all="ignore"):  # what is not finite is shown by its own promise
            prove(data.draw)

    limit = settings() if examples is None else settings(max_examples=examples)
    # Which lines of NumPy ran, as `explain` tells, is no explanation.
    phases = [phase for phase in Phase if phase is not Phase.explain]
    settings(limit, deadline=None, phases=phases)(given(st.data())(once))()


def _bare(rule: Rule, **values: Any) -> Rule:
    return rule.with_values({"weight_decay": 0.0, **values})


# The oracle


def _pure(rule: Rule, limits: Limits, draw: Draw) -> None:
    shape = draw(st.sampled_from([x for x in shapes_of(rule) if len(x) == 2 and np.prod(x)]))
    ticking = frozenset({"every", *rule.clocks()})
    one, two = (traced(rule, shape, ticking, anew=True)[0].outputs for _ in range(2))
    # Equal nodes are one object.
    other = [name for name in one if one[name] is not two.get(name)]
    assert not other, f"{other} come out otherwise when `update` is called again: it must be pure"


def _finite(rule: Rule, limits: Limits, draw: Draw) -> None:
    w, gradients = draw(streams()).arrays(draw(st.sampled_from(shapes_of(rule))))
    oracle = Oracle(rule, [w])
    with np.errstate(invalid="raise", divide="raise", over="raise"):
        for step, g in enumerate(gradients, 1):
            (w,) = oracle.step([w], [g])
            bad = [k for k, x in {"w": w, **oracle.state[0]}.items() if not np.isfinite(x).all()]
            assert not bad, f"{bad} are not finite after step {step}"


def _still(rule: Rule, limits: Limits, draw: Draw) -> None:
    w, gradients = draw(streams(sizes=(0.0,))).arrays(draw(st.sampled_from(shapes_of(rule))))
    for now in path(_bare(rule, eps=draw(st.sampled_from([0.0, 1e-8]))), w, gradients):
        np.testing.assert_array_equal(now, w)


def _descends(rule: Rule, limits: Limits, draw: Draw) -> None:
    w, (g,) = draw(streams(most=1, sizes=SIZES[1:])).arrays(draw(st.sampled_from(shapes_of(rule))))
    if g.any():
        # From zero, so that no step is lost in the rounding of a weight; with `every`, the first
        # steps only add up gradients.
        (moved,) = path(_bare(rule, lr=1.0, eps=0.0, every=1), np.zeros_like(w), [g])
        slope = np.sum(moved * (g / np.abs(g).max()))
        assert slope < 0, f"the step has the slope {slope:.1e} along the gradient: update's d is up"


def _repeatable(rule: Rule, limits: Limits, draw: Draw) -> None:
    w, gradients = draw(streams()).arrays(draw(st.sampled_from(shapes_of(rule))))
    before = [w.copy(), *(g.copy() for g in gradients)]
    for x in (w, *gradients):
        x.setflags(write=False)
    one, two = path(rule, w, gradients), path(rule, w, gradients)
    for x, y in zip([*one, w, *gradients], [*two, *before], strict=True):
        np.testing.assert_array_equal(x, y)


def _sums(rule: Rule, limits: Limits, draw: Draw) -> None:
    rule = replace(rule, every=1)
    w, gradients = draw(streams(least=6)).arrays((3, 4))
    every = draw(st.integers(2, 3))
    found = path(replace(rule, every=every), w, gradients)
    sums = [np.sum(gradients[i : i + every], axis=0) for i in range(0, 6, every)]
    sums = [0.0 * w + x for x in sums]
    expected = np.repeat(np.stack([w, *path(rule, w, sums)]), every, axis=0)
    np.testing.assert_array_equal(found, expected[1:7])


def _clocks(rule: Rule, limits: Limits, draw: Draw) -> None:
    rule = replace(rule, every=draw(st.integers(1, 2)), stagger=draw(st.booleans()))
    shape, count = (3, 4), 3
    slots = rule.all_slots(shape)
    unknown = limits.filling - {*slots}
    assert not unknown, f"filling {sorted(unknown)}: memories are {', '.join(slots)}"
    filling = limits.filling | {"gradient_sum"}
    drawn = draw(st.integers(0, 1000))
    w = [Stream((1.0,), "dense", drawn + i).arrays(shape)[0] for i in range(count)]
    oracle = Oracle(rule, w)
    for step in range(1, 6 * rule.every + 1):
        before = [dict(x) for x in oracle.state]
        seeds = (drawn + 10 * step + i for i in range(count))
        w = oracle.step(w, [Stream((1.0,), "dense", s).arrays(shape)[0] for s in seeds])
        for i in range(count):
            ticks = rule.ticks(step, index=i)
            changed = {k for k, x in oracle.state[i].items() if (x != before[i][k]).any()}
            still = {k for k, s in slots.items() if (s.clock or "every") not in ticks}
            early = changed & (still - filling)
            assert not early, f"{sorted(early)} changed at step {step}, where no clock ticks"


def _symmetries(rule: Rule, limits: Limits, draw: Draw) -> None:
    if not rule.symmetries():
        return
    shape = draw(st.sampled_from([(4, 6), (7, 3), (5, 5)]))
    symmetry = draw(st.sampled_from(sorted(rule.symmetries())))
    found = violation(_bare(rule, eps=0.0), symmetry, whole(shape, draw(st.integers(0, 1000))))
    assert found <= 1e-8, f"{symmetry} is declared, and the two paths are {found:.1e} apart"


def whole(shape: tuple[int, ...], seed: int = 0, steps: int = 12) -> Array:
    """A stream of full rank, without zeros, of unlike sizes."""
    chance = np.random.default_rng(seed)
    scale = np.exp(chance.standard_normal((steps, *[1] * len(shape))))
    return chance.standard_normal((steps, *shape)) * scale


Map: TypeAlias = Callable[[Array], Array]


def maps(symmetry: Symmetry, shape: tuple[int, ...]) -> list[tuple[Map, Map]]:
    """What is done to the gradients, and what that should do to the path from zero."""
    matrix = len(shape) > 1
    if symmetry == "odd":
        return [(np.negative, np.negative)]
    if symmetry == "permutation":
        return [(_permuted, _permuted)]
    if symmetry == "transposition":
        turned: Map = partial(np.swapaxes, axis1=-1, axis2=-2)
        return [(turned, turned)] if matrix else []
    if symmetry == "left rotation":
        q = _turn(shape[-2]) if matrix else np.eye(1)
        return [(lambda g: q @ g, lambda g: q @ g)] if matrix else []
    if symmetry == "right rotation":
        p = _turn(shape[-1])
        return [(lambda g: g @ p, lambda g: g @ p)] if matrix else []
    degree = int(symmetry.removeprefix("degree "))

    def scaled(c: float) -> tuple[Map, Map]:
        return lambda g: c * g, lambda d: c**degree * d

    return [scaled(1e-3), scaled(7.0)]


def violation(rule: Rule, symmetry: Symmetry, gradients: Array) -> float:
    """How far the rule is from a symmetry on a stream: zero for one that the shape has not."""
    zero, worst = np.zeros(gradients.shape[1:]), 0.0
    expected = path(rule, zero, [*gradients])
    for before, after in maps(symmetry, gradients.shape[1:]):
        moved = [before(g) for g in gradients]
        found = path(rule, np.zeros(np.shape(moved[0])), moved)
        worst = max(worst, difference(np.stack(found), np.stack([after(d) for d in expected])))
    return worst


def _permuted(x: Array) -> Array:
    order = np.random.default_rng(5).permutation(x.size)
    return x.ravel()[order].reshape(x.shape)


def _turn(n: int) -> Array:
    return np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0]


PURE = "update is the same whenever it is called"
ORACLE: dict[str, Prove] = {
    PURE: _pure,
    "weights and memories stay finite": _finite,
    "zero gradients never move": _still,
    "the first step descends": _descends,
    "two runs are equal and write nothing": _repeatable,
    "every few steps the rule sees the sum": _sums,
    "memories change at the ticks of their clocks": _clocks,
    "declared symmetries hold": _symmetries,
}
SYMMETRIES: tuple[Symmetry, ...] = get_args(Symmetry)
