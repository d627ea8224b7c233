"""The models of the Hope example: against the text of them in `papers`, and what they promise."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from papers import hope, hope_baselines
from torch import Tensor, nn

from deepopt import rules
from examples.hope import models, train
from examples.hope.baselines import GatedDelta, RotaryAttention, Segments, SwiGLU, rotate
from examples.hope.cms import ContinuumMemory, Level, stacked
from examples.hope.config import Config
from examples.hope.inner import Gates, InnerRule, unit
from examples.hope.memories import RESIDUAL, Learning
from examples.hope.mixers import Attention, SelfModifyingTitans
from examples.hope.model import MIXERS, LanguageModel
from torch_backend import Optimizer

TINY = Config(width=8, layers=1, heads=2, memory_width=3, cms_width=6, chunk=4, slow_chunk=8)
LENGTH = 19  # no multiple of a chunk, and two boundaries of the longest
# With the last only "memory" is ever written.
CHUNKS = [(1, 1), (4, 8), (8, 8), (4, 20)]
INDEPENDENT = {"cms": "independent"}
NESTED = {"cms": "nested"}
FEED_FORWARDS: list[dict[str, Any]] = [{}, NESTED, INDEPENDENT, {"feed_forward": "swiglu"}]
ALL = ("query", "key", "value", "rate", "retention")
F64 = {"dtype": torch.float64}

# Rounding of a few thousand operations, whose intermediate values may be large.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SINGLE = {"rtol": 0.0, "atol": 1e-5}
EXACT = {"rtol": 0.0, "atol": 1e-12}

# What is changed in Learning, and what in Config.
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as the paper": ({}, {}),
    "linear": ({"structure": "linear"}, {}),
    "dot": ({"objective": "dot"}, {}),
    "linear dot": ({"structure": "linear", "objective": "dot"}, {}),
    "residual": ({"structure": "residual"}, {}),
    "residual dot": ({"structure": "residual", "objective": "dot", "exact": False}, {}),
    "residual momentum": ({"structure": "residual", "momentum": True, "delta": False}, {}),
    "gradient descent": ({"delta": False}, {}),
    "explicit": ({"exact": False}, {}),
    "explicit linear": ({"exact": False, "structure": "linear"}, {"rate_cap": 2.0}),
    "momentum": ({"momentum": True}, {}),
    "momentum alone": ({"momentum": True, "delta": False, "exact": False}, {}),
    "momentum linear dot": ({"momentum": True, "structure": "linear", "objective": "dot"}, {}),
    "static": ({}, {"adaptive": ()}),
    "all adaptive": ({}, {"adaptive": ALL}),
    "in another order": ({}, {"adaptive": ("retention", "query", "value")}),
    "own channels": ({}, {"projected": False}),
    "own channels, static": ({}, {"projected": False, "adaptive": ("key", "rate")}),
    "given values": ({}, {"own_values": False}),
    "values of any length": ({}, {"unit_values": False}),
    "given values of any length": ({}, {"own_values": False, "unit_values": False}),
    "no retention": ({}, {"forget": 0.0}),
    "all may be forgotten": ({}, {"forget": 1.0}),
    "fast": ({}, {"rate_cap": 2.0}),
}


def switched(rule: dict[str, Any], changes: dict[str, Any]) -> Config:
    return replace(TINY, inner=Learning(**rule), **changes)


def perturbed(module: nn.Module) -> Any:
    """In float64, with no parameter left at a special value."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    return module


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in module.state_dict().items()}


def agree(found: Tensor, expected: np.ndarray, tolerance: dict[str, float] = CLOSE) -> None:
    torch.testing.assert_close(found.detach(), torch.from_numpy(expected), **tolerance)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(256, (batch, length))


# The mixers, a token at a time


@pytest.mark.parametrize("sizes", CHUNKS)
@pytest.mark.parametrize("name", SWITCHES)
def test_self_modifying_titans_are_the_recurrence(name: str, sizes: tuple[int, int]) -> None:
    config = replace(switched(*SWITCHES[name]), chunk=sizes[0], slow_chunk=sizes[1])
    mixer = perturbed(SelfModifyingTitans(config))
    x = torch.randn(2, LENGTH, 8, **F64)
    answers, _ = mixer(x)
    for i in range(2):
        agree(answers[i], hope.titans(arrays(mixer), x[i].numpy(), config))


RULES = st.builds(
    Learning,
    st.sampled_from(["mlp", "linear", "residual"]),
    st.sampled_from(["l2", "dot"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
CONFIGS = st.builds(
    lambda sizes, **changes: replace(TINY, chunk=sizes[0], slow_chunk=sizes[1], **changes),
    st.sampled_from([(1, 3), (2, 2), (3, 6), (5, 5)]),
    inner=RULES,
    adaptive=st.lists(st.sampled_from(ALL), unique=True).map(tuple),
    projected=st.booleans(),
    own_values=st.booleans(),
    unit_values=st.booleans(),
    forget=st.sampled_from([0.0, 0.1, 1.0]),
    rate_cap=st.sampled_from([0.5, 1.0, 2.0]),
)


@given(CONFIGS, st.integers(0, 1000))
def test_any_switches_together_are_the_recurrence(config: Config, seed: int) -> None:
    torch.manual_seed(seed)
    mixer = perturbed(SelfModifyingTitans(config))
    x = torch.randn(1, 8, 8, **F64)
    agree(mixer(x)[0][0], hope.titans(arrays(mixer), x[0].numpy(), config))


@pytest.mark.parametrize("delta", [False, True])
def test_momentum_of_a_linear_memory(delta: bool) -> None:
    """S ← θS - η∇ and M ← αM + S, the gradient at the start and the delta term outside of S."""
    rule = InnerRule("linear", "l2", delta=delta, exact=False, momentum=True)
    start, keys, values = torch.randn(4, 3, **F64), *torch.randn(2, 6, 3, **F64)
    keys = torch.nn.functional.pad(keys, (0, 1), value=0.5)
    alpha, eta, theta = torch.rand(3, 6, 1, **F64)
    found, _ = rule.write(rule.begin((start,)), keys, values, Gates(alpha, eta, theta))
    m, speed = start.T, torch.zeros(3, 4, **F64)
    for t in range(6):
        k, v = keys[t], values[t]
        speed = theta[t] * speed - eta[t] * torch.outer(start.T @ k - v, k)
        erased = eta[t] * torch.outer(m @ k, k) if delta else 0.0
        m = alpha[t] * m - erased + speed
    torch.testing.assert_close(found.now[0].T, m, **EXACT)
    torch.testing.assert_close(found.velocity[0].T, speed, **EXACT)


BASELINES = {
    "attention": lambda p, x, config: hope_baselines.convolved(p, x, config.heads),
    "rotary": lambda p, x, config: hope_baselines.rotary(p, x, config.heads),
    "delta": lambda p, x, config: hope_baselines.gated_delta(p, x, config.heads),
    "segments": lambda p, x, config: hope_baselines.titans_as_context(
        p, x, config.heads, config.chunk
    ),
}


@pytest.mark.parametrize("chunk", [1, 4, 8])
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_its_recurrence(name: str, chunk: int) -> None:
    config = replace(TINY, chunk=chunk)
    mixer = perturbed(MIXERS[name](config))
    x = torch.randn(2, LENGTH, 8, **F64)
    answers, _ = mixer(x)
    for i in range(2):
        agree(answers[i], BASELINES[name](arrays(mixer), x[i].numpy(), config))


@pytest.mark.parametrize("offset", [0, 3, 100])
def test_rotations_know_only_distances(offset: int) -> None:
    q, k = torch.randn(2, 1, 6, **F64)
    found = (rotate(q, offset + 7) * rotate(k, offset + 2)).sum()
    expected = (rotate(q, 5) * k).sum()
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(rotate(q, offset).norm(), q.norm(), **EXACT)
    assert (rotate(q, 5) - q).abs().max() > 0.1


def test_swiglu() -> None:
    module = perturbed(SwiGLU(TINY))
    x = torch.randn(2, 5, 8, **F64)
    agree(
        module(x), hope_baselines.swiglu(arrays(module), x.numpy().reshape(10, 8)).reshape(2, 5, 8)
    )


# What every mixer promises


@pytest.mark.parametrize("mixer", MIXERS)
@given(
    cuts=st.lists(st.integers(0, LENGTH), max_size=5).map(sorted),
    feed_forward=st.sampled_from(FEED_FORWARDS),
    sizes=st.sampled_from(CHUNKS),
    structure=st.sampled_from(["mlp", "linear", "residual"]),
    momentum=st.booleans(),
    single=st.booleans(),
)
def test_a_stream_of_pieces_is_the_whole(
    mixer: Any,
    cuts: list[int],
    feed_forward: dict,
    sizes: Any,
    structure: Any,
    momentum: bool,
    single: bool,
) -> None:
    torch.manual_seed(len(cuts))
    rule, (chunk, slow) = InnerRule(structure, momentum=momentum), sizes
    config = replace(TINY, mixer=mixer, layers=2, inner=rule, chunk=chunk, slow_chunk=slow)
    model = LanguageModel(replace(config, **feed_forward))
    model = model if single else model.double()
    x, state, parts = tokens(2, LENGTH), None, []
    with torch.no_grad():
        for a, b in pairwise([0, *cuts, LENGTH]):
            if a < b:
                part, state = model.stream(x[:, a:b], state)
                parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), model(x), **(SINGLE if single else CLOSE))


@pytest.mark.parametrize("chunk", [1, 8, 32])
@pytest.mark.parametrize(
    ("mixer", "delta"), [*((mixer, True) for mixer in MIXERS), ("titans", False)]
)
def test_no_mixer_overshoots(mixer: Any, delta: bool, chunk: int) -> None:
    """On rows of noise, as many tokens as let a memory that overshoots by half grow past 1e3."""
    config = Config(width=32, layers=1, heads=2, memory_width=16, chunk=chunk, slow_chunk=chunk)
    module = MIXERS[mixer](replace(config, mixer=mixer, inner=Learning(delta=delta)))
    with torch.no_grad():
        answers, _ = module(torch.randn(2, 20 * chunk, 32))
    assert answers.abs().max() < 20


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("mixer", MIXERS)
def test_half_precision_answers_about_the_same(mixer: Any) -> None:
    """Under autocast and as a whole; within what bfloat16 can tell, 2⁻⁸ an operation."""
    torch.manual_seed(0)
    config = replace(TINY, mixer=mixer, inner=RESIDUAL if mixer == "titans" else Learning())
    model = LanguageModel(config)
    x = tokens(2, LENGTH)
    with torch.no_grad():
        single = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), single, rtol=0, atol=0.02)
        half = model.bfloat16()(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), single, rtol=0, atol=0.03)


def test_retentions_of_a_long_chunk_keep_their_digits_under_autocast() -> None:
    """Half of a memory forgotten at each of 64 rows: sums of logarithms beyond 40."""
    key, value = torch.randn(2, 1, 64, 4)
    key, start = unit(key), (torch.randn(1, 4, 4),)
    gates = Gates(torch.full((1, 64, 1), 0.5), torch.full((1, 64, 1), 0.1))
    rule = InnerRule.of(RESIDUAL)
    expected, told = rule.write(rule.begin(start), key, value, gates, key)
    with torch.autocast("cpu", torch.bfloat16):
        found, answers = rule.write(rule.begin(start), key, value, gates, key)
    torch.testing.assert_close(found.now[0].float(), expected.now[0], rtol=0, atol=0.02)
    torch.testing.assert_close(answers.float(), told, rtol=0, atol=0.03)


def test_a_memory_forgets_little_by_little_under_autocast() -> None:
    """1 - 0.1 sigmoid(-5) is one in bfloat16, and 0.96 after 64 tokens."""
    layer = Segments(replace(TINY, chunk=64, slow_chunk=64))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.gates.weight.zero_()
        layer.gates.bias.copy_(torch.tensor([-30.0, -5.0, 0.0]).repeat_interleave(2))
        _, state = layer(torch.randn(1, 64, 8), keep=True)
    kept = (1 - 0.1 / (1 + math.exp(5))) ** 64
    for now, start in zip(state.memory.now, layer.initial, strict=True):
        torch.testing.assert_close(now[0].float(), start * kept, rtol=0.01, atol=1e-4)


def test_nothing_to_read_is_refused() -> None:
    model = LanguageModel(TINY)
    for call in (model, model.stream):
        with pytest.raises(ValueError, match=r"tokens of shape \(2, 0\): at least one in a row"):
            call(tokens(2, 0))


def leaves(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (list, tuple)):
        for part in state:
            yield from leaves(part)


def size(state: Any) -> tuple[int, int]:
    """Numbers in a state, and the bytes that it keeps alive."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in leaves(state)}
    return sum(x.numel() for x in leaves(state)), sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize("structure", ["mlp", "residual"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_only_the_state_of_attention_grows(mixer: Any, momentum: bool, structure: Any) -> None:
    rule = InnerRule(structure, momentum=momentum)
    model = LanguageModel(replace(TINY, mixer=mixer, inner=rule))
    with torch.no_grad():
        sizes = [size(model.stream(tokens(1, length))[1]) for length in (16, 24, 80)]
        state, by_one = None, []
        for _ in range(40):
            _, state = model.stream(tokens(1, 1), state)
            by_one.append(size(state)[0])
    if mixer in ("attention", "rotary"):
        assert sizes[0] < sizes[1] < sizes[2]
        assert all(a < b for a, b in pairwise(by_one))
    else:
        assert sizes[0] == sizes[1] == sizes[2]
        assert max(by_one[:8]) == max(by_one[8:16]) == max(by_one[32:])


@pytest.mark.parametrize("sizes", CHUNKS)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS, ids=lambda x: "-".join(x.values()))
def test_a_token_changes_what_follows_and_nothing_before(
    feed_forward: dict[str, Any], mixer: Any, sizes: tuple[int, int]
) -> None:
    config = replace(TINY, mixer=mixer, chunk=sizes[0], slow_chunk=sizes[1], **feed_forward)
    model = perturbed(LanguageModel(config))
    x = tokens(1, LENGTH).expand(LENGTH + 1, -1).clone()
    rows = torch.arange(LENGTH)
    x[rows, rows] = (x[rows, rows] + 1) % 256
    with torch.no_grad():
        logits = model(x)
    change = (logits[:-1] - logits[-1]).abs().amax(-1)  # [token that differs, token answered]
    assert change.tril(-1).max() < 1e-12
    # The end lies far beyond the reach of a convolution.
    assert change.diagonal().min() > 1e-6
    assert change[:, -1].min() > 1e-6


GRADIENTS: dict[str, Config] = {
    **{name: switched(*changes) for name, changes in SWITCHES.items()},
    **{name: replace(TINY, mixer=name) for name in MIXERS if name != "titans"},
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_cross_the_inner_writes(name: str) -> None:
    """Against finite differences, along a random direction of parameters and rows at once."""
    mixer = perturbed(MIXERS[GRADIENTS[name].mixer](GRADIENTS[name]))
    x, weights = torch.randn(2, 1, LENGTH, 8, **F64)
    moving = [*mixer.parameters(), x.requires_grad_()]
    directions = [torch.randn_like(p) for p in moving]

    def height() -> Tensor:
        return (weights.view(1, LENGTH, 2, 4) * mixer(x)[0]).sum()

    found = torch.autograd.grad(height(), moving, allow_unused=True)
    slope = sum((g * v).sum() for g, v in zip(found, directions, strict=True) if g is not None)

    @torch.no_grad()
    def moved(by: float) -> Tensor:
        for p, v in zip(moving, directions, strict=True):
            p += by * v
        return height()

    rise = moved(1e-6) - moved(-2e-6)
    torch.testing.assert_close(slope, rise / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("momentum", [False, True])
def test_checkpoints_change_nothing(momentum: bool) -> None:
    config = replace(TINY, inner=Learning(momentum=momentum))
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(replace(config, checkpoint=checkpoint)).double()
        logits = model(tokens(2, LENGTH))
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_checkpoints_keep_less() -> None:
    kept = []
    for checkpoint in (False, True):
        model = LanguageModel(replace(TINY, checkpoint=checkpoint))
        found: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, found=found: (found.append(x.numel()), x)[1], lambda x: x
        ):
            model(tokens(2, 64))
        kept.append(sum(found))
    assert kept[1] < kept[0] / 2


# The continuum memory system


def levels_of(module: nn.Module) -> list[dict[str, np.ndarray]]:
    return [arrays(level) for level in module.levels]


@pytest.mark.parametrize("arrangement", ["sequential", "nested"])
def test_a_chain_reads_the_fastest_level_first(arrangement: Any) -> None:
    module = perturbed(ContinuumMemory(replace(TINY, cms=arrangement)))
    x = torch.randn(5, 8, **F64)
    agree(module(x), hope.chain(levels_of(module), x.numpy()))


def test_independent_levels_are_a_weighted_sum() -> None:
    module = perturbed(ContinuumMemory(replace(TINY, cms="independent")))
    x = torch.randn(5, 8, **F64)
    each = [hope.mlp(p, x.numpy()) for p in levels_of(module)]
    weights = module.weights.detach().numpy()
    agree(module(x), x.numpy() + sum(w * y for w, y in zip(weights, each, strict=True)))
    for i in range(3):
        with torch.no_grad():
            module.weights.copy_(torch.eye(3)[i])
        agree(module(x), x.numpy() + each[i])


@pytest.mark.parametrize("periods", [(1, 2, 4), (2, 6), (1, 3, 3)])
def test_nested_levels_begin_again_where_the_slower_one_says(periods: tuple[int, ...]) -> None:
    lr, steps = 1e-3, 3 * periods[-1]
    config = replace(TINY, cms="nested", periods=periods)
    module = ContinuumMemory(config).double()
    twin = ContinuumMemory(replace(config, cms="sequential")).double()
    x, wanted = torch.randn(2, steps + 1, 5, 8, **F64)

    def loss(memory: nn.Module, t: int) -> Tensor:
        return (memory(x[t]) - wanted[t]).square().sum()

    def gradient(levels: list[list[np.ndarray]], t: int) -> list[list[np.ndarray]]:
        with torch.no_grad():
            for level, held in zip(twin.levels, levels, strict=True):
                for p, w in zip(level.parameters(), held, strict=True):
                    p.copy_(torch.from_numpy(w))
        found = iter(torch.autograd.grad(loss(twin, t), list(twin.levels.parameters())))
        return [[next(found).numpy() for _ in level] for level in levels]

    begin = [[p.detach().numpy().copy() for p in level.parameters()] for level in module.levels]
    simulated = hope.nested_sgd(begin, periods, gradient, steps, lr)
    clocks = module.clocks()
    assert [period for period, _ in clocks] == list(periods)
    inside = [id(p) for _, parameters in clocks for p in parameters]
    assert sorted(inside) == sorted(id(p) for p in module.parameters())
    optimizer = Optimizer(
        [{"params": ps, "rule": rules.SGD(lr=lr), "every": period} for period, ps in clocks]
    )
    for step, (levels, starts) in enumerate(simulated, start=1):
        optimizer.zero_grad()
        loss(module, step).backward()
        module.before_step()
        for level, start in zip(module.levels, module.starts, strict=False):
            for p, p0 in zip(level.parameters(), start.parameters(), strict=True):
                assert torch.equal(p.grad, p0.grad)
        optimizer.step()
        module.after_step(step)
        for found, held in ((module.levels, levels), (module.starts, starts)):
            for level, arrays_ in zip(found, held, strict=True):
                for p, w in zip(level.parameters(), arrays_, strict=True):
                    agree(p, w, EXACT)
        for i, (level, start) in enumerate(zip(module.levels, module.starts, strict=False)):
            same = torch.equal(level.up.weight, start.up.weight)
            assert same == (step % periods[i + 1] < periods[i])


def test_a_model_restarts_the_nested_levels_of_all_blocks() -> None:
    model = LanguageModel(replace(TINY, cms="nested", layers=2, periods=(1, 2)))
    assert [len(ps) for _, ps in model.cms_levels()] == [2 * 3, 2 * 6]
    model(tokens(1, 5)).sum().backward()
    model.before_step()
    for memory in model.continuum():
        fast, start = memory.levels[0].up.weight, memory.starts[0].up.weight
        assert torch.equal(fast.grad, start.grad) and fast.grad is not start.grad
        with torch.no_grad():
            start += 1.0
    model.after_step(1)
    same = [torch.equal(m.levels[0].up.weight, m.starts[0].up.weight) for m in model.continuum()]
    model.after_step(2)
    same += [torch.equal(m.levels[0].up.weight, m.starts[0].up.weight) for m in model.continuum()]
    assert same == [False, False, True, True]


def test_stacked_levels_hold_every_parameter_once() -> None:
    for count in range(1, 8):
        mlps = [Level(2, 3) for _ in range(count)]
        order = [id(p) for mlp in mlps for p in mlp.parameters()]
        for periods in ((1,), (1, 4), (1, 2, 2), (1, 2, 4, 8)):
            if len(periods) <= count:
                levels = stacked(mlps, periods)
                assert [period for period, _ in levels] == list(periods)
                assert [id(p) for _, ps in levels for p in ps] == order
                runs = [len(ps) // 3 for _, ps in levels]
                assert max(runs) - min(runs) <= 1


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_stacked_levels_that_do_not_learn_are_the_pretrained_model(lr: float) -> None:
    mlps = nn.Sequential(*(Level(8, 6) for _ in range(4)))
    x = torch.randn(3, 8)
    before = mlps(x).detach()
    optimizer = Optimizer(
        [
            {"params": ps, "rule": rules.SGD(lr=lr), "every": period}
            for period, ps in stacked(list(mlps), (1, 2, 4))
        ]
    )
    for _ in range(4):
        mlps(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(mlps(x), before) == (lr == 0.0)


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        ((), "0 periods for 2 MLPs"),
        ((1, 2, 4), "3 periods for 2 MLPs"),
        ((2, 1), r"periods \(2, 1\)"),
        ((0, 1), r"periods \(0, 1\)"),
    ],
)
def test_stacked_refuses(periods: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stacked([Level(2, 3), Level(2, 3)], periods)


# Sizes and names


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize(
    "config",
    [
        Config(width=32, layers=2, heads=2, memory_width=16, cms_width=64),
        Config(),
        Config(width=192, layers=4, heads=6, periods=(1, 4), cms="nested", outputs=40),
    ],
    ids=["small", "default", "nested"],
)
def test_models_have_as_many_parameters_as_hope(config: Config, name: str) -> None:
    hope = models.count(models.configured("hope", config))
    assert abs(models.count(models.configured(name, config)) / hope - 1) < 0.01


def test_a_swiglu_takes_as_many_parameters_as_the_continuum() -> None:
    chain = models.count(models.configured("hope", TINY))
    other = models.configured("hope", replace(TINY, feed_forward="swiglu"))
    # A unit of its width is three vectors.
    assert abs(models.count(other) - chain) <= 3 * TINY.width
    assert other.cms_width != TINY.cms_width


PARTS = {
    "hope": (SelfModifyingTitans, ContinuumMemory),
    "hope-attention": (Attention, ContinuumMemory),
    "transformer": (RotaryAttention, SwiGLU),
    "delta": (GatedDelta, SwiGLU),
    "titans": (Segments, SwiGLU),
}


@pytest.mark.parametrize("name", models.MODELS)
def test_a_model_is_built_by_name(name: str) -> None:
    model = models.build(name, replace(TINY, outputs=5))
    assert model(tokens(2, 3)).shape == (2, 3, 5)
    mixer, feed_forward = PARTS[name]
    assert type(model.blocks[0].mixer) is mixer
    assert type(model.blocks[0].feed_forward) is feed_forward
    assert bool(model.cms_levels()) == (feed_forward is ContinuumMemory)
    assert sum(p.numel() for p in model.parameters()) == models.count(model.config)


# By the ends of names; all others are vectors, or lie before the first block or after the last.
VIEWS = {
    "stacked": r"(query|key|value|gates|gate|out|down|levels.\d.up).weight|initial.\d",
    "split:3": r"(project|learn).weight",
    "split:2": r"feed_forward.up.weight",
}


@pytest.mark.parametrize("feed_forward", ["cms", "swiglu"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_matrix_rule_sees_every_map_alone_and_no_vectors(mixer: Any, feed_forward: Any) -> None:
    model = LanguageModel(replace(TINY, mixer=mixer, feed_forward=feed_forward))
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], view) for view, ps in model.hidden_matrices().items() for p in ps]
    # The gates of the baselines are a vector for each head, and those of Hope are a map.
    vectors = {"blocks.0.mixer.gates.weight"}
    expected = [
        (name, view)
        for view, pattern in VIEWS.items()
        for name in names.values()
        if re.search(rf"(^|\.)({pattern})$", name) and name not in vectors
    ]
    assert sorted(found) == sorted(expected) and len(found) > 3
    groups = train.make_optimizer(model, "m3", 0.02).param_groups
    stepped = [id(p) for group in groups for p in group["params"]]
    assert sorted(stepped) == sorted(names)
    m3 = [(names[id(p)], g["seen_as"]) for g in groups if g["lr"] == 0.02 for p in g["params"]]
    assert sorted(m3) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transfomer", "'transfomer': did you mean 'transformer'"),
        ("xyz", r"'xyz': choose one of \['hope', "),
    ],
)
def test_unknown_models_are_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"no model is called {message}"):
        models.build(name, TINY)


@pytest.mark.parametrize("name", ["rotary", "segments"])
def test_rotations_need_pairs_of_channels(name: str) -> None:
    with pytest.raises(ValueError, match="width 6 over 2 heads: rotary positions need an even"):
        MIXERS[name](replace(TINY, width=6))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 9}, "width 9 is no multiple of heads 2"),
        ({"width": 0}, "width 0 is no multiple"),
        ({"heads": 0}, "no multiple of heads 0"),
        ({"chunk": 0}, "no multiple of chunk 0"),
        ({"slow_chunk": 0}, "slow_chunk 0 is no multiple"),
        ({"slow_chunk": 9}, "slow_chunk 9 is no multiple of chunk 4"),
        ({"layers": 0}, "layers 0: "),
        ({"memory_width": 0}, "memory_width 0: "),
        ({"cms_width": -1}, "cms_width -1: "),
        ({"vocabulary": 0}, "vocabulary 0: "),
        ({"outputs": -1}, "outputs -1: "),
        ({"chunk": 2.5}, "chunk=2.5: a whole number"),
        ({"periods": (1.5, 2)}, "periods=1.5: a whole number"),
        ({"periods": 2}, "periods=2: a list"),
        ({"forget": "0.1"}, "forget='0.1': a number"),
        ({"checkpoint": 1}, "checkpoint=1: true or false"),
        ({"inner": {"delta": False}}, r"its settings have names such as inner\.structure"),
        ({"mixer": "lstm"}, "mixer 'lstm': choose one of"),
        ({"feed_forward": "mlp"}, "feed_forward 'mlp': choose one of"),
        ({"cms": "chain"}, "cms 'chain': choose one of"),
        ({"adaptive": ("keys",)}, r"adaptive \('keys',\): choose among"),
        ({"adaptive": ("key", "key")}, r"adaptive \('key', 'key'\): .* each once"),
        ({"forget": -0.1}, "forget -0.1: a share"),
        ({"forget": 1.1}, "forget 1.1: a share"),
        ({"forget": float("nan")}, "forget nan: a share"),
        ({"rate_cap": 0.0}, "rate_cap 0.0: a learning rate"),
        ({"rate_cap": float("inf")}, "rate_cap inf: a learning rate"),
        ({"periods": ()}, r"periods \(\): one step or more"),
        ({"periods": (0, 1)}, r"periods \(0, 1\): one step or more"),
        ({"periods": (2, 1)}, r"periods \(2, 1\): the highest frequency comes first"),
        ({"periods": (1, 2, 3), "cms": "nested"}, r"periods \(1, 2, 3\): .*multiple"),
    ],
)
def test_bad_sizes_are_quoted(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"structure": "cnn"}, "structure 'cnn': choose one of"),
        ({"objective": "l1"}, "objective 'l1': choose one of"),
        ({"delta": "False"}, "delta='False': true or false"),
    ],
)
def test_bad_inner_rules_are_quoted(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Learning(**wrong)


DELTA_MOMENTUM = [(True, False), (True, True), (False, False), (False, True)]
BOUNDED = [
    Learning(structure, objective, delta, exact, momentum)
    for structure, objective, exact in [
        *(("mlp", "l2", True), ("mlp", "dot", True), ("linear", "l2", True)),
        *(("linear", "dot", True), ("linear", "dot", False), ("residual", "dot", False)),
    ]
    for delta, momentum in DELTA_MOMENTUM
]


@pytest.mark.parametrize("rule", BOUNDED, ids=str)
@pytest.mark.parametrize("gates", [0.0, 9.0])
def test_memories_stay_bounded_over_long_texts(rule: Learning, gates: float) -> None:
    """Fresh memories, and ones that are written and forget as fast as they may."""
    config = replace(TINY, inner=rule, forget=0.9, rate_cap=2.0)
    # Where nothing is erased, values add up.
    most = 20 if rule.delta or rule.objective == "l2" else 2 * 1024
    for x in (torch.randn(1, 1024, 8), torch.randn(1, 1, 8).expand(1, 1024, 8)):
        mixer = SelfModifyingTitans(config)
        with torch.no_grad():
            mixer.rate_bias += gates
            mixer.retention_bias += gates
            _, state = mixer(x, keep=True)
        assert max(p.abs().max() for p in (*state.memory.now, *state.generators.now)) < most


@pytest.mark.parametrize("mixer", [GatedDelta, Segments])
@pytest.mark.parametrize("gates", [0.0, 9.0])
def test_memories_of_baselines_stay_bounded_over_long_texts(mixer: Any, gates: float) -> None:
    for x in (torch.randn(1, 1024, 8), torch.randn(1, 1, 8).expand(1, 1024, 8)):
        layer = mixer(TINY)
        with torch.no_grad():
            layer.gates.bias += gates
            _, state = layer(x, keep=True)
        memory = state.memory if isinstance(layer, Segments) else state[1]
        assert max(p.abs().max() for p in memory.now) < 20
