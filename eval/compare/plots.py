"""The plots of a comparison: one colour a method, in every plot the same."""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path

from eval.compare.collect import Method, Run
from eval.compare.statistics import pareto, smooth
from eval.compare.tables import Question
from eval.plots import new_figure, save_figure

# Okabe and Ito's colours, which colour-blind readers can tell apart, and three more.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F", "#BCBD22")
MARKERS = "osD^vPX*<>"

TIME_UNITS = (("s", 1, 300), ("minutes", 60, 7200), ("hours", 3600, math.inf))  # and up to how many seconds

Axis = tuple[str, Callable[[Run, int], float | None]]


def axes_for(methods: list[Method]) -> list[Axis]:
    """Tokens, operations, and time in the unit that suits the longest run."""
    longest = max((seconds for method in methods for run in method.runs for seconds in run.seconds.values()), default=0)
    unit, length = next((u, n) for u, n, up_to in TIME_UNITS if longest < up_to)
    return [
        ("tokens", lambda run, tokens: tokens),
        ("training FLOPs", lambda run, tokens: tokens * run.counts["training_flops_per_token"]),
        (
            f"training time ({unit})",
            lambda run, tokens: run.seconds[tokens] / length if tokens in run.seconds else None,
        ),
    ]


def style(number: int) -> dict:
    return {"color": COLORS[number % len(COLORS)]}


def curves(methods: list[Method], share: float, path: Path, perplexity: bool = False) -> None:
    """Training loss (smoothed, each run's raw behind) and validation loss (marks) against tokens, FLOPs and time.

    A line is the mean over a method's runs; against time, where runs have different points, each run has its own.
    """
    shown = (lambda y: math.exp(min(y, 50))) if perplexity else (lambda y: y)
    axes = axes_for(methods)
    figure, panels = new_figure(columns=len(axes), width=5.6, height=4.6)
    for panel, (label, place) in zip(panels, axes, strict=True):
        by_time = label.startswith("training time")
        for number, method in enumerate(methods):
            color = style(number)
            for run in method.runs:
                raw = placed(run, run.points("train/loss"), place)
                panel.plot(*columns(raw, shown), **color, alpha=0.18, linewidth=0.7)
                if by_time:
                    draw_smooth(panel, raw, share, shown, color, method.name if run is method.first else None)
                    held_out = placed(run, run.points("val/loss"), place)
                    panel.plot(
                        *columns(held_out, shown), **color, marker=MARKERS[number % 10], linestyle="", markersize=5
                    )
            if not by_time:
                mean = placed(method.first, method.curve("train/loss"), place)
                draw_smooth(panel, mean, share, shown, color, method.name)
                held_out = placed(method.first, method.curve("val/loss"), place)
                panel.plot(*columns(held_out, shown), **color, marker=MARKERS[number % 10], linestyle="", markersize=5)
        panel.set_xlabel(label)
        zoom(panel, methods, shown)
        if not by_time:
            import matplotlib.ticker as ticker

            panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    panels[0].set_ylabel("perplexity" if perplexity else "loss (nats a token)")
    if perplexity:
        for panel in panels:
            panel.set_yscale("log")
            plain_log(panel.yaxis)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        panels[0].legend(handles, labels, fontsize=8)
    figure.suptitle("Lines: training, smoothed over raw; marks: validation", fontsize=10)
    save_figure(figure, path)


def draw_smooth(panel, points, share: float, shown, color: dict, label: str | None) -> None:
    smoothed = smooth([y for _, y in points], share)
    panel.plot(
        *columns(list(zip((x for x, _ in points), smoothed, strict=True)), shown), **color, linewidth=1.4, label=label
    )


def placed(run: Run, points, place) -> list[tuple[float, float]]:
    found = ((place(run, tokens), value) for tokens, value in points)
    return [(x, y) for x, y in found if x is not None]


def columns(points, shown) -> tuple[list, list]:
    return [x for x, _ in points], [shown(y) for _, y in points]


def zoom(panel, methods: list[Method], shown) -> None:
    """Leave the fall of the first tenth out of the picture: what matters comes after it."""
    ends = [run.tokens for method in methods for run in method.runs]
    late = [
        value
        for method in methods
        for run in method.runs
        for key in ("train/loss", "val/loss")
        for tokens, value in run.points(key)
        if tokens >= 0.1 * max(ends)
    ]
    if late:
        low, high = shown(min(late)), shown(max(late))
        margin = 0.03 * (high - low)
        panel.set_ylim(max(low - margin, 0.97 * low), high + margin)


def plain_log(axis) -> None:
    import matplotlib.ticker as ticker

    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))


def loss_against_cache(methods: list[Method], question: Question, path: Path) -> list[str]:
    """The metric against KV-cache bytes a token, with intervals; the names on the Pareto front, which is drawn."""
    figure, axes = new_figure(width=7, height=4.8)
    found = {method.name: question.of(method) for method in methods}
    points = {
        method.name: (method.first.counts["kv_bytes_per_token"], found[method.name].mean)
        for method in methods
        if found[method.name] is not None
    }
    for number, method in enumerate(methods):
        if method.name not in points:
            continue
        x, y = points[method.name]
        marks = {"marker": MARKERS[number % 10], "markersize": 8, "linestyle": "", "capsize": 4, "zorder": 3}
        axes.errorbar(x, y, yerr=found[method.name].half, **marks, **style(number))
        crowded = any(x < other <= 1.15 * x for other, _ in points.values())  # then the label goes to the left
        side = {"xytext": (-9, 4), "ha": "right"} if crowded else {"xytext": (9, 4)}
        name = textwrap.fill(method.name, 30, break_long_words=False)
        axes.annotate(name, (x, y), textcoords="offset points", fontsize=9, **side, **style(number))
    front = pareto(points)
    axes.plot(
        [points[name][0] for name in front],
        [points[name][1] for name in front],
        color="grey",
        linestyle="--",
        linewidth=1,
        label="Pareto front",
    )
    axes.set_xscale("log")
    ticks = sorted({x for x, _ in points.values()})
    from eval.plots import plain_ticks

    plain_ticks(axes.xaxis, apart(ticks))
    axes.set(xlabel="KV-cache bytes a token (bf16, all layers)", ylabel=question.label)
    if ticks:
        axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.5)
    axes.legend(fontsize=8)
    axes.set_title(f"{question.label} against cache" + interval_note(found, question.confidence), fontsize=10)
    save_figure(figure, path)
    return front


def apart(ticks: list[float]) -> list[float]:
    """Those ticks of a logarithmic axis whose labels don't run into each other."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick / kept[-1] > 1.15:
            kept.append(tick)
    return kept


def interval_note(found, confidence: float) -> str:
    n = {estimate.n for estimate in found.values() if estimate}
    return f"; bars: {confidence:.0%} t interval over {min(n)} seeds" if n and min(n) > 1 else ""


def gradient_norms(methods: list[Method], share: float, path: Path) -> None:
    """Gradient norms before clipping, every run of every method."""
    figure, axes = new_figure(width=7, height=4)
    for number, method in enumerate(methods):
        for run in method.runs:
            points = run.points("optim/grad_norm")
            label = method.name if run is method.first else None
            axes.plot(*columns(points, lambda y: y), **style(number), alpha=0.8, linewidth=0.9, label=label)
    import matplotlib.ticker as ticker

    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.set(xlabel="tokens", ylabel="gradient norm before clipping")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, ncols=2 if all(len(method.name) < 30 for method in methods) else 1)
    save_figure(figure, path)
