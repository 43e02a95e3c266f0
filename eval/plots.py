"""What the figures of evaluations need besides `training.plots`: plain ticks, and labels in free places."""

from collections.abc import Iterable
from itertools import pairwise, product

import numpy as np

# Where a label may stand next to its point, the best place first: directions, at each of the distances in points.
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
DISTANCES = (9, 18, 30)
HORIZONTAL = {1: "left", 0: "center", -1: "right"}
VERTICAL = {1: "bottom", 0: "center", -1: "top"}


def plain_ticks(axis, values: Iterable[float] = ()) -> None:
    """Write the ticks of an axis as plain numbers; with `values`, there and nowhere else."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # takes 0.2 s

    plain = FuncFormatter(lambda value, _: f"{value:,.0f}")
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(plain)
    if values := list(values):
        axis.set_major_locator(FixedLocator(values))
        axis.set_minor_locator(NullLocator())


def label_points(axes, points: dict[str, tuple[float, float]], lines: Iterable[list[tuple[float, float]]] = ()) -> None:
    """Write each name next to its (x, y), where it covers no point, none of the `lines` and no other name.

    `lines` are the corners of what else is drawn. The limits of the axes must be final.
    """
    axes.figure.draw_without_rendering()  # which decides where a point is on the page
    to_page = axes.transData.transform
    taken = [to_page(point) + corner for point in points.values() for corner in product((-6, 0, 6), repeat=2)]
    for a, b in (pair for line in lines if line for pair in pairwise(to_page(line))):
        taken.extend(a + np.linspace(0, 1, 200)[:, None] * (b - a))
    for name, point in points.items():
        tried = []
        for distance, (dx, dy) in product(DISTANCES, DIRECTIONS):
            look = {"ha": HORIZONTAL[dx], "va": VERTICAL[dy], "fontsize": 9}
            text = axes.annotate(name, point, (dx * distance, dy * distance), textcoords="offset points", **look)
            box = text.get_window_extent().padded(2)
            is_inside = axes.bbox.count_contains(box.corners()) == 4
            tried.append((not is_inside, box.count_contains(np.array(taken)), len(tried), text, box))
        *_, best, box = min(tried, key=lambda place: place[:3])
        for *_, text, _ in tried:
            if text is not best:
                text.remove()
        taken += product(np.linspace(box.x0, box.x1, 20), np.linspace(box.y0, box.y1, 5))
