"""The report of a study: one HTML page that needs nothing else, Markdown, CSV and pictures."""

import csv
import io
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deepopt import replacing
from examples.compare import figures
from examples.compare.stats import Interval, figure, geometric
from examples.compare.study import Plan
from examples.compare.summary import Line, Table, overall, verdict
from examples.compare.trial import code
from examples.hope.table import pipes

COLUMNS = (
    ("optimizer", "as it was asked for"),
    ("lr", "learning rate, and choices; * at the edge of what was tried: give more --trials"),
    (
        "score",
        "mean over seeds on test data; 95 % interval, which few seeds make wide and lopsided",
    ),
    (
        "difference",
        "to the reference, in pairs of seeds; bold (told apart) where its interval leaves out 0",
    ),
    ("rank", "by mean score; one that diverged on a seed comes after those that did not"),
    ("steps to target", "to the reference's final validation score, to what it took it itself"),
    ("time to target", "the same in seconds of training"),
    ("sensitivity", "what is lost, in the mean, at the best rate ÷ 1.8 and × 1.8; – if not tried"),
    ("ms/step", "all of a step, and the optimizer's part"),
    ("state", "bytes that the optimizer keeps per byte of parameters; peak of a GPU"),
    ("diverged", "of the seeds"),
    ("trials", "tuning and report"),
)


def write(plan: Plan, found: Sequence[Table], folder: Path) -> None:
    """report.html, report.md, summary.csv, and pictures/ as PNG and SVG."""
    drawn = figures.pictures(found)
    figures.save(drawn, folder / "pictures")
    texts = {
        "report.html": page(plan, found, {k: figures.svg(v) for k, v in drawn.items()}),
        "report.md": markdown(plan, found),
        "summary.csv": table_csv(found),
    }
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode())


def cells(table: Table, line: Line) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    choices = "".join(f", {k}={v}" for k, v in line.settings.items())
    lr = "–" if line.lr is None else f"{line.lr:g}{'*' if line.edge else ''}{choices}"
    d = line.difference
    some = f", {len(line.test)} of {line.seeds} seeds" if len(line.test) < line.seeds else ""
    return [
        *(line.label, lr, _words(line.mean) + some),
        "–" if d is None else f"**{_words(d)}**" if d.apart else _words(d),
        "–" if math.isnan(line.rank) else f"{line.rank:g}",
        _share(line.steps),
        _share(line.seconds),
        "–" if math.isnan(line.sensitivity) else figure(line.sensitivity),
        *_costs(line),
        f"{line.diverged}",
        f"{line.trials}",
    ]


def markdown(plan: Plan, found: Sequence[Table]) -> str:
    """The whole report without its pictures."""
    text = ["# " + title(found), ""]
    if left := unfinished(found):
        text += [f"**{left}**", ""]
    if len(found) > 1:
        text += ["## All tasks", "", pipes(OVERALL, _overall(found))]
    for table in found:
        text += [f"## {table.task}", "", caption(table), ""]
        heads = [name for name, _ in COLUMNS]
        text += [pipes(heads, [cells(table, line) for line in table.lines])]
        text += [line for sentence in ends(table) for line in (sentence, "")]
        if rows := _of_stream(table):
            text += [pipes(rows[0], rows[1:])]
    text += ["## Conditions", "", *(f"- {line}" for line in conditions(plan, found)), ""]
    text += [*(f"- {name}: {about}." for name, about in COLUMNS), ""]
    return "\n".join(text)


def table_csv(found: Sequence[Table]) -> str:
    """A line for each contender on each task, figures as they are; empty where there is none.

    Verdict: 1 where it is better than the reference and told apart, -1 where worse, 0 neither.
    """
    out = io.StringIO()
    rows = [_record(table, line) for table in found for line in table.lines]
    writer = csv.DictWriter(out, dict.fromkeys(k for row in rows for k in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _record(table: Table, x: Line) -> dict[str, Any]:
    row = {"task": table.task, "optimizer": x.label, "lr": x.lr, "edge": x.edge}
    row |= {"metric": table.metric, "better": table.better, **_interval("mean", x.mean)}
    row |= _interval("difference", x.difference)
    row |= {"verdict": verdict(table, x) if x.difference else None, "rank": x.rank}
    for name, reached in (("steps to target", x.steps), ("seconds to target", x.seconds)):
        ratio, missed = _target(reached)
        row |= {**_interval(name, ratio), "missed": missed}
    row |= {"sensitivity": x.sensitivity, "step ms": x.step_ms, "optimizer ms": x.optimizer_ms}
    row |= {"state per parameter byte": x.state, "diverged": x.diverged, "seeds": len(x.test)}
    row |= {"trials": x.trials}
    for name, kept in x.stream.items():
        row |= _interval(name, kept) | _interval(f"{name} difference", x.kept[name])
    return row


def _interval(name: str, found: Interval | None) -> dict[str, float | None]:
    """Under the name, and its ends."""
    values = (found.mean, found.low, found.high) if found else (None,) * 3
    return dict(zip((name, f"{name} low", f"{name} high"), values, strict=True))


OVERALL = ("optimizer", "mean rank", "better", "worse", "not told apart")


def _overall(found: Sequence[Table]) -> list[list[str]]:
    summary = overall(found)
    first = next(x.label for x in found[0].lines if x.difference is None)
    return [
        [name, f"{rank:.2f}", *(("–",) * 3 if name == first else map(str, counts))]
        for name, (rank, *counts) in summary.items()
    ]


def title(found: Sequence[Table]) -> str:
    labels = dict.fromkeys(line.label for table in found for line in table.lines)
    who = f"{len(labels)} optimizers" if len(labels) > 1 else next(iter(labels))
    return f"{who} on {', '.join(table.task for table in found)}"


def unfinished(found: Sequence[Table]) -> str:
    """Which rows are of fewer seeds than were asked for, because the study was stopped."""
    done = [(t.task, x, len(x.test) + x.diverged) for t in found for x in t.lines]
    left = [f"{x.label} on {task} ({n} of {x.seeds} seeds)" for task, x, n in done if n < x.seeds]
    return f"Not finished: {', '.join(left)}. The same command goes on." if left else ""


def caption(table: Table) -> str:
    """What the scores of a task are."""
    data = "test data" if table.tested else "validation data, for the task has no test data"
    text = f"{table.metric}, {table.better} is better, on {data}."
    if table.target is not None:
        text += " The target of a seed is the validation score that the reference ends at"
        text += f" (median {figure(table.target)})."
    return text


def conditions(plan: Plan, found: Sequence[Table]) -> list[str]:
    """What the figures depend on."""
    each = f" of {plan.tuning_seeds} seeds" if plan.tuning_seeds > 1 else ""
    tuned = plan.tuned()
    how = [f"learning rate {lr:g} of {label} as given" for label, lr in plan.lr.items()]
    if tuned:
        who = "each" if tuned == [*plan.optimizers] else ", ".join(tuned)
        how.insert(0, f"{plan.trials} trials{each} to tune {who}")
    if plan.drop_in:
        how.append(f"the rate of {plan.optimizers[0]} for the others")
    decays = "their own weight decay"
    if plan.weight_decay is not None:
        decays = f"weight decay {plan.weight_decay:g} for all that have one and do not say theirs"
    runs = sorted({x for table in found for x in table.runs})
    lines = [
        f"command: `{plan.command}`; differences and targets are those of {plan.reference}",
        f"{', '.join(how)}, then {plan.seeds} of other seeds, which decide weights and data for "
        "all alike",
        decays,
        *(f"hardware: {x}" for x in sorted({x for table in found for x in table.machines})),
        f"times: of {len(runs) or 1} run{'s' * (len(runs) > 1)} of the command"
        f"{', begun ' * bool(runs)}{', '.join(runs)}; with whatever else the machine did",
    ]
    for table in found:
        lines.append(f"{table.task}: {table.about}; {table.training}")
        lines += [f"data of {table.task}: {x}" for x in table.records if x]
        if len(table.records) > 1:
            lines.append(f"{table.task}: THE DATA DIFFER between rows, which do not compare")
        if len(table.software) > 1:
            lines.append(f"{table.task}: THE SOFTWARE DIFFERS between rows")
    versions = sorted({x for table in found for x in table.software})
    lines += [f"software: {x}" for x in versions]
    if any("code " in x and f"code {code()}" not in x for x in versions):
        lines.append(f"the code here is another by now, {code()}: another --out does it anew")
    return lines


CSS = """
:root { color-scheme: light; --ink: #1f2430; --muted: #5b6270; --line: #e1e4ea; --good: #0a6b4b; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 16px 64px; color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, li { max-width: 75ch; } .muted { color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th { color: var(--muted); font-weight: 600; cursor: help; }
tr.better td { color: var(--good); font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr));
  gap: 12px; margin: 16px 0; }
figure { margin: 0; } svg { width: 100%; height: auto; }
figure.wide { grid-column: 1 / -1; }
code { background: #f3f4f7; padding: 1px 4px; overflow-wrap: anywhere; }
"""


def page(plan: Plan, found: Sequence[Table], drawn: Mapping[str, str]) -> str:
    """The report as HTML: no script, no font and no file from elsewhere."""
    body = [f"<h1>{escape(title(found))}</h1>"]
    if left := unfinished(found):
        body.append(f"<p><b>{escape(left)}</b></p>")
    if len(found) > 1:
        body.append("<h2>All tasks</h2>" + _html(OVERALL, _overall(found), {}))
    first = {name: drawn[name] for name in ("differences", "profile") if name in drawn}
    if first:
        body.append(_figures(first))
    for table in found:
        rows = [cells(table, line) for line in table.lines]
        better = {i for i, line in enumerate(table.lines) if verdict(table, line) > 0}
        about = dict(COLUMNS)
        body.append(f'<h2 id="{escape(table.task)}">{escape(table.task)}</h2>')
        body.append(f'<p class="muted">{escape(caption(table))}</p>')
        body.append(_html([name for name, _ in COLUMNS], rows, about, better))
        body += [f"<p>{escape(sentence)}</p>" for sentence in ends(table)]
        name = figures.file_name(table.task)
        own = {k: v for k, v in drawn.items() if k.rpartition("-")[0] == name}
        body.append(_figures(own))
        if rows := _of_stream(table):
            body.append(_html(rows[0], rows[1:], {}))
    lines = "".join(f"<li>{_code(line)}</li>" for line in conditions(plan, found))
    about = "".join(f"<li><b>{escape(n)}</b>: {escape(t)}.</li>" for n, t in COLUMNS)
    body.append(f"<h2>Conditions</h2><ul>{lines}</ul><h2>Columns</h2><ul>{about}</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title(found))}</title>'
        f"<style>{CSS}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _of_stream(table: Table) -> list[list[str]]:
    """What a stream keeps and loses, under the names of it; empty for a task of one part."""
    streams = [line for line in table.lines if line.stream]
    names = [*streams[0].stream] if streams else []
    rows = []
    for line in streams:
        cells = [_words(line.stream[n]) for n in names]
        bold = [line.difference is not None and line.kept[n].apart for n in names]
        rows.append(
            [line.label, *(f"**{x}**" if b else x for x, b in zip(cells, bold, strict=True))]
        )
    return [["stream", *(n.replace("_", " ") for n in names)], *rows] if rows else []


def _figures(drawn: Mapping[str, str]) -> str:
    # Names within a picture are the page's: each picture gets its own.
    inside = ""
    for i, (name, text) in enumerate(drawn.items()):
        kind = ' class="wide"' if name.endswith("-matrices") else ""
        inside += f'<figure{kind} role="img" aria-label="{escape(name)}">{_own(text, i)}</figure>'
    return f'<div class="pictures">{inside}</div>'


def _own(text: str, index: int) -> str:
    prefix = f"p{zlib.crc32(text.encode())}{index}-"
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, mark + prefix)
    return text


def _html(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    about: Mapping[str, str],
    better: Collection[int] = (),
) -> str:
    top = "".join(f'<th title="{escape(about.get(h, h))}">{escape(h)}</th>' for h in heads)
    lines = []
    for i, row in enumerate(rows):
        kind = ' class="better"' if i in better else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{_bold(x)}</td>' for x in row)}</tr>")
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def _bold(text: str) -> str:
    strong = text.startswith("**") and text.endswith("**")
    return f"<b>{escape(text[2:-2])}</b>" if strong else escape(text)


def _code(text: str) -> str:
    parts = escape(text).split("`")
    return "".join(f"<code>{x}</code>" if i % 2 else x for i, x in enumerate(parts))


def _costs(line: Line) -> tuple[str, str]:
    """Time of a step, and state."""
    if math.isnan(line.step_ms):  # no training came to its end
        return "–", "–"
    peak = "" if math.isnan(line.peak) else f", {line.peak:.0f} MB on the GPU"
    return f"{line.step_ms:.1f} / {line.optimizer_ms:.1f}", f"{line.state:.2f}{peak}"


def ends(table: Table) -> list[str]:
    """How trainings ended that diverged, a sentence for each contender."""
    found = []
    for line in table.lines:
        if line.ends:
            rate = "at every rate that was tried" if line.lr is None else "on a reported seed"
            more = f", and {len(line.ends) - 1} more" if len(line.ends) > 1 else ""
            found.append(f"{line.label} diverged {rate} ({line.ends[0]}{more}).")
    return found


def _target(ratios: Mapping[int, float]) -> tuple[Interval | None, int]:
    """The geometric mean over the seeds that reached the target, and how many did not.

    None where half or more did not: a mean of the few that were lucky would look like speed.
    """
    good = [ratios[seed] for seed in sorted(ratios) if math.isfinite(ratios[seed])]
    return geometric(good) if 2 * len(good) > len(ratios) else None, len(ratios) - len(good)


def _share(ratios: Mapping[int, float]) -> str:
    found, count = _target(ratios)
    missed = f" ({count} missed)" if count else ""
    return f"–{missed}" if found is None else f"{_words(found)} ×{missed}"


def _words(found: Interval) -> str:
    return "–" if math.isnan(found.mean) else f"{found}"
