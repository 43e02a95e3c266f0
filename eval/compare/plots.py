"""The plots of a comparison: a colour for each mechanism, the same in every plot."""

import math
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from matplotlib.colors import to_rgb
from matplotlib.ticker import EngFormatter

from eval.compare.collect import Method, Run
from eval.compare.statistics import pareto, smooth
from eval.compare.tables import Question
from eval.plots import label_points, plain_ticks
from training.plots import colour_of, legend_below, new_figure, save_figure

MARKERS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
LIGHTEST = 0.65  # how much white the last shade of a mechanism's colour has
# What a curve is drawn against: a run's number of tokens, and what follows from it (None: not known).
AXES: dict[str, Callable[[Run, int], float | None]] = {
    "tokens": lambda run, tokens: tokens,
    "training FLOPs": lambda run, tokens: tokens * run.counts["training_flops_per_token"],
    "training time (minutes)": lambda run, tokens: run.seconds[tokens] / 60 if tokens in run.seconds else None,
}


def styles(methods: list[Method]) -> list[dict]:
    """Return colour, line style and marker of each method: the mechanism's colour, in shades if several share it."""
    sharing, seen, found = Counter(method.mechanism for method in methods), Counter(), []
    for number, method in enumerate(methods):
        which = seen[method.mechanism]
        seen[method.mechanism] += 1
        white = LIGHTEST * which / max(1, sharing[method.mechanism] - 1)
        colour = tuple(part + white * (1 - part) for part in to_rgb(colour_of(method.mechanism)))
        found.append({
            "color": colour, "linestyle": LINES[which % len(LINES)], "marker": MARKERS[number % len(MARKERS)]
        })  # fmt: skip
    return found


def curves(methods: list[Method], share: float, path: Path, time: bool = False, perplexity: bool = False) -> None:
    """Draw training loss (smoothed, with each run's raw behind) and validation loss (marks) against each axis.

    A line is the mean over a method's runs; against time, at which runs have different points, each has its own.
    """
    shown = (lambda loss: math.exp(min(loss, 50))) if perplexity else (lambda loss: loss)
    axes = list(AXES) if time else ["tokens", "training FLOPs"]
    figure, panels = new_figure(columns=len(axes), width=5.6, height=4.6)

    def draw(panel, axis: str, run: Run, points: list[tuple[int, float]], **style) -> None:
        placed = [
            (x, shown(y)) for x, y in ((AXES[axis](run, tokens), value) for tokens, value in points) if x is not None
        ]
        panel.plot([x for x, _ in placed], [y for _, y in placed], **style)

    for panel, axis in zip(panels, axes, strict=True):
        by_time = axis.startswith("training time")
        for method, style in zip(methods, styles(methods), strict=True):
            panel.plot([], [], **style, linewidth=1.4, markersize=5, label=method.name)
            for run in method.runs:
                draw(panel, axis, run, run.points("train/loss"), color=style["color"], alpha=0.18, linewidth=0.7)
            for run in method.runs if by_time else [method.first]:
                points = run.points if by_time else method.curve
                trained = points("train/loss")
                smoothed = zip((x for x, _ in trained), smooth([y for _, y in trained], share), strict=True)
                draw(panel, axis, run, smoothed, **style | {"marker": ""}, linewidth=1.4)
                draw(panel, axis, run, points("val/loss"), **style | {"linestyle": ""}, markersize=5)
        panel.set_xlabel(axis)
        zoom(panel, methods, shown)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if perplexity:
            panel.set_yscale("log")
            plain_ticks(panel.yaxis)
    panels[0].set_ylabel("perplexity" if perplexity else "loss (nats per token)")
    add_legend(figure, panels[0], methods)
    figure.suptitle("Lines: training, smoothed over raw; marks: validation", fontsize=10)
    save_figure(figure, path)


def add_legend(figure, axes, methods: list[Method]) -> None:
    longest = max(len(method.name) for method in methods)
    legend_below(figure, axes, ncols=max(1, min(4, len(methods), round(7 * figure.get_figwidth() / (longest + 8)))))


def zoom(panel, methods: list[Method], shown: Callable[[float], float]) -> None:
    """Leave the fall of the first tenth out of the picture: what matters comes after it."""
    runs = [run for method in methods for run in method.runs]
    begin = 0.1 * max(run.tokens for run in runs)
    points = [point for run in runs for key in ("train/loss", "val/loss") for point in run.points(key)]
    late = [shown(value) for tokens, value in points if tokens >= begin]
    if late:
        margin = 0.03 * (max(late) - min(late))
        panel.set_ylim(max(min(late) - margin, 0.97 * min(late)), max(late) + margin)


def loss_against_cache(methods: list[Method], question: Question, path: Path) -> list[str]:
    """Draw the metric against KV-cache bytes per token, with intervals; return the names on the Pareto front, in it."""
    found = {
        method.name: (method, style, question.of(method))
        for method, style in zip(methods, styles(methods), strict=True)
    }
    found = {name: one for name, one in found.items() if one[2] is not None}
    points = {name: (one[0].first.counts["kv_bytes_per_token"], one[2].mean) for name, one in found.items()}
    front = pareto(points)
    figure, axes = new_figure(width=7, height=4.8)
    for name, (_, style, estimate) in found.items():
        look = {"color": style["color"], "marker": style["marker"], "markersize": 8, "capsize": 4, "zorder": 3}
        axes.errorbar(*points[name], yerr=estimate.half, **look)
    line = [points[name] for name in front]
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), "--", color="grey", linewidth=1, label="Pareto front")
    axes.set_xscale("log")
    axes.set(xlabel="KV-cache bytes per token (bf16, all layers)", ylabel=question.label)
    plain_ticks(axes.xaxis, apart(sorted(x for x, _ in points.values())))
    if points:
        axes.margins(x=0.15)
    axes.set_title(f"{question.label} against cache\n{trained(methods, question)}", fontsize=10)
    add_legend(figure, axes, methods)
    if points:
        bars = [[(points[name][0], one[2].low), (points[name][0], one[2].high)] for name, one in found.items()]
        wrapped = {textwrap.fill(name, 30, break_long_words=False): point for name, point in points.items()}
        label_points(axes, wrapped, [line, *bars])
    save_figure(figure, path)
    return front


def apart(ticks: list[float]) -> list[float]:
    """Return those ticks of a logarithmic axis whose labels do not run into each other."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick > 1.2 * kept[-1]:
            kept.append(tick)
    return kept


def trained(methods: list[Method], question: Question) -> str:
    """Return what was trained, and on what, as far as the methods have it in common; and what the bars are."""
    configs = [method.first.config for method in methods]
    shared = ({config.size.name for config in configs}, {config.data.name for config in configs})
    words = [next(iter(names)) for names in shared if len(names) == 1]
    if question.tokens is not None:
        words.append(f"{question.tokens:,} tokens")
    seeds = min(len(set(method.seeds)) for method in methods)
    if seeds > 1:
        words.append(f"bars: {question.confidence:.0%} t interval over {seeds} seeds")
    return ", ".join(words)


def gradient_norms(methods: list[Method], path: Path) -> None:
    """Draw gradient norms before clipping, of every run of every method."""
    figure, axes = new_figure(width=7, height=4)
    for method, style in zip(methods, styles(methods), strict=True):
        for run in method.runs:
            points = run.points("optim/grad_norm")
            label = method.name if run is method.first else None
            look = {"color": style["color"], "linestyle": style["linestyle"], "alpha": 0.8, "linewidth": 0.9}
            axes.plot([x for x, _ in points], [y for _, y in points], label=label, **look)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="tokens", ylabel="gradient norm before clipping")
    add_legend(figure, axes, methods)
    save_figure(figure, path)
