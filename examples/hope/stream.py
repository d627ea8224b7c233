"""Files one after another as a stream of bytes to learn from, with some blocks held out of it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.hope.data import SEPARATOR

ONE_IN = 20  # of so many blocks the middle one is held out


class Stream:
    """The bytes of files as tokens, each file followed by `SEPARATOR`, read once, from a position.

    block: bytes that are held out together; after a separator the text goes on behind them. Which
        blocks they are depends on the sizes of the files only, so it is the same in every run.
    Files that cannot be read, or hold nothing, are left out, with a line in `skipped`. Raises
    ValueError where none is left.
    """

    def __init__(self, paths: Sequence[str | Path], block: int) -> None:
        self.block, self.skipped = block, list[str]()
        self._paths: list[Path] = []
        self._digests: list[str] = []  # of whole files
        self._starts: list[int] = []  # bytes of the files before
        held, self.bytes, self.tokens = bytearray(), 0, 0
        for path in map(Path, paths):
            try:
                text = path.read_bytes()
            except OSError as error:
                self.skipped.append(f"{str(path)!r} is skipped: {error.strerror}")
                continue
            if not text:
                self.skipped.append(f"{str(path)!r} is skipped: it is empty")
                continue
            self._paths.append(path)
            self._digests.append(_sha256(text))
            self._starts.append(self.bytes)
            learnt, kept = split(text, self.bytes, block)
            held += kept
            self.tokens += len(learnt)
            self.bytes += len(text)
        if not self._paths:
            raise ValueError("no text to learn from. " + ("; ".join(self.skipped) or "No file"))
        self.held_out = torch.frombuffer(held or bytearray(1), dtype=torch.uint8)[: len(held)]
        self.file = self.offset = self.read = 0  # position: file, tokens of it, tokens of all
        self._open: tuple[int, bytes] | None = None

    def next(self, count: int) -> Tensor | None:
        """The next `count` tokens (int64), across files; None, and none is read, if fewer remain.

        Raises ValueError where a file has changed since the stream was begun.
        """
        if self.read + count > self.tokens:
            return None
        found, file, offset = bytearray(), self.file, self.offset
        while len(found) < count:
            text = self._text(file)
            piece = text[offset : offset + count - len(found)]
            found += piece
            offset += len(piece)
            if offset == len(text):
                file, offset = file + 1, 0
        self.file, self.offset, self.read = file, offset, self.read + count
        return torch.frombuffer(found, dtype=torch.uint8).long()

    def state_dict(self) -> dict[str, Any]:
        """The position, and digests of what was read before it."""
        part = self._text(self.file)[: self.offset] if self.offset else b""
        return {
            **{"file": self.file, "offset": self.offset, "read": self.read},
            "digests": self._digests[: self.file],
            "part": _sha256(part),
        }

    def changes(self, state: dict[str, Any]) -> list[str]:
        """How these files differ, in words, from what was read before `state` was taken."""
        found = [
            f"file {i + 1} ({self._paths[i]}), read to its end, has changed"
            for i, (theirs, ours) in enumerate(zip(state["digests"], self._digests, strict=False))
            if theirs != ours
        ]
        file, offset = state["file"], state["offset"]
        needed = file + (offset > 0)
        if needed > len(self._paths):
            return [*found, f"{needed} files were read, {len(self._paths)} are given"]
        if offset and _sha256(self._text(file)[:offset]) != state["part"]:
            found.append(
                f"file {file + 1} ({self._paths[file]}) has changed in its first {offset} tokens, "
                "which were read"
            )
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; ValueError where what was read has changed."""
        if found := self.changes(state):
            raise ValueError("; ".join(found))
        self.file, self.offset, self.read = state["file"], state["offset"], state["read"]

    def _text(self, file: int) -> bytes:
        """The tokens of a file; one file at a time is held in memory."""
        if self._open is None or self._open[0] != file:
            path = self._paths[file]
            text = path.read_bytes()
            if _sha256(text) != self._digests[file]:
                raise ValueError(f"{str(path)!r} changed while the files before it were read")
            self._open = file, split(text, self._starts[file], self.block)[0]
        return self._open[1]


def split(text: bytes, start: int, block: int) -> tuple[bytes, bytes]:
    """The parts of a file to learn from and to hold out, each followed by a separator.

    start: bytes of the stream before this file.
    """
    sides = bytearray(), bytearray()
    position = 0
    while position < len(text):
        index = (start + position) // block
        middle = index - index % ONE_IN + ONE_IN // 2  # the held-out block of these
        held = index == middle
        border = middle if index < middle else middle + 1 if held else middle + ONE_IN
        end = min(len(text), border * block - start)
        sides[held].extend(text[position:end] + bytes([SEPARATOR]))
        position = end
    return bytes(sides[0]), bytes(sides[1])


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
