"""The tables of a comparison, as cells of text. What is not there is a dash."""

import math
import re
from dataclasses import dataclass, field

from eval.compare.collect import Method, Run
from eval.compare.statistics import Difference, Estimate, difference, estimate, reaches

DASH = "-"


@dataclass
class Table:
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


@dataclass
class Question:
    """What is compared: the metric, at which count of tokens (None: each run's last), against which method."""

    metric: str
    tokens: int | None
    baseline: Method
    confidence: float
    target: float | None

    @property
    def label(self) -> str:
        return {"val/loss": "validation loss", "val/bits_per_byte": "bits a byte"}.get(self.metric, self.metric)

    def of(self, method: Method, key: str | None = None) -> Estimate | None:
        return estimate(list(method.at(key or self.metric, self.tokens).values()), self.confidence)


def number(value: float | None, digits: int = 4) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def signed(value: float, digits: int = 4) -> str:
    return f"{value:+.{digits}f}"


def count(value: float | None) -> str:
    """Three digits and a unit: 2.62M."""
    if value is None or not math.isfinite(value):
        return DASH
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(float(f"{value:.3g}")) >= 10**power:  # 999,999 is 1M
            return f"{value / 10**power:.3g}{unit}"
    return f"{value:.3g}"


def with_interval(found: Estimate | None, digits: int = 4, sign: bool = False) -> str:
    if found is None:
        return DASH
    mean = signed(found.mean, digits) if sign else number(found.mean, digits)
    return mean if found.half is None else f"{mean} ± {found.half:.{digits}f}"


def mean_over_runs(method: Method, of) -> float | None:
    values = [value for value in map(of, method.runs) if value is not None]
    return sum(values) / len(values) if values else None


def final(methods: list[Method], question: Question, comparable: bool) -> Table:
    """Loss, perplexity, bits a byte with their intervals, and the difference to the baseline."""
    base, level = question.baseline, f"{question.confidence:.0%}"
    columns = [
        "method",
        "n",
        "train loss",
        "validation loss",
        "perplexity",
        "bits a byte",
        f"Δ {question.label} to {base.name}",
    ]
    rows, unpaired, clear, intervals = [], [], [], 0
    for method in methods:
        gap = difference(method.at(question.metric, question.tokens), base.at(question.metric, question.tokens),
                         question.confidence) if comparable and method is not base else None  # fmt: skip
        if isinstance(gap, Difference) and not gap.paired:
            unpaired.append(method.name)
        intervals += gap is not None and gap.half is not None
        if gap and gap.is_clear:
            clear.append(f"{method.name} ({'better' if gap.mean < 0 else 'worse'})")
        shown = DASH if gap is None else with_interval(gap, sign=True) + ("" if gap.paired else " (unpaired)")
        lately = method.lately("train/loss", question.tokens)
        values = [
            with_interval(question.of(method, f"val/{key}"), digits)
            for key, digits in (("loss", 4), ("perplexity", 2), ("bits_per_byte", 4))
        ]
        rows.append(
            [
                method.name,
                str(len(method.runs)),
                with_interval(estimate(list(lately.values()), question.confidence)),
                *values,
                shown,
            ]
        )
    where = "each run's last evaluation" if question.tokens is None else f"{question.tokens:,} tokens"
    notes = [
        f"At {where}. n: runs (seeds). ±: half of the {level} t interval over seeds; none where n = 1. "
        "Train loss: the mean over the last tenth of the tokens.",
        "Δ: below zero is better; taken seed by seed where the seeds are the same. No correction for the number of "
        "methods."
        if comparable
        else "Δ: not given, since the runs' losses are not of the same text.",
    ]
    if intervals:
        notes.append(f"The {level} interval of Δ leaves out zero for: {', '.join(clear) or 'none'}.")
    if unpaired:
        notes.append(f"Unpaired (other seeds than {base.name}; Welch's interval): {', '.join(unpaired)}.")
    return Table(columns, rows, notes)


def reach(methods: list[Method], question: Question) -> Table:
    """Tokens, FLOPs and seconds of training until the metric falls to the target; means over runs."""
    columns = ["method", f"tokens to {question.label} {number(question.target, 3)}", "/ baseline's"]
    columns += ["FLOPs", "/ baseline's", "training time", "/ baseline's"]
    found = {}
    for method in methods:
        tokens = [reaches(run.points(question.metric), question.target) for run in method.runs]
        seconds = [seconds_at(run, at) for run, at in zip(method.runs, tokens, strict=True)]
        flops = [
            at and at * run.counts["training_flops_per_token"] for run, at in zip(method.runs, tokens, strict=True)
        ]
        found[method.name] = [mean_of_all(values) for values in (tokens, flops, seconds)]
    rows = []
    for method in methods:
        cells = []
        show = (count, count, duration)
        for ours, base, shown in zip(found[method.name], found[question.baseline.name], show, strict=True):
            cells += [shown(ours), number(ours / base if ours and base else None, 3)]
        rows.append([method.name, *cells])
    notes = ["On straight lines between evaluations; a dash where not every run of a method has got there."]
    return Table(columns, rows, notes)


def mean_of_all(values: list[float | None]) -> float | None:
    return None if None in values or not values else sum(values) / len(values)


def seconds_at(run: Run, tokens: float | None) -> float | None:
    """Seconds of training until a count of tokens, on straight lines between the logged ones."""
    if tokens is None:
        return None
    before = (0, 0.0)
    for point in sorted(run.seconds.items()):
        if point[0] >= tokens:
            return before[1] + (point[1] - before[1]) * (tokens - before[0]) / (point[0] - before[0])
        before = point
    return None


def duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def cost(methods: list[Method]) -> Table:
    """What each method takes: parameters, operations, cache, and the speeds that were seen."""
    columns = ["method", "heads", "parameters", "attention parameters / MHA's", "training FLOPs a token"]
    columns += ["KV bytes a token", "/ MHA's", "training tokens/s", "MFU", "peak memory (GB)", "decode tokens/s"]
    rows, decoding = [], []
    for method in methods:
        counts = method.first.counts
        decode, where = decode_speed(method)
        decoding += [where] if where else []
        speed, mfu, memory = (
            mean_over_runs(method, lambda run, key=key: run.typical(f"perf/{key}"))
            for key in ("tokens_per_second", "mfu", "memory_gb")
        )
        cells = [
            str(counts["n_heads"]),
            f"{counts['params']:,}",
            number(counts["attention_params_over_mha"], 3),
            f"{counts['training_flops_per_token']:.3e}",
            f"{counts['kv_bytes_per_token']:,}",
            number(counts["attention_kv_bytes_over_mha"], 3),
            DASH if speed is None else f"{speed:,.0f}",
            DASH if mfu is None else f"{mfu:.1%}",
            number(memory, 2),
            decode,
        ]
        rows.append([method.name, *cells])
    notes = [
        "KV bytes: bf16, all layers. Training speed: the median over each run, as logged; it compares methods only "
        "where the machine and its load were the same."
    ]
    if decoding:
        notes.append(f"Decoding: {'; '.join(dict.fromkeys(decoding))}.")
    return Table(columns, rows, notes)


def decode_speed(method: Method) -> tuple[str, str]:
    """The speed at the longest length that the runs' decoding benchmarks have, and what that was."""
    model = method.first.config.model.name
    points = [point for run in method.runs for point in run.decoding if point.get("model", model) == model]
    if not points:
        return DASH, ""
    points = [point for point in points if point.get("scope", "model") == "model"] or points  # else one layer's
    best = max(points, key=lambda p: (p.get("length") or 0, p.get("batch") or 0, p["tokens_per_second"]))
    scope, batch, length, device = (best.get(key, "?") for key in ("scope", "batch", "length", "device"))
    where = f"{scope}, batch {batch} at {length} tokens on {device}"
    return f"{best['tokens_per_second']:,.0f}", where


def health(methods: list[Method]) -> Table:
    columns = ["run", "method", "seed", "state", "skipped steps", "restarts", "rollbacks", "failed saves"]
    columns += ["median gradient norm", "largest"]
    rows = [health_of(run) for method in methods for run in method.runs]
    return Table(columns, rows, ["Gradient norms before clipping, of the steps that were logged."])


def health_of(run: Run) -> list[str]:
    norms = [value for _, value in run.points("optim/grad_norm")]
    step, horizon = max((line["step"] for line in run.lines), default=0), run.config.trainer.horizon
    skipped, restarts = run.last("optim/skipped_steps"), run.restarts()
    return [
        run.dir.name,
        run.method,
        str(run.seed),
        "finished" if run.finished else f"step {step:,} of {horizon:,}",
        DASH if skipped is None else f"{skipped:,.0f}",
        DASH if restarts is None else str(restarts),
        *(str(run.count(event)) if run.events else DASH for event in ("rollback", "save_failed")),
        number(run.typical("optim/grad_norm"), 3),
        number(max(norms, default=None), 3),
    ]


def differences(differing: dict[str, list], methods: list[Method]) -> Table:
    """The config keys in which the methods differ; what a mechanism alone has is a dash with the others."""

    def show(value) -> str:
        return (
            DASH if value is None else re.sub(r"^[a-z_]+(\.[a-z_]+)+\.", "", str(value))
        )  # a class without its module

    rows = [[f"`{key}`", *map(show, values)] for key, values in differing.items()]
    return Table(["key", *(method.name for method in methods)], rows)
