"""Lightning's trainer steps as a plain loop does, and resumes."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from small import CLIP, gradient_norm, lines, loss_of, make, plain, same, steps
from torch import nn
from torch.utils.data import DataLoader

from torch_backend import M3, Optimizer

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def m3(model: nn.Module, **options):
    return M3(model, lr=1e-2, weight_decay=0.1, period=2, **options)


def ramp(t: int) -> float:
    return (t + 1) / 4


class Automatic(LightningModule):
    """Lightning calls backward and clips, in the closure that it gives to the step."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.model, self.options, self.losses, self.norms = make(), options, [], []

    def training_step(self, batch):
        loss = loss_of(self.model, batch)
        self.losses.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(gradient_norm(self.model))

    def configure_optimizers(self):
        optimizer = m3(self.model, **self.options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Manual(Automatic):
    """The user's own loop, in steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        loss = super().training_step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, CLIP, "norm")
        optimizer.step()
        self.lr_schedulers().step()


def fit(module: LightningModule, count: int, resume: Path | None = None, **options) -> Optimizer:
    """The optimizer after one epoch, or `max_epochs`, of so many batches."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    given = {"max_epochs": 1, "enable_checkpointing": "callbacks" in options, **quiet, **options}
    trainer = Trainer(accelerator="cpu", **given)
    trainer.fit(module, DataLoader(lines(count), batch_size=None), ckpt_path=resume)
    return trainer.optimizers[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_automatic_optimization_is_the_plain_loop(precision, accumulate):
    module = Automatic()
    optimizer = fit(
        module,
        8,
        precision=precision,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=CLIP,
    )
    assert isinstance(optimizer, M3) and steps(optimizer) == {8 / accumulate}
    bfloat16 = precision == "bf16-mixed"
    *_, expected = plain(m3, lines(8), accumulate=accumulate, bfloat16=bfloat16, schedule=ramp)
    assert same(module.model, expected)
    assert max(module.norms) > CLIP and module.losses[-1] < module.losses[0]


def test_manual_optimization_is_the_plain_loop():
    module = Manual()
    optimizer = fit(module, 4)
    assert steps(optimizer) == {4.0}
    *_, expected = plain(m3, lines(4), schedule=ramp)
    assert same(module.model, expected)


def test_the_wrapper_shows_what_the_optimizer_shows():
    optimizer = m3(make())
    wrapped = LightningOptimizer(optimizer)
    assert isinstance(wrapped, M3) and type(wrapped) is not M3
    assert wrapped.routing == optimizer.routing and wrapped.metrics() == optimizer.metrics()
    assert wrapped.context is optimizer.context and wrapped.state_dict()["param_groups"]


def test_a_run_that_is_resumed_is_the_run_that_went_on(tmp_path):
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, module = Automatic(), Automatic()
    fit(whole, 3, max_epochs=2, callbacks=[every])
    optimizer = fit(module, 3, tmp_path / "epoch=0.ckpt", max_epochs=2, callbacks=[every])
    assert steps(optimizer) == {6.0} and len(module.losses) == 3
    assert same(module.model, whole.model)


def test_gradients_are_clipped_under_a_scaler():
    """Lightning refuses to clip where the step says that it unscales gradients itself."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = Automatic(fused=None)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    optimizer = fit(module, 8, plugins=[plugin], gradient_clip_val=CLIP)
    assert steps(optimizer) == {8.0} and module.losses[-1] < module.losses[0]
    assert CLIP < max(module.norms) < 100.0


def test_lightning_does_not_clip_what_the_step_unscales():
    with pytest.raises(RuntimeError, match="M3, does not allow for gradient clipping"):
        fit(Automatic(fused=True), 1, precision="bf16-mixed", gradient_clip_val=CLIP)
