"""Figures without a display."""

from pathlib import Path


def new_figure(columns: int = 1, width: float = 7.0, height: float = 4.2):
    """A figure and its axes (an array of them where there are several columns)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained")
    for one in [axes] if columns == 1 else axes:
        one.grid(alpha=0.3)
    return figure, axes


def save_figure(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)


def plain_ticks(axis, values) -> None:
    """Mark an axis at these values, as plain numbers, and nowhere else."""
    import matplotlib.ticker as ticker

    axis.set_major_locator(ticker.FixedLocator(list(values)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_locator(ticker.NullLocator())
