"""What the ranks of a world do in the tests of torch_backend.distributed."""

import copy
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import contexts
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from deepopt import Rule, rules
from examples.hope.config import Config
from examples.hope.model import Hope
from torch_backend import (
    Optimizer,
    distributed,
    export_state,
    import_state,
    release_gradients,
)
from torch_backend.distributed import local

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


def cut(x, mesh, placements):
    """A tensor that all ranks have, as a DTensor."""
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def streams(shapes, steps, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
    return [draw(s) for s in shapes], [[draw(s) for s in shapes] for _ in range(steps)]


def equals_one_device(rank, world, rule, shapes, placement, steps, options, fused=None):
    """The largest differences of parameters and of state from an optimizer of whole tensors."""
    sizes, placements = PLACEMENTS[placement]
    mesh = mesh_of(*sizes)
    start, gradients = streams(shapes, steps)
    ones = [nn.Parameter(x.clone()) for x in start]
    many = [nn.Parameter(cut(x, mesh, placements)) for x in start]
    one = Optimizer(ones, rule, fused=False, **options)
    two = Optimizer(many, rule, fused=fused, **options)
    given = [contexts(rule, tuple(s), steps) for s in shapes]
    for t in range(steps):
        for p, q, g, c in zip(ones, many, gradients[t], given, strict=True):
            p.grad, q.grad = g.clone(), cut(g, mesh, placements)
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
    assert all(
        isinstance(x, DTensor)
        for s in optimizer.state.values()
        for k, x in s.items()
        if k != "step"
    )
    found, expected = weights(model), weights(one)
    return max(apart(found[k], expected[k]) for k in expected)


def every_rule(rank, world, jobs):
    """`equals_one_device` for many rules."""
    return [equals_one_device(rank, world, *job, 5, {}) for job in jobs]


def seen_as_several(rank, world, rule, views):
    """Stacks and fused projections, cut where their matrices are not."""
    mesh, worst = mesh_of(4), 0.0
    for shape, view in views:
        start, gradients = streams([shape], 4)
        one = nn.Parameter(start[0].clone())
        many = nn.Parameter(cut(start[0], mesh, (Shard(0),)))
        pair = [Optimizer([{"params": [x], "rule": rule, "seen_as": view}]) for x in (one, many)]
        for (g,) in gradients:
            one.grad, many.grad = g.clone(), cut(g, mesh, (Shard(0),))
            for optimizer in pair:
                optimizer.step()
        worst = max(worst, apart(many, one))
    return worst


def counted(rank, world, rule, shapes, steps):
    """How often a step calls each collective."""
    mesh, (start, gradients) = mesh_of(4), streams(shapes, steps + 1)
    params = [nn.Parameter(cut(x, mesh, (Shard(0),))) for x in start]
    optimizer = Optimizer(params, rule)
    for t in range(steps + 1):
        for p, g in zip(params, gradients[t], strict=True):
            p.grad = cut(g, mesh, (Shard(0),))
        with CommDebugMode() as calls:
            optimizer.step()
    found = {k.__name__.split(".")[-1]: n for k, n in calls.get_comm_counts().items() if n}
    return found, [len(optimizer._distributed.cut), steps]


def gradients_on_some_ranks(rank, world, rule):
    """A gradient that only rank 1 has is a step for all; frozen parameters stay."""
    mesh, (start, gradients) = mesh_of(4), streams([(6, 4), (5, 3), (4, 4)], 3)
    place = (Shard(0),)
    ones = [nn.Parameter(x.clone()) for x in start]
    many = [nn.Parameter(cut(x, mesh, place)) for x in start]
    many[2].requires_grad_(False)
    one, two = Optimizer(ones, rule), Optimizer(many, rule)
    for t, g in enumerate(gradients):
        for i in range(2):
            whole = cut(g[i], mesh, place)
            ones[i].grad, many[i].grad = g[i].clone(), whole
        if t == 1:
            # Only rank 1 has something of the first, and nobody anything of the second.
            part = g[0].clone()
            part[:2], part[4:] = 0, 0
            ones[0].grad, ones[1].grad, many[1].grad = part, None, None
            many[0].grad = cut(part, mesh, place) if rank == 1 else None
        one.step()
        two.step()
    steps = [float(two.state[p]["step"]) for p in many[:2]]
    return max(apart(q, p) for p, q in zip(ones, many, strict=True)), steps, many[2] in two.state


def bad_gradients(rank, world, rule, how, where):
    """What ranks do about a NaN that one rank sees: what was raised, and what changed."""
    mesh, (start, gradients) = mesh_of(4), streams([(8, 4), (8,)], 2)
    names = ("matrix", "vector")
    many = [nn.Parameter(cut(x, mesh, (Shard(0),))) for x in start]
    optimizer = Optimizer(zip(names, many, strict=True), rule, on_nonfinite=how)
    for p, g in zip(many, gradients[0], strict=True):
        p.grad = cut(g, mesh, (Shard(0),))
    optimizer.step()
    before = (
        [full(p).detach().clone() for p in many],
        [float(optimizer.state[p]["step"]) for p in many],
    )
    if rank == 2:
        many[where].grad._local_tensor.view(-1)[0] = float("nan")
    try:
        optimizer.step()
        message = ""
    except ValueError as error:
        message = str(error)
    after = [full(p).detach() for p in many], [float(optimizer.state[p]["step"]) for p in many]
    same = all(torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    return message, same and before[1] == after[1], optimizer.skipped_steps


def scaled(rank, world, rule):
    """GradScaler's flags: an inf that one rank found is a step that nobody takes."""
    mesh, (start, gradients) = mesh_of(4), streams([(8, 4), (8,)], 2, torch.float32)
    ones = [nn.Parameter(x.clone()) for x in start]
    many = [nn.Parameter(cut(x, mesh, (Shard(0),))) for x in start]
    one, two = Optimizer(ones, rule, fused=False), Optimizer(many, rule, precision="float32")
    for t, bad in enumerate([False, True]):
        for p, q, g in zip(ones, many, gradients[t], strict=True):
            p.grad, q.grad = g.clone(), cut(8.0 * g, mesh, (Shard(0),))
        two.grad_scale = torch.tensor(8.0)
        two.found_inf = torch.tensor(float(bad and rank == 3))
        two.step()
        del two.grad_scale, two.found_inf
        if not bad:
            one.step()
    return max(apart(q, p) for p, q in zip(ones, many, strict=True))


def unlike(rank, world, what):
    """An optimizer whose parameters are not the same on all ranks."""
    mesh = mesh_of(4)
    columns = 5 if what == "shape" and rank == 2 else 4
    part = torch.ones(2, columns)
    p = nn.Parameter(DTensor.from_local(part, mesh, (Shard(0),)))
    p.grad = DTensor.from_local(torch.ones(2, columns), mesh, (Shard(0),))
    extra = [("extra", nn.Parameter(torch.ones(3)))] if what == "names" and rank == 1 else []
    lr = 0.5 if what == "lr" and rank == 3 else 0.1
    before = p._local_tensor.clone()
    optimizer = Optimizer([("weight", p), *extra], rules.Muon(lr=lr))
    try:
        optimizer.step()
    except ValueError as error:
        return str(error), torch.equal(before, p._local_tensor) and not optimizer.state
    return "", False


def refused(rank, world, what):
    """A parameter that lies on its mesh as no rule can take it."""
    mesh = mesh_of(4)
    if what == "partial":
        p = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, (Partial(),)))
    elif what == "nameless":
        mesh = init_device_mesh("cpu", (2, 2))
        p = nn.Parameter(cut(torch.ones(4, 4), mesh, (Shard(0), Shard(1))))
    else:
        p = nn.Parameter(cut(torch.ones(4, 4), mesh, (Shard(0),)))
    p.grad = torch.ones_like(p)
    options = {"fused": {"fused": True}}.get(what, {})
    if what == "rounding":
        p = nn.Parameter(p.detach().bfloat16())
        p.grad, options = torch.ones_like(p), {"rounding": "stochastic"}
    try:
        Optimizer([("weight", p)], rules.Muon(), **options).step()
    except (ValueError, RuntimeError) as error:
        return type(error).__name__ + ": " + str(error)
    return ""


def norms(rank, world, rule):
    """A rule that goes by the norm of all gradients, of which some lie on no mesh."""
    mesh, (start, gradients) = mesh_of(4), streams([(6, 4), (5,), (3, 3)], 3)
    ones = [nn.Parameter(x.clone()) for x in start]
    many = [nn.Parameter(cut(x, mesh, (Shard(0),))) for x in start[:2]]
    many.append(nn.Parameter(start[2].clone()))
    one, two = Optimizer(ones, rule), Optimizer(many, rule)
    for g in gradients:
        for p, x in zip(ones, g, strict=True):
            p.grad = x.clone()
        for p, x in zip(many, g, strict=True):
            p.grad = cut(x, mesh, (Shard(0),)) if isinstance(p, DTensor) else x.clone()
        one.step()
        two.step()
    return max(apart(q, p) for p, q in zip(ones, many, strict=True))


def ddp(rank, world, rule):
    """DistributedDataParallel: how many bits differ between ranks, and how far one device is."""
    data = batches(4)
    one, _ = train_alone(rule, data, {"precision": "float32"})
    model = small()
    optimizer = Optimizer(model, rule, precision="float32")
    parallel = nn.parallel.DistributedDataParallel(model)
    for x in data:
        optimizer.zero_grad()
        loss(parallel, x[rank::world]).backward()
        optimizer.step()
    mine = [*model.parameters(), *(x for s in optimizer.state.values() for x in s.values())]
    differing = 0
    for x in mine:
        given = [torch.empty_like(x) for _ in range(world)]
        dist.all_gather(given, x.detach().contiguous())
        differing += sum(int((y != x).sum()) for y in given)
    expected = weights(one)
    return differing, max(apart(x, expected[k]) for k, x in weights(model).items())


def saved(rank, world, rule, folder, flat, load, steps, mesh_sizes, rows):
    """Train by FSDP2 from a checkpoint, if any, and write one, both by torch's DCP."""
    mesh = mesh_of(*mesh_sizes) if world > 1 else None
    model = sharded(small(), mesh) if world > 1 else small()
    optimizer = Optimizer(model, rule, precision="float32", fused=False if world == 1 else None)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def state():
        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }

    if load:
        now = state()
        with warnings.catch_warnings():
            # It warns where torch.distributed does not run, whatever it is told.
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(now, checkpoint_id=folder, no_dist=world == 1)
        set_model_state_dict(model, now["model"])
        set_optimizer_state_dict(model, optimizer, now["optimizer"], options=options)
    for x in batches(*rows)[steps]:
        optimizer.zero_grad()
        loss(model, x[rank::world] if world > 1 else x).backward()
        optimizer.step()
    optimizer.zero_grad()
    if folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(state(), checkpoint_id=folder, no_dist=world == 1)
    state = {
        k: {n: full(x) for n, x in optimizer.state[p].items()} for k, p in model.named_parameters()
    }
    return weights(model), state


def hope(rank, world, rule, steps):
    """How far the Hope example by FSDP2, block by block, is from the one on one device."""
    config = Config(width=12, layers=2, heads=2, vocabulary=32)
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 32, (steps, 2 * world, 33), generator=generator)
    found = []
    for shards in (False, True):
        torch.manual_seed(0)
        model = Hope(config)
        if shards:
            for block in model.blocks:
                fully_shard(block, mesh=mesh_of(world))
            fully_shard(model, mesh=mesh_of(world))
        optimizer = Optimizer(model, rule, precision="float32")
        for x in data:
            x = x[rank::world] if shards else x
            optimizer.zero_grad()
            logits = model(x[:, :-1])
            nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()
            optimizer.step()
        found.append(weights(model))
    return max(apart(found[1][k], x) for k, x in found[0].items())


def owned(rank, world, rule, shapes):
    """How many matrices this rank is to compute whole."""
    seen = []
    functions = distributed._functions
    distributed._functions = lambda cuts: seen.append(len(cuts)) or functions(cuts)
    try:
        equals_one_device(rank, world, rule, shapes, "0", 1, {})
    finally:
        distributed._functions = functions
    (count,) = seen
    return count


def page(rank, world, blocks):
    """Run the code of a page."""
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/distributed.md", "exec"), names)
    return len(names["optimizer"].state)


def rounds(rank, world, rule, shapes):
    """Matrices that go one by one."""
    before, distributed.ROUND = distributed.ROUND, 1
    try:
        return equals_one_device(rank, world, rule, shapes, "0", 3, {})
    finally:
        distributed.ROUND = before


def kernels(rank, world, rule):
    """How far shards that step in kernels are from whole tensors."""
    return equals_one_device(rank, world, rule, [(7, 5), (9,)], "0", 3, {}, fused=True)


def compiled_step(rank, world, rule):
    """A compiled step of DTensors, which the compiler leaves alone."""
    mesh, (start, (g,)) = mesh_of(4), streams([(8, 4)], 1)
    pair = [nn.Parameter(cut(start[0], mesh, (Shard(0),))) for _ in range(2)]
    for p, compiles in zip(pair, (False, True), strict=True):
        p.grad = cut(g[0], mesh, (Shard(0),))
        optimizer = Optimizer([p], rule)
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        step()
    return apart(pair[1], full(pair[0]))


def exported(rank, world, rule, path):
    """State that goes from four ranks to a file, and from the file to four ranks."""
    mesh, names = mesh_of(4), ("a", "b")
    start, (gradients,) = streams([(6, 4), (5,)], 1)
    found = []
    for again in (False, True):
        many = [nn.Parameter(cut(x, mesh, (Shard(0),))) for x in start]
        optimizer = Optimizer(zip(names, many, strict=True), rule)
        if again:
            import_state(optimizer, path)
        else:
            for p, g in zip(many, gradients, strict=True):
                p.grad = cut(g, mesh, (Shard(0),))
            optimizer.step()
            export_state(optimizer, path)
            dist.barrier()
        found.append(
            [(k, local(x).clone()) for s in optimizer.state.values() for k, x in s.items()]
        )
    return all(k == n and torch.equal(x, y) for (k, x), (n, y) in zip(*found, strict=True))


def measured(rank, world, rule):
    """Metrics of shards, and of whole tensors."""
    mesh, (start, (g,)) = mesh_of(4), streams([(6, 4), (5,)], 1)
    found = []
    for place in (None, (Shard(0),)):
        lay = (lambda x: cut(x, mesh, place)) if place else torch.clone  # noqa: B023
        params = [nn.Parameter(lay(x)) for x in start]
        optimizer = Optimizer(params, rule, fused=False if place is None else None)
        for _ in range(2):
            for p, x in zip(params, g, strict=True):
                p.grad = lay(x)
            optimizer.step()
        found.append(optimizer.metrics())
    return found


def narrow(rank, world, rule):
    """Memories in bfloat16: how many are, and how far the mean over steps is from wide ones."""
    mesh, (start, _) = mesh_of(4), streams([(64, 16)], 1, torch.float32)
    found = []
    for dtype in (None, torch.bfloat16):
        p = nn.Parameter(cut(start[0], mesh, (Shard(0),)))
        optimizer = Optimizer([p], rule, state_dtype=dtype)
        for _ in range(20):
            p.grad = cut(torch.full((64, 16), 1.0), mesh, (Shard(0),))
            optimizer.step()
        found.append({k: full(x) for k, x in optimizer.state[p].items() if k != "step"})
    wide, short = found
    kinds = {x.dtype for x in short.values()}
    apart = max(
        abs(float(short[k].double().mean() / x.double().mean()) - 1) for k, x in wide.items()
    )
    return kinds == {torch.bfloat16}, apart


def released(rank, world, on_mesh):
    """What release_gradients says where gradients are not those of one process."""
    weight = torch.ones(4, 4)
    p = nn.Parameter(cut(weight, mesh_of(world), (Shard(0),)) if on_mesh else weight)
    try:
        release_gradients(Optimizer([p], rules.AdamW()))
    except ValueError as error:
        return str(error)
    return ""


class PerRow(Rule):
    """A rule of entries that computes with the shape."""

    def update(self, w, g, s, t):
        return g / float(w.shape[0]), {}


def pairs(rank, world, rule, shapes, places, sizes=(4,), options=None, mesh=None, dtype=None):
    """The largest difference from one device; places: of each parameter, None for no mesh."""
    mesh = mesh_of(*sizes) if mesh is None else mesh
    start, gradients = streams(shapes, 4, dtype or torch.float64)
    ones = [nn.Parameter(x.clone()) for x in start]
    lay = [(lambda x, at=at: x.clone() if at is None else cut(x, mesh, at)) for at in places]
    many = [nn.Parameter(f(x)) for f, x in zip(lay, start, strict=True)]
    one, two = Optimizer(ones, rule, fused=False), Optimizer(many, rule, **(options or {}))
    for g in gradients:
        for p, q, f, x in zip(ones, many, lay, g, strict=True):
            p.grad, q.grad = x.clone(), f(x)
        one.step()
        two.step()
    return max(apart(q, p) for p, q in zip(ones, many, strict=True))


def permuted(rank, world, rule):
    """A mesh that numbers its ranks in another order than their groups do."""
    mesh = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("a", "b"))
    place = (Shard(0), Shard(1))
    return pairs(rank, world, rule, [(8, 4)], [place], mesh=mesh)


def narrow_and_empty(rank, world):
    """bfloat16 weights of fewer rows than ranks, rounded at random, with narrow memories."""
    options = {"rounding": "stochastic", "state_dtype": torch.bfloat16}
    p = nn.Parameter(cut(torch.ones(2, 3, dtype=torch.bfloat16), mesh_of(4), (Shard(0),)))
    optimizer = Optimizer([p], rules.AdamW(lr=0.1), **options)
    for _ in range(2):
        p.grad = cut(torch.ones(2, 3, dtype=torch.bfloat16), mesh_of(4), (Shard(0),))
        optimizer.step()
    return {full(x).dtype for k, x in optimizer.state[p].items() if k != "step"}, full(p).detach()


def draws(rank, world):
    """Whether shards round by numbers of their own, and replicas by the same ones."""
    weight, found = torch.ones(64, 16, dtype=torch.bfloat16), []
    for place in (Shard(0), Replicate()):
        p = nn.Parameter(cut(weight, mesh_of(4), (place,)))
        p.grad = cut(torch.full_like(weight, 2.0**-9), mesh_of(4), (place,))
        Optimizer([p], rules.SGD(lr=1.0), rounding="stochastic").step()
        found.append(local(p))
    given = [[torch.empty_like(x) for _ in range(world)] for x in found]
    for x, xs in zip(found, given, strict=True):
        dist.all_gather(xs, x.detach().contiguous())
    return [[torch.equal(xs[0], x) for x in xs[1:]] for xs in given]


def context_on_some_ranks(rank, world):
    """What ranks say when one of them has no context."""
    p = nn.Parameter(cut(torch.ones(4, 4), mesh_of(4), (Shard(0),)))
    p.grad = torch.ones_like(p)
    optimizer = Optimizer([("v", p)], rules.DGD())
    if rank != 2:
        optimizer.context[p]["gram"] = torch.eye(4)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def tensor_parallel(rank, world, rule):
    """Column- and row-wise layers, whose inputs and outputs are cut by features."""
    found = []
    for shards in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        if shards:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(model, mesh_of(4), plan)
        optimizer = Optimizer(model, rule, precision="float32")
        for x in torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        found.append(weights(model))
    return max(apart(found[1][k], x) for k, x in found[0].items())


def regrouped(rank, world):
    """State that is dropped, and a parameter that moves to another group."""
    mesh, (start, gradients) = mesh_of(4), streams([(4, 4), (6, 2)], 4)
    found = []
    for place in (None, (Shard(0),)):
        lay = (lambda x: cut(x, mesh, place)) if place else torch.clone  # noqa: B023
        params = [nn.Parameter(lay(x)) for x in start]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.01), strict=True)]
        optimizer = Optimizer(groups, rules.AdamW(), fused=False)
        for t, g in enumerate(gradients):
            if t == 2:
                optimizer.state.clear()
                moved = optimizer.param_groups[1]["params"].pop()
                optimizer.param_groups[0]["params"].append(moved)
            for p, x in zip(params, g, strict=True):
                p.grad = lay(x)
            optimizer.step()
        found.append([full(p).detach() for p in params])
    return max(apart(y, x) for x, y in zip(*found, strict=True))


def resumed(rank, world, rule, options):
    """How many entries differ between a run over shards and one that stops and goes on."""
    mesh, dtype = mesh_of(4), torch.bfloat16 if "rounding" in options else torch.float32
    shapes, found = [(7, 5), (4, 6)], []
    start, gradients = streams(shapes, 6, dtype)
    given = [contexts(rule, s, 6) for s in shapes]
    for stops in (False, True):
        params = [nn.Parameter(cut(x, mesh, (Shard(0),))) for x in start]
        optimizer = Optimizer(params, rule, **options)
        for t, g in enumerate(gradients):
            if stops and t == 3:
                checkpoint = copy.deepcopy(optimizer.state_dict())
                params = [nn.Parameter(p.detach().clone()) for p in params]
                optimizer = Optimizer(params, rule, **options)
                optimizer.load_state_dict(checkpoint)
            for p, x, c in zip(params, g, given, strict=True):
                p.grad = cut(x, mesh, (Shard(0),))
                for name, value in c[t].items():
                    optimizer.context[p][name] = torch.from_numpy(value)
            optimizer.step()
        state = [local(x) for p in params for x in optimizer.state[p].values()]
        found.append([*map(local, params), *state])
    return sum(int((x != y).sum()) for x, y in zip(*found, strict=True))


def every_resumed(rank, world, jobs):
    return [resumed(rank, world, *job) for job in jobs]
