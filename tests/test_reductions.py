"""Rules that become other rules: a hyperparameter at its limit leaves exactly the simpler one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import pytest
from cases import CASES, DEFAULTS, TOLERANCE, contexts, difference, stream
from papers import around as papers
from papers.common import frob, rms

from deepopt import Oracle, Rule, around, rules

STEPS = 30
Context = dict[str, np.ndarray]


def dense(shape: tuple[int, ...]) -> np.ndarray:
    """Gradients without exact zeros, in which a cautious mask or a rank could hide."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((STEPS, *shape)) * np.exp(rng.standard_normal((STEPS, 1, 1)))


def orthonormal(shape: tuple[int, ...]) -> np.ndarray:
    q = np.linalg.qr(np.random.default_rng(2).standard_normal((np.prod(shape), STEPS)))[0]
    return q.T.reshape(STEPS, *shape)


def orthogonal_rows(shape: tuple[int, ...]) -> np.ndarray:
    """Gradients with orthonormal rows, orthogonal to those of every other gradient."""
    rows, columns = shape
    rng = np.random.default_rng(3)
    spaces = np.linalg.qr(rng.standard_normal((columns, STEPS * rows)))[0].T
    turns = np.linalg.qr(rng.standard_normal((STEPS, rows, rows)))[0]
    return turns @ spaces.reshape(STEPS, rows, columns)


STREAMS: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "mixed": lambda shape: stream(shape, STEPS)[1],
    "dense": dense,
    "orthonormal": orthonormal,
    "orthogonal rows": orthogonal_rows,
    "constant": lambda shape: dense(shape)[:1].repeat(STEPS, axis=0),
    "growing": lambda shape: np.sign(dense(shape)) * 1.1 ** np.arange(STEPS)[:, None, None],
}


def as_it_is(w: np.ndarray, g: np.ndarray, context: Context) -> np.ndarray:
    return g


@dataclass(frozen=True)
class Pair:
    """`rule` is `other`, which sees another gradient or has a rate that changes with the step."""

    name: str
    rule: Rule
    other: Rule
    kind: str = "mixed"
    shape: tuple[int, ...] = (4, 6)
    sees: Callable[[np.ndarray, np.ndarray, Context], np.ndarray] = as_it_is
    factor: Callable[[int], float] = lambda t: 1.0
    context: Context = field(default_factory=dict)
    tolerance: float = TOLERANCE["float64"]

    def __str__(self) -> str:
        return self.name

    def distance(self) -> float:
        """The largest difference between the paths of the two."""
        given = [x | self.context for x in contexts(self.rule, self.shape, STEPS)]
        w = v = stream(self.shape, 1)[0]
        one, other = Oracle(self.rule, [w]), Oracle(self.other, [w])
        worst = 0.0
        gradients = STREAMS[self.kind](self.shape)
        for t, (g, context) in enumerate(zip(gradients, given, strict=True), start=1):
            seen = self.sees(v, g, context)
            lr = self.other.lr * self.factor(t)
            (w,) = one.step([w], [g], [context])
            (v,) = other.step([v], [seen], [context], lr=lr)
            worst = max(worst, difference(w, v))
        return worst


LR = 0.05
ALPHA, ETA = 0.9, 0.5
r = rules
sgd, heavy = r.SGD(lr=LR), r.HeavyBall(lr=LR)
plain = {"output": "identity", "scale": "none"}
one_level = {"period": 1, "weight": 1.0}
muon = r.Muon(lr=LR, nesterov=False)
adam = r.Adam(lr=LR)
delta = partial(r.DeltaMomentum, momentum=ALPHA, rate=ETA, normalize=False, lr=LR, **plain)
deep = partial(r.DeepMomentum, lr=LR, width=3)
given = partial(r.PreconditionedMomentum, lr=LR, values="given", scale="none")
feature = partial(r.FeatureMomentum, lr=LR, normalize=False, scale="none")
literal = partial(r.M3, literal=True, eps=1e-8, lr=LR, period=7)
# A sum of gradients is held where an average is meant, and no bias is corrected.
averaging = {"factor": lambda t: (1 - ALPHA) / (1 - ALPHA**t)}


def erased(w: np.ndarray, g: np.ndarray, context: Context, kappa: float = 0.5) -> np.ndarray:
    """The gradient of the loss plus ½·kappa·‖Wx‖²."""
    return g + kappa * w @ context["gram"]


def implicit(g: np.ndarray, context: Context, kappa: float = 0.5) -> np.ndarray:
    return g @ np.linalg.inv(np.eye(g.shape[1]) + LR * kappa * context["gram"])


def sees_unit(w: np.ndarray, g: np.ndarray, context: Context) -> np.ndarray:
    return g / frob(g)


def clip(w: np.ndarray, g: np.ndarray, context: Context) -> np.ndarray:
    return g * min(1.0, 0.5 / frob(g))


def pushed(quadratic: float, cubic: float) -> Callable[..., np.ndarray]:
    return lambda w, g, context: quadratic * g + cubic * g @ g.T @ g


MATRIX = np.diag([1.0, -2.0, 3.0, 0.5]) + 0.3
PAIRS = [
    # Descent
    Pair("DGD without erasing", r.DGD(lr=LR, kappa=0.0), sgd),
    *(
        Pair(f"DGD {s} without erasing", r.DGD(lr=LR, kappa=0.0, solver=s), sgd)
        for s in ("explicit", "unit", "neurips")
    ),
    Pair(
        "explicit DGD is descent on the loss and the outputs",
        r.DGD(lr=LR, kappa=0.5, solver="explicit"),
        sgd,
        sees=erased,
    ),
    Pair(
        "DGD for inputs of norm one has a smaller rate",
        r.DGD(lr=LR, kappa=0.5, solver="unit"),
        sgd,
        sees=erased,
        factor=lambda t: 1 / (1 + LR * 0.5),
    ),
    Pair(
        "the short version erases without the rate",
        r.DGD(lr=LR, kappa=0.01, solver="neurips"),
        sgd,
        sees=partial(erased, kappa=0.01 / LR),
    ),
    Pair(
        "exact DGD is implicit descent on the loss and the outputs",
        r.DGD(lr=LR, kappa=0.5),
        sgd,
        sees=lambda w, g, c: implicit(erased(w, g, c), c),
    ),
    Pair(
        "inputs first is the transpose",
        r.DGD(lr=LR, kappa=0.5, inputs="first", solver="explicit"),
        sgd,
        sees=lambda w, g, c: erased(w.T, g.T, c).T,
    ),
    Pair("GGD near one state", r.GGD(lr=LR, objective="dot", states=1), sgd),
    Pair("GGD that forgets", r.GGD(lr=LR, objective="dot", states=4, decay=0.0), sgd),
    Pair(
        "GGD of one state, l2",
        r.GGD(lr=LR, states=1, weight_decay=0.1),
        r.DGD(lr=LR, kappa=1.0, weight_decay=0.1),
    ),
    Pair(
        "GGD that forgets, l2",
        r.GGD(lr=LR, states=3, decay=0.0, kappa=0.5, weight_decay=0.1, inputs="first"),
        r.DGD(lr=LR, kappa=0.5, weight_decay=0.1, inputs="first"),
    ),
    *(
        Pair(
            f"GGD without a quadratic term, values {values}",
            r.GGD(lr=LR, kappa=0.0, states=3, values=values, weight_decay=0.1),
            r.GGD(lr=LR, objective="dot", states=3, weight_decay=0.1),
        )
        for values in ("gradient", "target")
    ),
    Pair(
        "GGD towards its own answer shrinks nothing",
        r.GGD(lr=LR, states=1, kappa=0.5, values="target"),
        sgd,
        sees=lambda w, g, c: implicit(g, c),
    ),
    # Momentum
    Pair("heavy ball without retention", r.HeavyBall(lr=LR, momentum=0.0), sgd),
    Pair("Nesterov without retention", r.Nesterov(lr=LR, momentum=0.0), sgd),
    Pair("Nesterov", r.Nesterov(lr=LR), r.HeavyBall(lr=LR, nesterov=True)),
    Pair("Signum without retention", r.Signum(lr=LR, momentum=0.0), r.SignSGD(lr=LR)),
    Pair("Signum", r.Signum(lr=LR), around.nonlinear(heavy, "sign")),
    Pair("Lion of one retention", r.Lion(lr=LR, betas=(0.9, 0.9)), r.Signum(lr=LR)),
    Pair("Lion that reads no memory", r.Lion(lr=LR, betas=(0.0, 0.9)), r.SignSGD(lr=LR)),
    Pair("P = I", given(), heavy, context={"preconditioner": np.eye(4)}),
    Pair("any P is seen", given(), heavy, sees=lambda w, g, c: c["preconditioner"] @ g),
    Pair("inner rate", given(rate=ETA), heavy, context={"preconditioner": 2.0 * np.eye(4)}),
    Pair(
        "diagonal P is Adam without a first memory",
        r.PreconditionedMomentum(lr=LR, momentum=0.0, scale="none", eps=1e-3),
        r.Adam(lr=LR, betas=(0.0, 0.95), eps=1e-3),
    ),
    Pair(
        "Kronecker P is Shampoo without momentum",
        r.PreconditionedMomentum(lr=LR, momentum=0.0, values="kronecker", period=3, block=3),
        r.Shampoo(lr=LR, momentum=0.0, period=3, block=3),
    ),
    Pair(
        "Kronecker P before the first root",
        r.PreconditionedMomentum(lr=LR, values="kronecker", period=99, scale="none"),
        heavy,
    ),
    Pair("the first power", feature(power=1.0), heavy),
    Pair(
        "a polynomial of one term", feature(feature="polynomial", polynomial=2.0, rate=0.5), heavy
    ),
    Pair("the power zero", feature(power=0.0, momentum=0.0), r.SignSGD(lr=LR)),
    Pair("the third power", feature(power=3.0), heavy, sees=lambda w, g, c: g**3),
    Pair(
        "a polynomial",
        feature(feature="polynomial", polynomial=(0.5, -0.1)),
        heavy,
        sees=pushed(0.5, -0.1),
    ),
    Pair(
        "one step of Newton-Schulz is a polynomial",
        r.Muon(lr=LR, momentum=0.0, nesterov=False, steps=1, scale="none"),
        feature(feature="polynomial", polynomial=(3.4445, -4.7750, 2.0315), momentum=0.0),
        sees=sees_unit,
    ),
    # Delta momentum (oracles 10-12)
    *(
        Pair(
            f"delta, {view}, {solver}, {kind}",
            delta(view=view, solver=solver),
            heavy,
            kind=kind,
            shape=shape,
            factor=lambda t, solver=solver: ETA if solver == "explicit" else ETA / (1 + ETA),
        )
        for view, kind, shape in (
            ("flat", "orthonormal", (5, 6)),
            ("flat", "orthonormal", (1, 31)),
            ("matrix", "orthogonal rows", (2, 60)),
        )
        for solver in ("explicit", "prox")
    ),
    *(
        Pair(
            f"scalar delta only forgets, {solver}",
            delta(view="scalar", solver=solver, normalize=True),
            r.HeavyBall(lr=LR, momentum=momentum),
            sees=sees_unit,
            factor=lambda t, factor=factor: factor,
        )
        for solver, momentum, factor in (
            ("explicit", ALPHA - ETA, ETA),
            ("prox", ALPHA / (1 + ETA), ETA / (1 + ETA)),
        )
    ),
    Pair(
        "delta as printed at η = 1",
        delta(solver="explicit", decay="literal", rate=1.0, normalize=True),
        delta(solver="explicit", rate=1.0, normalize=True),
    ),
    Pair(
        "flat delta without retention, orthogonalised",
        r.DeltaMomentum(lr=LR, view="flat", momentum=0.0),
        r.Muon(lr=LR, momentum=0.0, nesterov=False),
    ),
    Pair("a row is flat", delta(view="matrix"), delta(view="flat"), shape=(1, 7)),
    Pair("a column is scalar", delta(view="matrix"), delta(view="scalar"), shape=(7, 1)),
    # Deep momentum
    Pair("DMGD that learns nothing", deep(rate=0.0, **plain), around.nonlinear(sgd, "rms")),
    Pair(
        "DMGD that learns nothing, orthogonalised",
        deep(rate=0.0),
        r.Muon(lr=LR, momentum=0.0, nesterov=False),
    ),
    Pair(
        "a residual network has nothing to learn of its key",
        deep(teacher="gradient", rate=0.7),
        deep(rate=0.0),
    ),
    Pair("a teacher of one step", deep(teacher_retention=0.0), deep(teacher="gradient")),
    # Nests and M3
    Pair("Nest of one table", r.Nest(lr=LR, **one_level), muon),
    Pair(
        "Nest of one table as it is",
        r.Nest(lr=LR, **one_level, **plain),
        heavy,
        factor=lambda t: 1 - ALPHA,
    ),
    *(
        Pair(
            f"Nest of one delta memory, {output}",
            r.Nest(lr=LR, memory="delta", output=output, **one_level),
            r.DeltaMomentum(lr=LR, output=output),
        )
        for output in ("newton_schulz", "identity", "sign", "rms")
    ),
    *(
        Pair(
            f"Nest of one deep memory, {output}",
            r.Nest(lr=LR, memory="deep", retention=0.95, width=3, output=output, **one_level),
            deep(teacher="gradient", objective="dot", retention=0.95, output=output),
        )
        for output in ("newton_schulz", "identity")
    ),
    Pair(
        "Nest of tables is M3 without a second moment",
        r.Nest(
            lr=LR,
            period=(1, 3, 7),
            retention=(0.9, 0.8, 0.7),
            weight=(1.0, 0.3, 0.2),
            scale="none",
        ),
        r.M3(
            lr=LR,
            scale="none",
            period=(3, 7),
            slow=(0.8, 0.7),
            weight=(0.3, 0.2),
            second_moment="none",
            nesterov=False,
        ),
    ),
    Pair(
        "a level of no weight",
        r.Nest(
            lr=LR,
            memory=("table", "deep"),
            period=(1, 2),
            weight=(1.0, 0.0),
            width=3,
            scale="none",
        ),
        r.Muon(lr=LR, nesterov=False, scale="none"),
    ),
    *(
        Pair(
            f"M3 {name}",
            r.M3(lr=LR, second_moment="none", **{"period": 3, "weight": 0.5} | given),
            r.Muon(lr=LR),
        )
        for name, given in (("of no weight", {"weight": 0.0}), ("of no tick", {"period": 99}))
    ),
    Pair(
        "the retentions of literal M3 have no effect",
        literal(momentum=0.3, slow=0.2, weight=0.5, eps=0.0),
        literal(momentum=0.9, slow=0.6, weight=0.5, eps=0.0),
    ),
    Pair(
        "four times the second retention of literal M3 halves the step",
        literal(beta2=0.8, eps=0.0),
        literal(beta2=0.2, eps=0.0),
        factor=lambda t: 0.5,
    ),
    Pair(
        "a closed floor leaves M3 without a second moment",
        r.M3(lr=LR, floor=1e30, scale="rms", period=3),
        around.nonlinear(r.M3(lr=LR, second_moment="none", period=3), "rms"),
        factor=lambda t: 0.2,
    ),
    # Orthogonal
    Pair(
        "Muon",
        r.Muon(lr=LR, nesterov=False, scale="none"),
        around.nonlinear(heavy, "newton_schulz"),
    ),
    Pair(
        "Muon read ahead",
        r.Muon(lr=LR, scale="none"),
        around.nonlinear(r.Nesterov(lr=LR), "newton_schulz"),
    ),
    Pair(
        "AdaMuon of one step is a sign",
        r.AdaMuon(lr=LR, beta2=0.0, eps=0.0, signed=False, scale="none", momentum=ALPHA),
        around.nonlinear(r.Muon(lr=LR, nesterov=False, scale="none"), "sign"),
        kind="dense",
    ),
    # Adaptive
    Pair("Adam", adam, r.AdamW(lr=LR, weight_decay=0.0)),
    Pair(
        "coupled decay",
        r.Adam(lr=LR, weight_decay=0.1),
        r.AdamW(lr=LR, weight_decay=0.1, decoupled=False),
    ),
    Pair(
        "RMSProp corrected",
        r.Adam(lr=LR, betas=(0.0, 0.9), eps=0.0),
        r.RMSProp(lr=LR, beta2=0.9, eps=0.0),
        factor=lambda t: np.sqrt(1 - 0.9**t),
    ),
    Pair("RMSProp of one step", r.RMSProp(lr=LR, beta2=0.0, eps=0.0), r.SignSGD(lr=LR)),
    *(
        Pair(
            f"AMSGrad of what grows, corrected={corrected}",
            r.AMSGrad(lr=LR, betas=(0.9, 0.9), corrected=corrected),
            r.Adam(lr=LR, betas=(0.9, 0.9)),
            kind="growing",
        )
        for corrected in (False, True)
    ),
    *(
        Pair(
            f"NAdam without a first memory, {schedule}",
            r.NAdam(lr=LR, betas=(0.0, 0.9), schedule=schedule),
            r.Adam(lr=LR, betas=(0.0, 0.9)),
        )
        for schedule in ("dozat", "constant")
    ),
    Pair("RAdam held back", r.RAdam(lr=LR, betas=(ALPHA, 0.5)), heavy, **averaging),
    Pair("AdEMAMix of no weight", r.AdEMAMix(lr=LR, weight=0.0), adam),
    Pair(
        "AdEMAMix of one retention",
        r.AdEMAMix(lr=LR, weight=1.0, betas=(0.0, 0.9), slow=0.0),
        r.Adam(lr=LR, betas=(0.0, 0.9)),
        factor=lambda t: 2.0,
    ),
    Pair("the last gradient as memory", r.DiagonalMemory(lr=LR, retention=0.0), r.SignSGD(lr=LR)),
    Pair(
        "the paper's Adam",
        r.DiagonalMemory(lr=LR, retention=0.9),
        r.Adam(lr=LR, betas=(0.9, 0.9), eps=0.0),
    ),
    Pair(
        "the paper's momentum",
        r.DiagonalMemory(lr=LR, retention=ALPHA, values="square"),
        heavy,
        **averaging,
    ),
    Pair(
        "sums of one gradient",
        r.DiagonalMemory(lr=LR, accumulate="sum"),
        r.AdaGrad(lr=LR, eps=0.0),
        kind="constant",
        factor=float,
    ),
    # Preconditioned
    *(
        Pair(
            f"one frequency, {weighting}, {sides}",
            r.MultiFrequency(
                lr=LR,
                period=1,
                retention=0.95,
                root=4,
                weighting=weighting,
                sides=sides,
                weight=3.0,
            ),
            r.Shampoo(lr=LR, period=4, sides=sides, floor=1e-4),
            tolerance=1e-10 if weighting == "static" else TOLERANCE["float64"],
        )
        for weighting, sides in product(("static", "mass"), ("both", "left", "right"))
    ),
    Pair(
        "frequencies of no weight",
        r.MultiFrequency(lr=LR, period=(1, 4), retention=0.95, weight=(1.0, 0.0), root=4),
        r.Shampoo(lr=LR, period=4),
    ),
    Pair(
        "Shampoo of one row",
        r.Shampoo(lr=LR, sides="left", period=3),
        around.nonlinear(heavy, "rms"),
        shape=(1, 7),
        factor=lambda t: 0.2,
    ),
    *(
        Pair(
            f"Shampoo of one number, {sides}",
            r.Shampoo(lr=LR, momentum=0.0, period=1, sides=sides, scale="none"),
            r.Adam(lr=LR, betas=(0.0, 0.95), eps=0.0),
            shape=(1, 1),
        )
        for sides in ("both", "left", "right")
    ),
    Pair(
        "Shampoo before its first root",
        r.Shampoo(lr=LR, period=99),
        around.nonlinear(heavy, "rms"),
        factor=lambda t: 0.2,
    ),
    Pair(
        "Shampoo grafted on SGD before its first root",
        r.Shampoo(lr=LR, period=99, graft="sgd", momentum=0.0),
        sgd,
    ),
    Pair(
        "SOAP before its first basis",
        r.SOAP(lr=LR, period=99, betas=(0.9, 0.99), scale="none"),
        r.Adam(lr=LR, betas=(0.9, 0.99)),
    ),
    Pair(
        "SOAP before its first basis, at its size",
        r.SOAP(lr=LR, period=99),
        around.nonlinear(r.Adam(lr=LR, betas=(0.95, 0.95)), "rms"),
        factor=lambda t: 0.2,
    ),
    Pair(
        "SOAP of one number",
        r.SOAP(lr=LR, period=2, scale="none"),
        r.Adam(lr=LR, betas=(0.95, 0.95)),
        shape=(1, 1),
    ),
    # Functions around rules
    Pair("cautious where all agree", around.cautious(sgd), sgd, kind="dense"),
    Pair(
        "clipping is seen",
        around.clipped(adam, max_norm=0.5),
        adam,
        sees=clip,
    ),
    Pair(
        "joint clipping of one tensor is its own",
        around.clipped_globally(adam, 0.5),
        around.clipped(adam, max_norm=0.5),
    ),
    *(
        Pair(
            f"the mean over inputs is not seen, outputs {outputs}",
            around.centralized(adam, outputs=outputs),
            adam,
            sees=lambda w, g, c, axis=axis: g - g.mean(axis, keepdims=True),
        )
        for outputs, axis in (("first", 1), ("last", 0))
    ),
    Pair(
        "clipping leaves coupled decay alone",
        around.clipped(r.Adam(lr=LR, weight_decay=0.1), 0.5),
        r.Adam(lr=LR, weight_decay=0.1),
        sees=clip,
    ),
    Pair(
        "clipped jointly and alone",
        around.clipped_globally(around.clipped(heavy, 0.1), 0.5),
        around.clipped(heavy, 0.1),
    ),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_reduction(pair):
    assert pair.distance() <= pair.tolerance


APART = [
    # Oracle 10: orthogonal gradients of one row space, and one column, are not enough.
    Pair("shared row space", delta(solver="explicit"), heavy, "orthonormal", (5, 6),
         factor=lambda t: ETA),
    Pair("scalar", delta(view="scalar", solver="explicit"), heavy, "orthonormal", (5, 6),
         factor=lambda t: ETA),
    Pair("cautious of zeros", around.cautious(sgd), sgd),
    Pair("AMSGrad of what shrinks", r.AMSGrad(lr=LR, betas=(0.9, 0.5)),
         r.Adam(lr=LR, betas=(0.9, 0.5))),
    Pair("a root after all", r.Shampoo(lr=LR, period=29), around.nonlinear(heavy, "rms"),
         factor=lambda t: 0.2),
]  # fmt: skip


@pytest.mark.parametrize("pair", APART, ids=str)
def test_what_does_not_reduce(pair):
    assert pair.distance() >= 1e-4


def path(rule: Rule, w: np.ndarray, gradients: Any, scalars: Any = ()) -> list[np.ndarray]:
    oracle, found = Oracle(rule, [w]), []
    for i, g in enumerate(gradients):
        (w,) = oracle.step([w], [g], **(scalars[i] if scalars else {}))
        found.append(w)
    return found


# Around every rule


def named(rule: Rule) -> str:
    return type(rule).__name__


SAME = {
    "averaged": around.averaged,
    "clipped by much": partial(around.clipped, max_norm=1e9),
    "clipped globally by much": lambda rule: around.clipped_globally(rule, 1e9),
    "read as it is": partial(around.nonlinear, output="identity"),
    "restarted later": partial(around.restarted, restart_period=960),
    "schedule-free between no averages": partial(around.schedule_free, free_beta=0.0),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("rule", DEFAULTS, ids=named)
def test_a_function_around_a_rule_may_change_nothing(rule, name):
    rule = replace(rule, lr=LR, weight_decay=0.1)
    w, g = stream((4, 6), STEPS)
    expected, found = path(rule, w, g), path(SAME[name](rule), w, g)
    assert max(difference(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-12


@pytest.mark.parametrize("rule", [x for x in DEFAULTS if x.domain == "any"], ids=named)
def test_a_vector_has_no_inputs_to_centralise(rule):
    w, g = stream((6,), STEPS)
    np.testing.assert_array_equal(path(around.centralized(rule), w, g), path(rule, w, g))


# The past weights of GGD are memories of weights, which stay.
FORGETFUL = [x for x in CASES if not x.rule.context(x.shape) and not isinstance(x.rule, r.GGD)]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("case", FORGETFUL, ids=str)
def test_a_restart_is_a_new_optimizer(case, every):
    period = int(np.lcm.reduce([4, *case.rule.clocks().values()]))
    rule = replace(case.rule, every=every, stagger=False)
    steps = period * every
    w, g = stream(case.shape, 2 * steps + every)
    found = path(around.restarted(rule, restart_period=period), w, g)
    expected = path(rule, w, g[:steps])
    expected += path(rule, expected[-1], g[steps : 2 * steps])
    expected += path(rule, expected[-1], g[2 * steps :])
    assert max(difference(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-12


@pytest.mark.parametrize("rule", DEFAULTS, ids=named)
def test_an_average_is_of_the_weights(rule):
    rule = replace(rule, lr=LR, weight_decay=0.1)
    w, g = stream((4, 6), STEPS)
    average, oracle = w, Oracle(around.averaged(rule, average_retention=0.8), [w])
    for step in g:
        (w,) = oracle.step([w], [step])
        average = 0.8 * average + 0.2 * w
        assert difference(w + oracle.state[0]["average_offset"], average) <= 1e-12


OUTSIDE = {
    "cautious": around.cautious,
    "centralized": around.centralized,
    "clipped": around.clipped,
    "nonlinear": partial(around.nonlinear, output="sign"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_functions_around_rules_compose_around_an_average(name):
    inner = r.AdamW(lr=LR, weight_decay=0.1)
    w, g = stream((4, 6), STEPS)
    rule = OUTSIDE[name](around.averaged(inner, average_retention=0.8))
    average, oracle = w, Oracle(rule, [w])
    for step in g:
        (w,) = oracle.step([w], [step])
        average = 0.8 * average + 0.2 * w
        assert difference(w + oracle.state[0]["average_offset"], average) <= 1e-12


# What goes by the direction refuses a rule that also moves the weights otherwise.
@pytest.mark.parametrize("name", ["centralized", "clipped", "averaged", "schedule_free"])
def test_the_past_weights_of_ggd_are_those_that_were(name):
    extra = {k: getattr(around, k) for k in ("schedule_free", "averaged")}
    w, g = stream((4, 6), 9)
    rule = (OUTSIDE | extra)[name](r.GGD(lr=LR, objective="dot", weight_decay=0.1))
    oracle = Oracle(rule, [w])
    for step in g:
        (now,) = oracle.step([w], [step])
        assert difference(now + oracle.state[0]["past_1"], w) <= 1e-12
        w = now


@pytest.mark.parametrize("names", [*combinations(OUTSIDE, 2)], ids="+".join)
def test_functions_that_compose_keep_what_each_does_to_a_gradient(names):
    """Gradients are prepared, the outer one first; then come directions, the inner one first."""
    first, second = (OUTSIDE[k] for k in names)
    w, g = stream((4, 6), 1)
    found = path(first(second(r.SGD(lr=1.0))), np.zeros_like(w), g)[0]
    acts = {
        "cautious": (lambda g: g, lambda d, g: d * (d * g > 0) / np.mean(d * g > 0)),
        "centralized": (lambda g: g - g.mean(1, keepdims=True), lambda d, g: d),
        "clipped": (lambda g: g / max(1.0, frob(g)), lambda d, g: d),
        "nonlinear": (lambda g: g, lambda d, g: np.sign(d)),
    }
    (before, after), (inner_before, inner_after) = (acts[k] for k in names)
    seen = inner_before(before(g[0]))
    expected = after(inner_after(seen, seen), seen)
    assert difference(-found, expected) <= 1e-13


# Functions around rules, against their transcriptions

INNER = {
    "sgd": (r.SGD, {}),
    "adamw": (r.AdamW, {"betas": (0.8, 0.9), "eps": 1e-3}),
}
AROUND: dict[str, tuple[Callable[..., Rule], Callable[..., Any]]] = {
    "cautious": (around.cautious, papers.cautious),
    "centralized": (around.centralized, papers.centralized),
    "clipped": (
        partial(around.clipped, max_norm=0.7),
        partial(papers.clipped, max_norm=0.7),
    ),
    "clipped globally": (
        lambda rule: around.clipped_globally(rule, 0.7),
        partial(papers.clipped, max_norm=0.7),
    ),
    "averaged": (
        partial(around.averaged, average_retention=0.8),
        partial(papers.averaged, average_retention=0.8),
    ),
    "schedule_free": (
        partial(around.schedule_free, free_beta=0.8),
        partial(papers.schedule_free, beta=0.8),
    ),
    "restarted": (
        partial(around.restarted, restart_period=4),
        partial(papers.restarted, restart_period=4),
    ),
    **{
        f"nonlinear {output}": (
            partial(around.nonlinear, output=output, iterations=3),
            partial(papers.nonlinear, output=output, steps=3),
        )
        for output in ("identity", "sign", "rms", "newton_schulz")
    },
}
FRAMES = {
    "": {"weight_decay": 0.0},
    "decayed": {"weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1, "decoupled": False},
    "every third": {"weight_decay": 0.1, "every": 3},
}
# The norm of a sum of gradients over all parameters is not known.
REFUSED = {("clipped globally", "every third")}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    ("name", "frame"),
    [x for x in product(AROUND, FRAMES) if x not in REFUSED],
)
def test_functions_around_rules_equal_their_transcriptions(name, frame, inner):
    (made, paper), (cls, given), framed = AROUND[name], INNER[inner], FRAMES[frame]
    w, g = stream((4, 6), STEPS)
    oracle = Oracle(made(cls(lr=LR, **given, **framed)), [w])
    expected, memories = paper(w, list(g), inner=inner, lr=LR, **given, **framed)
    for step, there, memory in zip(g, expected, memories, strict=True):
        (w,) = oracle.step([w], [step])
        assert difference(w, there) <= 1e-12
        state = {k: x for k, x in oracle.state[0].items() if k not in ("weights", "gradient_sum")}
        assert set(state) == set(memory)
        for k, x in state.items():
            assert np.max(np.abs(x - memory[k])) <= 1e-12, k


@pytest.mark.parametrize("inner", INNER)
def test_all_gradients_are_clipped_together(inner):
    cls, given = INNER[inner]
    shapes = [(4, 6), (5,), (1, 3, 2)]
    both = [stream(shape, STEPS, seed=i) for i, shape in enumerate(shapes)]
    ws, streams = [w for w, _ in both], [list(g) for _, g in both]
    frame = {"lr": LR, "weight_decay": 0.1, **given}
    expected = papers.clipped_globally(ws, streams, inner=inner, max_norm=0.7, **frame)
    oracle = Oracle(around.clipped_globally(cls(**frame), 0.7), ws)
    for t, gradients in enumerate(zip(*streams, strict=True)):
        ws = oracle.step(ws, gradients)
        for w, (there, memories), state in zip(ws, expected, oracle.state, strict=True):
            assert difference(w, there[t]) <= 1e-12
            assert all(difference(x, memories[t][k]) <= 1e-12 for k, x in state.items())


@pytest.mark.parametrize("inner", INNER)
def test_schedule_free_weighs_by_the_square_of_a_scheduled_rate(inner):
    cls, given = INNER[inner]
    w, g = stream((4, 6), STEPS)
    # Zero at first, as a warm-up may be.
    rates = LR * np.minimum(np.arange(STEPS) / 10, 1.0)
    frame = {"weight_decay": 0.1, **given}
    expected, memories = papers.schedule_free(w, list(g), inner=inner, lr=rates, beta=0.8, **frame)
    oracle = Oracle(around.schedule_free(cls(**frame), free_beta=0.8), [w])
    for t in range(STEPS):
        (w,) = oracle.step([w], [g[t]], lr=rates[t])
        assert difference(w, expected[t]) <= 1e-12
        offset = oracle.state[0]["average_offset"]
        assert np.max(np.abs(offset - memories[t]["average_offset"])) <= 1e-12


# What is no path of another rule


@pytest.mark.parametrize("solver", ["explicit", "prox"])
def test_the_fixed_point_of_delta_momentum(solver):
    rule = delta(solver=solver)
    g = 0.5 * stream((4, 6), 1, seed=3)[1][0]
    oracle = Oracle(rule, [g])
    for _ in range(2000):
        oracle.step([g], [g])
    expected = ETA * g @ np.linalg.inv((1 - ALPHA) * np.eye(6) + ETA * g.T @ g)
    assert difference(oracle.state[0]["momentum_buffer"], expected) <= 1e-12


def test_flat_delta_leaves_what_is_orthogonal_alone():
    flat = partial(delta, view="flat", momentum=1 - 1e-16)
    a, b = orthonormal((5, 6))[:2]
    oracle = Oracle(flat(solver="explicit", rate=1.0), [a])
    for g in (a, a, *[b] * 50):
        oracle.step([a], [g])
    # Oracles 11 and 12: what was written is neither added again nor worn away.
    assert difference(oracle.state[0]["momentum_buffer"], a + b) <= 1e-12


def test_a_constant_preconditioner_acts_on_the_momentum():
    w, g = stream((4, 6), STEPS)
    ours, theirs = w, w
    one, other = Oracle(given(), [w]), Oracle(heavy, [w])
    for step in g:
        (ours,) = one.step([ours], [step], [{"preconditioner": MATRIX}])
        (theirs,) = other.step([theirs], [step])
        assert difference(ours - w, MATRIX @ (theirs - w)) <= 1e-12


def test_inverse_curvature_is_a_step_of_newton():
    w, target = stream((4, 6), 1)
    hessian = MATRIX @ MATRIX.T + np.eye(4)
    rule = given(momentum=0.0).with_values({"lr": 1.0})
    context = {"preconditioner": np.linalg.inv(hessian)}
    (after,) = Oracle(rule, [w]).step([w], [hessian @ (w - target[0])], [context])
    assert difference(after, target[0]) <= 1e-12


def test_anchors_of_ggd():
    rule = r.GGD(lr=LR, objective="dot", states=3, decay=0.5)
    w, g = stream((4, 6), STEPS)
    past = [w] * 3
    shares = np.array([1.0, 0.5, 0.25]) / 1.75
    for step, found in zip(g, path(rule, w, g), strict=True):
        anchor = sum(c * x for c, x in zip(shares, past, strict=True))
        past = [anchor - LR / 1.75 * step, *past[:2]]
        assert difference(found, past[0]) <= 1e-12


def test_m3_reads_a_chunk_in_the_next_one():
    w, g = stream((4, 6), STEPS)
    one, other = (path(literal(weight=x), w, g) for x in (0.1, 0.7))
    np.testing.assert_array_equal(one[:7], other[:7])
    assert difference(one[7], other[7]) > 1e-6


def test_the_iteration_of_muon_ends_in_the_polar_factor():
    g = dense((4, 6))[:1]
    (found,) = path(r.Muon(lr=1.0, scale="none", coefficients="cubic", steps=40), g[0] * 0.0, g)
    u, _, v = np.linalg.svd(g[0], full_matrices=False)
    assert difference(-found, u @ v) <= 1e-12


def test_the_scale_of_a_step_is_what_its_docstring_says():
    w, g = stream((4, 6), 5)
    for rule in DEFAULTS:
        if "root mean square of a step is 0.2·lr" in type(rule).__doc__:
            paths = path(replace(rule, lr=1.0, weight_decay=0.0), w, g)
            for a, b in pairwise([w, *paths]):
                # Newton-Schulz and the cap leave it near that.
                assert 0.05 <= rms(b - a) <= 0.25, rule
