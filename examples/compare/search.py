"""Which learning rate to try next: a grid of factors √10 that grows, then halves its gaps."""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

STEP = math.sqrt(10)


def following(start: float, tried: Mapping[float, float | None], better: str) -> list[float]:
    """The rates to try next, given the scores of those that were tried (None: diverged).

    At first `start` and its neighbours. Then one beyond the edge while the best lies there, and
    else the middle, in logarithms, between the best and the better of its neighbours. What comes
    next depends on the scores alone, so that a study begun again takes the same way, and there is
    always a next one, so that all contenders have as many trials.
    """
    if not tried:
        return [rounded(start / STEP), rounded(start), rounded(start * STEP)]
    return [next(rate for rate in _wished(tried, better) if rate not in tried)]


def _wished(tried: Mapping[float, float | None], better: str) -> Iterator[float]:
    rates, best = sorted(tried), best_rate(tried, better)
    if best is None:  # all diverged
        yield rounded(rates[0] / 10)
    elif best == rates[0]:
        yield rounded(best / STEP)
    elif best == rates[-1]:
        yield rounded(best * STEP)
    else:
        place = rates.index(best)
        sides = [rates[place - 1], rates[place + 1]]
        first = best_rate({rate: tried[rate] for rate in sides}, better)
        for side in sorted(sides, key=lambda rate: rate != first):
            yield rounded(math.sqrt(best * side))
    for low, high in sorted(pairwise(rates), key=lambda gap: gap[0] / gap[1]):
        yield rounded(math.sqrt(low * high))
    factor = STEP
    while True:
        yield rounded(rates[0] / factor)
        yield rounded(rates[-1] * factor)
        factor *= STEP


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
