"""Small real data sets that scikit-learn ships: images of digits, and two tables."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from examples.compare.problem import Backend, Part, Problem
from examples.compare.tasks.both import Array, Library, at_least, library, score, shuffled

SPLIT = (0.7, 0.85)  # shares of rows where validation, and then test, begin


@cache
def load(name: str) -> tuple[Array, Array]:
    """Inputs [N, d] with mean 0 and deviation 1, and targets, always in the same order."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"the task needs scikit-learn ({error}): pip install scikit-learn"
        ) from None
    found: Any = getattr(datasets, f"load_{name}")()
    x, y = np.asarray(found.data, np.float64), np.asarray(found.target)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    train = x[: int(SPLIT[0] * len(x))]
    # One deviation for all pixels: a corner that is always white would have none.
    spread = train.std() if name == "digits" else train.std(0)
    return (x - train.mean(0)) / spread, y


def split(*arrays: Any) -> list[tuple[Any, ...]]:
    """Training, validation and test rows."""
    count = len(arrays[0])
    bounds = [0, *(int(share * count) for share in SPLIT), count]
    return [tuple(x[a:b] for x in arrays) for a, b in pairwise(bounds)]


def mlp(seed: int, sizes: Sequence[int]) -> dict[str, Array]:
    """Weights [in, out] and biases of a network, with He's variance."""
    chance, found = np.random.default_rng(seed), {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        found[f"w{i}"] = chance.normal(size=(a, b)) * np.sqrt(2 / a)
        found[f"b{i}"] = np.zeros(b)
    return found


def digits(
    seed: int = 0, width: int = 128, batch: int = 32, steps: int = 400, backend: Backend = "torch"
) -> Problem:
    """1,797 images of handwritten digits, a network with two hidden layers; held-out nats."""
    return _classes("digits", seed, (64, width, width, 10), batch, steps, backend)


def cancer(
    seed: int = 0, width: int = 64, batch: int = 32, steps: int = 200, backend: Backend = "torch"
) -> Problem:
    """569 tumours by 30 measures, benign or not; held-out nats."""
    return _classes("breast_cancer", seed, (30, width, width, 2), batch, steps, backend)


def diabetes(
    seed: int = 0, width: int = 64, batch: int = 32, steps: int = 200, backend: Backend = "torch"
) -> Problem:
    """442 patients by 10 measures, and how their illness went on; held-out squared error."""
    at_least(width=(width, 1))
    xp, (x, y) = library(backend), load("diabetes")
    y = ((y - y.mean()) / y.std())[:, None]
    rows = split(xp.array(x), xp.array(y))

    def loss(model: Any, rows: Any) -> Any:
        return ((xp.forward(model, rows[0]) - rows[1]) ** 2).mean()

    sizes = 10, width, width, 1
    found = _problem("diabetes", xp, seed, sizes, batch, steps, loss, rows)
    return replace(found, metric="squared error")


def _classes(
    name: str, seed: int, sizes: tuple[int, ...], batch: int, steps: int, backend: Backend
) -> Problem:
    at_least(width=(min(sizes), 1))
    xp, (x, y) = library(backend), load(name)
    rows = split(xp.array(x), xp.array(y))

    def loss(model: Any, rows: Any) -> Any:
        return xp.nats(xp.forward(model, rows[0]), rows[1])

    return _problem(name, xp, seed, sizes, batch, steps, loss, rows)


def _problem(
    name: str,
    xp: Library,
    seed: int,
    sizes: tuple[int, ...],
    batch: int,
    steps: int,
    loss: Any,
    rows: Sequence[tuple[Any, ...]],
) -> Problem:
    train, valid, test = rows
    batches = shuffled(np.random.default_rng([seed, 1]), batch, *train)
    part = Part(batches, score(lambda m: loss(m, valid)), score(lambda m: loss(m, test)))
    record = {"task": name, "sizes": list(sizes), "batch": batch}
    model = xp.network(mlp(seed, sizes))
    outside = xp.outside(model)
    return Problem(model, loss, [part], steps, metric="nats", outside=outside, record=record)
