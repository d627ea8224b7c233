"""What is said of two things that should be alike and are not."""

from __future__ import annotations

from collections.abc import Sequence

MOST = 20


def refuse(what: str, differences: Sequence[str]) -> None:
    """Raise ValueError with all differences, or the first `MOST` of them; none is no error."""
    if len(differences) == 1:
        raise ValueError(differences[0])
    if differences:
        rows = [f"{what} in {len(differences)} ways; nothing was loaded:", *differences[:MOST]]
        rows += [f"and {len(differences) - MOST} more"] * (len(differences) > MOST)
        raise ValueError("\n  ".join(rows))


def several(names: Sequence[object], most: int = 5) -> str:
    """A list of names, the first few of them."""
    more = [f"and {len(names) - most} more"] * (len(names) > most)
    return ", ".join([*map(repr, names[:most]), *more]) or "none"
