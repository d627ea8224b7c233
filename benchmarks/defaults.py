"""Earns the rules' default hyperparameters on real text: `python -m benchmarks.defaults`.

A small byte GPT on Python's own sources; hidden matrices by the candidate, everything else always
by the same AdamW; the same weights and the same data for every candidate of a seed. One JSON line
per run; a run that is on file is not repeated. docs/defaults.md reads the outcome.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.candidates import STARTS, Candidate, candidates
from deepopt import rules
from deepopt.rule import Rule
from examples.compare.tasks.language import GPT
from examples.hope import data
from examples.hope.train import cost
from torch_backend import Optimizer

ASKED = ("rule", "knobs", "seed", "protocol", "corpus")
RESULTS = Path("results/defaults.jsonl")
QUICK_RESULTS = Path("runs/defaults-quick.jsonl")


@dataclass(frozen=True)
class Protocol:
    """What is the same for every candidate."""

    layers: int = 3
    width: int = 96
    heads: int = 4
    length: int = 128
    batch: int = 16
    steps: int = 300
    evaluation_batches: int = 8
    warmup: float = 0.1  # share of the steps; the rate is linear up, then a cosine down
    last: float = 0.1  # share of the rate at the end
    clip: float = 1.0
    weight_decay: float = 0.1  # of hidden matrices
    rest_lr: float = 3e-3  # AdamW of embeddings, head and gains
    rest_betas: tuple[float, float] = (0.9, 0.95)


QUICK = Protocol(layers=1, width=48, length=32, batch=4, steps=20, evaluation_batches=2)


def schedule(step: int, p: Protocol) -> float:
    """Factor of the learning rate at a step, from 0."""
    warm = max(1, round(p.warmup * p.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, p.steps - warm)
    return p.last + (1 - p.last) * 0.5 * (1 + math.cos(math.pi * done))


@cache
def corpus(length: int) -> data.Corpus:
    return data.load(length=length)


def settings(rule: Rule, seed: int, p: Protocol) -> dict[str, Any]:
    """What a run's outcome depends on."""
    return {
        "rule": type(rule).__name__,
        "knobs": asdict(rule),
        "seed": seed,
        "protocol": asdict(p),
        "corpus": corpus(p.length).sha256,
    }


def identity(asked: dict[str, Any]) -> str:
    """The run's id: equal settings, equal id. Of the knobs those count that a candidate names."""
    starts = {kind.__name__: own for kind, own in STARTS.items()}
    own: dict[str, Any] = starts.get(asked["rule"]) or asked["knobs"]
    named = {k: asked["knobs"][k] for k in dict.fromkeys(("lr", "weight_decay", *own))}
    text = json.dumps({k: named if k == "knobs" else asked[k] for k in ASKED}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(
    rule: Rule, seed: int, p: Protocol, optimizer_of: Callable[..., Optimizer] = Optimizer
) -> dict[str, Any]:
    """Train once and measure; the record of the run."""
    torch.set_num_threads(1)
    text = corpus(p.length)
    rule = replace(rule, weight_decay=p.weight_decay)
    torch.manual_seed(seed)
    model = GPT(p.layers, p.width, p.heads, p.length)
    hidden = [w for w in model.blocks.parameters() if w.ndim == 2]
    known = {id(w) for w in hidden}
    rest = [w for w in model.parameters() if id(w) not in known]
    adamw = rules.AdamW(lr=p.rest_lr, betas=p.rest_betas, weight_decay=0.0)
    groups = [{"params": hidden, "rule": rule}, {"params": rest, "rule": adamw}]
    optimizer = optimizer_of(groups)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, p))
    crops = data.batches(text.train, p.batch, p.length, seed)
    held_out = data.windows(text.valid, p.batch, p.length, p.evaluation_batches)

    wall, cpu = time.perf_counter(), time.process_time()
    losses: list[float] = []
    for _ in range(p.steps):
        loss = cost(model, next(crops))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), p.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    with torch.no_grad():
        nats = sum(cost(model, x).item() for x in held_out) / len(held_out)
    tail = losses[-20:]
    asked = settings(rule, seed, p)
    return {
        "id": identity(asked),
        "status": "done" if math.isfinite(nats) else "diverged",
        "nats": round(nats, 4) if math.isfinite(nats) else None,
        "train_nats": round(sum(tail) / len(tail), 4) if math.isfinite(sum(tail)) else None,
        "steps": len(losses),
        "cpu_s": round(time.process_time() - cpu, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **asked,
    }


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The records on file by id."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {r["id"]: r for r in map(json.loads, lines)}


def shown(record: dict[str, Any] | None) -> str:
    """A cell of the table."""
    if record is None:
        return "not run"
    return "diverged" if record["nats"] is None else f"{record['nats']:.3f}"


def markdown(chosen: Iterable[Candidate], p: Protocol, done: dict[str, dict[str, Any]]) -> str:
    """One row per candidate, rule by rule, and a column per seed that any candidate has."""
    chosen = list(chosen)
    found: dict[tuple[int, int], dict[str, Any] | None] = {}
    for i, c in enumerate(chosen):
        for seed in (0, 1):
            rule = replace(c.rule, weight_decay=p.weight_decay)
            found[i, seed] = done.get(identity(settings(rule, seed, p)))
    order = {kind.__name__: i for i, kind in enumerate(STARTS)}
    rows = ["| rule | lr | candidate | seed 0 | seed 1 | CPU s |", "|---|---|---|---|---|---|"]
    for i in sorted(range(len(chosen)), key=lambda i: (order[chosen[i].name], i)):
        c, first, second = chosen[i], found[i, 0], found[i, 1]
        other = shown(second) if second or 1 in c.seeds else ""
        seconds = f"{first['cpu_s']:.0f}" if first else ""
        rows.append(
            f"| {c.name} | {c.rule.lr:g} | {c.label} | {shown(first)} | {other} | {seconds} |"
        )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.defaults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 steps of a tiny model")
    parser.add_argument("--only", metavar="NAME", help="candidates of this rule")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of each candidate's own")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}; --quick: {QUICK_RESULTS}")
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    args = parser.parse_args(argv)

    names = sorted(kind.__name__ for kind in STARTS)
    if args.only is not None and args.only not in names:
        parser.error(f"--only {args.only}: one of {', '.join(names)}")
    p = QUICK if args.quick else Protocol()
    out: Path = args.out or (QUICK_RESULTS if args.quick else RESULTS)
    chosen = [c for c in candidates() if args.only in (None, c.name)]
    done = read(out)
    wanted: dict[str, tuple[Candidate, int]] = {}
    for c in chosen:
        for seed in args.seeds or c.seeds:
            rule = replace(c.rule, weight_decay=p.weight_decay)
            wanted.setdefault(identity(settings(rule, seed, p)), (c, seed))
    left = [] if args.table else [pair for key, pair in wanted.items() if key not in done]
    print(f"{len(wanted)} runs asked for, {len(left)} to do", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    for i, ((c, seed), record) in enumerate(zip(left, runs(left, p, args.jobs), strict=True)):
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        done[record["id"]] = record
        print(
            f"[{i + 1}/{len(left)}] {c.name} lr {c.rule.lr:g} ({c.label}) seed {seed}: "
            f"{shown(record)} nats, {record['cpu_s']:.0f} s CPU",
            file=sys.stderr,
            flush=True,
        )
    print(markdown(chosen, p, done))
    return 0


def runs(left: Sequence[tuple[Candidate, int]], p: Protocol, jobs: int) -> Iterator[dict[str, Any]]:
    """The records of all runs in order, each as soon as it is there."""
    asked = ([c.rule for c, _ in left], [seed for _, seed in left], [p] * len(left))
    if jobs == 1:
        yield from map(run, *asked)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run, *asked)


if __name__ == "__main__":
    raise SystemExit(main())
