"""How much each rule forgets on a stream of orthogonal tasks (Eq. 45).

    python -m benchmarks.forgetting

Eight linear regressions, each on inputs from a subspace of its own, one after the other; once with
orthogonal subspaces, once with neighbours that share a quarter of theirs. Writes
results/forgetting.jsonl, the tables of docs/forgetting.md between their markers, and the picture.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.figures import STYLE, between, conditions, save
from deepopt import Oracle, rules
from deepopt.oracle import Array
from deepopt.rule import Rule

RESULTS = Path("results/forgetting.jsonl")
PAGE = Path("docs/forgetting.md")
PICTURE = Path("docs/images/forgetting.png")

INPUTS, OUTPUTS, TASKS, RANK = 64, 16, 8, 8
STEPS, BATCH, NOISE = 120, 16, 0.1
SHARED = {"orthogonal": 0, "overlap": 2}  # directions that a task shares with the one before
SEEDS = (0, 1, 2)
TUNING_SEED, TUNING_TASKS = 1000, 3
LRS = tuple(2.0**k for k in range(-14, 5))
ENOUGH = 0.01  # of the loss of zero weights
LOOK = (1, 10, 40, STEPS)  # steps into a task at which shares are on file

RULES: dict[str, Rule] = {
    "SGD": rules.SGD(),
    "DGD": rules.DGD(kappa=1.0),
    "HeavyBall": rules.HeavyBall(),
    "HeavyBall 0.99": rules.HeavyBall(momentum=0.99),
    "Nesterov": rules.Nesterov(),
    "DeltaMomentum matrix": rules.DeltaMomentum(),
    "DeltaMomentum flat": rules.DeltaMomentum(view="flat"),
    "DeltaMomentum scalar": rules.DeltaMomentum(view="scalar"),
    "DeltaMomentum as it is": rules.DeltaMomentum(output="identity"),
    "DeepMomentum": rules.DeepMomentum(),
    "Muon": rules.Muon(),
    "M3": rules.M3(),
    "Nest": rules.Nest(weight=(1.0, 0.1)),
    "Shampoo": rules.Shampoo(),
    "SOAP": rules.SOAP(),
    "MultiFrequency": rules.MultiFrequency(),
    "Signum": rules.Signum(),
    "FeatureMomentum": rules.FeatureMomentum(),
    "PreconditionedMomentum": rules.PreconditionedMomentum(),
    "AdamW": rules.AdamW(weight_decay=0.0),
    "AdEMAMix": rules.AdEMAMix(),
}
# The memory of the gradient, and the slow one beside it.
MEMORIES = (
    ("momentum_buffer", "exp_avg", "fast", "memory_0"),
    ("exp_avg_slow", "slow_1", "memory_1"),
)

CURVES = ("HeavyBall", "DeltaMomentum as it is", "DeltaMomentum matrix", "Muon", "AdamW", "Signum")


@dataclass(frozen=True)
class Stream:
    """Tasks y = T x + noise on x in the span of orthonormal columns: `axes[t]` of `basis`."""

    basis: Array  # inputs × inputs, orthogonal
    axes: list[Array]
    targets: Array  # tasks × outputs × rank, on those axes
    codes: Array  # tasks × steps × batch × rank: the inputs on those axes
    noise: Array  # tasks × steps × batch × outputs

    def losses(self, w: Array) -> Array:
        """The exact loss of each task, as a share of the loss of zero weights."""
        errors = np.array([w @ self.basis[:, a] for a in self.axes]) - self.targets
        return (errors**2).sum((1, 2)) / (self.targets**2).sum((1, 2))

    def old(self, task: int) -> Array:
        """An orthonormal basis of what earlier tasks used and this one does not."""
        used = {int(i) for a in self.axes[:task] for i in a} - {int(i) for i in self.axes[task]}
        return self.basis[:, sorted(used)]

    def forced(self) -> float:
        """The mean loss on tasks but the last where each was learnt exactly, with least change."""
        w = np.zeros((OUTPUTS, INPUTS))
        for axes, target in zip(self.axes, self.targets, strict=True):
            u = self.basis[:, axes]
            w += (target - w @ u) @ u.T
        return float(self.losses(w)[:-1].mean())


def stream(seed: int, shared: int) -> Stream:
    """The same targets, inputs and noise for every rule; no axis is one of the coordinates."""
    rng = np.random.default_rng(seed)
    return Stream(
        basis=np.linalg.qr(rng.normal(size=(INPUTS, INPUTS)))[0],
        axes=[np.arange(RANK) + t * (RANK - shared) for t in range(TASKS)],
        targets=rng.normal(size=(TASKS, OUTPUTS, RANK)) / np.sqrt(RANK),
        codes=rng.normal(size=(TASKS, STEPS, BATCH, RANK)),
        noise=NOISE * rng.normal(size=(TASKS, STEPS, BATCH, OUTPUTS)),
    )


def share(x: Array, basis: Array) -> float:
    """Of the squared norm of the rows, how much lies along the basis; not a number for zero."""
    whole = float((x**2).sum())
    return float(((x @ basis) ** 2).sum()) / whole if whole > 0 else float("nan")


def train(
    rule: Rule, data: Stream, tasks: int = TASKS, cleared: bool = False
) -> tuple[Array, Array]:
    """Losses (after each task, of each task); shares (task, step, of step · memory · slow memory).

    The learning rate falls linearly to zero within each task and starts again with the next.
    cleared: start every task with new memories.
    """
    w = np.zeros((OUTPUTS, INPUTS))
    oracle = Oracle(rule, [w])
    watched = [next((k for k in names if k in oracle.state[0]), None) for names in MEMORIES]
    losses, shares = np.zeros((tasks, TASKS)), np.full((tasks, STEPS, 3), np.nan)
    with np.errstate(all="ignore"):
        for t in range(tasks):
            u, old = data.basis[:, data.axes[t]], data.old(t)
            oracle = Oracle(rule, [w]) if cleared else oracle
            for i in range(STEPS):
                z = data.codes[t, i]
                error = z @ (w @ u - data.targets[t]).T - data.noise[t, i]
                gradient = error.T @ z @ u.T / BATCH
                context = [{"gram": u @ (z.T @ z / BATCH) @ u.T} if rule.context(w.shape) else {}]
                (new,) = oracle.step([w], [gradient], context, lr=rule.lr * (1 - i / STEPS))
                if t:
                    parts = [new - w, *(oracle.state[0][k] if k else 0 * w for k in watched)]
                    shares[t, i] = [share(x, old) for x in parts]
                w = new
            losses[t] = data.losses(w)
            if not losses[t].max() < 1e6:
                losses[t:] = np.inf
                break
    return losses, shares


def tuned(rule: Rule) -> tuple[Rule, bool]:
    """The rule at the least lr of the grid that learns the current task, else at the best one."""
    data, found = stream(TUNING_SEED, SHARED["orthogonal"]), []
    for lr in LRS:
        candidate = replace(rule, lr=lr)
        losses, _ = train(candidate, data, TUNING_TASKS)
        loss = np.diagonal(losses).mean()
        if loss <= ENOUGH:
            return candidate, True
        found.append((loss, lr))
    return replace(rule, lr=min(found)[1]), False


def run(name: str, rule: Rule, variant: str, seed: int, enough: bool) -> dict[str, Any]:
    """The record of a stream."""
    data, start = stream(seed, SHARED[variant]), time.process_time()
    losses, shares = train(rule, data)
    own = np.diagonal(losses)
    lost = [[losses[t, j] - own[j] for t in range(j, TASKS)] for j in range(TASKS - 1)]
    fresh, _ = train(rule, data, cleared=True)
    seen = np.array([shares[1:, i - 1].mean(0) for i in LOOK])
    return {
        "name": name,
        "rule": repr(rule),
        "lr": rule.lr,
        "enough": enough,
        "variant": variant,
        "seed": seed,
        "current": short(own.mean()),
        "forgetting": short(np.mean([x[-1] for x in lost])),
        "cleared": short((fresh[-1] - np.diagonal(fresh))[:-1].mean()),
        "forced": short(data.forced()),
        "after_later_tasks": [
            short(np.mean([x[k] for x in lost if len(x) > k])) for k in range(TASKS)
        ],
        "losses": [[short(x) for x in row] for row in losses],
        "step_share": {i: short(x) for i, x in zip(LOOK, seen[:, 0], strict=True)},
        "memory_share": {i: short(x) for i, x in zip(LOOK, seen[:, 1], strict=True)},
        "slow_share": {i: short(x) for i, x in zip(LOOK, seen[:, 2], strict=True)},
        "cpu_s": round(time.process_time() - start, 2),
        **conditions(),
    }


def short(x: Any) -> float | None:
    """Four digits of a number, None for one that is not finite."""
    return float(f"{x:.4g}") if np.isfinite(x) else None


def percent(values: Sequence[Any]) -> str:
    """Mean ± standard deviation over seeds, in percent."""
    if None in values:
        return "diverged"
    mean, spread = 100 * np.mean(values), 100 * np.std(values, ddof=1)
    if abs(mean) < 0.005:
        return "0"
    digits = 0 if abs(mean) >= 9.95 else 1 if abs(mean) >= 0.95 else 2
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def shown(values: Sequence[Any]) -> str:
    """A mean share, in percent."""
    if None in values:
        return "–"
    mean = 100 * np.mean(values)
    return f"{mean:.0f}" if mean >= 0.95 else f"{mean:.1f}" if mean >= 0.05 else "0"


def both(rows: Sequence[dict[str, Any]], step: int) -> str:
    """The shares of the memory and, where there is one, of the slow memory."""
    fast, slow = ([r[k][step] for r in rows] for k in ("memory_share", "slow_share"))
    return shown(fast) if None in slow else f"{shown(fast)}; {shown(slow)}"


def orthogonal_table(records: Sequence[dict[str, Any]]) -> str:
    """What is forgotten on orthogonal tasks, and where steps and memories point."""
    table = [
        "| rule | lr | own task | forgotten | memories cleared | step 10 | step 40 | memory 10 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in RULES:
        rows = [r for r in records if r["name"] == name and r["variant"] == "orthogonal"]
        cells = [percent([r[k] for r in rows]) for k in ("current", "forgetting", "cleared")]
        cells += [shown([r["step_share"][i] for r in rows]) for i in (10, 40)]
        star = "" if rows[0]["enough"] else " *"
        table.append(
            f"| {name} | {rows[0]['lr']:.3g}{star} | {' | '.join(cells)} | {both(rows, 10)} |"
        )
    return "\n".join(table)


def overlap_table(records: Sequence[dict[str, Any]]) -> str:
    """What is forgotten where neighbours share a quarter, beyond what learning the next forces."""
    ages = (1, 3, 7)
    table = [
        "| rule | own task | forgotten | beyond forced | memories cleared, beyond forced | "
        + " | ".join(f"after {k} later" for k in ages)
        + " |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in RULES:
        rows = [r for r in records if r["name"] == name and r["variant"] == "overlap"]
        cells = [percent([r[k] for r in rows]) for k in ("current", "forgetting")]
        for k in ("forgetting", "cleared"):
            known = None not in [r[k] for r in rows]
            cells.append(percent([r[k] - r["forced"] for r in rows]) if known else "diverged")
        cells += [shown([r["after_later_tasks"][k] for r in rows]) for k in ages]
        table.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(table)


def draw(records: Sequence[dict[str, Any]], chosen: dict[str, Rule]) -> None:
    """Forgetting of each rule in both variants; the old share of its steps as a task goes on."""
    names = list(reversed(RULES))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 3, figsize=(11.5, 4.8), layout="constrained", width_ratios=(1, 1, 1.15)
        )
        for panel, variant in zip(axes, SHARED, strict=False):
            rows = [
                [r for r in records if (r["name"], r["variant"]) == (n, variant)] for n in names
            ]
            for key, colour, face in (("forgetting", "C3", "C3"), ("cleared", "C0", "white")):
                for y, own in enumerate(rows):
                    values = [max(r[key], 1e-4) for r in own if r[key] is not None]
                    panel.plot([min(values), max(values)], [y, y], color=colour, lw=1)
                    label = {"forgetting": "as it is", "cleared": "memories cleared"}[key]
                    panel.plot(
                        np.mean(values),
                        y,
                        "o",
                        color=colour,
                        mfc=face,
                        ms=5,
                        label=label if y == 0 else None,
                    )
            panel.set(xscale="log", ylim=(-0.6, len(names) - 0.4), yticks=range(len(names)))
            panel.grid(axis="y", lw=0.3)
            panel.minorticks_off()
            panel.tick_params(axis="y", length=0)
        axes[0].set(yticklabels=names, xlim=(6e-5, 20), title="Forgotten, orthogonal tasks")
        axes[0].set_xlabel("loss on old tasks, share of the loss of zero weights")
        axes[0].set_xticks(
            [1e-4, 1e-3, 1e-2, 1e-1, 1, 10], ["≤ .01 %", ".1", "1", "10", "100", "1000"]
        )
        axes[1].set(yticklabels=[], xlim=(0.18, 14), title="Forgotten, a quarter shared")
        forced = np.mean([r["forced"] for r in records if r["variant"] == "overlap"])
        axes[1].axvline(forced, color="0.4", lw=0.8, ls=":")
        axes[1].annotate(" forced", (forced, len(names) - 0.95), color="0.4", fontsize=7)
        axes[1].set_xticks([0.25, 0.5, 1, 2, 5, 10], ["25 %", "50", "100", "200", "500", "1000"])
        axes[1].legend(loc="lower right")
        for i, name in enumerate(CURVES):
            _, shares = train(chosen[name], stream(SEEDS[0], 0))
            curve = shares[1:, :, :2].mean(0)
            steps = np.arange(1, STEPS + 1)
            axes[2].plot(steps, curve[:, 0], color=f"C{i}", lw=1.4, label=name)
            axes[2].plot(steps, curve[:, 1], color=f"C{i}", lw=0.9, ls=":")
        axes[2].set(yscale="log", ylim=(1e-6, 1.5), xlabel="step into a task")
        axes[2].set_title("Share along old tasks: step —, memory ···")
        axes[2].legend(loc="upper left", bbox_to_anchor=(-0.1, -0.12), ncols=3)
        save(figure, PICTURE)


def main() -> int:
    """Run everything; returns the exit status."""
    records: list[dict[str, Any]] = []
    chosen: dict[str, Rule] = {}
    for i, (name, rule) in enumerate(RULES.items()):
        print(f"\r[{i + 1}/{len(RULES)}] {name:24}", end="", file=sys.stderr, flush=True)
        chosen[name], enough = tuned(rule)
        for variant in SHARED:
            records += [run(name, chosen[name], variant, seed, enough) for seed in SEEDS]
    print(file=sys.stderr)
    RESULTS.write_text("".join(json.dumps(r) + "\n" for r in records))
    between(PAGE, "orthogonal", orthogonal_table(records))
    between(PAGE, "overlap", overlap_table(records))
    draw(records, chosen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
