"""The candidates of `benchmarks.defaults`: which knobs of which rule, on how many seeds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from deepopt import rules
from deepopt.rule import Rule


@dataclass(frozen=True)
class Candidate:
    """A rule with the learning rate and the knobs that make it up, and the seeds to run it on."""

    rule: Rule
    label: str
    seeds: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        return type(self.rule).__name__


# What "as it was" means in the tables: the defaults when the experiment began, written out so that
# a candidate stays what it is when a default changes.
STARTS: dict[type[Rule], dict[str, Any]] = {
    rules.AdamW: dict(betas=(0.9, 0.999), eps=1e-8),
    rules.HeavyBall: dict(momentum=0.9, nesterov=False),
    rules.Lion: dict(betas=(0.9, 0.99)),
    rules.Muon: dict(momentum=0.95, nesterov=True),
    rules.DeltaMomentum: dict(momentum=0.9, rate=1.0, view="matrix", solver="prox", decay="eta")
    | dict(normalize=True, output="newton_schulz"),
    rules.DeepMomentum: dict(retention=0.99, rate=1.0, objective="l2", teacher="ema", width=32)
    | dict(teacher_retention=0.9, anchor="initial", output="newton_schulz"),
    rules.M3: dict(momentum=0.95, slow=0.9, period=16, weight=0.1, beta2=0.95, floor=0.1)
    | dict(nesterov=True, accumulate="ema", second_moment="gradient", literal=False),
}

# Learning rates of the first stage; those of AdamW, HeavyBall and Lion are in units of their own.
RATES: dict[type[Rule], tuple[float, ...]] = {
    rules.Muon: (1e-2, 3e-3, 2e-2),
    rules.M3: (1e-2, 3e-3, 2e-2),
    rules.DeltaMomentum: (1e-2, 3e-3, 2e-2),
    rules.AdamW: (3e-3, 1e-3, 1e-2),
    rules.DeepMomentum: (1e-2, 3e-3, 2e-2),
    rules.HeavyBall: (0.3, 0.1, 1.0),
    rules.Lion: (1e-3, 3e-4, 3e-3),
}


def at(kind: type[Rule], lr: float, *, seeds: tuple[int, ...] = (0,), **knobs: Any) -> Candidate:
    """A candidate: the rule's start with other knobs."""
    label = ", ".join(f"{k} {v}" for k, v in knobs.items()) or "as it was"
    return Candidate(kind(**{"lr": lr, **STARTS[kind], **knobs}), label, seeds)


def candidates() -> list[Candidate]:
    """All candidates; the starts of most rules and the leading knobs on a second seed too."""
    first = [at(kind, rates[i]) for i in range(3) for kind, rates in RATES.items()]
    repeated = {
        (rules.DeltaMomentum, 1e-2),
        (rules.Muon, 1e-2),
        (rules.DeepMomentum, 2e-2),
        (rules.AdamW, 3e-3),
        (rules.Lion, 3e-4),
        (rules.HeavyBall, 0.3),
    }
    again = [(type(c.rule), c.rule.lr) in repeated for c in first]
    first = [replace(c, seeds=(0, 1) if r else (0,)) for c, r in zip(first, again, strict=True)]
    return [*first, *second_stage()]


def second_stage() -> Iterator[Candidate]:
    """Each rule's own knobs at 1e-2, a rate that every matrix rule is stable at, then the best."""
    muon, m3, delta, deep = rules.Muon, rules.M3, rules.DeltaMomentum, rules.DeepMomentum
    both = (0, 1)
    yield at(muon, 1e-2, seeds=both, momentum=0.9)
    yield at(delta, 1e-2, seeds=both, rate=3.0)
    yield at(m3, 1e-2, seeds=both, momentum=0.9)
    yield at(m3, 1e-2, seeds=both, momentum=0.9, weight=0.0)
    yield at(muon, 2e-2, seeds=both, momentum=0.9)
    yield at(m3, 2e-2, seeds=both, momentum=0.9)
    yield at(muon, 3e-3, momentum=0.9)
    yield at(m3, 3e-3, momentum=0.9)
    yield at(delta, 1e-2, momentum=0.8)
    yield at(muon, 1e-2, momentum=0.8)
    yield at(delta, 2e-2, rate=3.0)
    yield at(m3, 2e-2, momentum=0.9, weight=0.0)
    yield at(rules.AdamW, 3e-3, betas=(0.9, 0.95))
    yield at(rules.Lion, 1e-4)
    yield at(m3, 1e-2, weight=0.0)
    yield at(delta, 1e-2, momentum=0.95)
    yield at(delta, 1e-2, view="flat")
    yield at(deep, 1e-2, retention=0.9)
    yield at(muon, 1e-2, momentum=0.9, nesterov=False)
    yield at(muon, 1e-2, nesterov=False)
    yield at(m3, 1e-2, second_moment="none")
    yield at(m3, 1e-2, second_moment="update")
    yield at(delta, 1e-2, solver="explicit")
    yield at(delta, 1e-2, rate=0.3)
    yield at(deep, 1e-2, objective="dot")
    yield at(deep, 1e-2, output="identity")
    yield at(m3, 1e-2, weight=0.3)
    yield at(m3, 1e-2, floor=0.001)
    yield at(m3, 1e-2, momentum=0.9, nesterov=False)
    yield at(m3, 1e-2, period=64)
    yield at(m3, 1e-4, literal=True)
    yield at(delta, 1e-2, output="identity")
    yield at(delta, 1e-2, view="scalar")
    yield at(deep, 1e-2, rate=0.3)
    yield at(deep, 1e-2, width=8)
    yield at(deep, 1e-2, teacher_retention=0.95)
    yield at(rules.HeavyBall, 0.3, momentum=0.95)
    yield at(rules.HeavyBall, 0.3, nesterov=True)
    yield at(rules.AdamW, 3e-3, betas=(0.95, 0.95))
    yield at(rules.Lion, 3e-4, betas=(0.95, 0.98))
    yield at(m3, 3e-4, literal=True)
    yield at(m3, 3e-5, literal=True)
    yield at(m3, 1e-5, literal=True)
