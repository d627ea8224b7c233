"""Time one optimizer step against torch's own, many matrices: `python -m benchmarks.step`."""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import torch_backend

RIVALS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[..., torch.optim.Optimizer]]]
RIVALS = {
    "AdamW": (torch_backend.AdamW, lambda p: torch.optim.AdamW(p, foreach=False)),
    "Muon": (torch_backend.Muon, lambda p: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw")),
}


def parameters(count: int, size: int) -> list[Tensor]:
    """Square matrices with gradients."""
    generator = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for _ in range(count):
        p = nn.Parameter(torch.randn(size, size, generator=generator))
        p.grad = torch.randn(size, size, generator=generator)
        made.append(p)
    return made


def compare(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, rounds: int
) -> tuple[float, float, float]:
    """Median CPU milliseconds of each and median of their ratios; the two take turns."""
    times: list[list[float]] = [[], []]
    for i in range(rounds + 2):
        for optimizer, taken in zip((ours, theirs), times, strict=True):
            start = time.process_time()
            optimizer.step()
            if i >= 2:
                taken.append(1e3 * (time.process_time() - start))
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="matrices (default: 100)")
    parser.add_argument("--size", type=int, default=256, help="rows and columns (default: 256)")
    parser.add_argument("--rounds", type=int, default=15, help="steps timed (default: 15)")
    parser.add_argument("--rule", choices=sorted(RIVALS), help="only this one")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(
        f"{args.count} matrices of {args.size}×{args.size} in float32, CPU time of one thread, "
        f"median of {args.rounds} steps\n"
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{datetime.date.today()}"
    )
    for name in [args.rule] if args.rule else RIVALS:
        ours, theirs = (make(parameters(args.count, args.size)) for make in RIVALS[name])
        a, b, ratio = compare(ours, theirs, args.rounds)
        print(f"{name:6} {a:7.1f} ms, torch.optim.{name} {b:7.1f} ms: {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
