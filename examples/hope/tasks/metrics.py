"""What is kept and what is lost over a stream of parts, and means with their uncertainty."""

import math
import statistics
from collections.abc import Sequence

from examples.hope.tasks.base import Better

NORMAL = 1.959964  # quantile 0.975

# Quantiles 0.975 of Student's t for 1 to 30 degrees of freedom.
STUDENT = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def continual(scores: Sequence[Sequence[float]], better: Better) -> dict[str, float]:
    """Average, backward transfer, forgetting and learning of a whole stream.

    `scores[i][j]` is the score of part j after training on part i, [parts, parts].

    - average: of all parts, at the end;
    - backward_transfer: how much the score of an earlier part changed since it was learnt; where
      lower scores are better, a loss is positive;
    - forgetting: how much worse an earlier part is than it was at its best, positive for a loss
      in either direction;
    - learning: of every part, just after it was learnt.
    """
    count = len(scores)
    if count < 2 or any(len(row) != count for row in scores):
        raise ValueError(
            f"scores have {count} rows of {[len(row) for row in scores]} columns: one row and one "
            "column for each of at least 2 parts"
        )
    if better not in ("higher", "lower"):
        raise ValueError(f"better = {better!r}: 'higher' or 'lower'")
    last, earlier = scores[-1], range(count - 1)
    best = max if better == "higher" else min
    sign = 1 if better == "higher" else -1
    lost = [best(scores[i][j] for i in earlier) - last[j] for j in earlier]
    return {
        "average": math.fsum(last) / count,
        "backward_transfer": math.fsum(last[j] - scores[j][j] for j in earlier) / (count - 1),
        "forgetting": sign * math.fsum(lost) / (count - 1),
        "learning": math.fsum(scores[j][j] for j in range(count)) / count,
    }


def forward_transfer(scores: Sequence[Sequence[float]], untrained: Sequence[float]) -> float:
    """How much earlier parts changed the score of a later one, before it was learnt itself."""
    count = len(scores)
    if count < 2 or len(untrained) != count:
        raise ValueError(f"{len(untrained)} scores of the untrained model for {count} parts")
    changes = [scores[j - 1][j] - untrained[j] for j in range(1, count)]
    return math.fsum(changes) / (count - 1)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95 % interval by Student's t."""
    freedom = len(values) - 1
    if freedom < 1:
        raise ValueError(f"an interval from {len(values)} values: at least 2 are needed")
    # The expansion about the normal quantile is good to 3e-5 there.
    far = NORMAL + 2.3723 / freedom + 2.8225 / freedom**2
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else far
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def wilson(count: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was `count` in `of` trials."""
    if not 0 <= count <= of or of < 1:
        raise ValueError(f"{count} of {of}: a count of trials, of which there is at least one")
    share, z = count / of, NORMAL
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + (z / (2 * of)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)
