"""Print the matrix of the contract: python -m tests.contract --jobs 2"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from .infos import INFOS
from .matrix import ROWS, Cell, Outcome, failures, of_rule, table
from .subject import MODES

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; 1 where a cell is red."""
    parser = argparse.ArgumentParser(prog="python -m tests.contract", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes, 0 for none")
    parser.add_argument("--rules", nargs="+", choices=INFOS, default=[*INFOS], metavar="RULE")
    parser.add_argument("--checks", nargs="+", choices=ROWS, default=ROWS, metavar="CHECK")
    parser.add_argument("--modes", default="".join(MODES), help="letters among pfgc")
    parser.add_argument("--times", action="store_true", help="say what took how long")
    parser.add_argument("--page", action="store_true", help="write the matrix to docs/contract.md")
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch._logging.set_logs(dynamo=logging.ERROR)
    if unknown := set(given.modes) - set(MODES):
        parser.error(f"--modes {given.modes!r}: {sorted(unknown)} are none of {''.join(MODES)}")
    run = partial(of_rule, names=given.checks, modes=given.modes)
    outcomes: dict[Cell, Outcome] = {}
    for found in everywhere(run, given.rules, given.jobs):
        outcomes |= found
    text = table(outcomes)
    print(text)
    for failure in failures(outcomes):
        print(f"\n{failure}")
    if given.times:
        print("\n".join(spent(outcomes)))
    print(f"{time.perf_counter() - start:.0f} s in {given.jobs} processes")
    if given.page:
        write(text)
    return int(any(x.failure for x in outcomes.values()))


def everywhere(
    run: Callable[[str], dict[Cell, Outcome]], rules: list[str], jobs: int
) -> Iterator[dict[Cell, Outcome]]:
    """What comes out for each rule, from several processes, or from this one if they are none."""
    if not jobs:
        yield from map(run, rules)
        return
    # Forked processes need not import torch again; no thread runs yet.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(run, rules)


def spent(outcomes: dict[Cell, Outcome]) -> list[str]:
    """Seconds by check and mode, and by rule, the most first."""
    sums: dict[str, float] = defaultdict(float)
    for (rule, name, mode), x in outcomes.items():
        sums[f"{name} ({mode})"] += x.seconds
        sums[rule] += x.seconds
        sums[MODES[mode]] += x.seconds
    return [f"{s:7.1f} s  {k}" for k, s in sorted(sums.items(), key=lambda x: -x[1])[:60]]


def write(text: str) -> None:
    """Put the matrix into its page."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n```text\n{text}\n```\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
