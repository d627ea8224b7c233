"""Accelerate's wrapper steps as a plain loop does, and saves and loads."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from small import CLIP, lines, loss_of, make, parameters, plain, same, steps

from torch_backend import M3

pytestmark = pytest.mark.integrations


@pytest.fixture(autouse=True)
def _one_accelerator_per_test():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def m3(model):
    return M3(model, lr=1e-2, weight_decay=0.1, period=2)


def ramp(t: int) -> float:
    return (t + 1) / 4


def prepared(accelerator: Accelerator):
    model = make()
    optimizer = m3(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp)
    return accelerator.prepare(model, optimizer, scheduler)


def train(accelerator: Accelerator, model, optimizer, scheduler, batches) -> list[float]:
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss = loss_of(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters(optimizer), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_the_plain_loop(precision, accumulate):
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate
    )
    model, optimizer, scheduler = prepared(accelerator)
    losses = train(accelerator, model, optimizer, scheduler, lines(8))
    assert isinstance(optimizer.optimizer, M3) and steps(optimizer) == {8 / accumulate}
    *_, expected = plain(
        m3, lines(8), accumulate=accumulate, bfloat16=precision == "bf16", schedule=ramp
    )
    assert same(model, expected) and losses[-1] < losses[0]


def test_the_wrapper_loads_an_untouched_state_and_changes_nothing():
    """Its constructor loads what `state_dict` gave it, before the first step and later."""
    accelerator, model = Accelerator(cpu=True), make()
    optimizer = m3(model)
    before, routing = optimizer.state_dict(), str(optimizer.routing)
    wrapped = accelerator.prepare(optimizer)
    assert optimizer.state_dict() == before and str(wrapped.optimizer.routing) == routing
    assert not optimizer.state


def test_modes_are_forwarded_to_an_optimizer_that_has_none():
    accelerator = Accelerator(cpu=True)
    model, optimizer, scheduler = prepared(accelerator)
    for batch in lines(2):
        optimizer.train()
        train(accelerator, model, optimizer, scheduler, [batch])
        optimizer.eval()
    *_, expected = plain(m3, lines(2), schedule=ramp)
    assert same(model, expected)
    assert not {"train", "eval"} & set(dir(optimizer.optimizer))


def test_a_run_that_is_resumed_is_the_run_that_went_on(tmp_path):
    accelerator = Accelerator(cpu=True)
    parts = prepared(accelerator)
    train(accelerator, *parts, lines(8)[:3])
    accelerator.save_state(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model, optimizer, scheduler = prepared(accelerator)
    accelerator.load_state(tmp_path)
    assert steps(optimizer) == {3.0}
    train(accelerator, model, optimizer, scheduler, lines(8)[3:])
    *_, expected = plain(m3, lines(8), schedule=ramp)
    assert same(model, expected)
