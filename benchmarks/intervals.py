"""How often intervals of few values cover the mean: `python -m benchmarks.intervals [COUNT]`."""

import math
import sys
from collections.abc import Callable

import numpy as np

from examples.compare.stats import interval
from examples.hope.tasks.metrics import mean_interval

Array = np.ndarray
DRAWS = 2000


def percentile(x: list[float]) -> tuple[float, float]:
    """The bootstrap that many reports use."""
    chance = np.random.default_rng(0)
    means = np.asarray(x)[chance.integers(0, len(x), (2000, len(x)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def student(x: list[float]) -> tuple[float, float]:
    mean, half = mean_interval(x)
    return mean - half, mean + half


def wider(x: list[float]) -> tuple[float, float]:
    """What studies use."""
    found = interval(x)
    return found.low, found.high


def main(count: int = 5) -> None:
    """A table in per cent: kinds of interval by kinds of values."""
    kinds: dict[str, tuple[Callable[[np.random.Generator], Array], float]] = {
        "normal": (lambda chance: chance.normal(size=count), 0.0),
        "log-normal": (lambda chance: chance.lognormal(size=count), math.exp(0.5)),
    }
    print(f"{count} values", *kinds, sep=" | ")
    for name, make in (("percentile", percentile), ("student", student), ("wider", wider)):
        row = [name]
        for draw, mean in kinds.values():
            chance, hits = np.random.default_rng(1), 0
            for _ in range(DRAWS):
                low, high = make([*map(float, draw(chance))])
                hits += low <= mean <= high
            row.append(f"{100 * hits / DRAWS:.1f}")
        print(*row, sep=" | ")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
