"""What the ranks of a world do in the tests of torch_backend.distributed."""

import torch
from cases import contexts
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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


class Small(nn.Module):
    """An embedding, a hidden matrix, a stack, a norm, a convolution and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.convolution = nn.Conv1d(10, 7, 3, padding=1)
        self.stack = nn.Parameter(torch.randn(3, 7, 5) / 3)
        self.head = nn.Linear(5, 11)

    def forward(self, x):
        x = self.norm(self.hidden(self.embedding(x)).tanh())
        x = self.convolution(x.mT).mT
        return self.head(torch.einsum("btc,kcd->btd", x, self.stack).tanh())


def small(seed=0):
    torch.manual_seed(seed)
    return Small()


def batches(count, rows=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 11, (rows, 5), generator=generator) for _ in range(count)]


def loss(model, x):
    return nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())


def sharded(model, mesh):
    """The model by FSDP2, in two groups."""
    for child in (model.hidden, model.convolution):
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def weights(model):
    return {k: full(x).detach().clone() for k, x in model.named_parameters()}


def train_alone(rule, data, options=None, model=None):
    """Losses of whole batches, and the weights, of a model on this rank alone."""
    model = small() if model is None else model
    optimizer = Optimizer(model, rule, **(options or {}))
    for x in data:
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    return model, optimizer


def fsdp(rank, world, rule, mesh_sizes, options, compiled=False, halves=1):
    """How far a model by FSDP2 is from one on one device, each rank on its part of the batches."""
    mesh = mesh_of(*mesh_sizes)
    data = batches(4)
    one, _ = train_alone(rule, data, options)
    model = sharded(small(), mesh)
    optimizer = Optimizer(model, rule, **options)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    for x in data:
        optimizer.zero_grad()
        for part in x[rank :: mesh.size()].chunk(halves):
            (loss(run, part) / halves).backward()
        optimizer.step()
    assert all(isinstance(x, DTensor) for s in optimizer.state.values() for k, x in s.items() if k != "step")
    found, expected = weights(model), weights(one)
    return max(apart(found[k], expected[k]) for k in expected)
