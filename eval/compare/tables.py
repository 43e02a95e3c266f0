"""The tables of a comparison, as cells of text. What is not known is a dash."""

import math
import re
import statistics
from dataclasses import dataclass
from functools import partial

from eval.compare.collect import Method, Run
from eval.compare.statistics import Estimate, difference, estimate, reaches
from eval.tables import Table

DASH = "-"
# Columns of the cost table: what is counted, or logged, and how it is shown.
COUNTED = {
    "heads": ("n_heads", ".0f"),
    "parameters": ("params", ".0f"),
    "attention parameters / MHA's": ("attention_params_over_mha", ".3f"),
    "training FLOPs per token": ("training_flops_per_token", ".3e"),
    "KV bytes per token": ("kv_bytes_per_token", ".0f"),
    "/ MHA's": ("attention_kv_bytes_over_mha", ".3f"),
}
LOGGED = {
    "training tokens/s": ("perf/tokens_per_second", ".0f"),
    "MFU": ("perf/mfu", ".1%"),
    "peak memory (GB)": ("perf/memory_gb", ".2f"),
}


@dataclass
class Question:
    """What is compared: a metric, at a number of tokens (None: there is no evaluation), with a method."""

    metric: str
    tokens: int | None
    between: bool  # whether some runs were evaluated only before and after that number of tokens
    baseline: Method
    confidence: float
    target: float | None
    comparable: bool  # whether the metric means the same in all runs

    @property
    def label(self) -> str:
        return {"val/loss": "validation loss", "val/bits_per_byte": "bits per byte"}.get(self.metric, self.metric)

    def values(self, method: Method, key: str | None = None) -> dict[int, float]:
        """Return a metric by seed; the one that is compared unless a key is given."""
        return method.by_seed(lambda run: run.at(key or self.metric, self.tokens))

    def of(self, method: Method, key: str | None = None) -> Estimate | None:
        return estimate(self.values(method, key).values(), self.confidence)


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


def with_interval(found: Estimate | None, digits: int = 4, sign: str = "") -> str:
    if found is None or not math.isfinite(found.mean):
        return DASH
    mean = f"{found.mean:{sign},.{digits}f}"
    return mean if found.half is None else f"{mean} ± {found.half:.{digits}f}"


def final(methods: list[Method], question: Question) -> Table:
    """Return losses, perplexities and bits per byte with their intervals, and differences from the baseline."""
    base, level = question.baseline, f"{question.confidence:.0%}"
    rows, gaps = [], {}
    for method in methods:
        against = question.values(base) if question.comparable and method is not base else {}
        gap = difference(question.values(method), against, question.confidence)
        if gap:
            gaps[method.name] = gap
        lately = method.by_seed(lambda run: run.lately("train/loss", question.tokens))
        rows.append([
            method.name,
            str(len(method.runs)),
            with_interval(estimate(lately.values(), question.confidence)),
            with_interval(question.of(method, "val/loss")),
            with_interval(question.of(method, "val/perplexity"), digits=2),
            with_interval(question.of(method, "val/bits_per_byte")),
            with_interval(gap, sign="+") + (" (unpaired)" if gap and not gap.paired else ""),
        ])  # fmt: skip
    where = "no evaluation yet" if question.tokens is None else f"at {question.tokens:,} tokens"
    if question.between:
        where += ", which is no evaluation of all runs: on straight lines between each run's evaluations"
    notes = [
        f"{where[0].upper()}{where[1:]}. n: runs (seeds). ±: half of the {level} t interval over seeds; none if n = 1. "
        "Train loss: the mean over the last tenth of the tokens.",
        "Δ: below zero is better; seed by seed if the seeds are the same, else Welch's (unpaired). No correction for "
        "the number of methods."
        if question.comparable
        else "Δ: not given, since the runs' losses are not of the same text.",
    ]
    if any(gap.half is not None for gap in gaps.values()):
        clear = [f"{name} ({'better' if gap.mean < 0 else 'worse'})" for name, gap in gaps.items() if gap.is_clear]
        notes.append(f"The {level} interval of Δ excludes zero for: {', '.join(clear) or 'none'}.")
    columns = ["method", "n", "train loss", "validation loss", "perplexity", "bits per byte"]
    return Table([*columns, f"Δ {question.label} to {base.name}"], rows, notes)


def reach(methods: list[Method], question: Question) -> Table:
    """Return the tokens and FLOPs that it takes to reach the target."""

    def takes(method: Method) -> tuple[float, float]:
        reached = [reaches(run.points(question.metric), question.target) for run in method.runs]
        tokens = math.nan if None in reached else statistics.fmean(reached)
        return tokens, tokens * method.first.counts["training_flops_per_token"]

    base, rows = takes(question.baseline), []
    for method in methods:
        cells = []
        for ours, theirs in zip(takes(method), base, strict=True):
            cells += [count(ours), number(ours / theirs if theirs else None, ".3f")]
        rows.append([method.name, *cells])
    tokens = f"tokens to {question.label} {number(question.target, '.3f')}"
    note = "Means over runs, on straight lines between evaluations; a dash if a run of the method has not got there."
    return Table(["method", tokens, "/ baseline's", "FLOPs", "/ baseline's"], rows, [note])


def cost(methods: list[Method]) -> Table:
    """Return what each method takes: parameters, operations, cache, and the speeds that were seen."""
    rows, decoding = [], []
    for method in methods:
        counts, point = method.first.counts, decoding_point(method)
        counted = [number(counts[key], spec) for key, spec in COUNTED.values()]
        logged = [number(method.mean(partial(Run.typical, key=key)), spec) for key, spec in LOGGED.values()]
        rows.append([method.name, *counted, *logged, number(point.get("tokens_per_second"), ".0f")])
        if point:
            decoding.append("{scope}, batch {batch} at {length} tokens on {device}".format(**point))
    notes = [
        "KV bytes: bf16, all layers. Training speed: the median over each run, as logged; it compares methods only if "
        "the machine and its load were the same."
    ]
    if decoding:
        notes.append(f"Decoding: {'; '.join(dict.fromkeys(decoding))}.")
    return Table(["method", *COUNTED, *LOGGED, "decode tokens/s"], rows, notes)


def decoding_point(method: Method) -> dict:
    """Return the fastest point at the longest length of the runs' decoding benchmarks; an empty one without any."""
    points = [point for run in method.runs for point in run.decoding if point["model"] == method.mechanism]
    whole = [point for point in points if point["scope"] == "model"]  # else one layer's attention
    return max(whole or points, key=lambda p: (p["length"], p["batch"], p["tokens_per_second"]), default={})


def health(methods: list[Method]) -> Table:
    columns = ["run", "method", "seed", "state", "skipped steps", "restarts", "rollbacks", "failed saves"]
    columns += ["median gradient norm", "largest"]
    rows = []
    for method in methods:
        for run in method.runs:
            starts, norms = run.count("start"), [value for _, value in run.points("optim/grad_norm")]
            state = "finished" if run.finished else f"step {run.step:,} of {run.config.trainer.horizon:,}"
            counts = [run.at("optim/skipped_steps"), starts and starts - 1]
            counts += [run.count("rollback"), run.count("save_failed")]
            sizes = [run.typical("optim/grad_norm"), max(norms, default=None)]
            cells = [number(count, ".0f") for count in counts] + [number(size, ".3f") for size in sizes]
            rows.append([run.dir.name, method.name, str(run.seed), state, *cells])
    return Table(columns, rows, ["Gradient norms before clipping, of the steps that were logged."])


def differences(methods: list[Method]) -> Table:
    """Return the configuration keys in which the methods differ; a dash if a mechanism has no such key."""

    def show(value) -> str:  # a class without its module
        return DASH if value is None else re.sub(r"^[a-z_]+(\.[a-z_]+)+\.", "", str(value))

    identities = [method.first.identity for method in methods]
    keys = sorted(set().union(*identities) - {"run.seed"})
    found = {key: [identity.get(key) for identity in identities] for key in keys}
    rows = [[f"`{key}`", *map(show, values)] for key, values in found.items() if values != values[:1] * len(values)]
    return Table(["key", *(method.name for method in methods)], rows)
