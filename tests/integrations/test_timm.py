"""timm's factory makes our optimizers once they are registered, with its groups and schedulers."""

import pytest
import timm
import torch
from small import parameters, steps
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F

from torch_backend import M3

pytestmark = pytest.mark.integrations

APART = ("patch_embed.*", "pos_embed", "cls_token", "head.*")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    default_registry.register(OptimInfo("m3", M3, "multi-scale momentum Muon", has_eps=False))


def make():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **sizes)


def created(model, **options):
    given = {"lr": 1e-2, "weight_decay": 0.1, "fallback_list": APART, "period": 2, **options}
    return create_optimizer_v2(model, opt="m3", **given)


def train(model, optimizer, count: int) -> list[float]:
    losses, generator = [], torch.Generator().manual_seed(1)
    x, y = torch.randn((8, 3, 16, 16), generator=generator), torch.arange(8) % 4
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.5}], ids=str)
def test_its_groups_train(options):
    """Patches, positions and head are routed by `fallback_list`, vectors by their shape."""
    model = make()
    optimizer = created(model, **options)
    groups = {p: g for g in optimizer.param_groups for p in g["params"]}
    named = {name: groups[p] for name, p in model.named_parameters()}
    assert {name for name, g in named.items() if g["rule"] == "M3"} == {
        f"blocks.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    decayed = {name for name, g in named.items() if g["weight_decay"]}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1} - {
        "pos_embed",
        "cls_token",
    }
    losses = train(model, optimizer, 8)
    assert losses[-1] < losses[0] and steps(optimizer) == {8.0}


def test_its_scheduler_scales_the_layers():
    """`layer_decay` leaves a factor in each group, which timm's schedulers multiply."""
    optimizer = created(make(), layer_decay=0.5)
    scheduler = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-3)
    scheduler.step(5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {0.125, 0.25, 0.5, 1.0}
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx((1e-2 + 1e-3) / 2 * group["lr_scale"])


def test_a_checkpoint_goes_on_where_it_was():
    model, again = make(), make()
    optimizer, loaded = created(model, layer_decay=0.5), created(again, layer_decay=0.5)
    train(model, optimizer, 3)
    again.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    assert train(model, optimizer, 3) == train(again, loaded, 3)
    pairs = zip(parameters(optimizer), parameters(loaded), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
