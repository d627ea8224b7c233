"""A custom loop over a Keras model whose backend is torch."""

import keras
import pytest
import torch
from small import steps
from torch.nn import functional as F

from torch_backend import M3

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]


def make() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Embedding(32, 16, name="tokens"),
        keras.layers.Dense(16, activation="relu", name="hidden"),
        keras.layers.LayerNormalization(name="norm"),
        keras.layers.Dense(32, name="head"),
    ]
    model = keras.Sequential(layers, name="model")
    model(torch.zeros((1, 1), dtype=torch.int64))
    return model


def named(model: keras.Model):
    return [(v.path, v.value) for v in model.trainable_variables]


def train(model: keras.Model, optimizer, count: int) -> list[float]:
    x = torch.arange(32).view(4, 8)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), (x.flatten() + 1) % 32)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_variables_by_path_are_routed_train_and_resume():
    assert keras.backend.backend() == "torch"
    model, again = make(), make()
    optimizer = M3(named(model), lr=1e-2, period=2)
    routed = {route.name: route.rule for route in optimizer.routing.routes}
    kernels = {name for name, rule in routed.items() if rule == "M3"}
    assert kernels == {"model/hidden/kernel"}
    losses = train(model, optimizer, 8)
    assert losses[-1] < losses[0] and steps(optimizer) == {8.0}

    again.set_weights(model.get_weights())
    loaded = M3(named(again), lr=1e-2, period=2)
    loaded.load_state_dict(optimizer.state_dict())
    assert train(model, optimizer, 3) == train(again, loaded, 3)
