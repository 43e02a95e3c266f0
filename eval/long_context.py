"""What length does to a model: loss on the same tokens with ever more text before them, passkeys, memory, speed."""

import dataclasses
import hashlib
import os
import time
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from rich.progress import track

from configs.errors import ConfigError, Mistakes
from data.loader import IGNORED
from eval import long_context_report as report
from eval.config import EvalConfig
from eval.loading import LoadedRun, load_run
from eval.long_context_report import Point, Sweep
from eval.passkey import retrieve
from eval.perplexity import bits_per_byte, perplexity
from eval.results import Outcome, save
from eval.scoring import head_at
from eval.texts import Text, TextSource, Window, read_text, share_out, stack
from model.rope import Scaling
from training import ranks
from training.device import memory_gb, synchronize


class LongContextSuite(TextSource):
    """Loss on the same tokens with ever more of the text before them, and passkey retrieval."""

    scales_rope: ClassVar[bool] = True

    name: str = "long_context"
    lengths: list[Annotated[int, Field(ge=2)]] = Field(default_factory=list)  # default: 1 to 16 times the run's seq_len
    scored: int | None = Field(None, ge=1)  # tokens at the end of each window that count; null: half the least length
    windows: int = Field(32, ge=1)  # spread over the documents that are long enough
    scalings: list[Scaling] = Field(["none"])  # of RoPE, one after another
    factor: float | None = Field(None, ge=1)  # of the scalings; null: length / the run's seq_len
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.0, 0.25, 0.5, 0.75, 1.0])  # of the key: 0 is the start
    trials: int = Field(5, ge=0)  # passkeys a depth and length; 0: no retrieval
    beside: list[str] = Field(default_factory=list)  # further runs, evaluated alike and shown next to each other

    @model_validator(mode="after")
    def _check_together(self):
        lines = [f"{key}=[]: must have at least one" for key in ("scalings", "depths") if not getattr(self, key)]
        if self.scored and self.lengths and self.scored > min(self.lengths):
            lines.append(f"scored={self.scored}: must be at most the smallest length, {min(self.lengths)}")
        if lines:
            raise Mistakes(*lines)
        return self

    def run(self, run: LoadedRun, options: EvalConfig) -> Outcome:
        """Return the sweep of the run, with those of `beside`, which are also saved in these runs' own folders."""
        sweep = sweep_of(self, run, options)
        outcome = outcome_of(sweep)
        if self.beside:
            alike = self.replace(lengths=sweep.lengths, scored=sweep.scored, beside=[])
            sweeps = [sweep]
            for folder in self.beside:
                other = load_run(folder, options.device, options.dtype)
                sweeps.append(sweep_of(alike, other, options))
                if run.runtime.is_main:
                    save(other, self.name, outcome_of(sweeps[-1]), options.limit)
            outcome.shown = report.table(sweeps)
            outcome.files |= {"_beside.md": outcome.shown, "_beside.png": partial(report.plot, sweeps)}
        return outcome


def outcome_of(sweep: Sweep) -> Outcome:
    results, stderr = {}, {}
    for scaling, points in sweep.points.items():
        for length, point in points.items():
            key = f"{scaling}/{length}"
            results |= {
                f"{key}/loss": point.loss,
                f"{key}/perplexity": perplexity(point.loss),
                f"{key}/bits_per_byte": point.bits_per_byte,
                f"{key}/tokens_per_second": point.tokens_per_second,
                f"{key}/memory_gb": point.memory_gb,
            }
            stderr[f"{key}/loss"] = point.stderr
            if point.passkey is not None:
                results[f"{key}/passkey"] = float(np.mean(point.passkey))
    table = report.table([sweep])
    files = {".md": table, ".png": partial(report.plot, [sweep])}
    if any(key.endswith("/passkey") for key in results):
        files["_passkey.png"] = partial(report.plot_passkeys, sweep)
    return Outcome(results, stderr, details={"sweep": dataclasses.asdict(sweep)}, shown=table, files=files)


def sweep_of(suite: LongContextSuite, run: LoadedRun, options: EvalConfig) -> Sweep:
    """Measure every scaling at every length; up to the trained length a scaling changes nothing."""
    text = by_document(read_text(suite, run))
    lengths = lengths_for(suite, run, text)
    scored = suite.scored or min(lengths) // 2
    ends = window_ends(text, max(lengths), scored, options.limit or suite.windows)
    tokens = np.concatenate([text.streams[number][end - scored + 1 : end + 1] for number, end in ends])
    fingerprint = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()[:16]
    sweep = Sweep(run.config.run.name, run.context, lengths, scored, suite.depths, text.name, fingerprint)
    todo = [(scaling, length) for scaling in suite.scalings for length in lengths]
    try:
        for scaling, length in track(todo, "long context", transient=True, disable=not run.runtime.is_main):
            factor = suite.factor or max(1.0, length / run.context)
            point = sweep.points.get("none", {}).get(length) if factor == 1 else None
            if point is None:
                run.scale_rope(scaling, factor)
                batch_size = max(1, options.batch_size * run.context // length)
                windows = [Window(number, end - length, end, end - scored + 1) for number, end in ends]
                point = measure(run, text, windows, batch_size)
                if suite.trials and (found := retrieve(run, length, suite.depths, suite.trials, batch_size)):
                    point.passkey, point.passkey_nats = (values.tolist() for values in found)
            sweep.points.setdefault(scaling, {})[length] = point
    finally:
        run.scale_rope("none", None)
    return sweep


def by_document(text: Text) -> Text:
    """Return the text with each document as a stream, from the end-of-text before it if that is in its shard."""
    if text.starts is None:
        return text
    documents = [
        stream[max(int(start) - 1, 0) : int(end)]
        for stream, starts in zip(text.streams, text.starts, strict=True)
        for start, end in zip(starts, [*starts[1:], len(stream)], strict=True)
    ]
    return dataclasses.replace(text, streams=documents, starts=None)


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


@torch.no_grad()
def measure(run: LoadedRun, text: Text, windows: list[Window], batch_size: int) -> Point:
    """Return the loss over windows of one length in which as many tokens count, and the time and memory it took."""
    _, begin, end, scored = windows[0]
    device, length, counted = run.runtime.device, end - begin, end - scored + 1
    sums = torch.zeros(len(windows), dtype=torch.float64)
    batches = share_out(windows, batch_size)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    with head_at(run.model, first, first):  # what is made on first use is not timed
        run.model.logits(first.expand(1, length))
    synchronize(device)
    reset_peak(device)
    began = time.perf_counter()
    for numbers in batches:
        # A rank that has no more windows takes part all the same.
        tokens, targets = stack(text, [windows[n] for n in numbers] or windows[:1], device)
        rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
        with head_at(run.model, rows, columns):
            logits = run.model.logits(tokens)
        losses = F.cross_entropy(logits.float(), targets[rows, columns], reduction="none")
        for n, loss in zip(numbers, losses.view(-1, counted).double().sum(1).tolist(), strict=False):
            sums[n] = loss
    synchronize(device)
    seconds, memory = time.perf_counter() - began, peak_gb(device)
    speed = sum(map(len, batches)) * length / seconds
    means = ranks.total(sums.to(device)).cpu().numpy() / counted
    loss = float(means.mean())
    stderr = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0
    return Point(loss, stderr, bits_per_byte(loss, text.bytes_per_token), speed, memory)


def reset_peak(device: torch.device) -> None:
    """Forget the peak memory so far: of the GPU or, if Linux allows it, of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb(device: torch.device) -> float:
    """Return the peak memory since then in GB; if it could not be forgotten, that of the whole process."""
    status = Path("/proc/self/status")
    if device.type != "cuda" and status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    return memory_gb(device)
