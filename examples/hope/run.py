"""Compare models on a task over several seeds: `python -m examples.hope.run TASK`.

The same command goes on where an earlier one was stopped, by Ctrl-C or in any other way, and
repeats nothing that is finished. On a CPU it goes on bit for bit.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.hope import models, plan, presets, train
from examples.hope.plan import Contender, Plan
from examples.hope.study import Makers
from examples.settings import assignments, learning_rate, nearest, row

MAKERS = Makers(presets.make_task, presets.make_model, presets.configuration)


def main(argv: Sequence[str] | None = None, makers: Makers = MAKERS) -> int:
    """The command line; returns the exit status: 1 if trials failed, 2 for bad input."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    command = f"python -m examples.hope.run {shlex.join(given)}"
    if args.list:
        print(listing())
        return 0
    try:
        asked = plan_of(args, command)
        asked.out.mkdir(parents=True, exist_ok=True)
        stages = plan.conduct(asked, makers)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first trial, or asked for twice
        print(f"\nstopped; to go on: {again(given)}", file=sys.stderr)
        return 130
    if any(stage.outcome.stopped for stage in stages):
        print(f"\nstopped; to go on: {again(given)}", file=sys.stderr)
        return 130
    failed = 0
    for stage in stages:
        for trial in stage.trials:
            if trial.id() in stage.outcome.errors:
                failed += 1
                why = stage.outcome.errors[trial.id()]
                print(f"error: {trial.label}, seed {trial.seed}: {why}", file=sys.stderr)
    if stages[-1].purpose == "report" and stages[-1].rows():
        page = (asked.out / "summary.md").read_text()
        print(f"\n{page}\n{asked.out / 'summary.md'}\n{asked.out / 'plot.png'}")
    if args.size == "quick":
        print("--size quick only shows that everything runs: the models are hardly trained")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m examples.hope.run", description=__doc__)
    p.add_argument("task", nargs="?", help="a name of --list")
    p.add_argument("--list", action="store_true", help="show the tasks and the models")
    p.add_argument(
        *("--models", "--model"),
        nargs="+",
        default=["hope", "transformer", "delta"],
        metavar="MODEL",
        help="names, or MODEL:SETTING=VALUE,… for ablations (hope:periods=[1],chunk=8); the "
        "others are compared with the first (default: hope transformer delta)",
    )
    p.add_argument("--size", choices=("quick", "cpu", "gpu"), default="cpu")
    p.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    p.add_argument("--steps", type=int, help="optimizer steps; of a stream, on each part")
    p.add_argument("--batch", type=int, help="rows of a training step")
    p.add_argument("--optimizer", choices=sorted(train.LEARNING_RATES), default="adamw")
    p.add_argument("--lr", nargs="+", metavar="RATE", help="of all models, or MODEL=RATE …")
    p.add_argument(
        "--tune",
        action="store_true",
        help="try the rate ÷√10, ×1, ×√10 on another seed of the training, the same test data",
    )
    p.add_argument("--config", nargs="+", default=[], metavar="SETTING=VALUE", help="of all models")
    p.add_argument("--options", nargs="+", default=[], metavar="OPTION=VALUE", help="of the task")
    p.add_argument("--data", type=Path, help="a text file or folder, for tasks that read text")
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda, with bfloat16")
    p.add_argument("--precision", choices=("float32", "bfloat16"), help="of the forward pass")
    p.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    p.add_argument("--out", type=Path, help="folder (default: runs/hope/TASK, TASK-SIZE)")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on; this is what happens anyway")
    how.add_argument("--restart", action="store_true", help="forget earlier trials of this study")
    return p


def plan_of(args: argparse.Namespace, command: str) -> Plan:
    """The study that is asked for; ValueError where an option makes no sense."""
    if args.task is None:
        raise ValueError("no task given: --list shows them")
    preset = presets.preset(args.task)
    scale = preset.sizes[args.size]
    for name in ("seeds", "steps", "batch", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least 1")
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device}: cpu or cuda")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch finds no GPU here; --device cpu works")
    name = args.task if args.size == "cpu" else f"{args.task}-{args.size}"
    out = args.out or Path("runs/hope") / name
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file: give a folder")
    options = {**scale.options, **assignments(args.options)}
    if args.data is not None:
        if not preset.text:
            raise ValueError(f"--data {str(args.data)!r}: task {args.task} reads no text")
        options["data"] = str(args.data)
    default = "float32" if args.device == "cpu" else "bfloat16"
    common = {**scale.model, **assignments(args.config)}
    return Plan(
        **{"task": args.task, "options": options, "out": out, "command": command},
        contenders=contenders(args, common, scale.rates),
        **{"seeds": args.seeds, "steps": args.steps or scale.steps},
        **{"batch": args.batch or scale.batch, "optimizer": args.optimizer},
        **{"device": args.device, "precision": args.precision or default},
        **{"quick": args.size == "quick", "tune": args.tune, "jobs": args.jobs},
        restart=args.restart,
    )


def contenders(
    args: argparse.Namespace, common: dict[str, Any], scale: dict[str, float]
) -> list[Contender]:
    """The rows of the table, each with its settings and learning rate."""
    twice = [label for i, label in enumerate(args.models) if label in args.models[:i]]
    if twice:
        raise ValueError(f"--models has {twice[0]!r} twice")
    own = {**presets.RATES, **scale} if args.optimizer == "adamw" else {}
    given: dict[str | None, float] = {}
    for text in args.lr or []:
        name, equals, rate = text.rpartition("=")
        if (name if equals else None) in given:
            raise ValueError(f"--lr {' '.join(args.lr)}: two rates for {name or 'all models'}")
        given[name if equals else None] = learning_rate(f"--lr {rate}", rate)
    unused = {name for name in given if name is not None}
    found = []
    for label in args.models:
        model, settings = row(label)
        models.check_read(model, settings)
        fallback = given.get(None, own.get(model, train.LEARNING_RATES[args.optimizer]))
        lr = given.get(label, given.get(model, fallback))
        unused -= {label, model}
        found.append(Contender(label, model, {**common, **settings}, lr))
    if unused:
        name = sorted(unused)[0]
        raise ValueError(f"--lr {name}=…: {nearest(name, args.models)}")
    return found


def listing() -> str:
    """Tasks and models, one line each."""
    width = max(map(len, presets.PRESETS))
    lines = [f"  {name:<{width}}  {preset.about}" for name, preset in presets.PRESETS.items()]
    return "\n".join(["tasks", *lines, "models", *(f"  {m}" for m in presets.model_names())])


def again(given: list[str]) -> str:
    """The command that goes on."""
    kept = [option for option in given if option != "--restart"]
    return f"{shlex.quote(sys.executable)} -m examples.hope.run {shlex.join(kept)}"


if __name__ == "__main__":
    sys.exit(main())
