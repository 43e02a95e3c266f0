"""Plots of the decoding benchmark: time a step over the cache's length, the paper's curves beside where it has them."""

from pathlib import Path

# Milliseconds a step of one layer's attention in Figure 5 of arXiv 2501.06425 (d_model 2048, 32 heads of 64, ranks
# 16/1/1, 4 groups), read off the figure. Its card is not named; its axis says seconds, and milliseconds is what fits.
PUBLISHED_LENGTHS = (2**12, 2**16, 2**19)
PUBLISHED = {
    1: {
        "mha": (0.026, 0.189, 1.44), "mqa": (0.017, 0.043, 0.083), "gqa": (0.018, 0.047, 0.191),
        "mla": (0.021, 0.047, 0.194), "t6": (0.025, 0.033, 0.129),
    },
    16: {
        "mha": (0.304, 4.96, 39.2), "mqa": (0.023, 0.100, 0.697), "gqa": (0.036, 0.357, 3.24),
        "mla": (0.041, 0.367, 3.49), "t6": (0.033, 0.241, 2.07),
    },
}  # fmt: skip


def plot_decoding(lines: list[dict], folder: Path) -> list[Path]:
    """A picture for every size and scope, with a panel for every batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    for size, scope in sorted({(line["size"], line["scope"]) for line in lines}):
        chosen = [line for line in lines if (line["size"], line["scope"]) == (size, scope)]
        batches = sorted({line["batch"] for line in chosen})
        figure, panels = plt.subplots(
            1, len(batches), figsize=(2 + 5 * len(batches), 4.6), layout="constrained", squeeze=False, sharey=True
        )
        names = sorted({(line["model"], line["core"]) for line in chosen})
        models = sorted({model for model, _ in names})
        for batch, axes in zip(batches, panels[0], strict=True):
            for model, core in names:
                points = sorted(
                    (line["length"], line["ms"], line["floor_ms"])
                    for line in chosen
                    if (line["model"], line["core"], line["batch"]) == (model, core, batch)
                )
                lengths, times, floors = zip(*points, strict=True) if points else ((), (), ())
                color = f"C{models.index(model)}"
                style = "--" if "cached" in core else "-"
                label = f"{model}, {core}" if model.startswith("t6") else model
                axes.plot(lengths, times, style, marker="o", markersize=4, color=color, label=label)
                axes.plot(lengths, floors, ":", linewidth=1, color=color)
            if size == "paper_2048" and scope == "attention":
                for model, times in PUBLISHED.get(batch, {}).items():
                    if model in models:
                        color = f"C{models.index(model)}"
                        axes.plot(PUBLISHED_LENGTHS, times, "x", color=color, alpha=0.6, label=f"{model}, published")
            axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", title=f"batch {batch}")
            axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(base=2, numticks=12))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k")
            axes.grid(alpha=0.3, which="both")
        panels[0][0].set_ylabel("ms a step (dotted: bytes / copy bandwidth)")
        panels[0][0].legend(fontsize=8)
        first = chosen[0]
        what = "one layer's attention" if scope == "attention" else "the whole model"
        figure.suptitle(f"{size}, {what}, {first['dtype']}, {first['device']}", fontsize=11)
        path = folder / f"decoding_{size}_{scope}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        paths.append(path)
    return paths
