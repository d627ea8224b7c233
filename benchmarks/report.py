"""Records of steps on file, and as tables."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.race import Record


def spread(x: Sequence[float]) -> str:
    """A median and its quartiles."""
    return "{:.4g} [{:.4g}, {:.4g}]".format(*x)


# What is shown of a record: its keys, the head of the column, and how.
COLUMNS = (
    ("ms", "ms", spread),
    ("host_ms", "{host}", spread),
    ("ratio", "ours / this", "{:.2f}".format),
    ("host_ratio", "in {host}", "{:.2f}".format),
    ("us_per_tensor", "host µs per tensor", "{:.2f}".format),
    ("spike", "p99 / p50", "{:.2f}".format),
    ("host_spike", "in {host}", "{:.2f}".format),
    ("GB/s", "GB/s", "{:.3g}".format),
    ("of copy", "of copy", "{:.0%}".format),
    ("TFLOP/s", "TFLOP/s", "{:.3g}".format),
    ("of GEMM", "of GEMM", "{:.0%}".format),
    ("cosine", "cosine", "{:.4f}".format),
    ("launches", "launches", str),
    ("plain_s", "plain path, s", "{:.3f}".format),
    ("cold_s", "more, cold, s", "{:+.3f}".format),
    ("warm_s", "more, warm, s", "{:+.3f}".format),
    ("extra_MB", "extra MB", "{:.1f}".format),
    ("slab_MB", "slab MB", "{:.1f}".format),
    ("target", "to meet", str),
)
ONLY = {"spike": ("m3",), "host_spike": ("m3",), "us_per_tensor": ("tiny",)}


def of_run(record: Record) -> tuple[str, str, int]:
    """Which run a record is of."""
    return record["section"], record["device"], record["threads"]


def merged(path: Path, records: Sequence[Record]) -> None:
    """Put records on file, in the place of those of the same section, device and threads."""
    new = {of_run(r) for r in records}
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [r for r in map(json.loads, lines) if of_run(r) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [json.dumps(r, ensure_ascii=False) + "\n" for r in (*kept, *records)]
    path.write_text("".join(text))


def table(records: Sequence[Record]) -> str:
    """The records of one section, with the conditions of its run."""
    first = records[0]
    host = "host ms" if first["device"] == "cuda" else "CPU ms"
    shown = [
        (k, head.format(host=host), how)
        for k, head, how in COLUMNS
        if any(k in r for r in records) and first["section"] in ONLY.get(k, (first["section"],))
    ]
    heads = ["contender", *(head for _, head, _ in shown)]
    rows = [heads, ["---"] * len(heads)]
    rows += [[r["row"], *(how(r[k]) if k in r else "" for k, _, how in shown)] for r in records]
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    threads = "" if first["device"] == "cuda" else f", threads: {first['threads']}"
    ran = "{date}, {machine}, {cores} cores, load {load}; Python {python}, torch {torch}"
    return f"**{first['section']}**{threads} ({ran.format(**first)})\n\n{body}\n"
