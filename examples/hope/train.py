"""Train Hope on Python's own sources with M3: `python -m examples.hope.train`.

Ctrl-C saves the run; the same command with --resume continues it, bit for bit.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from deepopt import rules
from examples.hope import checkpoint, data, ngram, report
from examples.hope.config import Config
from examples.hope.memories import RESIDUAL, Learning
from examples.hope.model import Hope
from torch_backend import Optimizer

LEARNING_RATES = {"m3": 2e-2, "muon": 2e-2, "adamw": 1e-2}
REST = 3e-3  # learning rate of embedding, head and vectors beside a matrix rule
PROMPT = b"\nimport "
MODEL = Config(inner=RESIDUAL)
SMALL = replace(
    MODEL, width=32, layers=2, heads=2, memory_width=16, cms_width=64, chunk=16, slow_chunk=32
)
VARIANTS = {
    "titans": {},
    "mlp": {"inner": Learning()},
    "attention": {"mixer": "attention"},
}


@dataclass(frozen=True)
class Settings:
    """What a run depends on; a checkpoint continues only under the same."""

    model: Config = MODEL
    optimizer: str = "m3"
    lr: float = LEARNING_RATES["m3"]
    steps: int = 600
    batch: int = 8
    length: int = 128
    evaluations: int = 5
    windows: int = 32  # validation batches; before the end, every fourth of them
    clip: float = 1.0
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        settings = settings_of(args)
        torch.set_num_threads(args.threads)
        corpus = data.load(args.data, settings.length)
        out = args.out or Path("runs/hope") / f"{args.variant}-{settings.optimizer}"
        if not (args.resume or args.restart):
            checkpoint.refuse_to_lose(out / "checkpoint.pt")
        result = train(settings, corpus, out, resume=args.resume)
    except (OSError, ValueError, ArithmeticError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is not None and args.quick:
        print("--quick only shows that everything runs: the model is tiny and hardly trained")
    if result is None:
        options = list(sys.argv[1:] if argv is None else argv)
        again = shlex.join([*options, *([] if args.resume else ["--resume"])])
        python = shlex.quote(sys.executable)
        print(f"\nstopped; to go on: {python} -m examples.hope.train {again}", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m examples.hope.train", description=__doc__)
    p.add_argument("--data", type=Path, help="a text file or folder (default: Python's sources)")
    p.add_argument("--optimizer", choices=sorted(LEARNING_RATES), default="m3")
    p.add_argument("--lr", type=float, help=f"default: {LEARNING_RATES}")
    p.add_argument("--steps", type=int, help=f"default: {Settings.steps}; with --quick, 40")
    p.add_argument("--seed", type=int, default=0, help="of weights, batches and the sample")
    p.add_argument(
        "--variant",
        choices=tuple(VARIANTS),
        default="titans",
        help="mlp: memories as in Eq. 89 and 93; titans: residual ones (default); attention",
    )
    p.add_argument("--threads", type=int, default=1, help="default: 1; more only on idle cores")
    p.add_argument("--out", type=Path, help="folder (default: runs/hope/VARIANT-OPTIMIZER)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    p.add_argument("--restart", action="store_true", help="begin again, over an unfinished run")
    p.add_argument("--quick", action="store_true", help="a tiny model, to see that all works")
    return p


def settings_of(args: argparse.Namespace) -> Settings:
    size = SMALL if args.quick else MODEL
    quick = {"steps": 40, "batch": 8, "windows": 4, "evaluations": 2} if args.quick else {}
    given = {k: v for k in ("steps", "lr") if (v := getattr(args, k)) is not None}
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr}: a learning rate is positive, such as 1e-2")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps}: at least 1")
    if args.threads < 1:
        raise ValueError(f"--threads {args.threads}: at least 1")
    common = {"optimizer": args.optimizer, "seed": args.seed, "lr": LEARNING_RATES[args.optimizer]}
    model = replace(size, **VARIANTS[args.variant])
    return Settings(model=model, **{**common, **quick, **given})


def train(
    settings: Settings, corpus: data.Corpus, out: Path, *, resume: bool = False
) -> dict[str, float] | None:
    """Train, evaluate, plot and sample; None if Ctrl-C stopped it."""
    torch.manual_seed(settings.seed)
    model = Hope(settings.model)
    optimizer = make_optimizer(model, settings.optimizer, settings.lr)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, settings.steps))
    batches = data.batches(corpus.train, settings.batch, settings.length, settings.seed)
    held_out = data.windows(corpus.valid, settings.batch, settings.length, settings.windows)
    count = sum(p.numel() for p in model.parameters())

    saved, log_path, png_path = out / "checkpoint.pt", out / "log.jsonl", out / "loss.png"
    identity = {**asdict(settings), "corpus": corpus.sha256}
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "batches": batches}
    start = step = checkpoint.load(saved, identity, state) if resume else 0
    log = report.Log(log_path, resume=step if resume else None)
    if not resume:
        about = {"optimizer": settings.optimizer, "lr": settings.lr, "params": count}
        log.write({**corpus.record(), **about, "torch": torch.__version__})
    print(f"{corpus.description}: {corpus.size:,} bytes, some held out, seed {settings.seed}")
    kind = settings.model.inner.structure if settings.model.mixer == "titans" else "attention"
    print(f"Hope ({kind}), {count / 1e6:.2f} M parameters, {settings.optimizer}")

    progress = report.Progress(settings.steps, settings.batch * settings.length, start=step)
    every = max(1, settings.steps // settings.evaluations)
    with checkpoint.Stop() as stop:
        while step < settings.steps and not stop.asked:
            crops = next(batches)
            loss = cost(model, crops)
            if not loss.isfinite():
                raise ArithmeticError(f"the loss is {loss} at step {step}: try a smaller --lr")
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            model.before_step()
            optimizer.step()
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            model.after_step(step)
            row = {"step": step, "train": bits(loss), "lr": rate, "gradient": norm.item()}
            if step % every == 0 and step < settings.steps:
                row["valid"] = evaluate(model, held_out[::4])
                row["inner_gradient"] = inner_gradient(model, crops)
                progress.write(
                    f"step {step}: held out {row['valid']:.3f} bits/byte, largest inner gradient "
                    f"{row['inner_gradient']:.2f}, outer gradient {row['gradient']:.2f}"
                )
            log.write(row)
            progress.update(step, row["train"])
            if "valid" in row:
                checkpoint.save(saved, identity, state, step)
    progress.close()
    checkpoint.save(saved, identity, state, step)
    if step < settings.steps:
        return None

    result = {
        "hope": evaluate(model, held_out),
        "ngram": ngram.bits_per_byte(corpus.train, held_out),
    }
    if start < step:
        log.write({"step": step, "valid": result["hope"], "ngram": result["ngram"]})
    sample = generate(model, PROMPT, 200, settings.seed)
    print(
        f"\nheld-out bits per byte, the same {held_out.shape[0] * settings.batch} windows for both"
    )
    print(f"  Hope                        {result['hope']:.3f}")
    print(f"  Witten-Bell n-gram, order 2 {result['ngram']:.3f}")
    print(f"\na sample after {PROMPT.decode()!r}:\n{indented(sample)}\n")
    report.plot(log_path, png_path, {"order-2 n-gram": result["ngram"]})
    print(f"loss curve  {png_path}\nlog         {log_path}\ncheckpoint  {saved}")
    return result


class Parts(Protocol):
    """A model that says what of it is hidden matrices, by `seen_as`, and what is CMS levels."""

    def parameters(self) -> Iterator[Parameter]: ...

    def hidden_matrices(self) -> dict[str, list[Tensor]]: ...

    def cms_levels(self) -> list[tuple[int, list[Tensor]]]: ...


def make_optimizer(model: Parts, name: str, lr: float) -> Optimizer:
    """Matrices by the rule `name`, everything else by AdamW; every CMS level by its own clock."""
    adamw = rules.AdamW(lr=lr if name == "adamw" else REST, betas=(0.9, 0.95))
    matrix = {"m3": rules.M3(lr=lr), "muon": rules.Muon(lr=lr), "adamw": adamw}[name]
    levels = model.cms_levels()
    in_levels = {id(p) for _, parameters in levels for p in parameters}
    other = [p for p in model.parameters() if id(p) not in in_levels]
    views = model.hidden_matrices()
    hidden = {id(p): view for view, parameters in views.items() for p in parameters}
    groups: list[dict[str, Any]] = []
    for period, parameters in [(1, other), *levels]:
        clock = {"every": period}
        for view in views:
            matrices = [p for p in parameters if hidden.get(id(p)) == view]
            own = {"params": matrices, "rule": matrix, "seen_as": view, "weight_decay": 0.1}
            groups.append(own | clock)
        rest = [p for p in parameters if id(p) not in hidden]
        groups.append({"params": rest, "rule": adamw, "weight_decay": 0.0} | clock)
    return Optimizer(groups)


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: a tenth of linear warm-up, then a cosine down to a tenth."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def cost(model: nn.Module, crops: Tensor) -> Tensor:
    """Cross-entropy in nats of crops [B, T + 1]."""
    logits = model(crops[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())


def bits(loss: Tensor) -> float:
    return loss.item() / math.log(2)


@torch.no_grad()
def evaluate(model: Hope, windows: Tensor) -> float:
    """Mean bits per byte over windows [count, B, T + 1]."""
    return sum(bits(cost(model, crops)) for crops in windows) / len(windows)


@torch.no_grad()
def inner_gradient(model: Hope, crops: Tensor) -> float:
    """The largest norm of a chunk's mean inner gradient, over all memories; 0 without memories."""
    norms: list[Tensor] = []
    model(crops[:, :-1], norms)
    return max((norm.item() for norm in norms), default=0.0)


@torch.no_grad()
def generate(
    model: Hope, prompt: bytes, count: int, seed: int, state: list[Any] | None = None
) -> bytes:
    """`count` bytes drawn after `prompt` at temperature 0.8.

    state: what the model carries from the text before the prompt; it is left as it was. Each byte
    costs the same, and memory is that of the state, which grows with the text in attention only.
    """
    if not prompt:
        raise ValueError("prompt b'': at least one byte, such as the end of a line, to go on from")
    generator = torch.Generator().manual_seed(seed)
    device, tokens, drawn = model.head.weight.device, torch.tensor([list(prompt)]), bytearray()
    for _ in range(count):
        logits, state = model.stream(tokens.to(device), state)
        probabilities = torch.softmax(logits[0, -1].float().cpu() / 0.8, -1)
        tokens = torch.multinomial(probabilities, 1, generator=generator).view(1, 1)
        drawn.append(int(tokens))
    return bytes(drawn)


def indented(text: bytes) -> str:
    shown = text.decode("utf-8", "replace")
    shown = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in shown
    )
    return "\n".join(f"  | {line}" for line in shown.split("\n"))


if __name__ == "__main__":
    sys.exit(main())
