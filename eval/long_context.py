"""What length does to a model: loss on the same tokens with ever more text before them, passkeys, memory, speed."""

import dataclasses
import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track

from configs.errors import ConfigError
from configs.schema_eval import EvalConfig, LongContextSuite
from eval import long_context_report as report
from eval import ranks
from eval.loading import LoadedRun, load_run
from eval.passkey import retrieve
from eval.perplexity import bits_per_byte, perplexity
from eval.results import Outcome, save
from eval.scoring import head_at
from eval.texts import Text, read_text
from training.metrics import memory_gb


@dataclass
class Point:
    """What one length gives under one scaling of RoPE."""

    loss: float
    stderr: float
    bits_per_byte: float
    tokens_per_second: float  # of this process, the passkeys aside
    memory_gb: float
    passkey: list[float] | None = None  # accuracy by depth; None where there is no room for a prompt
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


def long_context_suite(run: LoadedRun, config: EvalConfig) -> Outcome:
    """The sweep of the run, and beside it those of `suite.beside`, whose own folders get theirs too."""
    sweep = sweep_of(run, config)
    outcome = outcome_of(sweep)
    if config.suite.beside:
        alike = dataclasses.replace(config.suite, lengths=sweep.lengths, scored=sweep.scored, beside=[])
        sweeps = [sweep]
        for folder in config.suite.beside:
            other = load_run(folder, config.device, config.dtype)
            sweeps.append(sweep_of(other, dataclasses.replace(config, suite=alike)))
            if run.runtime.is_main:
                save(other, alike.name, outcome_of(sweeps[-1]), config.limit)
        outcome.shown = [report.table(sweeps)]
        outcome.files |= {"_beside.md": report.markdown(sweeps), "_beside.png": report.plotter(sweeps)}
    return outcome


def outcome_of(sweep: Sweep) -> Outcome:
    results, stderr = {}, {}
    for scaling, points in sweep.points.items():
        for length, point in points.items():
            key = f"{scaling}/{length}"
            results |= {f"{key}/loss": point.loss, f"{key}/perplexity": perplexity(point.loss)}
            results |= {
                f"{key}/{name}": getattr(point, name) for name in ("bits_per_byte", "tokens_per_second", "memory_gb")
            }
            stderr[f"{key}/loss"] = point.stderr
            if point.passkey is not None:
                results[f"{key}/passkey"] = float(np.mean(point.passkey))
    files = {".md": report.markdown([sweep]), ".png": report.plotter([sweep])}
    if any(point.passkey is not None for points in sweep.points.values() for point in points.values()):
        files["_passkey.png"] = report.heat_maps(sweep)
    return Outcome(
        results, stderr, details={"sweep": dataclasses.asdict(sweep)}, shown=[report.table([sweep])], files=files
    )


def sweep_of(run: LoadedRun, config: EvalConfig) -> Sweep:
    """Every scaling at every length; with a scaling, a length up to the trained one is as without."""
    suite: LongContextSuite = config.suite
    text = read_text(suite, run)
    documents = documents_of(text)
    lengths = lengths_for(suite, run, documents, text.name)
    scored = suite.scored or min(lengths) // 2
    spans = ends(documents, max(lengths), scored, config.limit or suite.windows)
    seen = b"".join(documents[number][end - scored + 1 : end + 1].astype("<i8").tobytes() for number, end in spans)
    fingerprint = hashlib.sha256(seen).hexdigest()[:16]
    sweep = Sweep(run.config.run.name, run.context, lengths, scored, suite.depths, text.name, fingerprint)
    todo = [(scaling, length) for scaling in suite.scalings for length in lengths]
    try:
        for scaling, length in track(todo, "long context", transient=True, disable=not run.runtime.is_main):
            factor = suite.factor or max(1.0, length / run.context)
            plain = sweep.points.get("none", {}).get(length)
            run.scale_rope(scaling, factor)
            point = plain if plain and factor == 1 else measure(run, config, text, documents, spans, length, scored)
            sweep.points.setdefault(scaling, {})[length] = point
    finally:
        run.scale_rope("none", None)
    return sweep


def documents_of(text: Text) -> list[np.ndarray]:
    """Each document's tokens, from its first or, where it is known, from the end-of-text before it."""
    if text.starts is None:
        return text.streams
    return [
        stream[max(int(start) - 1, 0) : int(end)]
        for stream, starts in zip(text.streams, text.starts, strict=True)
        for start, end in zip(starts, [*starts[1:], len(stream)], strict=True)
    ]


def lengths_for(suite: LongContextSuite, run: LoadedRun, documents: list[np.ndarray], name: str) -> list[int]:
    """The lengths to evaluate, shortest first. ConfigError where no document is long enough."""
    longest = max(len(document) for document in documents) - 1
    lengths = sorted(set(suite.lengths)) or [run.context * 2**n for n in range(5)]
    fitting = [length for length in lengths if length <= longest]
    if not fitting or (suite.lengths and len(fitting) < len(lengths)):
        raise ConfigError(
            f"suite.lengths={lengths}: the longest document of {name} has {longest:,} tokens; give longer ones, as in "
            "suite.files=[books/*.txt], or shorter lengths"
        )
    return fitting


def ends(documents: list[np.ndarray], longest: int, scored: int, count: int) -> list[tuple[int, int]]:
    """At most `count` places (document, last token that counts), spread over all that have `longest` tokens before."""
    places = [
        (number, end)
        for number, document in enumerate(documents)
        for end in range(len(document) - 1, longest - 1, -scored)
    ]
    chosen = np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int))
    return [places[place] for place in chosen]


@torch.no_grad()
def measure(run: LoadedRun, config: EvalConfig, text: Text, documents, spans, length: int, scored: int) -> Point:
    """Loss of the last `scored` tokens of windows of `length` tokens; time and memory; passkeys."""
    device, (rank, world_size) = run.runtime.device, ranks.place()
    batch_size = max(1, config.batch_size * run.context // length)
    sums = torch.zeros(len(spans), dtype=torch.float64)
    columns = torch.arange(length - scored, length, device=device)
    mine = list(range(len(spans)))[rank::world_size]
    rounds = -(-len(spans) // (world_size * batch_size))  # alike on all ranks
    with head_at(run.model, columns.new_zeros(1), columns[:1]):  # what is made on first use is not timed
        run.model(torch.zeros(1, length, dtype=torch.int64, device=device))
    reset_peak(device)
    began = clock(device)
    for start in range(0, rounds * batch_size, batch_size):
        numbers = mine[start : start + batch_size]
        taken = [spans[number] for number in numbers or mine[:1] or [0]]
        windows = np.stack([documents[document][end - length : end + 1].astype(np.int64) for document, end in taken])
        windows = torch.from_numpy(windows).to(device)
        rows = torch.arange(len(taken), device=device).repeat_interleave(scored)
        with head_at(run.model, rows, columns.repeat(len(taken))):
            logits = run.model(windows[:, :-1])
        losses = F.cross_entropy(logits.float(), windows[:, -scored:].flatten(), reduction="none")
        if numbers:
            sums[numbers] = losses.view(len(taken), scored).double().sum(1).cpu()
    seconds = clock(device) - began
    memory = peak_gb(device)
    sums = ranks.total(sums.to(device)).cpu().numpy() / scored
    loss, spread = float(sums.mean()), float(sums.std(ddof=1) / len(sums) ** 0.5) if len(sums) > 1 else 0.0
    point = Point(loss, spread, bits_per_byte(loss, text.bytes_per_token), len(mine) * length / seconds, memory)
    if config.suite.trials:
        found = retrieve(run, length, config.suite.depths, config.suite.trials, batch_size)
        point.passkey, point.passkey_nats = (None, None) if found is None else (part.tolist() for part in found)
    return point


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far: of the GPU, or, where Linux allows it, of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb(device: torch.device) -> float:
    """The peak since then; where it could not be forgotten, that of the whole process."""
    status = Path("/proc/self/status")
    if device.type != "cuda" and status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    return memory_gb(device)
