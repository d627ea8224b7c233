"""Several devices: steps on explicit meshes, matrices shared among devices, shardings of states."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from math import prod
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

# What stands for a sharding: that of one device holds for any shape.
Sharding: TypeAlias = NamedSharding | PartitionSpec | SingleDeviceSharding


def explicit(x: Any) -> NamedSharding | None:
    """The sharding in the type of an array, None unless its mesh has explicit axes."""
    x = jax.typeof(x) if isinstance(x, jax.core.Tracer) else x
    sharding = _sharding_of(x)
    if not isinstance(sharding, NamedSharding):
        return None
    return sharding if AxisType.Explicit in (sharding.mesh.axis_types or ()) else None


def memory_spec(shape: tuple[int, ...], like: tuple[int, ...], spec: Any) -> PartitionSpec:
    """The spec of a memory of a parameter of shape `like` and spec `spec`.

    The axes in front that are as long as the parameter's are sharded as those, the rest is whole:
    so is all of a memory of the parameter's shape, and the stack in one of a stack of matrices.
    """
    pairs = zip(shape, like, (*spec, *[None] * (len(like) - len(spec))), strict=False)
    found = [s for _, _, s in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return PartitionSpec(*found, *[None] * (len(shape) - len(found)))


def placed(x: jax.Array, like: Any) -> jax.Array:
    """A new memory of a parameter, of the sharding that an explicit mesh has it in."""
    sharding = explicit(like)
    if sharding is None:
        return x
    spec = memory_spec(x.shape, like.shape, sharding.spec)
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def on_mesh(step: Callable[[Any, Any], Any], given: Any) -> Any:
    """step(specs, given), whose results are like the first two trees given, on an explicit mesh.

    Inside, the compiler chooses all shardings; results have the types of those two again.
    specs: of the leaves of the first tree, None without an explicit mesh.
    """
    known = next((s for s in map(explicit, jax.tree.leaves(tuple(given[:2]))) if s), None)
    if known is None:
        return step(jax.tree.map(lambda _: None, given[0]), given)
    whole = NamedSharding(known.mesh, PartitionSpec())
    types = jax.tree.map(lambda x: explicit(x) or whole, tuple(given[:2]))
    specs = jax.tree.map(lambda x, s: memory_spec(x.shape, x.shape, s.spec), given[0], types[0])
    return jax.sharding.auto_axes(lambda given: step(specs, given), out_sharding=types)(given)


def shared(function: Callable[[jax.Array], jax.Array], x: jax.Array, spec: Any) -> jax.Array:
    """function(x) of a stack of matrices, each computed whole, by one device of those it lies on.

    spec: that of a leaf in the stack, None off explicit meshes. Each mesh axis that matrices are
    sharded along costs two exchanges, whatever the function does.
    """
    if spec is None:
        return function(x)
    *batch, rows, columns = spec
    kept = batch if any(batch) else []
    own = x.shape[x.ndim - 2 - len(kept) :]
    n = x.size // max(prod(own), 1)
    path = [PartitionSpec(None, *kept, rows, columns)]
    if n > 1:
        path.append(PartitionSpec(names(rows), *kept, None, columns))
    path.append(PartitionSpec((*names(rows), *names(columns)) * (n > 1), *kept, None, None))
    mesh = jax.sharding.get_abstract_mesh()
    missing = -n % prod(mesh.shape[a] for a in names(path[-1][0]))
    y = jnp.pad(x.reshape(n, *own), ((0, missing), *[(0, 0)] * len(own)))
    for place in path:
        y = jax.lax.with_sharding_constraint(y, place)
    y = function(y)
    for place in reversed(path):
        y = jax.lax.with_sharding_constraint(y, place)
    return y[:n].reshape(x.shape)


def names(axes: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def state_sharding(tx: optax.GradientTransformation, params: Any, shardings: Any = None) -> Any:
    """The sharding of every array of `tx.init(params)`, as a tree of that state's structure.

    A memory of its parameter's shape is sharded as the parameter, and so are the axes in front that
    are as long as the parameter's (stacks of matrices). The rest is replicated: Kronecker factors,
    networks, counts. Good for `out_shardings`, and for the `jax.ShapeDtypeStruct`s from which orbax
    restores.
    tx: any optax transformation. params: arrays or `jax.ShapeDtypeStruct`s.
    shardings: a NamedSharding, PartitionSpec or SingleDeviceSharding, or a tree of one of these
        kinds for parts of params; those of params by default.
    Raises ValueError for a parameter with another sharding or none.
    """
    known = lambda x: isinstance(x, Sharding)  # noqa: E731
    if shardings is None:
        shardings = jax.tree.map_with_path(lambda k, p: _checked(k, _sharding_of(p)), params)
    else:
        shardings = jax.tree.broadcast(shardings, params, is_leaf=known)
        shardings = jax.tree.map_with_path(_checked, shardings, is_leaf=known)
    first = next(iter(jax.tree.leaves(shardings, is_leaf=known)), PartitionSpec())

    def memory(x: Any, p: Any, own: Any) -> Any:
        if isinstance(x, optax.MaskedNode):
            return x
        spec = own if isinstance(own, PartitionSpec) else getattr(own, "spec", ())
        return _like(own, memory_spec(x.shape, p.shape, spec))

    return optax.tree.map_params(
        tx,
        memory,
        jax.eval_shape(tx.init, params),
        params,
        shardings,
        transform_non_params=lambda _: _like(first, PartitionSpec()),
        is_leaf=lambda x: known(x) or isinstance(x, optax.MaskedNode),
    )


def _sharding_of(x: Any) -> Any:
    return getattr(x, "sharding", None)


def _checked(path: Any, sharding: Any) -> Any:
    if isinstance(sharding, Sharding):
        return sharding
    raise ValueError(
        f"the leaf at params{jax.tree_util.keystr(path)} has {sharding=!r}; expected a "
        "NamedSharding, PartitionSpec or SingleDeviceSharding, of the array itself or by "
        "state_sharding(tx, params, shardings)"
    )


def _like(sharding: Any, spec: PartitionSpec) -> Any:
    """The same kind of sharding with another spec."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, spec)
    return spec if isinstance(sharding, PartitionSpec) else sharding
