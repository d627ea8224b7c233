"""What bfloat16 memories cost and save: `python -m benchmarks.state` writes docs/memory.md's table.

The byte GPT of benchmarks.defaults, smaller; hidden matrices by the rule, the rest by AdamW. State
is float32, bfloat16 rounded at random as `state_dtype` has it, or, which the library does not
offer, bfloat16 rounded to the nearest after every step. Records go to results/state.jsonl.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.defaults import Protocol, run
from benchmarks.figures import between
from deepopt import rules
from deepopt.rule import Rule
from torch_backend import Optimizer

PAGE = Path("docs/memory.md")
RESULTS = Path("results/state.jsonl")
SIZE = Protocol(layers=2, width=64, length=64, batch=8, steps=400)
QUICK = Protocol(layers=1, width=16, heads=2, length=16, batch=2, steps=3, evaluation_batches=1)
SEEDS = (0, 1, 2)
RULES: list[Rule] = [
    rules.AdamW(lr=3e-3),
    rules.M3(lr=1e-2),
    rules.Muon(lr=1e-2),
    rules.SOAP(lr=1e-2),
    rules.Shampoo(lr=1e-2),
]


def wide(groups: Any) -> Optimizer:
    """State in float32."""
    return Optimizer(groups)


def narrow(groups: Any) -> Optimizer:
    """State in bfloat16, rounded at random."""
    return Optimizer(groups, state_dtype=torch.bfloat16)


def nearest(groups: Any) -> Optimizer:
    """State that every step rounds to the nearest bfloat16."""
    optimizer = Optimizer(groups)

    def round_(*_: Any) -> None:
        for x in (x for state in optimizer.state.values() for x in state.values()):
            if x.numel() > 1:
                x.copy_(x.bfloat16())

    optimizer.register_step_post_hook(round_)
    return optimizer


KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "float32": wide,
    "bfloat16, at random": narrow,
    "bfloat16, to the nearest": nearest,
}


def state_bytes(rule: Rule, p: Protocol, **options: Any) -> float:
    """Bytes of state per number of the hidden matrices."""
    sides = [(p.width, p.width)] * 4 + [(4 * p.width, p.width), (p.width, 4 * p.width)]
    params = [torch.nn.Parameter(torch.zeros(s)) for s in sides]
    optimizer = Optimizer(params, rule, **options)
    for w in params:
        w.grad = torch.ones_like(w)
    optimizer.step()
    every = [x for state in optimizer.state.values() for x in state.values()]
    return sum(x.numel() * x.element_size() for x in every) / sum(map(prod, sides))


def table(records: Sequence[dict[str, Any]], p: Protocol) -> str:
    """Bytes, and the mean of held-out losses with the least and greatest, a row for each rule."""
    rows = [
        "| rule | bytes per weight, float32 | bfloat16 | ratio | "
        + " | ".join(f"nats, {kind}" for kind in KINDS)
        + " |",
        "|---" * (4 + len(KINDS)) + "|",
    ]
    for rule in RULES:
        name = type(rule).__name__
        full = state_bytes(rule, p)
        half = state_bytes(rule, p, state_dtype=torch.bfloat16)
        cells = [name, f"{full:.2f}", f"{half:.2f}", f"{half / full:.3f}"]
        for kind in KINDS:
            own = [r["nats"] for r in records if (r["rule"], r["state"]) == (name, kind)]
            lost = None in own
            spread = "" if lost else f"{mean(own):.3f} ({min(own):.3f} to {max(own):.3f})"
            cells.append("diverged" if lost else spread)
        rows.append("| " + " | ".join(cells) + " |")
    r = records[0]
    rows.append("")
    rows.append(
        f"{r['date']}; 2 vCPU AMD EPYC, shared, one thread; Python {r['python']}, torch "
        f"{r['torch']}; `python -m benchmarks.state`, seeds {', '.join(map(str, SEEDS))}."
    )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.state", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three steps of a tiny model")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}; --quick: none")
    args = parser.parse_args(argv)
    p, seeds = (QUICK, SEEDS[:1]) if args.quick else (SIZE, SEEDS)
    records: list[dict[str, Any]] = []
    for rule in RULES:
        for kind, optimizer_of in KINDS.items():
            for seed in seeds:
                found = run(rule, seed, p, optimizer_of)
                records.append({"state": kind, **found})
                print(found["rule"], kind, seed, found["nats"], found["cpu_s"], file=sys.stderr)
    if out := args.out or (None if args.quick else RESULTS):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(r) + "\n" for r in records))
    print(table(records, p))
    if not args.quick:
        between(PAGE, "state", table(records, p))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
