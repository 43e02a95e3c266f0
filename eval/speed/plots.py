"""Plots of the decoding benchmark: time a step over the cache's length, with the paper's curves if it has them."""

from pathlib import Path

from matplotlib.ticker import NullLocator

from eval import published
from training.plots import colour_of, legend_below, new_figure, save_figure

PAPER_SIZE = "paper_2048"  # Figure 5 of arXiv 2501.06425: 32 heads of 64, ranks 16/1/1, 4 groups; its card is not named


def plot_decoding(lines: list[dict], folder: Path) -> list[Path]:
    """Draw a picture for every size and scope, with a panel for every batch, and return their paths."""
    paths = []
    for size, scope in sorted({(line["size"], line["scope"]) for line in lines}):
        chosen = [line for line in lines if (line["size"], line["scope"]) == (size, scope)]
        batches = sorted({line["batch"] for line in chosen})
        figure, panels = new_figure(columns=len(batches), width=5.4, height=4.8, sharey=True, squeeze=False)
        for batch, axes in zip(batches, panels[0], strict=True):
            draw(axes, [line for line in chosen if line["batch"] == batch])
            if (size, scope) == (PAPER_SIZE, "attention"):
                draw_published(axes, batch, {line["model"] for line in chosen})
            axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", title=f"batch {batch}")
            lengths = sorted({line["length"] for line in chosen})
            axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
            axes.xaxis.set_minor_locator(NullLocator())
        panels[0][0].set_ylabel("ms per step")
        legend_below(figure, panels[0][0])
        what = "one layer's attention" if scope == "attention" else "the whole model"
        notes = f"{size}, {what}, {chosen[0]['dtype']}, {chosen[0]['device']}; dotted: bytes / copy bandwidth"
        figure.suptitle(notes, fontsize=10)
        paths.append(folder / f"decoding_{size}_{scope}.png")
        save_figure(figure, paths[-1])
    return paths


def draw(axes, lines: list[dict]) -> None:
    """Draw a curve and its floor for each contestant: dashed if it is not the first one of its mechanism."""
    curves: dict[str, dict[str, list]] = {}
    for line in lines:
        way = f"fold {line['fold']}" if line["fold"] else f"{line['cached']} cached"
        point = (line["length"], line["ms"], line["floor_ms"])
        curves.setdefault(line["model"], {}).setdefault(way, []).append(point)
    for model, ways in curves.items():
        for number, (way, points) in enumerate(ways.items()):
            lengths, times, floors = zip(*sorted(points), strict=True)
            label = model if len(ways) == 1 else f"{model} ({way})"
            style = {"color": colour_of(model), "linestyle": ("-", "--", "-.")[number % 3]}
            axes.plot(lengths, times, marker="o", markersize=4, label=label, **style)
            axes.plot(lengths, floors, ":", linewidth=1, color=colour_of(model))


def draw_published(axes, batch: int, models: set[str]) -> None:
    rows = [row for row in published.DECODING if row["batch"] == batch]
    for model, name in published.NAMES.items():
        if model in models and rows and name in rows[0]:
            look = {"color": colour_of(model), "linestyle": "", "marker": "x", "alpha": 0.7}
            axes.plot([row["length"] for row in rows], [row[name] for row in rows], label=f"{model}, published", **look)
