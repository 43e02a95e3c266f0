"""Tables and plots of sweeps over lengths, of one run or of several side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from eval.perplexity import perplexity
from eval.plots import new_figure, plain_ticks, save_figure

if TYPE_CHECKING:
    from eval.long_context import Sweep

COLUMNS = ("run", "RoPE", "tokens", "loss", "±", "perplexity", "passkey", "tokens/s", "memory GB")


def rows(sweeps: "list[Sweep]") -> list[list[str]]:
    """A row for each length: the runs and scalings of a length below each other."""
    found = []
    for length in sweeps[0].lengths:
        for sweep in sweeps:
            for scaling, points in sweep.points.items():
                point = points[length]
                found.append([
                    sweep.run, scaling, f"{length:,}", f"{point.loss:.4f}", f"{point.stderr:.4f}",
                    f"{perplexity(point.loss):,.2f}", "" if point.passkey is None else f"{np.mean(point.passkey):.0%}",
                    f"{point.tokens_per_second:,.0f}", f"{point.memory_gb:.2f}",
                ])  # fmt: skip
    return found


def title(sweeps: "list[Sweep]") -> str:
    one = sweeps[0]
    return f"the last {one.scored} of so many tokens of {one.text}; trained at {one.trained}"


def table(sweeps: "list[Sweep]") -> Table:
    shown = Table(title=title(sweeps), box=None, pad_edge=False, title_justify="left")
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("run", "RoPE") else "right", no_wrap=True)
    for row in rows(sweeps):
        shown.add_row(*row)
    return shown


def markdown(sweeps: "list[Sweep]") -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows(sweeps)]
    notes = [f"{title(sweeps)}.\n\n"]
    if len({sweep.fingerprint for sweep in sweeps}) > 1:
        notes.append("The runs have different tokenizers: their losses are not of the same tokens.\n\n")
    return "".join([*notes, *("| " + " | ".join(line) + " |\n" for line in lines)])


def plotter(sweeps: "list[Sweep]") -> Callable[[Path], None]:
    """What draws loss, speed and memory against the length."""

    def draw(path: Path) -> None:
        figure, axes = new_figure(columns=3, width=5.5)
        for sweep in sweeps:
            for scaling, points in sweep.points.items():
                label = " ".join([sweep.run] * (len(sweeps) > 1) + [f"RoPE {scaling}"])
                values = [points[length] for length in sweep.lengths]
                bars = {"yerr": [point.stderr for point in values], "capsize": 2}
                axes[0].errorbar(sweep.lengths, [point.loss for point in values], **bars, marker="o", label=label)
                axes[1].plot(sweep.lengths, [point.tokens_per_second for point in values], marker="o", label=label)
                axes[2].plot(sweep.lengths, [point.memory_gb for point in values], marker="o", label=label)
        axes[0].axvline(sweeps[0].trained, color="grey", linestyle="--", linewidth=1)
        axes[0].annotate(
            " trained", (sweeps[0].trained, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color="grey"
        )
        labels = (f"loss of the last {sweeps[0].scored} tokens (nats a token)", "tokens a second", "peak memory (GB)")
        for one, label in zip(axes, labels, strict=True):
            one.set(xscale="log", xlabel="tokens seen", ylabel=label)
            plain_ticks(one.xaxis, sweeps[0].lengths)
        axes[1].set_ylim(bottom=0)
        axes[2].set_ylim(bottom=0)
        axes[0].legend(fontsize=8)
        figure.suptitle(title(sweeps), fontsize=10)
        save_figure(figure, path)

    return draw


def heat_maps(sweep: "Sweep") -> Callable[[Path], None]:
    """What draws passkey retrieval over depth and length: accuracy, and below it the key's log-probability."""

    def draw(path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        shape = (2, len(sweep.points))
        figure, axes = plt.subplots(*shape, figsize=(1.2 + 4.2 * shape[1], 6.4), layout="constrained", squeeze=False)
        for column, (scaling, points) in enumerate(sweep.points.items()):
            for row, (name, what) in enumerate((("passkey", "accuracy"), ("passkey_nats", "nats a token of the key"))):
                blank = [np.nan] * len(sweep.depths)
                values = [getattr(points[length], name) or blank for length in sweep.lengths]
                limits = {"vmin": 0, "vmax": 1} if row == 0 else {"vmin": -8, "vmax": 0}
                one, grid = axes[row, column], np.array(values).T
                one.imshow(grid, aspect="auto", cmap="RdYlGn", **limits)
                for (y, x), value in np.ndenumerate(grid):
                    if np.isfinite(value):
                        one.text(
                            x, y, f"{value:.0%}" if row == 0 else f"{value:.1f}", ha="center", va="center", fontsize=8
                        )
                one.set_xticks(range(len(sweep.lengths)), [f"{length:,}" for length in sweep.lengths])
                one.set_yticks(range(len(sweep.depths)), [f"{depth:.0%}" for depth in sweep.depths])
                one.set(xlabel="tokens", ylabel="depth of the key", title=f"RoPE {scaling}: {what}")
            if column == shape[1] - 1:
                for row in range(2):
                    figure.colorbar(axes[row, column].images[0], ax=axes[row, column])
        figure.suptitle(f"{sweep.run}: passkey retrieval, trained at {sweep.trained}", fontsize=11)
        save_figure(figure, path)

    return draw
