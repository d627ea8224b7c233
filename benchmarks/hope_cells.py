"""What one process measures of Hope's speed: `python -m benchmarks.hope_cells JSON` prints records.

All times are CPU seconds of the process, on one thread, medians over repeats taken in turn.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from examples.hope.config import Config
from examples.hope.memories import RESIDUAL, Learning
from examples.hope.model import LanguageModel
from examples.hope.models import build
from examples.hope.train import cost

Record = dict[str, Any]
WHOLE = Config(inner=RESIDUAL)
SMALL = replace(
    WHOLE, width=32, layers=1, heads=2, memory_width=8, cms_width=32, chunk=8, slow_chunk=16
)


def size(cell: Record) -> Config:
    """The sizes of the example, or very small ones; a cell may name other fields."""
    return replace(SMALL if cell["quick"] else WHOLE, **cell.get("config", {}))


def medians(repeats: int, **works: Callable[[], object]) -> dict[str, float]:
    """CPU seconds of each work, taken in turn, after one turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def memory(peak: bool = False) -> float:
    """MB that the process holds in RAM, or held at most."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    # Unlike ru_maxrss, it begins anew with a program.
    line = next(
        x for x in status.read_text().splitlines() if x.startswith("VmHWM" if peak else "VmRSS")
    )
    return int(line.split()[1]) * 1024 / 1e6


def trainer(model: nn.Module, tokens: Tensor, way: "Way | None" = None) -> Callable[[], float]:
    """A training step: forward, backward, torch's AdamW, and what the model does after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of, after = way or (cost, None)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        if after is not None:
            after(model, tokens)
        return loss.item()

    return step


def training(cell: Record) -> list[Record]:
    """Tokens/s of training and the memory that a step takes, at one length of context."""
    model = build(cell["model"], size(cell))
    tokens = torch.randint(256, (cell["batch"], cell["length"] + 1))
    before = memory()
    seconds = medians(cell["repeats"], step=trainer(model, tokens))["step"]
    found = {
        "tokens/s": cell["batch"] * cell["length"] / seconds,
        "MB": memory(peak=True) - before,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return [cell | found]


def forms(cell: Record) -> list[Record]:
    """Forward and backward by chunks, and of the same mathematics token by token."""
    records = []
    for rule in (RESIDUAL, Learning(), Learning(structure="linear", objective="dot")):
        model = LanguageModel(replace(size(cell), inner=rule))
        tokens = torch.randint(256, (cell["batch"], cell["length"]))

        def one_by_one(model: LanguageModel = model, tokens: Tensor = tokens) -> Tensor:
            state, logits = None, []
            for token in tokens.split(1, 1):
                new, state = model.stream(token, state)
                logits.append(new)
            return torch.cat(logits, 1)

        def whole(model: LanguageModel = model, tokens: Tensor = tokens) -> Tensor:
            return model(tokens)

        # In float64 and not to the end, for memories that generate their own keys enlarge rounding.
        model.double()
        with torch.no_grad():
            beginning = tokens[:, :512]
            difference = whole(tokens=beginning) - one_by_one(tokens=beginning)
            far = difference.abs().max().item()
        model.float()
        if not far < 1e-9:
            raise ArithmeticError(f"the two forms of {rule} are {far} apart")
        seconds = medians(
            cell["repeats"],
            chunks=lambda whole=whole: whole().square().mean().backward(),
            tokens=lambda one_by_one=one_by_one: one_by_one().square().mean().backward(),
        )
        speed = {k: tokens.numel() / s for k, s in seconds.items()}
        ratio = seconds["tokens"] / seconds["chunks"]
        records.append(
            cell
            | {"memory": f"{rule.structure}, {rule.objective}", "far": far, "ratio": ratio, **speed}
        )
    return records


@torch.no_grad()
def generation(cell: Record) -> list[Record]:
    """Tokens/s of writing on, and bytes carried, after contexts read in pieces."""
    models = {name: build(name, size(cell)) for name in ("hope", "transformer")}
    states: dict[str, Any] = dict.fromkeys(models)
    text, read, records = torch.randint(256, (1, max(cell["lengths"]))), 0, []
    for length in cell["lengths"]:
        for piece in text[:, read:length].split(cell["piece"], 1):
            for name, model in models.items():
                _, states[name] = model.stream(piece, states[name])
        read = length

        def write(name: str) -> None:
            token, state = text[:, :1], states[name]
            for _ in range(cell["tokens"]):
                logits, state = models[name].stream(token, state)
                token = logits[:, -1].argmax(-1, keepdim=True)

        seconds = medians(cell["repeats"], **{n: lambda n=n: write(n) for n in models})
        for name in models:
            speed = cell["tokens"] / seconds[name]
            found = {
                "model": name,
                "length": length,
                "tokens/s": speed,
                "bytes": held(states[name]),
            }
            records.append({k: v for k, v in cell.items() if k != "lengths"} | found)
    return records


def held(state: Any) -> int:
    """Bytes of the distinct tensors of a state."""
    tensors = [x for x in tree_leaves(state) if isinstance(x, Tensor)]
    return sum({(x.data_ptr(), x.shape): x.nbytes for x in tensors}.values())


def peers(cell: Record) -> list[Record]:
    """Tokens/s of training of other packages' models, and of Hope, at one size, taken in turn."""
    tokens = torch.randint(256, (cell["batch"], cell["length"] + 1))
    config = size(cell)
    models: dict[str, tuple[nn.Module, Way | None]] = {
        "hope": (build("hope", config), None),
        "hope mlp": (build("hope", replace(config, inner=Learning())), None),
        "transformer": (build("transformer", config), None),
    }
    for name, make in PEERS.items():
        if find_spec(name) is not None and not cell["quick"]:
            package = name.replace("_", "-")
            for words, way in WAYS[name].items():
                models[f"{package} {version(package)}{words}"] = make(config), way
    works = {name: trainer(model, tokens, way) for name, (model, way) in models.items()}
    seconds = medians(cell["repeats"], **works)
    return [
        cell
        | {"model": name, "tokens/s": cell["batch"] * cell["length"] / seconds[name]}
        | {"parameters": sum(p.numel() for p in model.parameters())}
        for name, (model, _) in models.items()
    ]


def nested_learning(config: Config) -> nn.Module:
    """The self-modifying Hope of `nested-learning`: its defaults, our sizes and clocks."""
    package, levels = (import_module(f"nested_learning.{x}") for x in ("model", "levels"))
    sizes = {"dim": config.width, "num_layers": config.layers, "heads": config.heads}
    made = package.ModelConfig(
        vocab_size=256,
        titan_level=levels.LevelSpec("titan", 1),
        cms_levels=[levels.LevelSpec(f"level {p}", p) for p in config.periods],
        block_variant="hope_selfmod",
        **sizes,
    )
    return package.HOPEModel(made)


@torch.no_grad()
def written(model: nn.Module, tokens: Tensor) -> None:
    """The pass after a step in which `nested-learning` writes its memories.

    The signal that it is given has the cost of any other.
    """
    model(tokens, teach_signal=1e-3 * torch.randn(*tokens.shape, model.config.dim))  # pyright: ignore


def titans_pytorch(config: Config) -> nn.Module:
    """Memory as context of `titans-pytorch`, with segments of our chunk."""
    return import_module("titans_pytorch").MemoryAsContextTransformer(
        num_tokens=256,
        dim=config.width,
        depth=config.layers,
        segment_len=config.chunk,
        num_persist_mem_tokens=4,
        num_longterm_mem_tokens=4,
        heads=config.heads,
        dim_head=config.width // config.heads,
    )


# The loss of a model, and what it does after a step.
Way = tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], None] | None]
WAYS: dict[str, dict[str, Way]] = {
    "nested_learning": {"": (cost, written), ", memories never written": (cost, None)},
    "titans_pytorch": {"": (lambda model, tokens: model(tokens, return_loss=True), None)},
}
PEERS = {"nested_learning": nested_learning, "titans_pytorch": titans_pytorch}
SECTIONS = {"forms": forms, "training": training, "generation": generation, "peers": peers}


def measured(cell: Record) -> list[Record]:
    """The records of a cell."""
    torch.manual_seed(0)
    return SECTIONS[cell["section"]](cell)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measured(json.loads(sys.argv[1]))))
