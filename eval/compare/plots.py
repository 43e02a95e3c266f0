"""The plots of a comparison: a colour for each mechanism, the same in every plot."""

import textwrap
from collections import Counter
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.ticker import EngFormatter

from eval.compare.collect import Method, all_runs
from eval.compare.statistics import pareto, smooth
from eval.compare.tables import Question
from eval.plots import label_points, plain_ticks
from training.plots import colour_of, legend_below, new_figure, save_figure

MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
LIGHTEST = 0.65  # how much white the last shade of a mechanism's colour has
SMOOTHING = 0.02  # the share of a run that a point of a training curve averages over


def styles(methods: list[Method]) -> list[dict]:
    """Return colour, line style and marker of each method: the mechanism's colour, in shades if several share it."""
    sharing, seen, found = Counter(method.mechanism for method in methods), Counter(), []
    for method, marker in zip(methods, cycle(MARKERS), strict=False):
        which = seen[method.mechanism]
        seen[method.mechanism] += 1
        white = LIGHTEST * which / max(1, sharing[method.mechanism] - 1)
        colour = tuple(part + white * (1 - part) for part in to_rgb(colour_of(method.mechanism)))
        found.append({"color": colour, "linestyle": LINES[which % len(LINES)], "marker": marker})
    return found


def curves(methods: list[Method], path: Path) -> None:
    """Draw training loss (smoothed, with each run's raw behind) and validation loss (marks) against tokens and FLOPs.

    A line is the mean over a method's runs; the axis on the right is in perplexity.
    """
    figure, panels = new_figure(columns=2, width=5.6, height=4.6)
    for panel, axis in zip(panels, ("tokens", "training FLOPs"), strict=True):
        for method, style in zip(methods, styles(methods), strict=True):
            unit = 1 if axis == "tokens" else method.first.counts["training_flops_per_token"]
            for run in method.runs:
                panel.plot(*columns(run.points("train/loss"), unit), color=style["color"], alpha=0.18, linewidth=0.7)
            x, losses = columns(method.curve("train/loss"), unit)
            panel.plot(x, smooth(losses, SMOOTHING), **style | {"marker": ""}, linewidth=1.4)
            panel.plot(*columns(method.curve("val/loss"), unit), **style | {"linestyle": ""}, markersize=5)
            panel.plot([], [], **style, linewidth=1.4, markersize=5, label=method.name)
        panel.set_xlabel(axis)
        zoom(panel, methods)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_ylabel("loss (nats per token)")
    perplexity = (np.exp, lambda value: np.log(np.maximum(value, 1)))  # and back
    panels[-1].secondary_yaxis("right", functions=perplexity).set_ylabel("perplexity")
    figure.suptitle("Lines: training, smoothed over raw; marks: validation", fontsize=10)
    save(figure, panels[0], methods, path)


def columns(points: list[tuple[int, float]], unit: float) -> np.ndarray:
    """Return (tokens, value) of each point as two rows, the tokens times `unit`."""
    return (np.reshape(points, (-1, 2)) * (unit, 1)).T


def save(figure, axes, methods: list[Method], path: Path) -> None:
    """Write a figure with its legend below, in as many columns as there is room for."""
    longest = max(len(method.name) for method in methods)
    legend_below(figure, axes, ncols=max(1, min(4, len(methods), round(7 * figure.get_figwidth() / (longest + 8)))))
    save_figure(figure, path)


def zoom(panel, methods: list[Method]) -> None:
    """Leave the fall of the first tenth out of the picture: what matters comes after it."""
    runs = all_runs(methods)
    begin = 0.1 * max(run.tokens for run in runs)
    points = [point for run in runs for key in ("train/loss", "val/loss") for point in run.points(key)]
    if late := [loss for tokens, loss in points if tokens >= begin]:
        margin = 0.03 * (max(late) - min(late))
        panel.set_ylim(max(min(late) - margin, 0.97 * min(late)), max(late) + margin)


def loss_against_cache(methods: list[Method], question: Question, path: Path) -> list[str]:
    """Draw the metric against KV-cache bytes per token, with intervals; return the names on the Pareto front, in it."""
    figure, axes = new_figure(width=7, height=4.8)
    points, bars = {}, []
    for method, style in zip(methods, styles(methods), strict=True):
        if found := question.of(method):
            x = method.first.counts["kv_bytes_per_token"]
            points[method.name] = (x, found.mean)
            bars.append([(x, found.low), (x, found.high)])
            look = {"color": style["color"], "marker": style["marker"], "markersize": 8, "capsize": 4, "zorder": 3}
            axes.errorbar(x, found.mean, yerr=found.half, **look)
    front = pareto(points)
    line = [points[name] for name in front]
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), "--", color="grey", linewidth=1, label="Pareto front")
    axes.set_xscale("log")
    axes.set(xlabel="KV-cache bytes per token (bf16, all layers)", ylabel=question.label)
    ticks: list[float] = []
    for x, _ in sorted(points.values()):
        if not ticks or x > 1.2 * ticks[-1]:  # else their labels would run into each other
            ticks.append(x)
    plain_ticks(axes.xaxis, ticks)
    axes.set_title(f"{question.label} against cache\n{trained(methods, question)}", fontsize=10)
    if points:
        axes.margins(x=0.15)
        wrapped = {textwrap.fill(name, 30, break_long_words=False): point for name, point in points.items()}
        label_points(axes, wrapped, [line, *bars])
    save(figure, axes, methods, path)
    return front


def trained(methods: list[Method], question: Question) -> str:
    """Return what was trained, and on what, as far as the methods have it in common; and what the bars are."""
    configs = [method.first.config for method in methods]
    shared = ({config.size.name for config in configs}, {config.data.name for config in configs})
    words = [next(iter(names)) for names in shared if len(names) == 1]
    if question.tokens is not None:
        words.append(f"{question.tokens:,} tokens")
    if (seeds := min(len(set(method.seeds)) for method in methods)) > 1:
        words.append(f"bars: {question.confidence:.0%} t interval over {seeds} seeds")
    return ", ".join(words)
