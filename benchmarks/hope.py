"""Speed of the Hope example, for docs/hope-speed.md: `python -m benchmarks.hope`.

Chunks against token by token, training and generation beside Transformer++ of equal size, and the
training of other packages' models where they are installed (`pip install --no-deps
nested-learning==0.2.0 titans-pytorch==0.5.5` and what they import). CPU time on one thread; each
cell of a table is a process of its own, so that its peak of memory is its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import conditions
from benchmarks.hope_cells import PEERS, SECTIONS, Record, measured
from benchmarks.hope_page import write_page
from examples.settings import processor

# Tokens of context, and sequences of a batch: 4,096 tokens a step where they fit.
LENGTHS = {256: 16, 1024: 4, 4096: 1, 16384: 1}


def cells(quick: bool) -> Iterator[Record]:
    """What is measured, in the order of the page."""
    repeats = 1 if quick else 3
    common: dict[str, Any] = {"quick": quick, "repeats": repeats}
    # One layer, for the gradient of so many writes keeps every one of them.
    one = {"section": "forms", "config": {"layers": 1}}
    yield {**common, **one, "batch": 1, "length": 32 if quick else 2048}
    for length, batch in ({64: 2} if quick else LENGTHS).items():
        for model, checkpoint in (("hope", False), ("hope", True), ("transformer", False)):
            cell = {"section": "training", "model": model, "config": {"checkpoint": checkpoint}}
            sizes = {"batch": batch, "length": length, "repeats": min(repeats, 65536 // length)}
            yield {**common, **cell, **sizes}
    lengths = [32, 64] if quick else [1024, 4096, 16384, 65536]
    pieces = {"lengths": lengths, "piece": min(lengths), "tokens": 4 if quick else 32}
    yield {**common, "section": "generation", **pieces}
    sizes = {"config": {"layers": 1 if quick else 4}, "batch": 4, "length": 32 if quick else 128}
    yield {**common, "section": "peers", **sizes}


def alone(cell: Record) -> list[Record]:
    """The records of a cell from a process of its own, on one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.hope_cells", json.dumps(cell)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the records, and the page if asked to."""
    parser = argparse.ArgumentParser("python -m benchmarks.hope", description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS], default=[*SECTIONS])
    parser.add_argument("--out", type=Path, default=Path("results/hope-speed.jsonl"))
    parser.add_argument("--page", type=Path, help="put tables and a picture into this page")
    parser.add_argument("--quick", action="store_true", help="very small: shows that all runs")
    options = parser.parse_args(argv)
    absent = [name.replace("_", "-") for name in PEERS if find_spec(name) is None]
    if "peers" in options.sections and absent:
        print(f"not installed, so left out: {', '.join(absent)}", file=sys.stderr)
    run = {
        **conditions(),
        "torch": torch.__version__,
        "machine": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    old = options.out.read_text().splitlines() if options.out.exists() else []
    records = [x for x in map(json.loads, old) if x["section"] not in options.sections]
    for cell in cells(options.quick):
        if cell["section"] in options.sections:
            start = time.perf_counter()
            found = measured(cell) if options.quick else alone(cell)
            records += [run | x for x in found]
            print(f"{time.perf_counter() - start:6.1f} s  {json.dumps(cell)}", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text("".join(json.dumps(x) + "\n" for x in records))
    if options.page is not None:
        write_page(options.page, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
