"""What the figures of evaluations need besides `training.plots`: plain ticks, and labels in free places."""

from collections.abc import Iterable

import numpy as np

# Where a label may stand, in points from what it labels, the best place first.
OFFSETS = [(dx * r, dy * r) for r in (9, 18, 30) for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))]  # fmt: skip  # noqa: E501
SIDES = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}


def plain_ticks(axis, values: Iterable[float] = ()) -> None:
    """Write the ticks of an axis as plain numbers; with `values`, there and nowhere else."""
    import matplotlib.ticker as ticker

    plain = ticker.FuncFormatter(lambda value, _: f"{value:,.0f}")
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(plain)
    if values := list(values):
        axis.set_major_locator(ticker.FixedLocator(values))
        axis.set_minor_locator(ticker.NullLocator())


def label_points(axes, points: dict[str, tuple[float, float]], lines: Iterable[list[tuple[float, float]]] = ()) -> None:
    """Write each name next to its (x, y), where it covers no point, none of the `lines` and no other name.

    `lines` are corners of what else is drawn. The limits of the axes must be final.
    """
    axes.figure.canvas.draw()
    to_pixels = axes.transData.transform
    dense = np.linspace(0, 1, 200)[:, None]
    taken = [to_pixels(point) + 6 * np.array((i, j)) for point in points.values() for i in (-1, 0, 1) for j in (-1, 0, 1)]
    for line in lines:
        corners = to_pixels(line)
        taken += [place for a, b in zip(corners, corners[1:], strict=False) for place in a + dense * (b - a)]
    for name, point in points.items():
        tried = []
        for offset in OFFSETS:
            horizontal, vertical = (SIDES[int(np.sign(part))] for part in offset)
            note = axes.annotate(
                name, point, offset, textcoords="offset points", ha=horizontal[0], va=vertical[1], fontsize=9
            )
            box = note.get_window_extent().padded(2)
            inside = axes.bbox.count_contains(box.corners()) == 4
            tried.append((box.count_contains(np.array(taken)) + (0 if inside else 1000), len(tried), note, box))
        best = min(tried, key=lambda one: one[:2])
        for one in tried:
            if one is not best:
                one[2].remove()
        box = best[3]
        taken += [(x, y) for x in np.linspace(box.x0, box.x1, 20) for y in np.linspace(box.y0, box.y1, 4)]
