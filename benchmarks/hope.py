"""Training speed of the Hope example: `python -m benchmarks.hope`.

Forward, backward and optimizer step at batch 4 × 128 bytes, width 128, four layers, on one thread.
Prints tokens per second of process CPU time, the median over a few runs, for Hope and for the same
model with attention in the place of the self-modifying memories, taken in turn.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from examples.hope.config import Config
from examples.hope.model import Hope
from torch_backend import M3, Optimizer

BATCH, LENGTH = 4, 128
VARIANTS = ("titans", "attention")


def seconds(model: Hope, optimizer: Optimizer, steps: int) -> float:
    """CPU seconds of a training step."""
    tokens = torch.randint(0, 256, (BATCH, LENGTH + 1))
    start = time.process_time()
    for _ in range(steps):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.process_time() - start) / steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="steps of a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements, taken in turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {v: Hope(Config(width=128, layers=4, mixer=v)) for v in VARIANTS}
    optimizers = {v: M3(model) for v, model in models.items()}
    times: dict[str, list[float]] = {v: [] for v in VARIANTS}
    for v in VARIANTS:
        seconds(models[v], optimizers[v], 1)
    for _ in range(options.repeats):
        for v in VARIANTS:
            times[v].append(seconds(models[v], optimizers[v], options.steps))
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, CPU time")
    for v in VARIANTS:
        speed = BATCH * LENGTH / statistics.median(times[v])
        count = sum(p.numel() for p in models[v].parameters())
        print(f"{v:10} {count / 1e6:.2f} M parameters  {speed:8,.0f} tokens/s")


if __name__ == "__main__":
    main()
