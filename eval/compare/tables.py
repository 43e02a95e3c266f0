"""The tables of a comparison, as cells of text. What is not known is a dash."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from eval.compare.collect import Method, Run
from eval.compare.statistics import Estimate, difference, estimate, reaches

DASH = "-"
LABELS = {"val/loss": "validation loss", "val/bits_per_byte": "bits per byte"}


@dataclass
class Table:
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


@dataclass
class Question:
    """What is compared: a metric, at a number of tokens (None: each run's last), with a method."""

    metric: str
    tokens: int | None
    baseline: Method
    confidence: float
    target: float | None
    time: bool  # whether times are compared too
    comparable: bool  # whether the metric means the same in all runs

    @property
    def label(self) -> str:
        return LABELS.get(self.metric, self.metric)

    def values(self, method: Method, key: str | None = None) -> dict[int, float]:
        """Return a metric by seed; the one that is compared unless a key is given."""
        return method.by_seed(lambda run: run.at(key or self.metric, self.tokens))

    def of(self, method: Method, key: str | None = None) -> Estimate | None:
        return estimate(list(self.values(method, key).values()), self.confidence)


def number(value: float | None, spec: str = ".4f") -> str:
    """Return a number in a format, or a dash if it is None or not finite."""
    return DASH if value is None or not math.isfinite(value) else format(value, f",{spec}")


def count(value: float | None) -> str:
    """Return three digits and a unit, as in 2.62M."""
    if value is None or not math.isfinite(value):
        return DASH
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(float(f"{value:.3g}")) >= 10**power:  # 999,999 is 1M
            return f"{value / 10**power:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    for length, unit, up_to in ((1, "s", 120), (60, "min", 7200)):
        if seconds < up_to:
            return f"{seconds / length:.{0 if unit == 's' else 1}f} {unit}"
    return f"{seconds / 3600:.1f} h"


def with_interval(found: Estimate | None, digits: int = 4, sign: str = "") -> str:
    if found is None:
        return DASH
    mean = f"{found.mean:{sign},.{digits}f}" if math.isfinite(found.mean) else DASH
    return mean if found.half is None else f"{mean} ± {found.half:.{digits}f}"


def final(methods: list[Method], question: Question) -> Table:
    """Return losses, perplexities and bits per byte with their intervals, and differences from the baseline."""
    base, level = question.baseline, f"{question.confidence:.0%}"
    columns = ["method", "n", "train loss", "validation loss", "perplexity", "bits per byte"]
    rows, gaps = [], {}
    for method in methods:
        gap = None
        if question.comparable and method is not base:
            gap = difference(question.values(method), question.values(base), question.confidence)
        if gap is not None:
            gaps[method.name] = gap
        lately = method.by_seed(lambda run: run.lately("train/loss", question.tokens))
        rows.append([
            method.name,
            str(len(method.runs)),
            with_interval(estimate(list(lately.values()), question.confidence)),
            with_interval(question.of(method, "val/loss")),
            with_interval(question.of(method, "val/perplexity"), digits=2),
            with_interval(question.of(method, "val/bits_per_byte")),
            with_interval(gap, sign="+") + (" (unpaired)" if gap is not None and not gap.paired else ""),
        ])  # fmt: skip
    where = "each run's last evaluation" if question.tokens is None else f"{question.tokens:,} tokens"
    notes = [
        f"At {where}. n: runs (seeds). ±: half of the {level} t interval over seeds; none if n = 1. "
        "Train loss: the mean over the last tenth of the tokens.",
        "Δ: below zero is better; seed by seed if the seeds are the same. No correction for the number of methods.",
    ]
    if not question.comparable:
        notes[1] = "Δ: not given, since the runs' losses are not of the same text."
    if any(gap.half is not None for gap in gaps.values()):
        clear = [f"{name} ({'better' if gap.mean < 0 else 'worse'})" for name, gap in gaps.items() if gap.is_clear]
        notes.append(f"The {level} interval of Δ excludes zero for: {', '.join(clear) or 'none'}.")
    if unpaired := [name for name, gap in gaps.items() if not gap.paired]:
        notes.append(f"Unpaired (other seeds than {base.name}; Welch's interval): {', '.join(unpaired)}.")
    return Table([*columns, f"Δ {question.label} to {base.name}"], rows, notes)


def reach(methods: list[Method], question: Question) -> Table:
    """Return the tokens, FLOPs and (if times are compared) seconds that it takes to reach the target."""
    columns = ["method"]
    rows = [[method.name] for method in methods]
    measures: list[tuple[str, Callable, Callable]] = [
        (f"tokens to {question.label} {number(question.target, '.3f')}", lambda run, tokens: tokens, count),
        ("FLOPs", lambda run, tokens: tokens * run.counts["training_flops_per_token"], count),
    ]
    if question.time:
        measures.append(("training time", seconds_at, duration))
    for name, of, show in measures:
        columns += [name, "/ baseline's"]
        found = {method.name: mean_until(method, question, of) for method in methods}
        base = found[question.baseline.name]
        for row, ours in zip(rows, found.values(), strict=True):
            row += [show(ours), number(ours / base if ours and base else None, ".3f")]
    note = "Means over runs, on straight lines between evaluations; a dash if a run of the method has not got there."
    return Table(columns, rows, [note])


def mean_until(method: Method, question: Question, of: Callable[[Run, float], float | None]) -> float | None:
    """Return the mean of `of(run, tokens to the target)`; None if a run has not got there."""
    reached = {id(run): reaches(run.points(question.metric), question.target) for run in method.runs}
    return None if None in reached.values() else method.mean(lambda run: of(run, reached[id(run)]))


def seconds_at(run: Run, tokens: float) -> float | None:
    """Return the seconds of training until a number of tokens, on straight lines between the logged ones."""
    before = (0, 0.0)
    for point in sorted(run.seconds.items()):
        if point[0] >= tokens:
            return before[1] + (point[1] - before[1]) * (tokens - before[0]) / (point[0] - before[0])
        before = point
    return None


def cost(methods: list[Method]) -> Table:
    """Return what each method takes: parameters, operations, cache, and the speeds that were seen."""
    columns = ["method", "heads", "parameters", "attention parameters / MHA's", "training FLOPs per token"]
    columns += ["KV bytes per token", "/ MHA's", "training tokens/s", "MFU", "peak memory (GB)", "decode tokens/s"]
    rows, decoding = [], []
    for method in methods:
        counts, point = method.first.counts, decoding_point(method)
        typical = {
            key: method.mean(lambda run, key=key: run.typical(f"perf/{key}"))
            for key in ("tokens_per_second", "mfu", "memory_gb")
        }
        rows.append([
            method.name,
            str(counts["n_heads"]),
            number(counts["params"], "d"),
            number(counts["attention_params_over_mha"], ".3f"),
            f"{counts['training_flops_per_token']:.3e}",
            number(counts["kv_bytes_per_token"], "d"),
            number(counts["attention_kv_bytes_over_mha"], ".3f"),
            number(typical["tokens_per_second"], ".0f"),
            number(typical["mfu"], ".1%"),
            number(typical["memory_gb"], ".2f"),
            number(point.get("tokens_per_second"), ".0f"),
        ])  # fmt: skip
        if point:
            scope, batch, length, device = (point.get(key, "?") for key in ("scope", "batch", "length", "device"))
            decoding.append(f"{scope}, batch {batch} at {length} tokens on {device}")
    notes = [
        "KV bytes: bf16, all layers. Training speed: the median over each run, as logged; it compares methods only if "
        "the machine and its load were the same."
    ]
    if decoding:
        notes.append(f"Decoding: {'; '.join(dict.fromkeys(decoding))}.")
    return Table(columns, rows, notes)


def decoding_point(method: Method) -> dict:
    """Return the fastest point at the longest length of the runs' decoding benchmarks; an empty one without any."""
    points = [point for run in method.runs for point in run.decoding]
    points = [point for point in points if point.get("model", method.mechanism) == method.mechanism]
    whole = [point for point in points if point.get("scope", "model") == "model"]
    order = lambda p: (p.get("length") or 0, p.get("batch") or 0, p["tokens_per_second"])  # noqa: E731
    return max(whole or points, key=order, default={})  # of one layer's attention if no whole step was timed


def health(methods: list[Method]) -> Table:
    columns = ["run", "method", "seed", "state", "skipped steps", "restarts", "rollbacks", "failed saves"]
    columns += ["median gradient norm", "largest"]
    rows = [health_of(run) for method in methods for run in method.runs]
    return Table(columns, rows, ["Gradient norms before clipping, of the steps that were logged."])


def health_of(run: Run) -> list[str]:
    starts, norms = run.count("start"), [value for _, value in run.points("optim/grad_norm")]
    return [
        run.dir.name,
        run.method,
        str(run.seed),
        "finished" if run.finished else f"step {run.step:,} of {run.config.trainer.horizon:,}",
        number(run.at("optim/skipped_steps"), ".0f"),
        number(starts and starts - 1, "d"),
        *(number(run.count(event), "d") for event in ("rollback", "save_failed")),
        number(run.typical("optim/grad_norm"), ".3f"),
        number(max(norms, default=None), ".3f"),
    ]


def differences(differing: dict[str, list], methods: list[Method]) -> Table:
    """Return the configuration keys in which the methods differ; a dash if a mechanism has no such key."""

    def show(value) -> str:  # a class without its module
        return DASH if value is None else re.sub(r"^[a-z_]+(\.[a-z_]+)+\.", "", str(value))

    rows = [[f"`{key}`", *map(show, values)] for key, values in differing.items()]
    return Table(["key", *(method.name for method in methods)], rows)
