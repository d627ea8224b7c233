"""Parts that are learnt one after another: what is lost of the first ones, and how fast the next
are learnt."""

import zlib
from functools import cache
from typing import Any

import numpy as np

from examples.compare.problem import Backend, Part, Problem
from examples.compare.tasks.both import Array, at_least, library, score, shuffled
from examples.compare.tasks.tables import load, mlp, split

HASHED = 2048  # inputs that n-grams of characters are hashed into


def orthogonal(
    seed: int = 0,
    size: int = 64,
    outputs: int = 16,
    parts: int = 8,
    steps: int = 200,
    batch: int = 8,
    noise: float = 0.5,
    backend: Backend = "torch",
) -> Problem:
    """Regressions along orthogonal directions, one after another (Eq. 45); loss on all of them.

    Inputs of part t are u_t and isotropic noise of norm about `noise`; what a part asks for never
    contradicts another, so that a longer memory of gradients could lose nothing.
    """
    at_least(parts=(parts, 2), size=(size, parts), outputs=(outputs, 1), batch=(batch, 1))
    xp, chance = library(backend), np.random.default_rng([17, seed])
    basis = np.linalg.qr(chance.normal(size=(size, size)))[0][:parts]
    goals = chance.choice([-1.0, 1.0], size=(parts, outputs))

    def loss(model: Any, rows: Any) -> Any:
        x, y = rows
        return 0.5 * ((x @ model["w"] - y) ** 2).mean()

    def part(t: int) -> Part:
        drawn = np.random.default_rng([seed, t])
        fixed = np.random.default_rng([23, seed, t])

        def rows(source: np.random.Generator, count: int) -> tuple[Any, Any]:
            x = basis[t] + noise / np.sqrt(size) * source.normal(size=(count, size))
            return xp.array(x), xp.array(np.tile(goals[t], (count, 1)))

        def batches() -> Any:
            while True:
                yield rows(drawn, batch)

        valid, test = rows(fixed, 64), rows(fixed, 64)
        return Part(
            batches(), score(lambda m: loss(m, valid)), score(lambda m: loss(m, test)), f"{t + 1}"
        )

    return Problem(
        xp.weights({"w": np.zeros((size, outputs))}),
        *(loss, [part(t) for t in range(parts)], steps),
        metric="loss",
        schedule="constant",
        warmup=0.0,
        record={"task": "orthogonal", "size": size, "parts": parts, "noise": noise},
    )


def permuted_digits(
    seed: int = 0,
    width: int = 128,
    parts: int = 5,
    batch: int = 32,
    steps: int = 200,
    backend: Backend = "torch",
) -> Problem:
    """Images of digits whose pixels are permuted anew in each part; accuracy on all parts."""
    at_least(width=(width, 1), parts=(parts, 2))
    x, y = load("digits")
    chance = np.random.default_rng([19, seed])
    orders = [np.arange(64), *(chance.permutation(64) for _ in range(parts - 1))]
    data = [(x[:, order], y) for order in orders]
    return _classes("permuted digits", seed, data, (64, width, width, 10), batch, steps, backend)


def intents(
    seed: int = 0, width: int = 128, parts: int = 7, batch: int = 32, steps: int = 150
) -> Problem:
    """Spoken commands by hashed n-grams, new intents in each part (real data); accuracy on all."""
    at_least(width=(width, 1), parts=(parts, 2))
    data, classes = _commands(parts)
    sizes = (HASHED, width, classes)
    return _classes("intents", seed, data, sizes, batch, steps, "torch")


@cache
def _commands(parts: int) -> tuple[list[tuple[Array, Array]], int]:
    from examples.hope.tasks import Intents

    stream = Intents(tasks=parts)
    found = []
    for part in range(parts):
        texts, outputs = zip(*stream.labelled(part), strict=True)
        rows = np.stack([_hashed(text.encode()) for text in texts])
        order = np.random.default_rng(part).permutation(len(rows))
        found.append((rows[order], np.array(outputs)[order]))
    return found, stream.outputs


def _hashed(text: bytes) -> Array:
    row = np.zeros(HASHED)
    for n in (2, 3, 4):
        for start in range(len(text) - n + 1):
            row[zlib.crc32(text[start : start + n]) % HASHED] += 1
    return row / np.linalg.norm(row)


def _classes(
    name: str,
    seed: int,
    data: list[tuple[Array, Array]],
    sizes: tuple[int, ...],
    batch: int,
    steps: int,
    backend: Backend,
) -> Problem:
    xp = library(backend)

    def loss(model: Any, rows: Any) -> Any:
        return xp.nats(xp.forward(model, rows[0]), rows[1])

    def right(model: Any, rows: Any) -> float:
        hits = xp.forward(model, rows[0]).argmax(-1) == rows[1]
        return hits.sum() / len(hits)

    def part(index: int) -> Part:
        train, valid, test = split(*map(xp.array, data[index]))
        rows = shuffled(np.random.default_rng([seed, index]), batch, *train)
        return Part(
            *(rows, score(lambda m: right(m, valid)), score(lambda m: right(m, test))),
            f"{index + 1}",
        )

    model = xp.network(mlp(seed, sizes))
    return Problem(
        *(model, loss, [part(i) for i in range(len(data))], steps),
        metric="accuracy",
        better="higher",
        schedule="constant",
        warmup=0.0,
        outside=xp.outside(model),
        record={"task": name, "sizes": list(sizes), "batch": batch},
    )
