"""What the pages of the small experiments share: palette pictures, and tables between markers."""

import io
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
}


def save(figure: Figure, path: Path, dpi: int = 80, colours: int = 255) -> None:
    """Save as a palette PNG, of the same bytes for equal figures and library versions; close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as raw:
        figure.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
        picture = np.asarray(Image.open(raw).convert("RGB"))
    # The most frequent colours stay as they are; softened edges take the nearest of them.
    found, where, counts = np.unique(
        picture.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    kept = found[np.argsort(-counts, kind="stable")[:colours]]
    nearest = ((found[:, None].astype(int) - kept[None]) ** 2).sum(-1).argmin(1)
    few = Image.fromarray(nearest[where].astype(np.uint8).reshape(picture.shape[:2]), "P")
    few.putpalette(kept.tobytes())
    few.save(path, optimize=True)
    plt.close(figure)


def between(page: Path, name: str, text: str) -> None:
    """Put text between the page's comments `<!-- name -->` and `<!-- /name -->`."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.read_text().partition(first)
    _, closed, after = rest.partition(last)
    if not found or not closed:
        raise ValueError(f"{page} has no pair of comments {first} and {last}")
    page.write_text(f"{before}{first}\n{text}\n{last}{after}")


def conditions() -> dict[str, str]:
    """What every record says of its run."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
    }
