"""Which learning rate to try next: a grid of factors √10 that grows, then halves its gaps."""

import math
from collections.abc import Mapping

STEP = math.sqrt(10)


def following(start: float, tried: Mapping[float, float | None], better: str) -> list[float]:
    """The rates to try next, given the scores of those that were tried (None: diverged).

    At first `start` and its neighbours. Then one beyond the edge while the best lies there, and
    else the middle, in logarithms, between the best and the better of its neighbours. What comes
    next depends on the scores alone, so that a study begun again takes the same way.
    """
    if not tried:
        return [rounded(start / STEP), rounded(start), rounded(start * STEP)]
    rates, best = sorted(tried), best_rate(tried, better)
    if best is None:  # all diverged
        return [rounded(rates[0] / 10)]
    place = rates.index(best)
    if place == 0:
        return [rounded(best / STEP)]
    if place == len(rates) - 1:
        return [rounded(best * STEP)]
    left, right = rates[place - 1], rates[place + 1]
    side = best_rate({left: tried[left], right: tried[right]}, better) or left
    return [rounded(math.sqrt(best * side))]


def best_rate(tried: Mapping[float, float | None], better: str) -> float | None:
    """The rate with the best score, the lower of equals; None if all diverged."""
    sign = 1.0 if better == "lower" else -1.0
    good = {rate: sign * score for rate, score in tried.items() if score is not None}
    return min(sorted(good), key=lambda rate: good[rate]) if good else None


def at_edge(tried: Mapping[float, float | None], better: str) -> bool:
    """Whether a better rate may lie beyond those tried."""
    best = best_rate(tried, better)
    return best is None or best in (min(tried), max(tried))


def rounded(rate: float) -> float:
    """Two digits: a rate is written as it is used, and 0.0032 · √10 is 0.01 again."""
    return float(f"{rate:.2g}")
