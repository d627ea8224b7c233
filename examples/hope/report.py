"""What a run shows and leaves behind: a progress line, a JSONL log and a plot of the loss."""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e6e8ec"
TRAIN, VALID, BAD = "#3b6fb6", "#c8501e", "#b3261e"
BASELINES = ("#5b5f97", "#2f7d6b", "#8a6d1d", "#7a4b8c")

TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 16, 32, 64)


class Progress:
    """One line on stderr, redrawn on a terminal; elsewhere a new line every `interval` seconds."""

    def __init__(
        self,
        total: int,
        tokens_per_step: int,
        start: int = 0,
        *,
        stream: TextIO | None = None,
        interval: float = 10.0,
        units: tuple[str, str] = ("bits/byte", "tokens/s"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.start, self.tokens_per_step = total, start, tokens_per_step
        self._cost, self._rate = units
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = 0.1 if self._terminal else interval
        self._clock = clock
        self._begun = self._drawn = clock()
        self._line = ""

    def update(self, step: int, loss: float | None = None, note: str = "") -> None:
        """Show that `step` steps are done, with the latest loss, and a note at the end."""
        now = self._clock()
        self._line = self._format(step, loss, now - self._begun) + (note and f"  {note}")
        if now - self._drawn >= self._interval or step >= self.total:
            self._drawn = now
            self._draw()

    def write(self, text: str) -> None:
        """Print a line of its own above the bar."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
        if self._terminal:
            self._draw()
        self._stream.flush()

    def close(self) -> None:
        """Leave the last state on the screen and move to the next line."""
        if self._terminal and self._line:
            self._draw()
            self._stream.write("\n")
            self._stream.flush()

    def _draw(self) -> None:
        if self._terminal:
            # One column stays free: a full row makes some terminals wrap.
            line = self._line[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"\r\x1b[K{line}")
        else:
            self._stream.write(self._line + "\n")
        self._stream.flush()

    def _format(self, step: int, loss: float | None, elapsed: float) -> str:
        done = step - self.start  # of this process: a resumed run starts above 0
        rate = done * self.tokens_per_step / elapsed if elapsed > 0 else 0.0
        speed = f"{rate:,.0f}" if rate >= 20 else f"{rate:.1f}"
        left = (self.total - step) * elapsed / done if done > 0 else math.nan
        filled = round(20 * min(step / max(self.total, 1), 1))
        cost = "" if loss is None else f"  {loss:.3f} {self._cost}"
        return (
            f"{step:>{len(str(self.total))}}/{self.total} [{'=' * filled:<20}]{cost}"
            f"  {speed} {self._rate}  {_time(elapsed)} elapsed  {_time(left)} left"
        )


class Log:
    """Rows of a run, one JSON object a line, on disk as soon as they are written.

    A new log replaces the file. With `resume`, the step of a checkpoint, the rows up to that step
    are kept and everything from the first later one is cut off, as is a line left unfinished.
    """

    def __init__(self, path: str | Path, resume: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume is None:
            self.path.write_bytes(b"")
        elif self.path.exists():
            _truncate(self.path, resume)

    def write(self, row: dict[str, Any]) -> None:
        """Append `row`; NaN and infinity, which JSON lacks, become null, with status "diverged"."""
        constants: list[str] = []  # append returns None, which is what NaN becomes
        clean = json.loads(json.dumps(row), parse_constant=constants.append)
        if constants:
            clean["status"] = "diverged"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log, without a last line that was left unfinished."""
    return [row for row, _ in _rows(Path(path))]


def plot(jsonl_path: str | Path, png_path: str | Path, baselines: dict[str, float]) -> None:
    """Draw the loss in bits per byte against steps, with validation points and baselines.

    Rows with `step` and `train` or `valid` are points; `corpus`, `optimizer` and `params` of any
    row make the title.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install matplotlib") from error

    rows = read(jsonl_path)
    train, valid = _points(rows, "train"), _points(rows, "valid")
    if not train and not valid:
        raise ValueError(f"{str(jsonl_path)!r} holds no finite losses to plot")
    figure = Figure(figsize=(9, 5.6), dpi=100, facecolor="white")
    axes = figure.add_axes((0.075, 0.115, 0.72 if baselines else 0.89, 0.69))

    # Logarithmic, so that the fall from 8 bits and the last tenths can both be read.
    axes.set_yscale("log")
    values = [loss for _, loss in train + valid] + list(baselines.values())
    low, high = max(min(values), 0.01) / 1.06, max(*values, 0.02) * 1.06
    axes.set_ylim(low, high)
    axes.yaxis.set_minor_locator(NullLocator())
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks) if len(ticks) > 3 else MaxNLocator(6))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")

    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=TRAIN, linewidth=1.8, label="training, smoothed")
    if valid:
        label = f"validation, last {valid[-1][1]:.3f}"
        style = {"marker": "o", "markersize": 5, "markeredgecolor": "white", "zorder": 3}
        axes.plot(*zip(*valid, strict=True), color=VALID, linewidth=1.2, label=label, **style)
    diverged = [row["step"] for row in rows if row.get("status") == "diverged" and "step" in row]
    if diverged:
        axes.axvline(diverged[0], color=BAD, linewidth=1.5, label=f"diverged, step {diverged[0]}")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _label_baselines(axes, baselines)

    info = {key: value for row in rows for key, value in row.items()}
    size = f"{info['params']:,} parameters" if "params" in info else None
    parts = [str(part) for part in (info.get("corpus"), info.get("optimizer"), size) if part]
    figure.text(0.03, 0.94, "Loss in bits per byte", fontsize=14, weight="bold", color=INK)
    title = "  ·  ".join(parts)
    figure.text(0.03, 0.89, title, fontsize=10.5, color=MUTED, parse_math=False)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("bits per byte (logarithmic)", color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=MUTED)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=3, frameon=False, labelcolor=INK)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, format="png")


def _label_baselines(axes: Any, baselines: dict[str, float]) -> None:
    """Dashed lines, named in the right margin at their height or just below the one above."""
    top = math.inf
    named = sorted(baselines.items(), key=lambda item: -item[1])
    for index, (name, value) in enumerate(named):
        color = BASELINES[index % len(BASELINES)]
        axes.axhline(value, color=color, linestyle=(0, (5, 3)), linewidth=1.3)
        height = axes.transAxes.inverted().transform(axes.transData.transform((0, value)))[1]
        top = min(height, top - 0.05)
        axes.text(
            *(1.015, top, f"{name}  {value:.2f}"),
            transform=axes.transAxes,
            color=color,
            fontsize=9.5,
            va="center",
        )


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if "step" in row and row.get(key) is not None]


def smooth(values: tuple[float, ...]) -> list[float]:
    """Means of about 1/50 of the curve, centred, and narrower towards both ends."""
    smooth = []
    for i in range(len(values)):
        half = min(len(values) // 100, i, len(values) - 1 - i)
        part = values[i - half : i + half + 1]
        smooth.append(sum(part) / len(part))
    return smooth


def _rows(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Every finished row of a log with the offset at which it ends."""
    rows, end = [], 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {line[:60]!r}") from error
        end += len(line)
        rows.append((row, end))
    return rows


def _truncate(path: Path, step: int) -> None:
    kept = 0
    for row, end in _rows(path):
        if row.get("step", -1) > step:
            break
        kept = end
    with path.open("r+b") as file:
        file.truncate(kept)


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
