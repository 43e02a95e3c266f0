"""What length does to a model: loss on the same tokens with ever more text before them, passkeys, memory, speed."""

import dataclasses
import os
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, model_validator
from rich.progress import track

from configs.errors import ConfigError, Mistakes
from configs.kinds import LONGEST_TEXT, Name
from eval.config import EvalConfig
from eval.loading import LoadedRun
from eval.passkey import retrieve
from eval.perplexity import bits_per_byte, perplexity
from eval.plots import plain_ticks
from eval.results import Outcome
from eval.scoring import log_likelihoods
from eval.tables import Table
from eval.texts import Text, TextSource, read_text
from model.rope import Scaling
from training.device import memory_gb, synchronize
from training.plots import legend_below, new_figure, save_figure


class LongContextSuite(TextSource):
    """Loss on the same tokens with ever more of the text before them, and passkey retrieval."""

    name: Name = "long_context"
    # default: 1 to 16 times the run's seq_len
    lengths: list[Annotated[int, Field(ge=2, le=LONGEST_TEXT)]] = Field(default_factory=list)
    # tokens at the end of each window that count; null: half the least length
    scored: int | None = Field(None, ge=1, le=LONGEST_TEXT)
    windows: int = Field(32, ge=1, le=10**6)  # spread over the documents that are long enough
    scalings: list[Scaling] = Field(["none"])  # of RoPE by length / the run's seq_len, one after another
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.0, 0.25, 0.5, 0.75, 1.0])  # of the key: 0 is the start
    trials: int = Field(5, ge=0, le=10**4)  # passkeys a depth and length; 0: no retrieval

    @model_validator(mode="after")
    def _check_together(self):
        lines = [f"{key}=[]: must have at least one" for key in ("scalings", "depths") if not getattr(self, key)]
        if self.scored and self.lengths and self.scored > min(self.lengths):
            lines.append(f"scored={self.scored}: must be at most the smallest length, {min(self.lengths)}")
        if lines:
            raise Mistakes(*lines)
        return self

    def run(self, run: LoadedRun, options: EvalConfig) -> Outcome:
        sweep = sweep_of(self, run, options)
        points = {
            f"{scaling}/{length}": point
            for scaling, by_length in sweep.points.items()
            for length, point in by_length.items()
        }
        results = {f"{key}/{name}": value for key, point in points.items() for name, value in point.numbers().items()}
        stderr = {f"{key}/loss": point.stderr for key, point in points.items()}
        shown = f"{table(sweep)}\n"
        files = {".md": shown, ".png": partial(plot, sweep)}
        if any(point.passkey is not None for point in points.values()):
            files["_passkey.png"] = partial(plot_passkeys, sweep)
        return Outcome(results, stderr, details={"sweep": dataclasses.asdict(sweep)}, shown=shown, files=files)


@dataclass
class Point:
    """What one length gives under one scaling of RoPE."""

    loss: float
    stderr: float
    bits_per_byte: float
    tokens_per_second: float  # of all processes, without the passkeys
    memory_gb: float
    passkey: list[float] | None = None  # accuracy by depth; None without room for a prompt
    passkey_nats: list[float] | None = None  # mean log-probability of a key's token, by depth

    def numbers(self) -> dict[str, float]:
        """Return the numbers to report, by name."""
        found = {"loss": self.loss, "perplexity": perplexity(self.loss), "bits_per_byte": self.bits_per_byte}
        found |= {"tokens_per_second": self.tokens_per_second, "memory_gb": self.memory_gb}
        return found if self.passkey is None else found | {"passkey": float(np.mean(self.passkey))}


@dataclass
class Sweep:
    """A run over lengths: `points[scaling][length]`."""

    run: str
    trained: int
    lengths: list[int]
    scored: int
    depths: list[float]
    text: str
    points: dict[str, dict[int, Point]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"the last {self.scored} of the tokens seen, from {self.text}; trained at {self.trained}"


def sweep_of(suite: LongContextSuite, run: LoadedRun, options: EvalConfig) -> Sweep:
    """Measure every scaling at every length; up to the trained length a scaling changes nothing."""
    text = read_text(suite, run)
    text.streams = text.documents()
    lengths = lengths_for(suite, run, text)
    scored = suite.scored or min(lengths) // 2
    ends = window_ends(text, max(lengths), scored, options.limit or suite.windows)
    sweep = Sweep(run.config.run.name, run.context, lengths, scored, suite.depths, text.name)
    todo = [(scaling, length) for scaling in suite.scalings for length in lengths]
    measured: dict[tuple[str, int], Point] = {}
    try:
        for scaling, length in track(todo, "long context", transient=True, disable=not run.runtime.is_main):
            kind = scaling if length > run.context else "none"
            if (kind, length) not in measured:
                run.scale_rope(kind, length / run.context)
                batch_size = max(1, options.batch_size * run.context // length)
                point = measured[kind, length] = measure(run, text, ends, length, scored, batch_size)
                if suite.trials and (found := retrieve(run, length, suite.depths, suite.trials, batch_size)):
                    point.passkey, point.passkey_nats = (values.tolist() for values in found)
            sweep.points.setdefault(scaling, {})[length] = measured[kind, length]
    finally:
        run.scale_rope("none", None)
    return sweep


def lengths_for(suite: LongContextSuite, run: LoadedRun, text: Text) -> list[int]:
    """Return the lengths to evaluate, shortest first. ConfigError if no document is long enough."""
    longest = max(map(len, text.streams)) - 1
    lengths = sorted(set(suite.lengths)) or [run.context * 2**n for n in range(5)]
    fitting = [length for length in lengths if length <= longest]
    if not fitting or (suite.lengths and len(fitting) < len(lengths)):
        raise ConfigError(
            f"suite.lengths={lengths}: the longest document of {text.name} has {longest:,} tokens; give longer ones, "
            "as in suite.files=[books/*.txt], or shorter lengths"
        )
    return fitting


def window_ends(text: Text, longest: int, scored: int, count: int) -> list[tuple[int, int]]:
    """Return at most `count` (document, last token that counts), spread over all that have `longest` tokens before."""
    candidates = [
        (number, end)
        for number, document in enumerate(text.streams)
        for end in range(len(document) - 1, longest - 1, -scored)
    ]
    chosen = np.unique(np.linspace(0, len(candidates) - 1, min(count, len(candidates))).round().astype(int))
    return [candidates[index] for index in chosen]


def measure(
    run: LoadedRun, text: Text, ends: list[tuple[int, int]], length: int, scored: int, batch_size: int
) -> Point:
    """Return the loss of the last `scored` tokens up to each end, of which `length` are seen, and what it cost."""
    device = run.runtime.device
    windows = [text.streams[number][end - length : end + 1].tolist() for number, end in ends]
    asked = [(window[:-scored], window[-scored:]) for window in windows]
    log_likelihoods(run.model, asked[:1], length, batch_size, device)  # what is made on first use is not timed
    synchronize(device)
    reset_peak(device)
    began = time.perf_counter()
    found = log_likelihoods(run.model, asked, length, batch_size, device)
    synchronize(device)
    speed = len(asked) * length / (time.perf_counter() - began)
    losses = [-log_p / scored for log_p, _ in found]
    loss = statistics.fmean(losses)
    stderr = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
    return Point(loss, stderr, bits_per_byte(loss, text.bytes_per_token), speed, memory_gb(device))


def reset_peak(device: torch.device) -> None:
    """Forget the peak memory so far: of the GPU or, if Linux allows it, of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def table(sweep: Sweep) -> Table:
    """Return a table with a row for each length and scaling; those of the same length are below each other."""
    rows = []
    for length in sweep.lengths:
        for scaling, points in sweep.points.items():
            point = points[length]
            rows.append([
                sweep.run, scaling, f"{length:,}", f"{point.loss:.4f}", f"{point.stderr:.4f}",
                f"{perplexity(point.loss):,.2f}", "" if point.passkey is None else f"{np.mean(point.passkey):.0%}",
                f"{point.tokens_per_second:,.0f}", f"{point.memory_gb:.2f}",
            ])  # fmt: skip
    columns = ["run", "RoPE", "tokens", "loss", "±", "perplexity", "passkey", "tokens/s", "memory GB"]
    return Table(columns, rows, [sweep.title])


def plot(sweep: Sweep, path: Path) -> None:
    """Draw loss, speed and memory against the length."""
    figure, axes = new_figure(columns=3, width=5.5)
    loss, speed, memory = axes
    for scaling, points in sweep.points.items():
        values = [points[length] for length in sweep.lengths]
        look = {"marker": "o", "label": f"RoPE {scaling}"}
        errors = [point.stderr for point in values]
        loss.errorbar(sweep.lengths, [point.loss for point in values], yerr=errors, capsize=2, **look)
        speed.plot(sweep.lengths, [point.tokens_per_second for point in values], **look)
        memory.plot(sweep.lengths, [point.memory_gb for point in values], **look)
    loss.axvline(sweep.trained, color="grey", linestyle="--", linewidth=1, label=f"trained at {sweep.trained}")
    loss.set_ylabel(f"loss of the last {sweep.scored} tokens (nats a token)")
    speed.set(ylabel="tokens a second", ylim=(0, 1.1 * speed.get_ylim()[1]))
    memory.set(ylabel="peak memory (GB)", ylim=(0, 1.1 * memory.get_ylim()[1]))
    for one in axes:
        one.set(xscale="log", xlabel="tokens seen")
        plain_ticks(one.xaxis, sweep.lengths)
    legend_below(figure, loss)
    figure.suptitle(sweep.title, fontsize=10)
    save_figure(figure, path)


def plot_passkeys(sweep: Sweep, path: Path) -> None:
    """Draw passkey retrieval over depth and length: the accuracy, and below it the key's log-probability."""
    figure, axes = new_figure(columns=len(sweep.points), rows=2, width=4.8, height=3.2, grid=False, squeeze=False)
    for (top, bottom), (scaling, points) in zip(axes.T, sweep.points.items(), strict=True):
        values = [points[length] for length in sweep.lengths]
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
