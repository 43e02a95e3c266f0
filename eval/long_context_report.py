"""Sweeps over lengths, of one run or of several: what they hold, their tables and their plots."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.perplexity import perplexity
from eval.plots import plain_ticks
from eval.tables import Table
from training.plots import legend_below, new_figure, save_figure

COLUMNS = ["run", "RoPE", "tokens", "loss", "±", "perplexity", "passkey", "tokens/s", "memory GB"]


@dataclass
class Point:
    """What one length gives under one scaling of RoPE."""

    loss: float
    stderr: float
    bits_per_byte: float
    tokens_per_second: float  # of this process, without the passkeys
    memory_gb: float
    passkey: list[float] | None = None  # accuracy by depth; None without room for a prompt
    passkey_nats: list[float] | None = None  # mean log-probability of a key's token, by depth


@dataclass
class Sweep:
    """A run over lengths: `points[scaling][length]`."""

    run: str
    trained: int
    lengths: list[int]
    scored: int
    depths: list[float]
    text: str
    fingerprint: str  # of the tokens that count
    points: dict[str, dict[int, Point]] = field(default_factory=dict)


def table(sweeps: list[Sweep]) -> str:
    """Return a table with a row for each length, run and scaling; those of the same length are below each other."""
    rows = []
    for length in sweeps[0].lengths:
        for sweep in sweeps:
            for scaling, points in sweep.points.items():
                point = points[length]
                rows.append([
                    sweep.run, scaling, f"{length:,}", f"{point.loss:.4f}", f"{point.stderr:.4f}",
                    f"{perplexity(point.loss):,.2f}", "" if point.passkey is None else f"{np.mean(point.passkey):.0%}",
                    f"{point.tokens_per_second:,.0f}", f"{point.memory_gb:.2f}",
                ])  # fmt: skip
    notes = [title(sweeps[0])]
    if len({sweep.fingerprint for sweep in sweeps}) > 1:
        notes.append("The runs have different tokenizers: their losses are not of the same tokens.")
    return f"{Table(COLUMNS, rows, notes)}\n"


def title(sweep: Sweep) -> str:
    return f"the last {sweep.scored} of the tokens seen, from {sweep.text}; trained at {sweep.trained}"


def plot(sweeps: list[Sweep], path: Path) -> None:
    """Draw loss, speed and memory against the length."""
    figure, axes = new_figure(columns=3, width=5.5)
    loss, speed, memory = axes
    first = sweeps[0]
    for sweep in sweeps:
        for scaling, points in sweep.points.items():
            label = f"RoPE {scaling}" if len(sweeps) == 1 else f"{sweep.run} RoPE {scaling}"
            values = [points[length] for length in sweep.lengths]
            bars = {"yerr": [point.stderr for point in values], "capsize": 2}
            loss.errorbar(sweep.lengths, [point.loss for point in values], **bars, marker="o", label=label)
            speed.plot(sweep.lengths, [point.tokens_per_second for point in values], marker="o")
            memory.plot(sweep.lengths, [point.memory_gb for point in values], marker="o")
    loss.axvline(first.trained, color="grey", linestyle="--", linewidth=1, label=f"trained at {first.trained}")
    loss.set_ylabel(f"loss of the last {first.scored} tokens (nats a token)")
    speed.set(ylabel="tokens a second", ylim=(0, 1.1 * speed.get_ylim()[1]))
    memory.set(ylabel="peak memory (GB)", ylim=(0, 1.1 * memory.get_ylim()[1]))
    for one in axes:
        one.set(xscale="log", xlabel="tokens seen")
        plain_ticks(one.xaxis, first.lengths)
    legend_below(figure, loss)
    figure.suptitle(title(first), fontsize=10)
    save_figure(figure, path)


def plot_passkeys(sweep: Sweep, path: Path) -> None:
    """Draw passkey retrieval over depth and length: the accuracy, and below it the key's log-probability."""
    figure, axes = new_figure(columns=len(sweep.points), rows=2, width=4.8, height=3.2, grid=False, squeeze=False)
    for column, (scaling, points) in zip(axes.T, sweep.points.items(), strict=True):
        values = [points[length] for length in sweep.lengths]
        top, bottom = column
        heat_map(top, sweep, [point.passkey for point in values], "{:.0%}", vmin=0, vmax=1)
        top.set_title(f"RoPE {scaling}: accuracy")
        heat_map(bottom, sweep, [point.passkey_nats for point in values], "{:.1f}", vmin=-8, vmax=0)
        bottom.set_title(f"RoPE {scaling}: nats a token of the key")
    for last in axes[:, -1]:
        figure.colorbar(last.images[0], ax=last)
    figure.suptitle(f"{sweep.run}: passkey retrieval, trained at {sweep.trained}", fontsize=11)
    save_figure(figure, path)


def heat_map(axes, sweep: Sweep, by_length: list[list[float] | None], text: str, **limits: float) -> None:
    """Draw values by depth for each length, with their numbers formatted by `text`; None leaves a column blank."""
    blank = [np.nan] * len(sweep.depths)
    grid = np.array([values or blank for values in by_length]).T
    axes.imshow(grid, aspect="auto", cmap="cividis", **limits)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            axes.text(x, y, text.format(value), ha="center", va="center", fontsize=8, bbox=box)
    axes.set_xticks(range(len(sweep.lengths)), [f"{length:,}" for length in sweep.lengths])
    axes.set_yticks(range(len(sweep.depths)), [f"{depth:.0%}" for depth in sweep.depths])
    axes.set(xlabel="tokens", ylabel="depth of the key")
