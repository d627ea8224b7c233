"""The tables of docs/results.md from results/compare: `python -m benchmarks.results`."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.figures import between
from examples.hope.table import pipes

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "results" / "compare"
PAGE = ROOT / "docs" / "results.md"
NAMES = {
    "adamw": "AdamW",
    "muon": "Muon",
    "torch.muon": "torch.optim.Muon",
    "m3": "M3",
    "m3:second_moment=none": "M3, no second moment",
    "m3:slow=0.99": "M3, slow 0.99",
    "deltamomentum": "DeltaMomentum",
    "multifrequency": "MultiFrequency",
    "ademamix": "AdEMAMix",
    "torch.sgd:momentum=0.9": "SGD with momentum",
}

Row = Mapping[str, str]


def rows(study: str) -> dict[tuple[str, str], Row]:
    """The summary of a study by task and optimizer."""
    with (STUDIES / study / "summary.csv").open() as file:
        return {(row["task"], row["optimizer"]): row for row in csv.DictReader(file)}


def tasks(found: Mapping[tuple[str, str], Row]) -> list[str]:
    return list(dict.fromkeys(task for task, _ in found))


def numbers(values: Sequence[float]) -> list[str]:
    """With as many decimals as the least but zero of the values and their range needs for two."""
    sizes = [abs(x) for x in (*values, max(values) - min(values)) if x]
    digits = 1 - math.floor(math.log10(min(sizes))) if sizes else 1
    tiny = max(map(abs, values)) < 1e-3
    texts = [f"{x:.1e}".replace("e-0", "e-") if tiny else f"{x:.{min(digits, 4)}f}" for x in values]
    return [text.replace("-", "−") for text in texts]


def interval(row: Row, name: str) -> str:
    """A mean and the ends of its interval, "–" where there is none."""
    if row.get(name) in (None, "", "nan"):
        return "–"
    values = [float(row[f"{name}{end}"]) for end in ("", " low", " high")]
    mean, *ends = numbers([x for x in values if math.isfinite(x)])
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def difference(row: Row, name: str = "difference") -> str:
    """Bold where it leaves out zero."""
    text = interval(row, name)
    apart = text != "–" and not float(row[f"{name} low"]) <= 0 <= float(row[f"{name} high"])
    return f"**{text}**" if apart else text


def reached(row: Row, name: str) -> str:
    """A ratio to the reference, and how many seeds have none."""
    missed = f", {row['missed']} missed" if row["missed"] != "0" else ""
    text = interval(row, name)
    return f"–{missed}" if text == "–" else f"{text} ×{missed}"


def drop_in() -> str:
    """Steps and time to AdamW's last score."""
    found = rows("drop-in")
    heads = ["task (AdamW's rate)", "optimizer", "score", "difference", "steps", "time"]
    return pipes(
        heads,
        [
            [
                f"{task}, {row['metric']} ({row['lr']})" if who == "adamw" else "",
                *(NAMES[who], interval(row, "mean"), difference(row)),
                *(reached(row, f"{axis} to target") for axis in ("steps", "seconds")),
            ]
            for (task, who), row in found.items()
        ],
    )


def muon() -> str:
    """Differences to Muon on seven tasks."""
    found = rows("bytes") | rows("hope") | rows("small")
    others = ["m3", "m3:second_moment=none", "torch.muon", "adamw"]
    body = [
        [
            f"{task}, {found[task, 'muon']['metric']}",
            interval(found[task, "muon"], "mean"),
            *(difference(found.get((task, who), {})) for who in others),
        ]
        for task in tasks(found)
    ]
    return pipes(["task", "Muon", *(NAMES[who] for who in others)], body)


def streams() -> str:
    """Scores and forgetting; bold: better than AdamW and Muon, told apart from both."""
    ours, theirs = rows("streams"), rows("streams-to-muon")
    names = tasks(ours)
    arrows = ["↑" if ours[task, "adamw"]["better"] == "higher" else "↓" for task in names]
    body: list[list[str]] = []
    for who in dict.fromkeys(who for _, who in ours):
        line = [NAMES[who]]
        for task, arrow in zip(names, arrows, strict=True):
            pair = ours[task, who], theirs[task, who]
            score = better(pair, "mean", "difference", arrow == "↑")
            forgotten = better(pair, "forgetting", "forgetting difference", False)
            line.append(f"{score} ({forgotten})" if forgotten else score)
        body.append(line)
    return pipes(["optimizer", *(f"{t}, {a}" for t, a in zip(names, arrows, strict=True))], body)


def better(pair: Sequence[Row], name: str, compared: str, higher: bool) -> str:
    """The figure, bold where it is better than both references and told apart."""
    if pair[0].get(name) in (None, ""):
        return ""
    text = f"{float(pair[0][name]):#.3g}"
    ends = [(row[f"{compared} low"], row[f"{compared} high"]) for row in pair]
    if any("" in end for end in ends):  # it is one of them
        return text
    apart = all(float(low) > 0 if higher else float(high) < 0 for low, high in ends)
    return f"**{text}**" if apart else text


def defaults() -> str:
    """On how many tasks a candidate is better or worse than the default."""
    body = []
    for study in CHOSEN:
        found = rows(study)
        for who in dict.fromkeys(who for _, who in found):
            signs = [row["verdict"] for (_, name), row in found.items() if name == who]
            if who == "muon" or "" in signs:  # the reference
                continue
            counts = [str(signs.count(sign)) for sign in ("1", "-1", "0")]
            body.append([f"`{who}`", *counts, held_back(who)])
    heads = ["candidate", "better", "worse", "not told apart", "on tasks held back"]
    return pipes(heads, body)


def held_back(who: str) -> str:
    """What the studies of tasks held back say of a candidate, "" where it was not run there."""
    found: dict[str, Row] = {}
    for study, names in CONFIRMED.items():
        for (task, name), row in rows(study).items():
            if name == who and task in names:
                found[task] = row
    return "; ".join(f"{task} {difference(row)}" for task, row in found.items())


# Studies that choose.
CHOSEN = ("defaults-m3", "defaults-delta", "defaults-deep", "defaults-dgd", "defaults-mf")
# Studies that confirm, and on which tasks.
CONFIRMED = {
    "confirm": ("bytes", "hope"),
    "small-to-m3": ("diabetes",),
    "confirm-dgd": ("bytes", "diabetes"),
    "confirm-deep": ("bytes", "diabetes"),
}


def main() -> None:
    for make in (drop_in, muon, streams, defaults):
        between(PAGE, make.__name__.replace("_", "-"), make())


if __name__ == "__main__":
    main()
