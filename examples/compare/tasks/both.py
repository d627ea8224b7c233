"""What lets a small task be written once for torch and for JAX."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from examples.compare.problem import Backend

Array = np.ndarray


class Weights(nn.ParameterDict):
    """Named arrays that are a module."""

    def hidden_matrices(self) -> dict[str, list[Tensor]]:
        """All that have two axes, be they one long: as JAX sees them."""
        return {"flatten": [p for p in self.parameters() if p.ndim > 1]}


class Network(nn.Sequential):
    """Linear layers with rectifiers between, of `mlp`'s arrays."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        layers: list[nn.Module] = []
        for i in range(len(arrays) // 2):
            w, b = (torch.from_numpy(_single(arrays[f"{k}{i}"])) for k in "wb")
            layer = nn.Linear(w.shape[0], w.shape[1])
            layer.weight.data, layer.bias.data = w.T.contiguous(), b
            layers += [layer, nn.ReLU()]
        super().__init__(*layers[:-1])


class Library(NamedTuple):
    """The few functions that the two spell differently; arrays have operators in common.

    network: a model of the weights [in, out] and biases of `mlp`. outside: as in `Problem`.
    forward: what a network answers to rows.
    """

    array: Callable[[Array], Any]
    weights: Callable[[Mapping[str, Array]], Any]
    network: Callable[[Mapping[str, Array]], Any]
    outside: Callable[[Any], tuple[str, ...]]
    forward: Callable[[Any, Any], Any]
    sin: Callable[[Any], Any]
    nats: Callable[[Any, Any], Any]  # logits [B, C], classes [B]: mean cross-entropy


def library(backend: Backend) -> Library:
    """Float32 arrays of the backend; ValueError where it is neither "torch" nor "jax"."""
    if backend == "torch":
        return Library(
            array=lambda x: torch.from_numpy(_single(x)),
            weights=lambda x: Weights(
                {k: nn.Parameter(torch.from_numpy(_single(v))) for k, v in x.items()}
            ),
            network=Network,
            outside=lambda model: (),
            forward=lambda model, x: model(x),
            sin=torch.sin,
            nats=nn.functional.cross_entropy,
        )
    if backend != "jax":
        raise ValueError(f"backend={backend!r}: 'torch' or 'jax'")
    import jax
    import jax.numpy as jnp

    def nats(logits: Any, classes: Any) -> Any:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), classes[:, None], 1)
        return -chosen.mean()

    def weights(arrays: Mapping[str, Array]) -> Any:
        return {k: jnp.asarray(_single(v)) for k, v in arrays.items()}

    def forward(model: Any, x: Any) -> Any:
        last = len(model) // 2 - 1
        for i in range(last):
            x = jax.nn.relu(x @ model[f"w{i}"] + model[f"b{i}"])
        return x @ model[f"w{last}"] + model[f"b{last}"]

    return Library(
        array=lambda x: jnp.asarray(_single(x)),
        weights=weights,
        network=weights,
        outside=lambda model: (f"w{len(model) // 2 - 1}",),
        forward=forward,
        sin=jnp.sin,
        nats=nats,
    )


def score(function: Callable[[Any], Any]) -> Callable[[Any], float]:
    """The function as a score: a number, without gradients."""

    def scored(model: Any) -> float:
        with torch.no_grad():
            return float(function(model))

    return scored


def at_least(**sizes: tuple[float, float]) -> None:
    """Raise ValueError where a size, of (value, least), is too small."""
    for name, (value, least) in sizes.items():
        if not value >= least:
            raise ValueError(f"{name}={value}: at least {least}")


def shuffled(
    chance: np.random.Generator, batch: int, *arrays: Any, of: int | None = None
) -> Iterator[tuple[Any, ...]]:
    """Endless batches of rows of the arrays, each row once in an epoch; `of` rows of them."""
    count = len(arrays[0]) if of is None else of
    if not 1 <= batch <= count:
        raise ValueError(f"batch={batch}: from 1 to the {count} rows there are")
    while True:
        order = chance.permutation(count)
        for start in range(0, count - batch + 1, batch):
            rows = order[start : start + batch]
            yield tuple(x[rows] for x in arrays)


def _single(x: Array) -> Array:
    return np.ascontiguousarray(x, np.float32) if x.dtype.kind == "f" else np.ascontiguousarray(x)
