"""One step of several leaves together: what runs as a batch, and what inside a conditional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepopt.algebra import Program, apply
from deepopt.expr import Expr
from jax_backend.algebra import Jax
from jax_backend.sharding import memory_spec, shared

# Bytes of the operands that one batch may copy.
LARGEST_BATCH = 2**28


@dataclass(frozen=True)
class Part:
    """One leaf in a step: the program of each variant, known values, what its outputs replace.

    spec: how an array of the leaf's `shape` is sharded on an explicit mesh, None if unknown.
    """

    algebra: Jax
    programs: Sequence[Program]
    values: dict[Expr, Any]
    replaced: Mapping[str, Any]
    shape: tuple[int, ...] = ()
    spec: Any = None

    def kind(self, call: Expr) -> tuple[Any, Any, PartitionSpec | None]:
        """What calls of a function on one argument have in common that run as a batch."""
        x = jax.typeof(self.values[call.args[0]])
        spec = None if self.spec is None else memory_spec(x.shape, self.shape, self.spec)
        return call.attrs, x, spec

    def outputs(self, variant: int, vary: bool) -> dict[str, jax.Array]:
        """The outputs that do, or do not, depend on the variant; they may lack the batch axes."""
        found: dict[str, jax.Array] = {}
        for name, like in self.replaced.items():
            if (len({p.outputs[name] for p in self.programs}) > 1) == vary:
                x, shape = self.values[self.programs[variant].outputs[name]], jnp.shape(like)
                x = x if jnp.size(x) == jnp.size(like) else jnp.broadcast_to(x, shape)
                found[name] = jnp.reshape(x, shape).astype(jnp.result_type(like))
        return found


def run(parts: Sequence[Part], chosen: Any) -> list[dict[str, jax.Array]]:
    """The outputs of each leaf, by the chosen variant.

    XLA copies what a conditional returns, so what every variant computes stays outside.
    """
    common = [set.intersection(*({*p.nodes} for p in part.programs)) for part in parts]
    every = [part.programs[0].nodes for part in parts]
    evaluate(parts, [[x for x in xs if x in c] for xs, c in zip(every, common, strict=True)])

    def branch(i: int) -> list[dict[str, jax.Array]]:
        own = [replace(part, values=dict(part.values)) for part in parts]
        evaluate(own, [part.programs[i].nodes for part in own])
        return [part.outputs(i, vary=True) for part in own]

    fixed = [part.outputs(0, vary=False) for part in parts]
    branches = [partial(branch, i) for i in range(len(parts[0].programs))]
    varied = jax.lax.switch(chosen, branches) if len(branches) > 1 else fixed
    return [x | y for x, y in zip(fixed, varied, strict=True)]


def evaluate(parts: Sequence[Part], todo: list[Sequence[Expr]]) -> None:
    """Adds the values of these nodes of each part; alike calls of newton_schulz are one batch.

    All else stays per leaf, where XLA fuses it without a copy.
    """
    while any(todo):
        due: dict[Any, list[tuple[dict[Expr, Any], Expr]]] = {}
        for n, part in enumerate(parts):
            own, later = part.values, list[Expr]()
            for x in (x for x in todo[n] if x not in own):
                if any(arg not in own for arg in x.args):
                    later.append(x)
                elif x.op == "call" and x["name"] == "newton_schulz":
                    later.append(x)
                    due.setdefault(part.kind(x), []).append((own, x))
                else:
                    own[x] = apply(part.algebra, x, [own[arg] for arg in x.args])
            todo[n] = later
            if not later and len(part.programs) == 1:
                for x in own.keys() - part.programs[0].outputs.values():
                    del own[x]
        for (_, kind, spec), calls in due.items():
            most = max(1, LARGEST_BATCH // (kind.size * kind.dtype.itemsize))
            for batch in (calls[i : i + most] for i in range(0, len(calls), most)):
                xs = [own[x.args[0]] for own, x in batch]
                function = partial(_called, Jax(kind.dtype), batch[0][1])
                y = shared(function, jnp.stack(xs) if len(xs) > 1 else xs[0], spec)
                for (own, x), value in zip(batch, y if len(xs) > 1 else [y], strict=True):
                    own[x] = value


def _called(algebra: Jax, call: Expr, x: jax.Array) -> jax.Array:
    return apply(algebra, call, [x])
