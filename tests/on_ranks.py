"""What the ranks of a world do in the tests of torch_backend.distributed."""

import torch
from cases import contexts
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torch_backend import Optimizer

_meshes = {}


def mesh_of(*sizes, names=("a", "b")):
    """A mesh, made once."""
    if sizes not in _meshes:
        _meshes[sizes] = init_device_mesh("cpu", sizes, mesh_dim_names=names[: len(sizes)])
    return _meshes[sizes]


PLACEMENTS = {
    "0": ((4,), (Shard(0),)),
    "1": ((4,), (Shard(1),)),
    "replicate": ((4,), (Replicate(),)),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "both": ((2, 2), (Shard(1), Shard(0))),
    "same": ((2, 2), (Shard(0), Shard(0))),
}


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def streams(shapes, steps, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
    return [draw(s) for s in shapes], [[draw(s) for s in shapes] for _ in range(steps)]


def equals_one_device(rank, world, rule, shapes, placement, steps, options, dtype=torch.float64):
    """The largest differences of parameters and of state from an optimizer of whole tensors."""
    sizes, placements = PLACEMENTS[placement]
    mesh = mesh_of(*sizes)
    start, gradients = streams(shapes, steps, dtype)
    ones = [nn.Parameter(x.clone()) for x in start]
    many = [nn.Parameter(distribute_tensor(x, mesh, placements)) for x in start]
    one = Optimizer(ones, rule, fused=False, **options)
    two = Optimizer(many, rule, **options)
    given = [contexts(rule, tuple(s), steps) for s in shapes]
    for t in range(steps):
        for p, q, g, c in zip(ones, many, gradients[t], given, strict=True):
            p.grad, q.grad = g.clone(), distribute_tensor(g, mesh, placements)
            for name, x in c[t].items():
                one.context[p][name] = two.context[q][name] = torch.from_numpy(x)
        one.step()
        two.step()
    worst = 0.0
    for p, q in zip(ones, many, strict=True):
        worst = max(worst, apart(q, p))
        assert list(two.state[q]) == list(one.state[p])
        for name, x in one.state[p].items():
            worst = max(worst, apart(two.state[q][name], x))
    return worst


def apart(x, y):
    x, y = full(x).detach(), y.detach()
    assert x.shape == y.shape and x.dtype == y.dtype
    return float((x - y).abs().max() / y.abs().max().clamp(min=1.0)) if y.numel() else 0.0
