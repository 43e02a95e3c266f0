"""The one set-up of matplotlib: figures without a display, and each mechanism in the same colour everywhere."""

import colorsys
import hashlib
import io
from pathlib import Path

from data.files import write_atomic
from training.jsonl import read_lines

# Okabe and Ito's, and others that readers who see no red, green or blue can tell apart; dark enough for text on white.
COLOURS = {
    "mha": "#0072B2", "gqa": "#009E73", "mqa": "#000000", "mla": "#CC79A7", "t6": "#D55E00", "t6_kvonly": "#C766FE",
    "t6_shared_b": "#FC1763", "t6_third_order": "#675B3B", "t6_noncontextual_a": "#130CFE",
    "t6_noncontextual_b": "#0E027A", "t6_softmax_a": "#701105", "t6_sigmoid_a": "#560D40",
}  # fmt: skip


def colour_of(name: str) -> str:
    """Return the colour of a mechanism as "#RRGGBB"; a name that is not known always gets the same one."""
    if name in COLOURS:
        return COLOURS[name]
    digest = hashlib.sha256(name.encode()).digest()
    rgb = colorsys.hls_to_rgb(digest[0] / 256, 0.25 + 0.15 * digest[1] / 256, 0.7)
    return "#" + "".join(f"{round(255 * part):02X}" for part in rgb)


def new_figure(columns: int = 1, rows: int = 1, width: float = 7.0, height: float = 4.2, grid: bool = True, **options):
    """Return a figure and its axes, of `width` x `height` inches each, as `Figure.subplots(**options)` does."""
    import matplotlib
    from matplotlib.figure import Figure  # which draws to files and needs no backend, unlike pyplot

    style = {"axes.prop_cycle": matplotlib.cycler(color=COLOURS.values()), "axes.grid": grid, "grid.alpha": 0.3}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, **options)
    return figure, axes


def legend_below(figure, axes, **options) -> None:
    """Put the legend of `axes` under the figure, where no line crosses it; no legend without labelled lines."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", **({"fontsize": 9, "ncols": 3} | options))


def save_figure(figure, path: Path) -> None:
    """Write a figure as it is drawn, in the format of the suffix; a reader finds the old file or the whole new one."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.removeprefix("."), dpi=150)
    write_atomic(Path(path), content.getvalue())


def plot_loss(run_dir: Path, title: str, unigram_entropy: float | None = None) -> Path:
    """Draw train and validation loss against tokens, and the unigram entropy to compare with; return the file."""
    from matplotlib.ticker import EngFormatter

    lines = read_lines(run_dir / "metrics.jsonl")
    figure, axes = new_figure()
    for key, label, style in (("train/loss", "train", {"alpha": 0.7}), ("val/loss", "validation", {"marker": "o"})):
        points = [(line["tokens"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{label} ({points[-1][1]:.3f})", markersize=4, **style)
    if unigram_entropy:
        label = f"unigram entropy ({unigram_entropy:.3f})"
        axes.axhline(unigram_entropy, color="dimgrey", linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend_below(figure, axes)
    path = run_dir / "loss.png"
    save_figure(figure, path)
    return path
