"""Means over seeds and what is known about them. Every interval is Student's t at the confidence that is asked for."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean, give or take `half` at some confidence (None: one value tells nothing about its spread)."""

    mean: float
    half: float | None
    paired: bool = True  # of a difference: whether it was taken seed by seed

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    @property
    def is_clear(self) -> bool:
        """Whether there is an interval and zero is outside of it."""
        return self.half is not None and not self.low <= 0 <= self.high


def estimate(values: Sequence[float], confidence: float) -> Estimate | None:
    """Return the mean with its t interval; None if there are no values."""
    if not values:
        return None
    n, half = len(values), None
    if n > 1:
        half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(statistics.variance(values) / n)
    return Estimate(sum(values) / n, half)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float) -> Estimate | None:
    """Return ours minus theirs, both by seed; None if a side is empty.

    With the same seeds on both sides, runs with the same seed are compared (they saw the same data in the same order)
    and the interval is that of the differences. Otherwise it is Welch's for two independent samples.
    """
    if not ours or not theirs:
        return None
    if ours.keys() == theirs.keys():
        return estimate([ours[seed] - theirs[seed] for seed in sorted(ours)], confidence)
    sides, half = [list(ours.values()), list(theirs.values())], None
    if min(map(len, sides)) > 1:
        interval = stats.ttest_ind(*sides, equal_var=False).confidence_interval(confidence)
        half = float(interval.high - interval.low) / 2
    return Estimate(statistics.fmean(sides[0]) - statistics.fmean(sides[1]), half, paired=False)


def reaches(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the first x at which y falls to `target`, on straight lines between the points; None if it never does."""
    before: tuple[float, float] | None = None
    for x, y in points:
        if y <= target:
            return x if before is None else before[0] + (x - before[0]) * (before[1] - target) / (before[1] - y)
        before = (x, y)
    return None


def smooth(values: Sequence[float], share: float) -> list[float]:
    """Return a centred moving average over `share` of the values; near an end over as many as both sides have."""
    reach = round(len(values) * share / 2)
    nearest = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [statistics.fmean(values[i - near : i + near + 1]) for i, near in enumerate(nearest)]


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names that no other beats (less in one number and not more in the other), by the first number."""
    others = points.values()
    unbeaten = (n for n, (x, y) in points.items() if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in others))
    return sorted(unbeaten, key=points.get)
