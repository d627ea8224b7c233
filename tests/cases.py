"""Every rule and every switch, as the fixtures of the battery, and the one table of tolerances."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
import optax
from papers import adamw, deep_momentum, delta_momentum, heavy_ball, lion, m3, muon, sgd

from deepopt import Rule, rules

PAPER = {
    rules.SGD: sgd.sgd,
    rules.HeavyBall: heavy_ball.heavy_ball,
    rules.AdamW: adamw.adamw,
    rules.Lion: lion.lion,
    rules.Muon: muon.muon,
    rules.DeltaMomentum: delta_momentum.delta_momentum,
    rules.DeepMomentum: deep_momentum.deep_momentum,
    rules.M3: m3.m3,
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
        r.AdamW(lr=lr),
        r.AdamW(lr=lr, decoupled=False, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-3),
        r.AdamW(lr=lr, every=4),
        r.Lion(lr=lr, weight_decay=0.1),
        r.Muon(lr=lr),
        r.Muon(lr=lr, nesterov=False, scale="spectral", coefficients="cubic", steps=9),
        r.Muon(lr=lr, scale="none", momentum=0.5),
        r.DeltaMomentum(lr=lr),
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
DEFAULTS = [cls() for cls in rules.ALL]


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


@contextmanager
def double_precision(enabled: bool = True) -> Iterator[None]:
    """jax in 64 bits inside the block; jax older than 0.8 has no context manager for it."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def scanned(tx: optax.GradientTransformation, w: Any, gradients: Any) -> Any:
    """The parameters after each step of an optax transformation, from one compilation of a scan."""

    @jax.jit
    def run(w, gradients):
        def one(carry, g):
            w, state = carry
            updates, state = tx.update(g, state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), w

        return jax.lax.scan(one, (w, tx.init(w)), gradients)[1]

    return run(w, gradients)


def difference(a: Any, b: Any) -> float:
    """Largest difference relative to the largest entry of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.max(np.abs(a - b), initial=0.0) / max(np.max(np.abs(b), initial=0.0), 1e-30))
