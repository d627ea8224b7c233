"""Tables and a picture of Hope's speed, for its page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.figures import STYLE, between, save
from benchmarks.hope_cells import Record

NAMES = {
    "hope": "Hope",
    "hope mlp": "Hope, MLP memories under l2",
    "transformer": "Transformer++",
}


def write_page(page: Path, records: Sequence[Record]) -> None:
    """A table between the page's markers for each section, and images/hope-speed.png beside it."""
    parts: list[str] = []
    for section, (title, table) in TABLES.items():
        own = [r for r in records if r["section"] == section]
        if own:
            ran = "{date}, {machine}, {cores} cores, load {load}; Python {python}, torch {torch}"
            parts.append(f"**{title}** ({ran.format(**own[0])})\n\n{table(own)}\n")
    draw(records, page.parent / "images" / "hope-speed.png")
    picture = "![Training speed and carried state by length of context](images/hope-speed.png)\n"
    between(page, "results", "\n".join([picture, *parts]))


def rows(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_forms(records: Sequence[Record]) -> str:
    heads = ["memory, objective", "chunks, tokens/s", "token by token, tokens/s", "ratio"]
    return rows(
        heads,
        [
            [r["memory"], f"{r['chunks']:,.0f}", f"{r['tokens']:,.0f}", f"{r['ratio']:.1f}"]
            for r in records
        ],
    )


def name(r: Record) -> str:
    """The model of a record, as a reader knows it."""
    checkpoint = r.get("config", {}).get("checkpoint")
    return NAMES.get(r["model"], str(r["model"])) + (", checkpoint" if checkpoint else "")


def across(
    records: Sequence[Record], columns: Sequence[tuple[str, Callable[[Record], str]]]
) -> str:
    """A row for each length, and columns for each model."""
    names = list(dict.fromkeys(map(name, records)))
    lengths = list(dict.fromkeys(r["length"] for r in records))
    found = {(r["length"], name(r)): r for r in records}
    heads = [f"{n}, {head}" for head, _ in columns for n in names]
    body = [[f"{x:,}", *(how(found[x, n]) for _, how in columns for n in names)] for x in lengths]
    return rows(["context", *heads], body)


def of_training(records: Sequence[Record]) -> str:
    speed, ram = (
        ("tokens/s", lambda r: f"{r['tokens/s']:,.0f}"),
        ("MB", lambda r: f"{r['MB']:,.0f}"),
    )
    return across(records, [speed, ram])


def of_generation(records: Sequence[Record]) -> str:
    speed = ("tokens/s", lambda r: f"{r['tokens/s']:,.0f}")
    return across(records, [speed, ("state, kB", lambda r: f"{r['bytes'] / 1e3:,.0f}")])


def of_peers(records: Sequence[Record]) -> str:
    ours = records[0]["tokens/s"]
    body = [
        [
            name(r),
            f"{r['parameters'] / 1e6:.2f}",
            f"{r['tokens/s']:,.0f}",
            f"{ours / r['tokens/s']:.2f}",
        ]
        for r in records
    ]
    return rows(["model", "M parameters", "tokens/s", "Hope / this"], body)


TABLES: dict[str, tuple[str, Callable[[Sequence[Record]], str]]] = {
    "forms": ("Forward and backward, 2,048 tokens, one layer", of_forms),
    "training": ("Training step by length of context", of_training),
    "generation": ("Generation by length of context", of_generation),
    "peers": ("Training step of public code, batch 4 × 128", of_peers),
}


def draw(records: Sequence[Record], path: Path) -> None:
    """Training speed, memory and carried state against the length of the context."""
    panels = [("training", "tokens/s"), ("training", "MB"), ("generation", "bytes")]
    titles = ["training, tokens/s", "training step, MB", "generation, bytes of state"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
        for (section, key), title, axis in zip(panels, titles, axes, strict=True):
            own: dict[str, list[tuple[Any, Any]]] = {}
            for r in records:
                if r["section"] == section:
                    own.setdefault(name(r), []).append((r["length"], r[key]))
            for label, points in own.items():
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            axis.set(title=title, xlabel="tokens of context", xscale="log", yscale="log")
            if own:
                axis.legend()
        save(figure, path)
