"""The tables of evaluations: benchmarks in the paper's form beside its numbers, and whatever else was evaluated."""

from collections.abc import Iterable

from eval import published
from eval.compare.collect import Method
from eval.compare.statistics import estimate
from eval.compare.tables import DASH, Table, count, with_interval


def suites_of(methods: list[Method]) -> list[str]:
    return sorted({suite for method in methods for run in method.runs for suite in run.results})


def is_benchmark(suite: str, methods: list[Method]) -> bool:
    """Whether the suite consists of tasks."""
    return any("/" in key for record in records_of(suite, methods) for key in record["results"])


def records_of(suite: str, methods: list[Method]) -> list[dict]:
    return [run.results[suite] for method in methods for run in method.runs if suite in run.results]


def benchmark(suite: str, methods: list[Method]) -> Table:
    """Percent by task, in the paper's form, above the paper's own rows of the nearest size where it has them."""
    known = published.tasks(suite) if suite in published.suites() else {}
    keys = [f"{task}/{metric}" for task, metric in known.items()] or found_keys(suite, methods)
    has_average = bool(known) or any("average" in record["results"] for record in records_of(suite, methods))
    averages = ["average"] * has_average
    columns = ["method", "parameters", *(key.split("/")[0] for key in keys), *averages]
    rows, partly, limits, steps = [], [], set(), set()
    for method in methods:
        records = [run.results[suite] for run in method.runs if suite in run.results]
        limits |= {record.get("limit") for record in records}
        steps |= {record.get("step") for record in records}
        if 0 < len(records) < len(method.runs):
            partly.append(f"{method.name} ({len(records)} of {len(method.runs)})")
        cells = [percent(records, key) for key in [*keys, *averages]]
        rows.append([method.name, count(method.first.counts["params"]), *cells])
    notes = [
        "Percent, the mean over seeds. ±: one run's standard error over the questions, as the harness gives it (seeds "
        "share the questions, so that it does not shrink with them)."
    ]
    if partly:
        notes.append(f"Not every seed has been evaluated of: {', '.join(partly)}.")
    if limits - {None}:
        notes.append(
            f"Only the first {', '.join(str(limit) for limit in sorted(limits - {None}))} questions of each task."
        )
    if len(steps) > 1:
        notes.append(f"Not all at the same step: {', '.join(str(step) for step in sorted(steps, key=str))}.")
    if known:
        size = published.nearest(suite, max(method.first.counts["params"] for method in methods))
        for row in published.rows(suite, size):
            scores = [f"{row['scores'][key.split('/')[0]]:.2f}" for key in keys]
            rows.append([f"published: {row['model']}", count(row["params"]), *scores, f"{row['average']:.2f}"])
        notes.append(
            f"Published: the TPA paper (arXiv 2501.06425) at {size}, the nearest size it has, after 49 B tokens of "
            "FineWeb-Edu-100B; it gives no standard errors."
        )
    return Table(columns, rows, notes)


def found_keys(suite: str, methods: list[Method]) -> list[str]:
    """The metric of each task that counts: what the evaluation says, else acc_norm, acc, or the first."""
    by_task: dict[str, list[str]] = {}
    chosen: dict[str, str] = {}
    for method in methods:
        for run in method.runs:
            record = run.results.get(suite, {})
            chosen |= record.get("metrics") or {}
            for key in record.get("results", {}):
                task, _, metric = key.rpartition("/")
                if task and metric not in by_task.setdefault(task, []):
                    by_task[task].append(metric)
    keys = []
    for task, metrics in by_task.items():
        wanted = (chosen.get(task), "acc_norm", "acc", metrics[0])
        keys.append(f"{task}/{next(metric for metric in wanted if metric in metrics)}")
    return keys


def percent(records: Iterable[dict], key: str) -> str:
    pairs = [
        (r["results"][key], (r.get("stderr") or {}).get(key)) for r in records if r["results"].get(key) is not None
    ]
    if not pairs:
        return DASH
    mean = 100 * sum(value for value, _ in pairs) / len(pairs)
    errors = [error for _, error in pairs if error is not None]
    return f"{mean:.2f} ± {100 * sum(errors) / len(errors):.2f}" if len(errors) == len(pairs) else f"{mean:.2f}"


def evaluation(suite: str, methods: list[Method], confidence: float) -> Table:
    """A suite without tasks: its numbers, means over seeds."""
    keys = list(
        dict.fromkeys(key for m in methods for run in m.runs for key in run.results.get(suite, {}).get("results", {}))
    )
    rows = []
    for method in methods:
        records = [run.results[suite]["results"] for run in method.runs if suite in run.results]
        values = [[r[key] for r in records if isinstance(r.get(key), int | float)] for key in keys]
        rows.append([method.name, *(with_interval(estimate(value, confidence)) for value in values)])
    return Table(["method", *(key.replace("_", " ") for key in keys)], rows)
