"""What a task hands to a study: weights, data, a loss and scores."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

Better = Literal["lower", "higher"]
Schedule = Literal["cosine", "linear", "constant"]
Backend = Literal["torch", "jax"]


@dataclass
class Part:
    """Data to learn from, and how well it is learnt.

    batches: endless; each is what the loss takes.
    validate: the score of a model that learning rates are tuned on and curves show.
    test: the score that is reported; without one it is that of `validate`, and the report says so.
    """

    batches: Iterator[Any]
    validate: Callable[[Any], float]
    test: Callable[[Any], float] | None = None
    name: str = ""


@dataclass
class Problem:
    """One training, made anew for every trial.

    model: an `nn.Module`, or a tree of arrays for JAX. It must depend on the seed alone: all
        optimizers start from the same weights and see the same batches, so that they differ in
        pairs.
    loss: (model, batch) to a scalar; a pure function of the tree in JAX.
    parts: one, or several that are learnt one after another (a stream).
    steps: of the optimizer, on each part.
    schedule: of the learning rate over all parts: a `warmup` share of linear rise, then down to a
        tenth as a cosine, down to zero as a line, or "constant".
    clip: the largest norm of all gradients together; None for no clipping.
    rest: learning rate of the AdamW that steps all but hidden matrices, whatever is compared. None
        where the optimizer steps everything.
    outside: in JAX, arrays of two axes or more that are no hidden matrices, such as embeddings and
        the head: their paths, keys joined by "/". An `nn.Module` says it by its kinds of layers.
    record: what identifies the data: figures are compared only where the records agree.
    """

    model: Any
    loss: Callable[[Any, Any], Any]
    parts: Sequence[Part]
    steps: int
    metric: str = "loss"
    better: Better = "lower"
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    clip: float | None = None
    rest: float | None = None
    outside: Collection[str] = ()
    record: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if isinstance(self.parts, Part) or not self.parts:
            raise ValueError(f"parts {self.parts!r}: a list of at least one Part to learn")
        for part in self.parts:
            if not isinstance(part.batches, Iterator):
                kind = type(part.batches).__name__
                raise ValueError(
                    f"batches of type {kind}: an endless iterator, such as a generator"
                )
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps {self.steps!r}: a whole number, at least 1")
        if self.better not in ("lower", "higher"):
            raise ValueError(f"better {self.better!r}: 'lower' or 'higher'")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"schedule {self.schedule!r}: 'cosine', 'linear' or 'constant'")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup {self.warmup}: a share of the steps, from 0 to below 1")
        for key, value in self.record.items():
            try:
                json.dumps({key: value})
            except (TypeError, ValueError) as error:
                kind = type(value).__name__
                raise ValueError(
                    f"record {key!r} of type {kind}: {error}; numbers, words and lists of them can "
                    "be kept, such as int(…) or str(…)"
                ) from error
        if self.outside:
            self._check_outside()

    def _check_outside(self) -> None:
        if self.backend == "torch":
            raise ValueError(f"outside {self.outside!r}: for trees of arrays, not an nn.Module")
        import jax

        paths = jax.tree.leaves(paths_of(self.model))
        for path in self.outside:
            if path not in paths:
                raise ValueError(f"outside {path!r}: no array of the model, which has {paths}")

    @property
    def backend(self) -> Backend:
        return "torch" if isinstance(self.model, nn.Module) else "jax"

    @property
    def total(self) -> int:
        """Steps on all parts."""
        return self.steps * len(self.parts)


def paths_of(tree: Any) -> Any:
    """The tree with the path of each array in its place."""
    from jax.tree_util import keystr, tree_map_with_path

    return tree_map_with_path(lambda path, _: keystr(path, simple=True, separator="/"), tree)
