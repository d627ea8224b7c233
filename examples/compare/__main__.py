"""Compare optimizers: `python -m examples.compare run TASK --optimizers adamw m3 muon`.

Every optimizer is tuned with the same number of trials on a seed of its own, then trained on the
seeds that are reported. The same command goes on where an earlier one was stopped, and repeats
nothing that is finished.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from examples.blame import told
from examples.compare import contenders, registry
from examples.compare.ledger import Ledger, read
from examples.compare.study import HOUR, LEDGER, Plan, Study, conduct, estimate
from examples.compare.summary import tables
from examples.settings import learning_rate, row

DEFAULT = ["adamw", "muon", "m3"]
# XLA takes all cores unless it is told not to; trials run side by side.
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if trials failed, 2 for bad input."""
    os.environ.setdefault("XLA_FLAGS", ONE_THREAD)
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    try:
        if args.command == "list":
            print(listing())
            return 0
        if args.command == "report":
            plan = Plan.load(args.folder)
            plan = replace(plan, reference=args.reference) if args.reference else plan
            return reported(Study(plan), args.folder)
        return ran(args, given)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:  # of a module of the user's
        print(f"error: {told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m examples.compare", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser("run", help="do a study, or what is left of it, and report")
    r.add_argument(
        *("tasks",),
        nargs="+",
        metavar="TASK",
        help="names of `list`, with options as in bytes:steps=600,width=128, or module:function",
    )
    r.add_argument(
        *("--optimizers", "--rules"),
        nargs="+",
        default=DEFAULT,
        metavar="NAME",
        help="rules, as in m3:momentum=0.95 or 'm3:weight=0|0.1' (a choice to be tuned), or import "
        "paths, as in torch.optim.AdamW; the first is the reference (default: adamw muon m3)",
    )
    r.add_argument("--seeds", type=int, default=5, help="that are reported (default: 5)")
    r.add_argument("--trials", type=int, default=7, help="to tune each optimizer (default: 7)")
    r.add_argument(
        *("--tuning-seeds",),
        type=int,
        default=1,
        help="trainings of each of them; 3 where one seed decides little (default: 1)",
    )
    r.add_argument("--lr", nargs="+", default=[], metavar="NAME=RATE", help="instead of tuning")
    r.add_argument(
        *("--drop-in",),
        action="store_true",
        help="tune the first optimizer only; the others take its rate",
    )
    r.add_argument("--reference", metavar="NAME", help="to compare with (default: the first)")
    r.add_argument("--steps", type=int, help="of the optimizer, on each part of a stream")
    r.add_argument("--weight-decay", type=float, help="of all that have one and do not say theirs")
    r.add_argument(
        *("--rest",),
        help="rate of the AdamW that steps all but hidden matrices; 'same': the optimizer itself",
    )
    r.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    r.add_argument("--out", type=Path, help="folder (default: runs/compare/TASKS)")
    r.add_argument("--yes", action="store_true", help="begin even if it may take over an hour")
    w = commands.add_parser("report", help="write the report of a study again")
    w.add_argument("folder", type=Path)
    w.add_argument("--reference", metavar="NAME", help="to compare with, this once")
    commands.add_parser("list", help="tasks and optimizers")
    return p


def ran(args: argparse.Namespace, given: Sequence[str]) -> int:
    """Do the study, and report what there is."""
    plan = plan_of(args, f"python -m examples.compare {shlex.join(given)}")
    _report()  # what it needs is missed now, not after all training
    names = "-".join(label.replace("/", "-").replace(":", ".") for label, *_ in plan.tasks)
    folder = args.out or Path("runs/compare") / names
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {str(folder)!r} is a file: give a folder")
    rows = {}
    if (folder / LEDGER).exists():
        with Ledger(folder / LEDGER) as ledger:  # it says now if another process has it
            rows = ledger.results()
    study = Study(plan)
    study.following(rows)
    left = sum(study.left(rows))
    if left:
        seconds = estimate(study, rows, args.jobs)
        print(f"{left} trials, about {words(seconds)}", file=sys.stderr, flush=True)
        if seconds > HOUR and not args.yes:
            raise ValueError(
                f"the study would take about {words(seconds)}: --yes to begin, or fewer --seeds, "
                "--trials or --steps"
            )
    errors, stopped = conduct(study, folder, args.jobs)
    try:
        status = reported(study, folder)
    finally:
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
    if stopped:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if errors else status


def reported(study: Study, folder: Path) -> int:
    """Write the report of the study in a folder, and show its text."""
    report = _report()
    plan, rows = study.plan, read(folder / LEDGER)
    found = tables(study, rows)
    if not found:
        own = {name for entry in study.entries for name in (*entry.tuning, *entry.reported)}
        others = len(rows.keys() - own)
        rest = (
            f": {others} rows of {str(folder / LEDGER)!r} are of other tasks or settings, or of "
            "files that have been edited since"
        )
        print("nothing to report yet" + (rest if others else ""), file=sys.stderr)
        return 1
    report.write(plan, found, folder)
    print(report.markdown(plan, found))
    print(folder / "report.html")
    return 0


def _report() -> ModuleType:
    """The module that draws; ImportError where what it draws with is missing."""
    try:
        from examples.compare import report
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib ({error}): pip install matplotlib") from error
    return report


def plan_of(args: argparse.Namespace, command: str) -> Plan:
    """The study that is asked for; ValueError where an option makes no sense."""
    for name in ("seeds", "trials", "tuning_seeds", "jobs", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
    tuned = args.optimizers[:1] if args.drop_in else args.optimizers
    if args.trials < 3 and not {*tuned} <= {text.rpartition("=")[0] for text in args.lr}:
        raise ValueError(f"--trials {args.trials}: at least 3, a rate and its neighbours")
    labels = [_task(text) for text in args.tasks]
    twice = [label for i, (label, *_) in enumerate(labels) if label in [x[0] for x in labels[:i]]]
    if twice:
        raise ValueError(f"task {twice[0]!r} is there twice")
    rates = {}
    for text in args.lr:
        name, _, rate = text.rpartition("=")
        if not name:
            raise ValueError(f"--lr {text}: NAME=RATE is asked for, such as m3=0.02")
        rates[name] = learning_rate(f"--lr {text}", rate)
    rest: float | str | None = args.rest
    if rest is not None and rest != "same":
        rest = learning_rate(f"--rest {args.rest}", args.rest)
    return Plan(
        **{"tasks": labels, "optimizers": args.optimizers, "seeds": args.seeds},
        **{"trials": args.trials, "lr": rates, "drop_in": args.drop_in, "steps": args.steps},
        **{"weight_decay": args.weight_decay, "tuning_seeds": args.tuning_seeds},
        **{"rest": rest, "command": command, "reference": args.reference or ""},
    )


def _task(text: str) -> tuple[str, str, dict[str, Any]]:
    module, colon, after = text.partition(":")
    function, _, rest = after.partition(":")
    if colon and "=" not in function:  # module:function, perhaps with options
        name, options = f"{module}:{function}", row(f"x:{rest}")[1]
    else:
        name, options = row(text)
    registry.maker(name)
    return text, name, options


def words(seconds: float) -> str:
    """A time as people say it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def listing() -> str:
    """Tasks with the first line of what they are, and optimizers."""
    known = registry.tasks()
    width = max(map(len, known))
    lines = [
        f"  {name:<{width}}  {(make.__doc__ or '').strip().splitlines()[0]}"
        for name, make in known.items()
    ]
    return "\n".join(["tasks", *lines, "optimizers", f"  {', '.join(contenders.listing())}"])


if __name__ == "__main__":
    sys.exit(main())
