"""Every rule and every switch, as the fixtures of the battery, and the one table of tolerances."""

from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
import optax
from papers import (
    ada_muon,
    adamw,
    ademamix,
    deep_momentum,
    delta_momentum,
    dgd,
    diagonal_memory,
    feature_momentum,
    ggd,
    heavy_ball,
    lion,
    m3,
    multi_frequency,
    muon,
    nest,
    preconditioned_momentum,
    second_moments,
    sgd,
    shampoo,
    signs,
    soap,
)

from deepopt import Rule, rules
from deepopt.testing import difference as difference
from jax_backend.testing import double_precision as double_precision

PAPER = {
    rules.SGD: sgd.sgd,
    rules.SignSGD: signs.sign_sgd,
    rules.DGD: dgd.dgd,
    rules.GGD: ggd.ggd,
    rules.HeavyBall: heavy_ball.heavy_ball,
    rules.Nesterov: heavy_ball.heavy_ball,
    rules.Signum: signs.signum,
    rules.PreconditionedMomentum: preconditioned_momentum.preconditioned_momentum,
    rules.FeatureMomentum: feature_momentum.feature_momentum,
    rules.DeltaMomentum: delta_momentum.delta_momentum,
    rules.DeepMomentum: deep_momentum.deep_momentum,
    rules.AdaGrad: second_moments.adagrad,
    rules.RMSProp: second_moments.rmsprop,
    rules.Adam: adamw.adamw,
    rules.AdamW: adamw.adamw,
    rules.NAdam: second_moments.nadam,
    rules.RAdam: second_moments.radam,
    rules.AMSGrad: second_moments.amsgrad,
    rules.DiagonalMemory: diagonal_memory.diagonal_memory,
    rules.Lion: lion.lion,
    rules.Muon: muon.muon,
    rules.AdaMuon: ada_muon.ada_muon,
    rules.Shampoo: shampoo.shampoo,
    rules.SOAP: soap.soap,
    rules.MultiFrequency: multi_frequency.multi_frequency,
    rules.M3: m3.m3,
    rules.AdEMAMix: ademamix.ademamix,
    rules.Nest: nest.nest,
}

# Relative to the largest parameter on a path of 40 steps. float64: the same equations rounded in
# another order, amplified at most a thousandfold by five Newton-Schulz steps; float32: the same
# from 6e-8. bfloat16 parameters are rounded, by 2^-8 at most, once in each of the 40 steps, while
# the memories stay float32.
TOLERANCE = {"float64": 1e-12, "float32": 2e-4, "bfloat16": 40 * 2.0**-8}


@dataclass(frozen=True)
class Case:
    rule: Rule
    shape: tuple[int, ...]

    @property
    def tolerance(self) -> float:
        """In float64, relative."""
        return TOLERANCE["float64"]

    def __str__(self) -> str:
        default = type(self.rule)()
        changed = {
            f.name: getattr(self.rule, f.name)
            for f in fields(self.rule)
            if getattr(self.rule, f.name) != getattr(default, f.name) and f.name != "lr"
        }
        switches = ",".join(f"{k}={v}" for k, v in changed.items())
        shape = "x".join(map(str, self.shape))
        return f"{type(self.rule).__name__}({switches})-{shape}".replace(" ", "")


def _switches() -> list[Rule]:
    r = rules
    lr = 0.05
    delta: dict[str, Any] = {"lr": lr, "output": "identity"}
    printed = delta | {"lr": 0.02, "solver": "explicit", "decay": "literal", "normalize": False}
    printed |= {"rate": 0.2, "momentum": 0.8, "scale": "none"}
    deep: dict[str, Any] = {"lr": lr, "width": 3, "output": "identity"}
    nested: dict[str, Any] = {"lr": lr, "period": 7}
    return [
        r.SGD(lr=lr),
        r.SGD(lr=lr, weight_decay=0.1),
        r.SGD(lr=lr, weight_decay=0.1, decoupled=False),
        r.SGD(lr=lr, every=3),
        r.HeavyBall(lr=lr),
        r.HeavyBall(lr=lr, nesterov=True, weight_decay=0.1),
        r.Nesterov(lr=lr, momentum=0.5),
        r.SignSGD(lr=lr, weight_decay=0.1),
        r.Signum(lr=lr),
        r.DGD(lr=lr),
        r.DGD(lr=lr, kappa=0.3, weight_decay=0.1, inputs="first"),
        r.DGD(lr=lr, weight_decay=0.1, decoupled=False),
        *(r.DGD(lr=lr, solver=s, kappa=0.5) for s in ("explicit", "unit")),
        r.DGD(lr=lr, solver="neurips", kappa=0.1),
        r.GGD(lr=lr),
        r.GGD(lr=lr, values="target", states=3, decay=0.7, kappa=0.5, weight_decay=0.1),
        r.GGD(lr=lr, objective="dot", states=4, inputs="first"),
        r.GGD(lr=lr, states=1, inputs="first", weight_decay=0.1, decoupled=False),
        r.PreconditionedMomentum(lr=lr, weight_decay=0.1),
        r.PreconditionedMomentum(lr=lr, values="given", scale="none"),
        r.PreconditionedMomentum(lr=lr, values="kronecker", period=3, floor=1e-3),
        r.PreconditionedMomentum(
            lr=lr, values="kronecker", period=2, block=3, output="newton_schulz", rate=0.5
        ),
        r.PreconditionedMomentum(lr=lr, output="sign", scale="none", momentum=0.5, eps=1e-2),
        r.FeatureMomentum(lr=lr),
        r.FeatureMomentum(lr=lr, power=0.0, output="rms", scale="spectral", weight_decay=0.1),
        r.FeatureMomentum(lr=lr, feature="polynomial"),
        r.FeatureMomentum(
            lr=lr, feature="polynomial", polynomial=(0.5, -0.1, 0.01), rate=0.5, normalize=False
        ),
        r.FeatureMomentum(lr=lr, normalize=False, scale="none"),
        r.FeatureMomentum(lr=lr, power=3.0, output="newton_schulz", coefficients="cubic", steps=7),
        r.AdaGrad(lr=lr),
        r.AdaGrad(lr=lr, initial=0.1, eps=1e-3, weight_decay=0.1),
        r.RMSProp(lr=lr),
        r.RMSProp(lr=lr, centered=True, beta2=0.8, eps=1e-2),
        r.Adam(lr=lr, weight_decay=0.1),
        r.NAdam(lr=lr),
        r.NAdam(lr=lr, schedule="constant", betas=(0.8, 0.95), eps=1e-3),
        r.NAdam(lr=lr, momentum_decay=0.1, weight_decay=0.1),
        r.RAdam(lr=lr, weight_decay=0.1),
        r.RAdam(lr=lr, betas=(0.8, 0.95), eps=1e-3),
        r.AMSGrad(lr=lr),
        r.AMSGrad(lr=lr, corrected=True, betas=(0.8, 0.9), eps=1e-3),
        r.DiagonalMemory(lr=lr),
        r.DiagonalMemory(lr=lr, values="square", ridge=0.1),
        r.DiagonalMemory(lr=lr, accumulate="sum", retention=0.5, weight_decay=0.1),
        r.AdamW(lr=lr),
        r.AdamW(lr=lr, decoupled=False, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-3),
        r.AdamW(lr=lr, every=4),
        r.Lion(lr=lr, weight_decay=0.1),
        r.Muon(lr=lr),
        r.Muon(lr=lr, nesterov=False, scale="spectral", coefficients="cubic", steps=9),
        r.Muon(lr=lr, scale="none", momentum=0.5),
        r.Muon(lr=lr, coefficients="polar_express", steps=5),
        r.DeltaMomentum(lr=lr),
        r.AdaMuon(lr=lr),
        r.AdaMuon(lr=lr, signed=False, scale="none", momentum=0.5, eps=1e-2, weight_decay=0.1),
        r.Shampoo(lr=lr, period=1),
        r.Shampoo(lr=lr, period=4, sides="left", accumulate="sum", floor=1e-3, graft="sgd"),
        r.Shampoo(lr=lr, period=3, sides="right", graft="adam", block=3, eps=1e-3),
        r.Shampoo(lr=lr, period=5, block=2, scale="spectral", momentum=0.5, weight_decay=0.1),
        r.MultiFrequency(lr=lr, period=(1, 2, 6), root=3),
        r.MultiFrequency(lr=lr, period=(2, 4), retention=(0.8, 0.5), weighting="mass", root=2),
        r.MultiFrequency(
            lr=lr, period=(1, 3), weight=(1.0, 0.5), sides="right", block=3, graft="adam", root=1
        ),
        r.SOAP(lr=lr, period=4),
        r.SOAP(lr=lr, period=3, damping=0.1),
        r.SOAP(lr=lr, period=3, rotate=False, scale="none", betas=(0.9, 0.99), eps=1e-3),
        r.SOAP(lr=lr, period=2, sides="left", refresh="eigh", shampoo_beta=0.8, eps=1e-3),
        r.SOAP(lr=lr, period=5, sides="right", block=3, weight_decay=0.1),
        r.AdEMAMix(lr=lr),
        r.AdEMAMix(lr=lr, betas=(0.8, 0.95), slow=0.97, weight=2.0, eps=1e-3, weight_decay=0.1),
        r.Nest(lr=lr, period=(1, 3)),
        r.Nest(lr=lr, memory=("table", "delta", "deep"), period=(1, 2, 5), weight=0.5, width=3),
        r.Nest(
            lr=lr,
            memory=("deep", "delta"),
            period=(3, 1),
            retention=(0.95, 0.8),
            weight=(0.5, 1.0),
            output=("identity", "sign"),
            scale="spectral",
            width=3,
            weight_decay=0.1,
        ),
        r.Nest(lr=lr, memory="delta", period=4, weight=1.0, output="rms", scale="none"),
        r.DeltaMomentum(lr=lr, output="sign"),
        r.DeltaMomentum(lr=lr, view="flat", scale="spectral"),
        *(
            r.DeltaMomentum(view=v, solver=s, rate=0.3, **delta)
            for v in ("matrix", "flat", "scalar")
            for s in ("prox", "explicit")
        ),
        *(r.DeltaMomentum(view=v, **printed) for v in ("matrix", "flat", "scalar")),
        r.DeltaMomentum(normalize=False, scale="none", rate=0.5, **delta),
        r.DeepMomentum(lr=lr),
        r.DeepMomentum(**deep),
        r.DeepMomentum(objective="dot", retention=0.8, **deep),
        r.DeepMomentum(teacher="gradient", anchor="zero", rate=0.5, **deep),
        r.DeepMomentum(scale="none", teacher_retention=0.5, weight_decay=0.1, **deep),
        r.M3(**nested),
        r.M3(accumulate="sum", **nested),
        r.M3(second_moment="update", nesterov=False, **nested),
        r.M3(second_moment="none", scale="spectral", **nested),
        r.M3(floor=0.0, eps=1e-3, weight=0.7, weight_decay=0.1, **nested),
        r.M3(cap=0.15, **nested),
        r.M3(literal=True, eps=1e-8, **nested),
        r.M3(lr=lr, slow=(0.9, 0.8), period=(3, 12), weight=(0.3, 0.2)),
        r.M3(lr=lr, period=3, every=2),
    ]


# Wide, tall and square in turn, so that both sides of every transposition are seen.
SHAPES = [(4, 6), (7, 3), (5, 5)]
CASES = [Case(rule, SHAPES[i % 3]) for i, rule in enumerate(_switches())] + [
    Case(rules.AdamW(lr=0.05), (6,)),
    Case(rules.HeavyBall(lr=0.05), (2, 3, 2)),
    *(Case(cls(lr=0.05), s) for cls in (rules.DeltaMomentum, rules.M3) for s in ((1, 5), (5, 1))),
]
# The rules that go by the gradient alone.
DEFAULTS = [cls() for cls in rules.ALL if not cls().context((2, 2))]


def contexts(rule: Rule, shape: tuple[int, ...], steps: int) -> list[dict[str, np.ndarray]]:
    """For each step what a rule needs beyond the gradient: a Gram matrix, or any P."""
    rng = np.random.default_rng(7)
    found: list[dict[str, np.ndarray]] = []
    for _ in range(steps):
        step = {}
        for name, (n, _) in rule.context(shape).items():
            x = rng.standard_normal((n + 8, n)) * np.exp(rng.standard_normal(n))
            step[name] = x.T @ x / len(x) if name == "gram" else x[:n]
        found.append(step)
    return found


def stream(shape: tuple[int, ...], steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A parameter and gradients of unlike sizes with one row and some entries exactly zero."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    scale = np.exp(rng.standard_normal((steps, *[1] * len(shape))))
    g = rng.standard_normal((steps, *shape)) * scale * 0.3 + rng.standard_normal(shape) * 0.2
    if len(shape) > 1 and shape[0] > 2:
        g[:, 1] = 0.0
        g[:, 0, 0] = 0.0
    return w, g


def scanned(
    tx: optax.GradientTransformationExtraArgs, w: Any, gradients: Any, context: Any = None
) -> Any:
    """The parameters after each step of an optax transformation, from one compilation of a scan."""

    @jax.jit
    def run(w, gradients, context):
        def one(carry, step):
            w, state = carry
            g, given = step
            more = {"context": given} if given else {}
            updates, state = tx.update(g, state, w, **more)
            w = optax.apply_updates(w, updates)
            return (w, state), w

        return jax.lax.scan(one, (w, tx.init(w)), (gradients, context))[1]

    return run(w, gradients, context or {})
