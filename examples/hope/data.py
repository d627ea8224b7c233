"""Byte corpora for the language model: Python's own sources by default, or the user's text."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEPARATOR = 0  # the byte between two documents; no document contains it
VALID_SHARE = 0.05
BLOCK = 64 * 1024
FEW = 20  # with fewer files than this, blocks of files are split instead of whole files
# Folders of the standard library that are no sources of its own, tests, data or, as `encodings`,
# generated tables so alike that a hash split would put copies on both sides.
SKIPPED = (
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip"),
    *("pydoc_data", "encodings", "lib-dynload", "__phello__", "__pycache__"),
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and validation bytes (uint8, documents joined by `SEPARATOR`), with provenance."""

    train: Tensor
    valid: Tensor
    sha256: str
    size: int
    python: str
    description: str

    def record(self) -> dict[str, str | int]:
        """What identifies the corpus in a log; figures compare only where `sha256` agrees."""
        identity = {"sha256": self.sha256, "bytes": self.size, "python": self.python}
        return {"corpus": self.description, **identity}


def load(path: str | Path | None = None, length: int = 1) -> Corpus:
    """Read the standard library's sources, or the text file or folder `path`, and split it.

    Both parts are checked to hold at least one window of `length` bytes and its targets.
    """
    python = platform.python_version()
    if path is None:
        documents = _standard_library()
        what, description = "the standard library", f"standard library of Python {python}"
    elif Path(path).exists():
        documents = _blocks(_texts(Path(path)))
        what, description = repr(str(path)), Path(path).resolve().name
    else:
        raise FileNotFoundError(f"no such file or folder: {str(path)!r}")
    if not documents:
        raise ValueError(f"{what} holds no text: every file is empty or contains NUL bytes")
    train, valid = _split(documents)
    digest = hashlib.sha256()
    for part in (train, valid):  # the length first, so that moving the border changes the digest
        digest.update(len(part).to_bytes(8, "big") + part)
    for name, part in (("training", train), ("validation", valid)):
        if len(part) <= length:
            raise ValueError(
                f"{what} is too small: its {name} part has {len(part)} bytes, a context length "
                f"of {length} needs at least {length + 1}"
            )
    return Corpus(
        train=torch.frombuffer(train, dtype=torch.uint8),
        valid=torch.frombuffer(valid, dtype=torch.uint8),
        sha256=digest.hexdigest(),
        size=len(train) + len(valid),
        python=python,
        description=description,
    )


def held_out(name: str) -> bool:
    """Whether the document called `name` belongs to the validation part."""
    return _rank(name) < VALID_SHARE * 2**64


class Batches(Iterator[Tensor]):
    """Endless random crops [batch, length + 1] (int64) whose generator can be saved and restored.

    Inputs are `crop[:, :-1]`, targets `crop[:, 1:]`.
    """

    def __init__(self, data: Tensor, batch: int, length: int, seed: int) -> None:
        _require(data, batch, length)
        self.data, self.batch, self.length = data, batch, length
        self._generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> Tensor:
        starts = torch.randint(
            self.data.numel() - self.length, (self.batch,), generator=self._generator
        )
        return _crops(self.data, starts, self.length)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, and the shape of the draw it belongs to."""
        return {"generator": self._generator.get_state(), **self._shape()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; data and sizes must be the same."""
        for key, value in self._shape().items():
            if state[key] != value:
                raise ValueError(
                    f"cannot resume: the checkpoint was written with {key} = {state[key]}, "
                    f"this run has {key} = {value}"
                )
        self._generator.set_state(state["generator"].cpu())

    def _shape(self) -> dict[str, int]:
        return {"batch": self.batch, "length": self.length, "bytes": self.data.numel()}


def batches(data: Tensor, batch: int, length: int, seed: int) -> Batches:
    """Random crops of `length + 1` bytes, the same for the same seed on every machine."""
    return Batches(data, batch, length, seed)


def windows(data: Tensor, batch: int, length: int, count: int) -> Tensor:
    """Fixed evaluation windows [count, batch, length + 1] (int64), evenly spaced over `data`.

    Every batch spreads over the whole of `data`, so that a few of them are already a fair sample.
    """
    _require(data, batch, length)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    total = count * batch
    last = data.numel() - length - 1
    starts = torch.arange(total) * last // max(total - 1, 1)
    return _crops(data, starts.view(batch, count).T, length)


def _crops(data: Tensor, starts: Tensor, length: int) -> Tensor:
    index = starts[..., None] + torch.arange(length + 1)
    return data[index.to(data.device)].long()


def _require(data: Tensor, batch: int, length: int) -> None:
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")
    if data.numel() <= length:
        raise ValueError(
            f"the text is too small: it has {data.numel()} bytes, a context length of {length} "
            f"needs at least {length + 1}"
        )


def _standard_library() -> list[tuple[str, bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = _texts(root, _not_in_the_library, ".py")
    if not documents:
        raise FileNotFoundError(
            f"this Python has no sources below {str(root)!r}: give a text file or folder instead"
        )
    return documents


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _not_in_the_library(name: str) -> bool:
    # The prefixes are written when Python is built: their content differs between machines.
    return name in SKIPPED or name.startswith((".", "config-", "_sysconfigdata"))


def _texts(
    path: Path, skip: Callable[[str], bool] = _hidden, suffix: str = ""
) -> list[tuple[str, bytes]]:
    """(relative name, content) of the non-empty, NUL-free files, sorted by name."""
    root, found = path, []
    if path.is_dir():
        for folder, below, files in os.walk(path):
            below[:] = [name for name in below if not skip(name)]
            found += [Path(folder, f) for f in files if f.endswith(suffix) and not skip(f)]
    else:
        root, found = path.parent, [path]
    texts = [(p.relative_to(root).as_posix(), p.read_bytes()) for p in found if p.is_file()]
    return sorted((name, text) for name, text in texts if text and SEPARATOR not in text)


def _blocks(files: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Cut a few files at line ends into blocks, so that 5 % of them is a usable share."""
    if len(files) >= FEW:
        return files
    # About 200 blocks where the text allows it: with a handful, chance decides the share.
    size = max(1024, min(BLOCK, sum(len(text) for _, text in files) // 200))
    blocks = []
    for name, text in files:
        start = index = 0
        while start < len(text):
            end = start + size
            if end < len(text):
                end = text.rfind(b"\n", start, end) + 1 or end
            blocks.append((f"{name}#{index}", text[start:end]))
            start, index = end, index + 1
    return blocks


def _split(documents: list[tuple[str, bytes]]) -> tuple[bytearray, bytearray]:
    valid = {name for name, _ in documents if held_out(name)}
    if not valid or len(valid) == len(documents):
        valid = {min((name for name, _ in documents), key=_rank)}
    join = bytes([SEPARATOR]).join
    return (
        bytearray(join(text for name, text in documents if name not in valid)),
        bytearray(join(text for name, text in documents if name in valid)),
    )


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8])
