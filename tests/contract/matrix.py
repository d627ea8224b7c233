"""Running the checks over rules and modes, and the table of what came out."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from . import callers, forms, making, saving, stepping, tensors
from .infos import INFOS
from .subject import CHECKS, MODES, Meaningless, Subject, fresh

ORDER = (making, stepping, tensors, forms, callers, saving)
ROWS = [
    name for module in ORDER for name, x in CHECKS.items() if x.run.__module__ == module.__name__
]


class Outcome(NamedTuple):
    """What came of a check: nothing where it held, else why it means nothing, or what failed."""

    reason: str = ""
    failure: str = ""
    seconds: float = 0.0


Cell = tuple[str, str, str]
Outcomes = Mapping[Cell, Outcome]


def outcome(rule: str, name: str, mode: str) -> Outcome:
    """Run one check of one rule in one mode."""
    check = CHECKS[name]
    if mode in check.without:
        return Outcome(check.without[mode])
    start = time.process_time()
    try:
        with fresh(mode):
            check.run(Subject(INFOS[rule], mode))
    except Meaningless as reason:
        return Outcome(str(reason))
    except Exception:
        return Outcome(failure=traceback.format_exc(), seconds=time.process_time() - start)
    return Outcome(seconds=time.process_time() - start)


def of_rule(rule: str, names: Sequence[str] = (), modes: str = "") -> dict[Cell, Outcome]:
    """All checks of a rule."""
    wanted = [(rule, name, mode) for mode in modes or MODES for name in names or ROWS]
    return {cell: outcome(*cell) for cell in wanted}


def _marks(outcomes: Outcomes, rule: str, name: str) -> str:
    """A cell: the letters of the modes in which the check holds, - and ! for the others."""
    marks = {mode: outcomes.get((rule, name, mode)) for mode in MODES}
    shown = {
        m: "?" if x is None else "!" if x.failure else "-" if x.reason else m
        for m, x in marks.items()
    }
    return "".join(shown.values())


def table(outcomes: Outcomes, width: int = 4) -> str:
    """The matrix, the reasons of each -, and the totals."""
    names = [n for n in ROWS if any(n == cell[1] for cell in outcomes)]
    reached = {cell[0] for cell in outcomes}
    found = [r for r in INFOS if r in reached]
    margin = max(map(len, names)) + 2
    head = [[rule[i : i + width] for rule in found] for i in range(0, max(map(len, found)), width)]
    lines = [" " * margin + " ".join(x.ljust(width) for x in row).rstrip() for row in head]
    for name in names:
        cells = " ".join(_marks(outcomes, rule, name) for rule in found)
        lines.append(f"{name.ljust(margin)}{cells}")
    lines += ["", *legend(outcomes, names, found), "", totals(outcomes)]
    return "\n".join(lines)


def legend(outcomes: Outcomes, names: Sequence[str], found: Sequence[str]) -> list[str]:
    """What the marks mean, and each reason with the rows and modes that it is for."""
    lines = [f"{mode}: green, {text}" for mode, text in MODES.items()]
    lines += ["-: it means nothing there, for a reason given below", "!: red"]
    rows: dict[str, dict[str, dict[str, list[str]]]] = {}
    for (rule, name, mode), x in outcomes.items():
        if x.reason:
            rows.setdefault(x.reason, {}).setdefault(name, {}).setdefault(mode, []).append(rule)
    for reason, own in rows.items():
        where: list[str] = []
        for name, modes in own.items():
            some = {r for members in modes.values() for r in members}
            only = f" of {', '.join(sorted(some))}" if len(some) < len(found) else ""
            where.append(f"{name} ({''.join(modes)}){only}")
        lines.append(f"- {reason}: {'; '.join(where)}")
    return lines


def totals(outcomes: Outcomes) -> str:
    """How many cells are green, red, and without meaning."""
    red = sum(bool(x.failure) for x in outcomes.values())
    without = sum(bool(x.reason) for x in outcomes.values())
    rules, checks = ({cell[i] for cell in outcomes} for i in (0, 1))
    return (
        f"{len(rules)} rules, {len(checks)} checks, {len(MODES)} modes: "
        f"{len(outcomes) - red - without} green, {red} red, {without} without meaning"
    )


def failures(outcomes: Outcomes) -> Iterable[str]:
    """What went wrong, cell by cell."""
    for (rule, name, mode), x in outcomes.items():
        if x.failure:
            yield f"{rule}, {MODES[mode]}, {name}:\n{x.failure}"
