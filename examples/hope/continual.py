"""Keep a trained Hope learning: `python -m examples.hope.continual FILE … --checkpoint PATH`.

It predicts each segment, then learns from it, and measures what it forgets of the old text. Ctrl-C
saves the run; the same command with --resume continues it, bit for bit. A checkpoint of such a run
is one to begin the next with.
"""

import argparse
import hashlib
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepopt import Rule, rules
from examples.hope import checkpoint, data, report, train
from examples.hope.config import Config, config_from
from examples.hope.forgetting import Measured, plot, table
from examples.hope.learner import Learner
from examples.hope.model import Hope
from examples.hope.stream import Stream

BATCH = 8  # windows of an evaluation at once
BLOCK = 4  # lengths of a window that are held out together


@dataclass(frozen=True)
class Settings:
    """What a run depends on beside its files and the checkpoint; it continues under the same.

    segment, periods, every: in tokens. periods, levels: None for those of the model.
    every: between two evaluations, of `windows` batches of windows of the length of training.
    """

    optimizer: str = "m3"
    lr: float = 1e-3
    segment: int = 128
    periods: tuple[int, ...] | None = None
    levels: tuple[int, ...] | None = None
    every: int = 65536
    windows: int = 8

    def __post_init__(self) -> None:
        if self.optimizer not in RULES:
            raise ValueError(f"optimizer {self.optimizer!r}: choose one of {tuple(RULES)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr {self.lr}: a learning rate is positive, such as 1e-3")
        for name in ("segment", "every", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")

    def rule(self) -> Rule:
        """What steps the levels; a decay would be forgetting by itself."""
        return RULES[self.optimizer](lr=self.lr, weight_decay=0.0)


RULES: dict[str, Any] = {"m3": rules.M3, "adamw": rules.AdamW}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: at least 1")
        torch.set_num_threads(args.threads)
        names = ("optimizer", "lr", "segment", "every", "windows")
        settings = Settings(
            **{name: getattr(args, name) for name in names},
            periods=args.periods_tokens and tuple(args.periods_tokens),
            levels=() if args.frozen else args.levels and tuple(args.levels),
        )
        if not args.resume:
            refuse_to_lose(args.out / "checkpoint.pt", args.checkpoint, args.restart)
        where = {"old": args.old, "resume": args.resume}
        result = run(settings, args.files, args.checkpoint, args.out, **where)
    except (OSError, ValueError, ArithmeticError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is None:
        options = list(sys.argv[1:] if argv is None else argv)
        again = shlex.join([*options, *([] if args.resume else ["--resume"])])
        python = shlex.quote(sys.executable)
        print(f"\nstopped; to go on: {python} -m examples.hope.continual {again}", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m examples.hope.continual", description=__doc__)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="read in this order")
    p.add_argument("--checkpoint", type=Path, required=True, help="of train, or of such a run")
    p.add_argument("--optimizer", choices=tuple(RULES), default=Settings.optimizer)
    p.add_argument("--lr", type=float, default=Settings.lr, help=f"default: {Settings.lr}")
    p.add_argument("--segment", type=int, default=Settings.segment, help="tokens of a gradient")
    p.add_argument(
        *("--periods-tokens",),
        **{"type": int, "nargs": "+", "metavar": "TOKENS"},
        help="between updates of each level (default: the model's periods, in segments)",
    )
    who = p.add_mutually_exclusive_group()
    who.add_argument("--levels", type=int, nargs="+", help="that learn, from 0 (default: all)")
    who.add_argument("--frozen", action="store_true", help="learn nothing, as a control")
    p.add_argument("--every", type=int, default=Settings.every, help="tokens between evaluations")
    p.add_argument("--windows", type=int, default=Settings.windows, help=f"of {BATCH}, evaluated")
    p.add_argument("--old", type=Path, help="the old text (default: Python's sources)")
    p.add_argument("--out", type=Path, default=Path("runs/hope/continual"), help="folder")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--restart", action="store_true", help="begin again, over the run in --out")
    return p


def run(
    settings: Settings,
    files: Sequence[str | Path],
    start: Path,
    out: Path,
    *,
    old: str | Path | None = None,
    resume: bool = False,
) -> Measured | None:
    """Learn from the files, measure and plot; None if Ctrl-C stopped it."""
    trained = checkpoint.read(start)
    config, length = trained_as(start, trained)
    learner = begin(settings, config, trained)
    stream = Stream(files, BLOCK * length)
    for line in stream.skipped:
        print(line)
    if stream.tokens < settings.segment:
        raise ValueError(
            f"{stream.bytes} bytes to learn from, fewer than a segment of {settings.segment}: give "
            "more text or a smaller --segment"
        )
    corpus, texts = data.load(old, length), dict[str, Tensor]()
    texts["old"] = data.windows(corpus.valid, BATCH, length, settings.windows)
    if len(stream.held_out) > length:
        texts["new"] = data.windows(stream.held_out, BATCH, length, settings.windows)
    else:
        print(f"{stream.bytes} bytes are too few to hold some out: forgetting is measured alone")
    if corpus.sha256 != trained["identity"]["corpus"]:
        print(f"{corpus.description} is not the text that {str(start)!r} was trained on")

    identity = {
        **{**asdict(settings), "length": length, "model": asdict(config)},
        **{"corpus": trained["identity"]["corpus"], "old": corpus.sha256},
        "checkpoint": hashlib.sha256(start.read_bytes()).hexdigest(),
        "held_out": hashlib.sha256(stream.held_out.numpy().tobytes()).hexdigest(),
    }
    found, saved = Measured(), out / "checkpoint.pt"
    state = {"learner": learner, "stream": stream, "measured": found}
    if resume:
        load(saved, identity, state)
    step = stream.read // settings.segment
    log = report.Log(out / "log.jsonl", resume=step if resume else None)

    def measure() -> dict[str, Any]:
        row = {"tokens": stream.read}
        row |= {name: train.evaluate(learner.model, x) for name, x in texts.items()}
        found.rows.append(row)
        return row

    if not resume:
        about = {**learner.settings(), **corpus.record(), "torch": torch.__version__}
        log.write({**about, "files": [str(path) for path in files], "bytes_new": stream.bytes})
        log.write({"step": 0, **measure()})
    total = stream.tokens // settings.segment
    progress = report.Progress(total, settings.segment, start=step)
    with checkpoint.Stop() as stop:
        while not stop.asked and (tokens := stream.next(settings.segment)) is not None:
            bits = learner.learn(tokens)
            found.bits += bits * len(tokens)
            step += 1
            row = {"step": step, "tokens": stream.read, "read": bits}
            if stream.read % settings.every < settings.segment or step == total:
                row |= measure()
                progress.write("  ".join(f"{k} {v:.3f}" for k, v in row.items() if k in texts))
            log.write(row)
            progress.update(step, bits)
            if "old" in row:
                checkpoint.save(saved, identity, state, step)
    progress.close()
    checkpoint.save(saved, identity, state, step)
    if step < total:
        return None
    print(table(found, f"old: {corpus.description}", f"new: held out of {stream.bytes:,} bytes"))
    if left := stream.tokens - stream.read:
        print(f"the last {left} tokens, fewer than a segment, were not read")
    plot(report.read(out / "log.jsonl"), out / "loss.png", learner)
    print(f"curves      {out / 'loss.png'}\nlog         {log.path}\ncheckpoint  {saved}")
    return found


def trained_as(path: Path, saved: dict[str, Any]) -> tuple[Config, int]:
    """The configuration of a checkpoint's model, and the context length of its training."""
    identity = saved.get("identity", {})
    if not isinstance(identity.get("model"), dict) or not {"length", "corpus"} <= identity.keys():
        raise ValueError(
            f"{str(path)!r} holds no model of examples.hope.train or examples.hope.continual"
        )
    return config_from(identity["model"]), identity["length"]


def begin(settings: Settings, config: Config, trained: dict[str, Any]) -> Learner:
    """A learner with the weights of a checkpoint; all of it, if that is of a run like this one."""
    model = Hope(config)
    before = trained.get("learner")
    model.load_state_dict(trained["model"] if before is None else before["model"])
    learner = Learner(
        *(model, settings.rule()),
        **{"segment": settings.segment, "periods": settings.periods, "levels": settings.levels},
    )
    if before is not None and before["settings"] == learner.settings():
        learner.load_state_dict(before)
    elif before is not None:
        print("other settings than those of the checkpoint: only its weights are taken")
    return learner


def load(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Restore a run of the same settings and files; ValueError that lists all differences."""
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: {str(path)!r} does not exist")
    saved = checkpoint.read(path)
    if not state.keys() <= saved.keys():
        raise ValueError(f"{str(path)!r} is no checkpoint of examples.hope.continual")
    different = checkpoint.differences(saved["identity"], identity)
    different += state["stream"].changes(saved["stream"])
    if different:
        raise ValueError(f"{str(path)!r} belongs to another run. " + "; ".join(different))
    for name, thing in state.items():
        thing.load_state_dict(saved[name])


def refuse_to_lose(path: Path, start: Path, restart: bool) -> None:
    """Raise ValueError where a run would overwrite what was learnt, or the model it begins with."""
    if not path.exists():
        return
    if "stream" not in checkpoint.read(path) or path.samefile(start):
        raise ValueError(f"{str(path)!r} would be overwritten: give another --out")
    if not restart:
        raise ValueError(
            f"{str(path)!r} holds a run: add --resume to go on, --restart to begin again, or give "
            "another --out"
        )


if __name__ == "__main__":
    sys.exit(main())
