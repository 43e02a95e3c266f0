"""Means over seeds and what is known about them. Every interval is Student's t at the confidence that is asked for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values, give or take `half` at some confidence (None: one value tells nothing about its spread)."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference of two methods; `paired` where it was taken seed by seed."""

    paired: bool

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and not self.low <= 0 <= self.high


def variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def estimate(values: Sequence[float], confidence: float) -> Estimate | None:
    """The mean with its t interval; None of no values."""
    if not values:
        return None
    n, half = len(values), None
    if n > 1:
        half = float(student.ppf((1 + confidence) / 2, n - 1)) * math.sqrt(variance(values) / n)
    return Estimate(sum(values) / n, half, n)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float) -> Difference | None:
    """Ours minus theirs, both by seed.

    Where the seeds are the same, runs with the same seed are compared (they saw the same data in the same order) and
    the interval is that of the differences. Else it is Welch's for two independent samples. None where a side is empty.
    """
    if not ours or not theirs:
        return None
    if ours.keys() == theirs.keys():
        found = estimate([ours[seed] - theirs[seed] for seed in sorted(ours)], confidence)
        return Difference(found.mean, found.half, found.n, paired=True)
    a, b = list(ours.values()), list(theirs.values())
    mean, half = sum(a) / len(a) - sum(b) / len(b), None
    if len(a) > 1 and len(b) > 1:
        squares = [variance(values) / len(values) for values in (a, b)]
        if sum(squares) > 0:
            freedom = sum(squares) ** 2 / sum(
                s**2 / (len(values) - 1) for s, values in zip(squares, (a, b), strict=True)
            )
            half = float(student.ppf((1 + confidence) / 2, freedom)) * math.sqrt(sum(squares))
        else:
            half = 0.0
    return Difference(mean, half, min(len(a), len(b)), paired=False)


def reaches(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The first x at which y falls to `target`, on straight lines between the points; None where it never does."""
    for number, (x, y) in enumerate(points):
        if y <= target:
            if number == 0:
                return x
            before_x, before_y = points[number - 1]
            return before_x + (x - before_x) * (before_y - target) / (before_y - y)
    return None


def smooth(values: Sequence[float], share: float) -> list[float]:
    """A moving average over `share` of the values, centred; at the ends over what there is on both sides."""
    reach = round(len(values) * share / 2)
    out = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        out.append(sum(values[i - near : i + near + 1]) / (2 * near + 1))
    return out


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other beats: less in one of the two numbers and not more in the other; by the first number."""
    front = [
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    ]
    return sorted(front, key=lambda name: points[name])
