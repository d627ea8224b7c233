"""The JAX twin of Hope: the same outputs, gradients and steps as the torch model."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import double_precision

from deepopt.expr import array
from deepopt.functions import solve
from examples.hope import inner, jax_model, train
from examples.hope.config import Config
from examples.hope.jax_layers import unit
from examples.hope.jax_model import Parameters, from_torch, init, make_optimizer, to_torch
from examples.hope.memories import Learning
from examples.hope.model import LanguageModel
from jax_backend import lift
from torch_backend import lift as lift_to_torch

TINY = Config(
    width=16,
    layers=1,
    heads=2,
    memory_width=6,
    cms_width=16,
    chunk=4,
    slow_chunk=8,
    periods=(1, 2),
    vocabulary=32,
)
LENGTH = 18  # two slow chunks, and a piece of a third that is a piece of a chunk
EVERYTHING = ("query", "key", "value", "rate", "retention")
CONFIGS = {
    "default": replace(TINY, layers=2),
    "linear dot": replace(TINY, inner=Learning("linear", "dot")),
    "dot, no delta, inexact": replace(TINY, inner=Learning("mlp", "dot", False, False)),
    "momentum": replace(TINY, inner=Learning(momentum=True)),
    "residual": replace(TINY, inner=Learning("residual", "l2", True, True, True), layers=2),
    "linear momentum, one sum of levels": replace(
        TINY, inner=Learning("linear", "l2", False, True, True), cms="independent"
    ),
    "nothing adaptive": replace(TINY, adaptive=(), own_values=False, forget=0.0, checkpoint=True),
    "all adaptive, wide range": replace(
        TINY, adaptive=EVERYTHING, projected=False, unit_values=False, forget=1.0, rate_cap=2.0
    ),
    "given values, few answers": replace(
        TINY, own_values=False, adaptive=("value", "rate"), outputs=5
    ),
    "slow chunks beyond the text": replace(TINY, slow_chunk=40, checkpoint=True),
    "chunks of one": replace(TINY, chunk=1, slow_chunk=3),
}
# XLA takes a fifth of the time without what makes its programs fast.
QUICK: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
}

draw = jax.jit(init, static_argnames="config", compiler_options=QUICK)


def model_of(config: Config, double: bool = True) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config).to(torch.float64 if double else torch.float32)
    with torch.no_grad():
        # Gates and bounds are passed on both sides, and no two entries are alike.
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def tokens(config: Config) -> torch.Tensor:
    return torch.randint(min(config.vocabulary, config.outputs or 99), (2, LENGTH + 1))


def in_jax(x: torch.Tensor) -> jax.Array:
    return jnp.asarray(x.numpy().astype(np.int32))


def close(found: Any, expected: torch.Tensor, tolerance: float) -> None:
    expected = expected.detach()
    assert str(found.dtype) == str(expected.dtype).removeprefix("torch.")
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=0, atol=tolerance)


def named(parameters: Parameters) -> dict[str, jax.Array]:
    leaves, _ = jax.tree.flatten_with_path(parameters)
    return {".".join(part.key for part in path): value for path, value in leaves}


def quick(function: Any, *static: str) -> Any:
    return jax.jit(function.__wrapped__, static_argnames=static, compiler_options=QUICK)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-10), (False, 1e-5)], ids=["64", "32"])
def test_logits_are_those_of_torch(config: Config, double: bool, tolerance: float) -> None:
    with double_precision(double):
        model, crops = model_of(config, double), tokens(config)
        run = jax.jit(jax_model.apply, static_argnames="config", compiler_options=QUICK)
        close(run(from_torch(model), in_jax(crops), config=config), model(crops), tolerance)


def test_short_rows_stay_short() -> None:
    rows = torch.tensor([[0.0, 0.0], [3e-8, 4e-8], [3e-5, 4e-5], [3.0, 4.0]]).requires_grad_()
    inner.unit(rows).sum().backward()
    close(unit(jnp.asarray(rows.detach().numpy())), inner.unit(rows), 1e-6)
    slopes = jax.grad(lambda x: unit(x).sum())(jnp.asarray(rows.detach().numpy()))
    np.testing.assert_allclose(slopes, rows.grad.numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", ["default", "residual", "linear momentum, one sum of levels"])
def test_gradients_are_those_of_torch(name: str) -> None:
    config = CONFIGS[name]
    with double_precision():
        model, crops = model_of(config), tokens(config)
        train.cost(model, crops).backward()
        run = jax.grad(jax_model.cost)
        run = jax.jit(run, static_argnames="config", compiler_options=QUICK)
        slopes = named(run(from_torch(model), in_jax(crops), config=config))
        assert slopes.keys() == dict(model.named_parameters()).keys()
        for name, p in model.named_parameters():
            close(slopes[name], torch.zeros_like(p) if p.grad is None else p.grad, 1e-8)


def test_training_is_that_of_torch_and_compiles_once() -> None:
    """M3 for hidden matrices, AdamW for the rest, the slower level every second step."""
    with double_precision():
        model, crops = model_of(TINY), tokens(TINY)
        theirs = train.make_optimizer(model, "m3", 0.02)
        ours = make_optimizer(TINY, 0.02, train.REST, clip=0.05)
        parameters = from_torch(model)
        state = ours.init(parameters)
        step = quick(jax_model.train_step, "config", "optimizer")
        losses = []
        for _ in range(6):
            expected = train.cost(model, crops)
            expected.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            theirs.step()
            theirs.zero_grad()
            work = parameters, state, in_jax(crops)
            parameters, state, loss = step(*work, config=replace(TINY), optimizer=ours)
            close(loss, expected, 1e-7)
            losses.append(float(loss))
        for name, value in named(parameters).items():
            close(value, model.state_dict()[name], 1e-6)
        assert losses[-1] < losses[0] - 0.2
        assert step._cache_size() == 1


@pytest.mark.parametrize("name", ["default", "linear momentum, one sum of levels"])
def test_fresh_parameters_are_drawn_as_torch_draws_them(name: str) -> None:
    config = replace(CONFIGS[name], width=64, memory_width=32, cms_width=64)
    theirs = named(from_torch(LanguageModel(config)))
    ours = named(draw(jax.random.key(0), config=config))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    for name, value in ours.items():
        assert not value.weak_type  # or a training step would be compiled twice
        expected = np.asarray(theirs[name])
        # Means and deviations of few numbers are far from those that they were drawn with.
        slack = 6 * expected.std() / math.sqrt(expected.size)
        assert abs(float(value.mean()) - expected.mean()) <= slack, name
        assert abs(float(value.std()) - expected.std()) <= slack, name


def test_parameters_return_to_torch() -> None:
    model, other = model_of(TINY, double=False), LanguageModel(TINY)
    to_torch(from_torch(model), other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mixer": "attention"}, "mixer 'attention' has no twin in JAX"),
        ({"feed_forward": "swiglu"}, "feed_forward 'swiglu' has no twin"),
        ({"cms": "nested"}, r"cms 'nested' .* choose one of \('sequential', 'independent'\)"),
    ],
)
def test_what_has_no_twin_is_refused(changed: dict[str, str], message: str) -> None:
    config = replace(TINY, **changed)
    with pytest.raises(ValueError, match=message):
        init(jax.random.key(0), config)
    with pytest.raises(ValueError, match=message):
        from_torch(LanguageModel(config))


def test_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    still = lambda parameters, state, *_: (parameters, state, jnp.log(256.0))  # noqa: E731
    monkeypatch.setattr(jax_model, "train_step", still)
    monkeypatch.setattr(jax_model, "init", lambda key, config: draw(key, config=config))
    monkeypatch.setattr(train, "SMALL", replace(TINY, vocabulary=256, periods=(1,)))
    monkeypatch.setattr(jax_model, "evaluate", quick(jax_model.evaluate, "config"))
    command = ["--quick", "--data", str(text), "--steps"]
    assert jax_model.main([*command, "2"]) == 0
    shown = capsys.readouterr()
    assert "held-out bits per byte, 32 windows: " in shown.out
    assert "2/2 [====================]  8.000 bits/byte" in shown.err
    assert jax_model.main([*command, "0"]) == 2
    assert "--steps 0: at least 1" in capsys.readouterr().err


def test_a_lifted_function_takes_arrays_and_numbers() -> None:
    """Batch axes broadcast, also between a triangular system and its right-hand side."""

    def graph(a: Any, b: Any, c: Any, *, scale: float) -> Any:
        system = array("eye", a.shape) + array("strictly_lower", a.shape) * a
        return solve(system, scale * b, lower=True), c * b

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1, 4, 4)), rng.standard_normal((3, 4, 5))
    with double_precision():
        found = lift(graph)(jnp.asarray(a), jnp.asarray(b), 3.0, scale=2.0)
    expected = lift_to_torch(graph)(torch.from_numpy(a), torch.from_numpy(b), 3.0, scale=2.0)
    for x, y in zip(found, expected, strict=True):
        close(x, y, 1e-12)
    one = lift(lambda x: 2.0 * x)(jnp.ones((2, 2), jnp.float32))
    assert one.dtype == jnp.float32 and (one == 2.0).all()
    with pytest.raises(TypeError, match=r"lifted to arrays, but none is among \(3.0,\)"):
        lift(lambda x: x)(3.0)


@pytest.mark.parametrize("lower", [True, False])
def test_triangular_systems_do_without_threads_that_wait_for_each_other(lower: bool) -> None:
    """Values and derivatives are LAPACK's, but a batch does not go to LAPACK on a CPU."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1, 5, 5)), rng.standard_normal((3, 5, 4))
    a = 2 * np.eye(5) + (np.tril(a) if lower else np.triu(a))

    def graph(a: Any, b: Any) -> Any:
        return solve(a, b, lower=lower, upper=not lower)

    theirs = [torch.from_numpy(x).requires_grad_() for x in (a, b)]
    found = torch.linalg.solve_triangular(*theirs, upper=not lower)
    found.pow(3).sum().backward()
    with double_precision():
        ours = [jnp.asarray(x) for x in (a, b)]
        close(lift(graph)(*ours), found, 1e-12)
        run = jax.jit(jax.grad(lambda a, b: (lift(graph)(a, b) ** 3).sum(), (0, 1)))
        for slope, x in zip(run(*ours), theirs, strict=True):
            close(slope, x.grad, 1e-10)
        assert "trsm" not in run.lower(*ours).as_text()
