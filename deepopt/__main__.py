"""`python -m deepopt`: list the rules; `python -m deepopt describe NAME` shows one."""

from __future__ import annotations

import argparse
import os
import sys

from deepopt.describe import describe, state_numbers, table
from deepopt.kernels.show import kernels
from deepopt.latex import latex
from deepopt.rules import ALL


def main(arguments: list[str] | None = None) -> int:
    """Print what was asked for; an unknown name prints the known ones and returns 2."""
    parser = argparse.ArgumentParser(prog="python -m deepopt", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("list", "describe", "latex"), default="list")
    parser.add_argument("name", nargs="?", help="a rule, in any case: m3, adamw, ...")
    parser.add_argument("--kernel", choices=("c", "triton"), help="describe: print its kernels")
    options = parser.parse_args(arguments)
    by_name = {cls.__name__.lower(): cls for cls in ALL}
    if options.kernel and options.command != "describe":
        parser.error("--kernel goes with describe: python -m deepopt describe m3 --kernel triton")
    if options.command == "list" and options.name is not None:
        parser.error(f"list takes no name; to see one rule: describe {options.name}")
    if options.command == "list":
        rows = [("rule", "takes", "state", "what it is")]
        for cls in ALL:
            first = (cls.__doc__ or "").strip().split("\n")[0]
            state = f"{state_numbers(cls(), (256, 256)):.3g}"
            rows.append((cls.__name__, cls.domain, state, first))
        print(table(rows))
        print("\nstate: numbers per number of a 256 × 256 parameter.", end=" ")
        print("`python -m deepopt describe NAME` shows one rule.")
        return 0
    if options.name is None:
        parser.error(f"{options.command} needs the name of a rule: {', '.join(by_name)}")
    cls = by_name.get(options.name.replace("_", "").lower())
    if cls is None:
        known = ", ".join(by_name)
        print(f"deepopt: no rule is called {options.name!r}; there are {known}", file=sys.stderr)
        return 2
    if options.kernel:
        print(kernels(cls(), options.kernel))
        return 0
    print(describe(cls()) if options.command == "describe" else latex(cls()))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except BrokenPipeError:
        # The reader, such as `head`, had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
