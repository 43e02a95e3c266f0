"""What length does to a model: loss on the same tokens with ever more text before them, passkeys, memory, speed."""

import dataclasses
import hashlib
import os
import time
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from rich.progress import track

from configs.errors import ConfigError, Mistakes
from eval import long_context_report as report
from eval.config import EvalConfig
from eval.loading import LoadedRun, load_run
from eval.long_context_report import Point, Sweep
from eval.passkey import retrieve
from eval.perplexity import bits_per_byte, perplexity
from eval.results import Outcome, save
from eval.scoring import head_at
from eval.texts import Text, TextSource, read_text
from model.rope import SCALINGS
from training import ranks
from training.device import memory_gb, synchronize


class LongContextSuite(TextSource):
    """Loss on the same tokens with ever more of the text before them, and passkey retrieval."""

    scales_rope: ClassVar[bool] = True

    name: str = "long_context"
    lengths: list[Annotated[int, Field(ge=2)]] = []  # default: 1, 2, 4, 8 and 16 times the run's seq_len
    scored: int | None = Field(None, ge=1)  # tokens at the end of each window that count; null: half the least length
    windows: int = Field(32, ge=1)  # spread over the documents that are long enough
    scalings: list[Literal[*SCALINGS]] = ["none"]  # of RoPE, one after another
    factor: float | None = Field(None, ge=1)  # of the scalings; null: length / the run's seq_len
    depths: list[Annotated[float, Field(ge=0, le=1)]] = [0.0, 0.25, 0.5, 0.75, 1.0]  # where the key is: 0 is the start
    trials: int = Field(5, ge=0)  # passkeys a depth and length; 0: no retrieval
    beside: list[str] = []  # further runs, evaluated alike and shown next to each other

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
            outcome.shown = [report.terminal_table(sweeps)]
            outcome.files |= {"_beside.md": report.markdown(sweeps), "_beside.png": partial(report.plot, sweeps)}
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
    files = {".md": report.markdown([sweep]), ".png": partial(report.plot, [sweep])}
    if any(key.endswith("/passkey") for key in results):
        files["_passkey.png"] = partial(report.plot_passkeys, sweep)
    return Outcome(
        results,
        stderr,
        details={"sweep": dataclasses.asdict(sweep)},
        shown=[report.terminal_table([sweep])],
        files=files,
    )


def sweep_of(suite: LongContextSuite, run: LoadedRun, options: EvalConfig) -> Sweep:
    """Measure every scaling at every length; up to the trained length a scaling changes nothing."""
    text = read_text(suite, run)
    documents = documents_of(text)
    lengths = lengths_for(suite, run, documents, text.name)
    scored = suite.scored or min(lengths) // 2
    spans = window_ends(documents, max(lengths), scored, options.limit or suite.windows)
    counted = b"".join(documents[number][end - scored + 1 : end + 1].astype("<i8").tobytes() for number, end in spans)
    fingerprint = hashlib.sha256(counted).hexdigest()[:16]
    sweep = Sweep(run.config.run.name, run.context, lengths, scored, suite.depths, text.name, fingerprint)
    todo = [(scaling, length) for scaling in suite.scalings for length in lengths]
    try:
        for scaling, length in track(todo, "long context", transient=True, disable=not run.runtime.is_main):
            factor = suite.factor or max(1.0, length / run.context)
            point = sweep.points.get("none", {}).get(length) if factor == 1 else None
            if point is None:
                run.scale_rope(scaling, factor)
                batch_size = max(1, options.batch_size * run.context // length)
                point = measure(run, text, documents, spans, length, scored, batch_size)
                if suite.trials and (found := retrieve(run, length, suite.depths, suite.trials, batch_size)):
                    point.passkey, point.passkey_nats = (values.tolist() for values in found)
            sweep.points.setdefault(scaling, {})[length] = point
    finally:
        run.scale_rope("none", None)
    return sweep


def documents_of(text: Text) -> list[np.ndarray]:
    """Return each document's tokens, from its first or, if it is known, from the end-of-text before it."""
    if text.starts is None:
        return text.streams
    return [
        stream[max(int(start) - 1, 0) : int(end)]
        for stream, starts in zip(text.streams, text.starts, strict=True)
        for start, end in zip(starts, [*starts[1:], len(stream)], strict=True)
    ]


def lengths_for(suite: LongContextSuite, run: LoadedRun, documents: list[np.ndarray], name: str) -> list[int]:
    """Return the lengths to evaluate, shortest first. ConfigError if no document is long enough."""
    longest = max(len(document) for document in documents) - 1
    lengths = sorted(set(suite.lengths)) or [run.context * 2**n for n in range(5)]
    fitting = [length for length in lengths if length <= longest]
    if not fitting or (suite.lengths and len(fitting) < len(lengths)):
        raise ConfigError(
            f"suite.lengths={lengths}: the longest document of {name} has {longest:,} tokens; give longer ones, as in "
            "suite.files=[books/*.txt], or shorter lengths"
        )
    return fitting


def window_ends(documents: list[np.ndarray], longest: int, scored: int, count: int) -> list[tuple[int, int]]:
    """Return at most `count` (document, last token that counts), spread over all that have `longest` tokens before."""
    candidates = [
        (number, end)
        for number, document in enumerate(documents)
        for end in range(len(document) - 1, longest - 1, -scored)
    ]
    chosen = np.unique(np.linspace(0, len(candidates) - 1, min(count, len(candidates))).round().astype(int))
    return [candidates[index] for index in chosen]


@torch.no_grad()
def measure(
    run: LoadedRun,
    text: Text,
    documents: list[np.ndarray],
    spans: list[tuple[int, int]],
    length: int,
    scored: int,
    batch_size: int,
) -> Point:
    """Return the loss of the last `scored` tokens of windows of `length` tokens, with the time and memory it took."""
    device, rank, world_size = run.runtime.device, ranks.rank(), ranks.world_size()
    sums = torch.zeros(len(spans), dtype=torch.float64)
    columns = torch.arange(length - scored, length, device=device)
    mine = range(rank, len(spans), world_size)
    passes = -(-len(spans) // (world_size * batch_size))  # alike on all ranks
    with head_at(run.model, columns.new_zeros(1), columns[:1]):  # what is made on first use is not timed
        run.model.logits(torch.zeros(1, length, dtype=torch.int64, device=device))
    synchronize(device)
    reset_peak(device)
    began = time.perf_counter()
    for index in range(passes):
        numbers = list(mine[index * batch_size : (index + 1) * batch_size])
        batch = [spans[number] for number in numbers or [0]]  # a rank without windows takes part all the same
        windows = np.stack([documents[document][end - length : end + 1].astype(np.int64) for document, end in batch])
        windows = torch.from_numpy(windows).to(device)
        rows = torch.arange(len(batch), device=device).repeat_interleave(scored)
        with head_at(run.model, rows, columns.repeat(len(batch))):
            logits = run.model.logits(windows[:, :-1])
        losses = F.cross_entropy(logits.float(), windows[:, -scored:].flatten(), reduction="none")
        if numbers:
            sums[numbers] = losses.view(len(batch), scored).double().sum(1).cpu()
    synchronize(device)
    seconds, memory = time.perf_counter() - began, peak_gb(device)
    means = ranks.total(sums.to(device)).cpu().numpy() / scored
    loss = float(means.mean())
    stderr = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0
    return Point(loss, stderr, bits_per_byte(loss, text.bytes_per_token), len(mine) * length / seconds, memory)


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
