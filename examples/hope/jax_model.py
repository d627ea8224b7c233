"""Hope in JAX, trained through optax: `python -m examples.hope.jax_model`.

The parameters are those of the torch model under the same names, a nested dict, and the outputs are
the same. The model needs no torch; the command does, for the corpus of `examples.hope.data`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from deepopt import rules
from examples.hope import report
from examples.hope.config import STREAMS, Config
from examples.hope.jax_layers import (
    CONVOLUTION,
    Parameters,
    continuum,
    linear,
    rms_norm,
    titans,
)
from jax_backend import transform

Schedule = Callable[[Any], Any]


def apply(parameters: Parameters, tokens: Array, config: Config) -> Array:
    """Logits [B, T, outputs] of tokens [B, T]; T need not be a multiple of a chunk."""
    check(config)

    def step(x: Array, layer: Parameters) -> tuple[Array, None]:
        return block(layer, x, config), None

    layers = [parameters["blocks"][str(i)] for i in range(config.layers)]
    x = parameters["embedding"]["weight"][tokens]
    # A scan, not a loop: XLA compiles one layer, whatever their number.
    x, _ = jax.lax.scan(step, x, jax.tree.map(lambda *ps: jnp.stack(ps), *layers))
    return linear(parameters["head"], rms_norm(parameters["norm"], x))


def block(parameters: Parameters, x: Array, config: Config) -> Array:
    """Rows [B, T, width] to rows: the memories, gated, then the continuum memory (Eq. 94-97)."""
    inputs = rms_norm(parameters["norm"], x)
    answers = rms_norm(parameters["head_norm"], titans(parameters["mixer"], inputs, config))
    mixed = answers.reshape(x.shape) * jax.nn.silu(linear(parameters["gate"], inputs))
    return continuum(parameters["feed_forward"], x + linear(parameters["out"], mixed), config)


def check(config: Config) -> None:
    """ValueError for a configuration that only the torch model has."""
    for name, here in (
        ("mixer", ("titans",)),
        ("feed_forward", ("cms",)),
        ("cms", ("sequential", "independent")),
    ):
        if (value := getattr(config, name)) not in here:
            raise ValueError(f"{name} {value!r} has no twin in JAX: choose one of {here}")


def init(key: Array, config: Config) -> Parameters:
    """Fresh parameters, drawn as the torch model draws its own."""
    check(config)
    width, heads, count = config.width, config.heads, len(config.adaptive) + 1
    d, hidden = width // heads, config.memory_width

    def matrix(rows: int, columns: int) -> Parameters:
        def draw(key: Array) -> Array:
            return jax.random.uniform(key, (rows, columns), minval=-1.0) / columns**0.5

        return {"weight": draw}

    def normal(*shape: int, scale: float = 1.0) -> Schedule:
        return lambda key: jax.random.normal(key, shape) * scale

    def full(*shape: int, value: float = 0.0) -> Schedule:
        return lambda _: jnp.full(shape, value, float)

    def taps(key: Array) -> Array:
        return (jax.random.normal(key, (CONVOLUTION, len(STREAMS) * width)) * 0.3).at[-1].add(1.0)

    def gate(name: str, bias: float = 0.0) -> Parameters:
        return {name: normal(heads, d, 1), f"{name}_bias": full(heads, 1, 1, value=bias)}

    def scale(size: int) -> Parameters:
        return {"weight": full(size, value=1.0)}

    def level() -> Parameters:
        up, down = matrix(config.cms_width, width), matrix(width, config.cms_width)
        return {"norm": scale(width), "up": up, "down": down}

    def memories() -> Parameters:
        if config.inner.structure != "mlp":
            return {"0": normal(heads * count, d, d, scale=d**-0.5)}
        second = normal(heads * count, hidden, d, scale=(hidden * d) ** -0.5)
        return {"0": normal(heads * count, d, hidden), "1": second}

    def layer() -> Parameters:
        mixer = {"initial": memories(), "convolution": {"taps": taps}}
        maps = {name: matrix(width, width) for name in config.maps}
        mixer |= {"project": maps} if maps else {}
        mixer |= {"share": full(heads, 1, d, value=0.5)} if config.inner.fixed else {}
        mixer |= gate("rate")
        mixer |= gate("retention", -3.0) if config.forget else {}
        mixer |= gate("momentum") if config.inner.momentum else {}
        levels: Parameters = {"levels": {str(i): level() for i in range(len(config.periods))}}
        if config.cms == "independent":
            levels["weights"] = full(len(config.periods), value=1.0)
        shell = {"norm": scale(width), "head_norm": scale(d)}
        shell |= {"gate": matrix(width, width), "out": matrix(width, width)}
        return {**shell, "mixer": mixer, "feed_forward": levels}

    outputs = config.outputs or config.vocabulary
    drawn = {
        "embedding": {"weight": normal(config.vocabulary, width)},
        "blocks": {str(i): layer() for i in range(config.layers)},
        "norm": scale(width),
        "head": {"weight": normal(outputs, width, scale=0.2 / width**0.5)},
    }
    draws, structure = jax.tree.flatten(drawn)
    keys = jax.random.split(key, len(draws))
    return structure.unflatten([draw(k) for draw, k in zip(draws, keys, strict=True)])


def from_torch(model: Any) -> Parameters:
    """The parameters of an `examples.hope.model.LanguageModel`, in the dtype that jax allows."""
    check(model.config)
    parameters: Parameters = {}
    for name, tensor in model.state_dict().items():
        *path, last = name.split(".")
        inner = parameters
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = jnp.array(tensor.cpu().numpy())
    return parameters


def to_torch(parameters: Parameters, model: Any) -> None:
    """Give parameters to a torch model of the same configuration."""
    import torch

    named, _ = jax.tree.flatten_with_path(parameters)
    state = {
        ".".join(part.key for part in path): torch.from_numpy(np.array(value))
        for path, value in named
    }
    model.load_state_dict(state)


def make_optimizer(
    config: Config,
    lr: float = 2e-2,
    rest: float = 3e-3,
    schedule: Schedule = lambda step: 1.0,
    clip: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Hidden matrices and memories' starts by M3, all else by AdamW, CMS levels by their clocks.

    lr, rest: learning rates of M3 and AdamW; both are multiplied by `schedule`, a function of the
        step, from 0. clip: largest norm of all gradients together.
    """
    adamw = rules.AdamW(betas=(0.9, 0.95))
    parts = {}
    for period in {1, *config.periods}:
        own: dict[str, Any] = {"lr": lambda step: lr * schedule(step), "weight_decay": 0.1}
        others: dict[str, Any] = {"lr": lambda step: rest * schedule(step), "weight_decay": 0.0}
        parts[f"matrix {period}"] = transform(rules.M3(every=period), **own)
        parts[f"rest {period}"] = transform(adamw.with_values({"every": period}), **others)

    def label(path: tuple[Any, ...], value: Array) -> str:
        names = [part.key for part in path]
        hidden = names[0] == "blocks" and (
            (names[-1] == "weight" and value.ndim == 2) or "initial" in names
        )
        period = config.periods[int(names[4])] if "levels" in names else 1
        return f"{'matrix' if hidden else 'rest'} {period}"

    def labels(tree: Parameters) -> Any:
        return jax.tree.map_with_path(label, tree)

    return optax.chain(optax.clip_by_global_norm(clip), optax.partition(parts, labels))


def cost(parameters: Parameters, crops: Array, config: Config) -> Array:
    """Cross-entropy in nats of crops [B, T + 1]."""
    logits = apply(parameters, crops[:, :-1], config)
    return optax.softmax_cross_entropy_with_integer_labels(logits, crops[:, 1:]).mean()


@partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnums=(0, 1))
def train_step(
    parameters: Parameters,
    state: Any,
    crops: Array,
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
) -> tuple[Parameters, Any, Array]:
    """Parameters and optimizer state after one step on crops [B, T + 1], which takes their memory.

    Also the loss before it, in nats.
    """
    loss, gradients = jax.value_and_grad(cost)(parameters, crops, config)
    updates, state = optimizer.update(gradients, state, parameters)
    moved: Any = optax.apply_updates(parameters, updates)
    return moved, state, loss


@partial(jax.jit, static_argnames="config")
def evaluate(parameters: Parameters, windows: Array, config: Config) -> Array:
    """Mean bits per byte over windows [count, B, T + 1]."""
    costs = jax.lax.map(lambda crops: cost(parameters, crops, config), windows)
    return costs.mean() / math.log(2)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    p = argparse.ArgumentParser("python -m examples.hope.jax_model", description=__doc__)
    p.add_argument("--data", type=Path, help="a text file or folder (default: Python's sources)")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--seed", type=int, default=0, help="of weights and batches")
    p.add_argument("--quick", action="store_true", help="a tiny model, to see that all works")
    args = p.parse_args(argv)
    try:
        train(args.data, args.steps, args.seed, args.quick)
    except (OSError, ValueError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(path: Path | None, steps: int, seed: int, quick: bool) -> float:
    """Train as `examples.hope.train` does; the held-out bits per byte, which are printed too."""
    # Not at the top: the model is for those without torch too.
    from examples.hope import data
    from examples.hope.train import LEARNING_RATES, REST, SMALL, Settings, schedule

    if steps < 1:
        raise ValueError(f"--steps {steps}: at least 1")
    settings = Settings(model=SMALL, windows=4) if quick else Settings()
    config, batch, length = settings.model, settings.batch, settings.length
    corpus = data.load(path, length)
    crops = data.batches(corpus.train, batch, length, seed)
    held_out = data.windows(corpus.valid, batch, length, settings.windows)
    factors = jnp.array([schedule(step, steps) for step in range(steps)])
    lr = LEARNING_RATES["m3"]
    optimizer = make_optimizer(config, lr, REST, lambda step: factors[step], settings.clip)
    parameters = init(jax.random.key(seed), config)
    state = optimizer.init(parameters)
    count = sum(p.size for p in jax.tree.leaves(parameters))
    print(f"{corpus.description}: {corpus.size:,} bytes, some held out, seed {seed}")
    print(f"Hope in JAX {jax.__version__}, {count / 1e6:.2f} M parameters, M3")
    progress = report.Progress(steps, batch * length)
    for step in range(steps):
        rows = jnp.asarray(next(crops).numpy().astype(np.int32))
        parameters, state, loss = train_step(parameters, state, rows, config, optimizer)
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss} at step {step}")
        progress.update(step + 1, float(loss) / math.log(2))
    progress.close()
    found = float(evaluate(parameters, jnp.asarray(held_out.numpy().astype(np.int32)), config))
    print(f"held-out bits per byte, {held_out.shape[0] * batch} windows: {found:.3f}")
    return found


if __name__ == "__main__":
    sys.exit(main())
