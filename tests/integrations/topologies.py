"""Save sharded runs of these aliases with orbax and go on from it on eight, two and one device."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jax_backend
from jax_backend import state_sharding

jax.config.update("jax_enable_x64", True)
KINDS = AxisType.Explicit, AxisType.Auto


def place(n, kind):
    """Where parameters are, on one device without a mesh at all."""
    if n == 1:
        return dict.fromkeys("abc", SingleDeviceSharding(jax.devices()[7]))
    mesh = jax.make_mesh((n,), ("x",), devices=jax.devices()[:n], axis_types=(kind,))
    specs = {"a": P("x"), "b": P(None, "x"), "c": P()}
    return {k: NamedSharding(mesh, spec) for k, spec in specs.items()}


def stepped(tx, params, state, steps):
    update = jax.jit(tx.update)
    for i in steps:
        grads = {k: jnp.cos(i + p) for k, p in params.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def like(tree, places):
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


shapes = {"a": (16, 8), "b": (8, 8), "c": (5,)}
for name in sys.argv[1:]:
    for kind in KINDS:
        tx = getattr(jax_backend, name)(0.05, weight_decay=0.1)
        places = place(8, kind)
        params = {k: jax.random.normal(jax.random.key(1), s) for k, s in shapes.items()}
        params = jax.device_put(params, places)
        state = jax.jit(tx.init, out_shardings=state_sharding(tx, params))(params)
        saved = stepped(tx, params, state, range(3))
        folder = Path(f"{name}-{kind}").absolute()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, saved)
        last = stepped(tx, *saved, range(3, 6))
        for n in (8, 2, 1):
            empty = like(params, place(n, kind))
            empty = empty, like(jax.eval_shape(tx.init, empty), state_sharding(tx, empty))
            with ocp.StandardCheckpointer() as checkpointer:
                restored = checkpointer.restore(folder, empty)
            for x, y, s in zip(*map(jax.tree.leaves, (restored, saved, empty)), strict=True):
                assert np.array_equal(x, y) and x.dtype == y.dtype and len(x.devices()) == n
                assert x.sharding.is_equivalent_to(s.sharding, x.ndim)
            again = stepped(tx, *restored, range(3, 6))
            for x, y in zip(*map(jax.tree.leaves, (again, last)), strict=True):
                # Sums of several devices are rounded in another order.
                tolerance = 0.0 if n == 8 else 1e-11 * np.abs(y).max()
                assert np.abs(np.subtract(x, y)).max() <= tolerance, (name, kind, n)
        print(name, "continues")
