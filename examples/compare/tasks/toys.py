"""Problems whose answer is known: what an optimizer does is not hidden by a model."""

import itertools

import numpy as np

from examples.compare.problem import Backend, Part, Problem
from examples.compare.tasks.both import at_least, library, score


def factorisation(
    seed: int = 0, size: int = 128, rank: int = 16, steps: int = 1000, backend: Backend = "torch"
) -> Problem:
    """½‖AB − M‖² of a matrix whose singular values span three decades; relative squared error."""
    at_least(rank=(rank, 1), size=(size, rank))
    xp, chance = library(backend), np.random.default_rng([7, seed])
    left, right = (np.linalg.qr(chance.normal(size=(size, rank)))[0] for _ in range(2))
    whole = 10 * (left * np.geomspace(1, 1e-3, rank)) @ right.T
    goal, norm = xp.array(whole), float((whole**2).sum())
    chance = np.random.default_rng(seed)
    start = {name: 0.1 * chance.normal(size=shape) for name, shape in _shapes(size, rank).items()}

    def error(model, batch=None):
        return 0.5 * ((model["a"] @ model["b"] - goal) ** 2).sum()

    part = Part(itertools.repeat(None), score(lambda model: 2 * error(model) / norm))
    return Problem(
        *(xp.weights(start), error, [part], steps),
        metric="relative error",
        schedule="linear",
        warmup=0.0,
        record={"task": "factorisation", "size": size, "rank": rank},
    )


def _shapes(size: int, rank: int) -> dict[str, tuple[int, int]]:
    return {"a": (size, rank), "b": (rank, size)}


def regression(
    seed: int = 0,
    inputs: int = 64,
    outputs: int = 16,
    condition: float = 100.0,
    noise: float = 1.0,
    tail: float = 0.0,
    batch: int = 16,
    steps: int = 1000,
    backend: Backend = "torch",
) -> Problem:
    """Least squares from noisy batches; exact excess risk.

    The covariance of the inputs has eigenvalues from 1 down to 1 / condition. tail: degrees of
    freedom of Student noise; 0 for normal noise.
    """
    at_least(inputs=(inputs, 1), outputs=(outputs, 1), batch=(batch, 1), noise=(noise, 0))
    at_least(condition=(condition, 1), tail=(tail, 0))
    xp, chance = library(backend), np.random.default_rng([11, seed])
    basis = np.linalg.qr(chance.normal(size=(inputs, inputs)))[0]
    roots = np.sqrt(np.geomspace(1, 1 / condition, inputs))
    goal = chance.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    factor, truth = xp.array(basis * roots), xp.array(goal)
    chance = np.random.default_rng(seed)

    def batches():
        while True:
            x = chance.normal(size=(batch, inputs)) @ (basis * roots).T
            off = (
                chance.standard_t(tail, (batch, outputs))
                if tail
                else chance.normal(size=(batch, outputs))
            )
            yield xp.array(x), xp.array(x @ goal + noise * off)

    def loss(model, rows):
        x, y = rows
        return 0.5 * ((x @ model["w"] - y) ** 2).mean()

    def risk(model):
        return 0.5 * ((factor.T @ (model["w"] - truth)) ** 2).sum() / outputs

    return Problem(
        xp.weights({"w": np.zeros((inputs, outputs))}),
        *(loss, [Part(batches(), score(risk))], steps),
        metric="excess risk",
        schedule="linear",
        warmup=0.0,
        record={"task": "regression", "condition": condition, "noise": noise, "tail": tail},
    )


def rotating(
    seed: int = 0,
    size: int = 32,
    speed: float = 0.01,
    noise: float = 0.01,
    steps: int = 1000,
    backend: Backend = "torch",
) -> Problem:
    """A quadratic bowl whose axes and centre turn a little at every step; loss where it is now.

    speed: radians a step of the fastest plane. A memory of gradients that is too long looks back.
    """
    at_least(size=(size, 2), noise=(noise, 0))
    xp, chance = library(backend), np.random.default_rng([13, seed])
    skew = chance.normal(size=(size, size))
    skew = (skew - skew.T) / 2
    values, vectors = np.linalg.eigh(1j * skew)
    phases = values / np.abs(values).max()
    axes, curve = np.linalg.qr(chance.normal(size=(size, size)))[0], np.geomspace(1, 1e-2, size)
    centre = chance.normal(size=size)
    side = _square(size)
    chance = np.random.default_rng(seed)
    now = {}

    def turned(step):
        turn = ((vectors * np.exp(-1j * speed * step * phases)) @ vectors.conj().T).real
        q = turn @ axes
        return xp.array((q * curve) @ q.T), xp.array(turn @ centre)

    def batches():
        step = 0
        while True:
            now["bowl"] = turned(step)
            yield *now["bowl"], xp.array(noise * chance.normal(size=size))
            step += 1

    def height(model, bowl, centre):
        off = model["w"].reshape(-1) - centre
        return 0.5 * (off @ (bowl @ off))

    def loss(model, rows):
        bowl, centre, jitter = rows
        return height(model, bowl, centre) + (model["w"].reshape(-1) * jitter).sum()

    def present(model):
        return height(model, *(now.get("bowl") or turned(0)))

    return Problem(
        xp.weights({"w": np.zeros(side)}),
        *(loss, [Part(batches(), score(present))], steps),
        metric="loss",
        schedule="constant",
        warmup=0.0,
        record={"task": "rotating", "size": size, "speed": speed, "noise": noise},
    )


def _square(size: int) -> tuple[int, int]:
    rows = next(r for r in range(int(size**0.5), 0, -1) if size % r == 0)
    return rows, size // rows


def landscape(
    seed: int = 0,
    k: float = 10.0,
    a: float = 1.0,
    omega: float = 2.0,
    steps: int = 500,
    backend: Backend = "torch",
) -> Problem:
    """The paper's toy (Eq. 53): r² + k(r − θ + a·sin(ωr))²; the seed moves the start (−3.5, 2)."""
    xp, chance = library(backend), np.random.default_rng(seed)
    start = np.array([[-3.5, 2.0]]) + (0.3 * chance.normal(size=(1, 2)) if seed else 0.0)

    def height(model, batch=None):
        r, theta = model["x"][0, 0], model["x"][0, 1]
        return r**2 + k * (r - theta + a * xp.sin(omega * r)) ** 2

    return Problem(
        xp.weights({"x": start}),
        *(height, [Part(itertools.repeat(None), score(height))], steps),
        metric="height",
        schedule="constant",
        warmup=0.0,
        record={"task": "landscape", "k": k, "a": a, "omega": omega},
    )
