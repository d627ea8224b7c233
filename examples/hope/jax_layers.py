"""The layers of Hope as functions of jax arrays: self-modifying Titans and continuum memory.

Parameters are nested dicts under the names of the torch modules of `examples.hope.mixers` and
`examples.hope.cms`, whose maths is said there; the writes of the memories are the same graphs.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from examples.hope import memories as graphs
from examples.hope.config import EPSILON, GENERATED, STREAMS, Config
from examples.hope.memories import Learning
from jax_backend import lift

Parameters: TypeAlias = dict[str, Any]
CONVOLUTION = 4  # taps

_read, _write = map(lift, (graphs.read, graphs.write))


class Memories(NamedTuple):
    """Memories where a chunk begins; each array is [..., rows, columns] of a parameter."""

    fixed: tuple[Array, ...]  # what stays as it was trained; empty but for "residual"
    parameters: tuple[Array, ...]
    velocity: tuple[Array, ...]  # empty without momentum


class Rows(NamedTuple):
    """What the rows of a chunk bring to the memories: [B, H, T, d], and gates [B, H, T, 1]."""

    queries: Array
    keys: Array
    values: Array
    retention: Array
    rate: Array
    momentum: Array


def titans(parameters: Parameters, x: Array, config: Config) -> Array:
    """Self-modifying Titans (Eq. 83-88): rows [B, T, width] to answers [B, T, H, d].

    One scan over slow chunks around one over chunks, so that XLA compiles each of them once.
    """
    batch, length, _ = x.shape
    size = min(config.slow_chunk, -(-length // config.chunk) * config.chunk)
    count = -(-length // size)
    # Rows at the end that fill the last chunk: nothing before them depends on them.
    x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0)))

    def chunk(memory: Memories, rows: Rows) -> tuple[Memories, Array]:
        values = targets(memory, rows.values, config)
        rate = rows.rate / config.sharers(config.chunk)
        rows = rows._replace(values=values, rate=rate)
        return write(memory, rows, config.inner, answers=True)

    def learn(generators: Memories, rows: Rows) -> Memories:
        # All generators are written with the same keys and rates: one axis to broadcast.
        shared = Rows(*(r[:, :, None] for r in rows))
        values = targets(generators, shared.values, config)
        rate = shared.rate / config.sharers(config.slow_chunk)
        return write(generators, shared._replace(values=values, rate=rate), config.inner)[0]

    def slow_chunk(
        carry: tuple[Memories, Memories], given: tuple[Array, Array]
    ) -> tuple[tuple[Memories, Memories], Array]:
        (memory, generators), (last, streams) = carry, given
        rows = generate(parameters, generators, streams, config)
        memory, answers = jax.lax.scan(chunk, memory, in_chunks(rows, config.chunk))
        if config.adaptive:
            # The generators that no later row asks are not written.
            generators = jax.lax.cond(last, lambda g, _: g, learn, generators, rows)
        told = one_after_another(answers)
        if config.inner.fixed:
            told = told - (1 - parameters["share"]) * (rows.queries @ memory.fixed[0])
        return (memory, generators), told

    step = jax.checkpoint(slow_chunk) if config.checkpoint else slow_chunk
    state = begin(parameters["initial"], batch, config)
    streams = in_chunks(streams_of(parameters, x, config), size)
    _, answers = jax.lax.scan(step, state, (jnp.arange(count) == count - 1, streams))
    return one_after_another(answers)[:, :, :length].swapaxes(1, 2)


def in_chunks(rows: Any, size: int) -> Any:
    """Arrays [..., T, d] as [T / size, ..., size, d]."""

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:-2], -1, size, x.shape[-1]), -3, 0)

    return jax.tree.map(cut, rows)


def one_after_another(chunks: Array) -> Array:
    """Chunks [count, ..., size, d] as rows [..., count · size, d]."""
    x = jnp.moveaxis(chunks, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def streams_of(parameters: Parameters, x: Array, config: Config) -> Array:
    """The rows of each of `STREAMS`, [4, B, H, T, d] on the unit sphere."""
    project = parameters.get("project", {})
    parts = [linear(project[n], x) if n in project else x for n in STREAMS]
    taps, length = parameters["convolution"]["taps"], x.shape[1]
    padded = jnp.pad(jnp.concatenate(parts, -1), ((0, 0), (CONVOLUTION - 1, 0), (0, 0)))
    rows = sum(padded[:, i : i + length] * taps[i] for i in range(CONVOLUTION))
    rows = unit(jnp.reshape(rows, (*x.shape[:2], len(STREAMS), config.heads, -1)))
    return rows.transpose(2, 0, 3, 1, 4)


def begin(initial: Parameters, batch: int, config: Config) -> tuple[Memories, Memories]:
    """The meta-learnt initial states of "memory" [B, H, ...] and of the generators [B, H, G, ...].

    initial: the parameters "0", and "1" of an MLP, [H · (G + 1), rows, columns].
    """
    whole = [initial[name] for name in sorted(initial)]
    whole = [p.reshape(config.heads, -1, *p.shape[1:]) for p in whole]
    whole = [jnp.broadcast_to(p, (batch, *p.shape)) for p in whole]
    memory, generators = (tuple(p[:, :, i] for p in whole) for i in (-1, slice(-1)))

    def still(parameters: tuple[Array, ...]) -> Memories:
        zeros = tuple(map(jnp.zeros_like, parameters))
        fixed, start = (parameters, zeros) if config.inner.fixed else ((), parameters)
        return Memories(fixed, start, zeros if config.inner.momentum else ())

    return still(memory), still(generators)


def generate(parameters: Parameters, generators: Memories, streams: Array, config: Config) -> Rows:
    """What the generators make of streams [4, B, H, T, d]; the others are the streams' own rows."""
    found: dict[str, Array] = dict(zip(GENERATED, (*streams, streams[3]), strict=True))
    if config.adaptive:
        asked = jnp.stack([found[name] for name in config.adaptive], 2)
        answers = _read(asked, *generators.fixed, *generators.parameters, **vars(config.inner))
        found |= {name: answers[:, :, i] for i, name in enumerate(config.adaptive)}
    rate = jax.nn.softplus(found["rate"] @ parameters["rate"] + parameters["rate_bias"])
    rate = -jnp.expm1(-rate / config.rate_cap) * config.rate_cap
    retention = momentum = jnp.ones_like(rate)
    if config.forget:
        gate = found["retention"] @ parameters["retention"] + parameters["retention_bias"]
        retention = 1 - config.forget * jax.nn.sigmoid(gate)
    if config.rate_cap > 1:
        rate = rate * (1 + retention) / 2
    if config.inner.momentum:
        gate = streams[3] @ parameters["momentum"] + parameters["momentum_bias"]
        momentum = jax.nn.sigmoid(gate)
        rate = rate * (1 - momentum)
    value = unit(found["value"]) if config.unit_values else found["value"]
    return Rows(unit(found["query"]), unit(found["key"]), value, retention, rate, momentum)


def targets(memories: Memories, values: Array, config: Config) -> Array:
    """What the memories should answer to the keys: v̂ = m(v), each its own (Eq. 84)."""
    if not config.own_values:
        return values
    own = _read(values, *memories.fixed, *memories.parameters, **vars(config.inner))
    return unit(own) if config.unit_values else own


def write(
    memories: Memories, rows: Rows, rule: Learning, answers: bool = False
) -> tuple[Memories, Array]:
    """One step per row of a chunk; with `answers`, those to each query before its row's step."""
    queries, *given = rows
    asked = (queries,) if answers else ()
    new = _write(
        *(*given, *memories.fixed, *memories.parameters, *memories.velocity, *asked),
        **vars(rule),
        fresh=True,
        after=False,
    )
    count = rule.count
    velocity = new[count : count + len(memories.velocity)]
    moved = memories._replace(parameters=new[:count], velocity=velocity)
    return moved, new[-1] if answers else queries[..., :0, :]


def continuum(parameters: Parameters, x: Array, config: Config) -> Array:
    """The levels of a continuum memory, a chain (Eq. 73) or a weighted sum (Eq. 74)."""
    levels = [parameters["levels"][str(i)] for i in range(len(config.periods))]
    if config.cms == "independent":
        changes = jnp.stack([change(level, x) for level in levels])
        return x + jnp.einsum("l,l...->...", parameters["weights"], changes)
    for level in levels:
        x = x + change(level, x)
    return x


def change(level: Parameters, x: Array) -> Array:
    """What one MLP of a continuum memory adds to its input."""
    hidden = jax.nn.gelu(linear(level["up"], rms_norm(level["norm"], x)), approximate=False)
    return linear(level["down"], hidden)


def linear(parameters: Parameters, x: Array) -> Array:
    """A map whose weight is [out, in], as in torch."""
    return x @ parameters["weight"].T


def rms_norm(parameters: Parameters, x: Array) -> Array:
    """Rows divided by their root mean square, then scaled entry by entry."""
    mean = jnp.square(x).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + EPSILON) * parameters["weight"]


def unit(x: Array) -> Array:
    """Rows scaled to length one; short ones, up to 1e-6, stay short."""
    # Below the root, so that the derivative of a row of zeros is no NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
