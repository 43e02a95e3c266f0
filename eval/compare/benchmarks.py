"""The tables of evaluations: benchmarks in the paper's form with its numbers, and whatever else was evaluated."""

import statistics

from eval import published
from eval.compare.collect import Method
from eval.compare.statistics import estimate
from eval.compare.tables import DASH, count, with_interval
from eval.tables import Table


def evaluations(methods: list[Method], confidence: float) -> dict[str, Table]:
    """Return the tables of all suites that a run has been evaluated on, by their headings."""
    tables = {}
    for suite in sorted({suite for method in methods for run in method.runs for suite in run.results}):
        counted = published.tasks(suite) if suite in published.SUITES else {}
        if not counted:
            for method in methods:
                for record in method.records(suite):
                    counted |= record.get("metrics", {})
        if counted:
            tables[f"Benchmarks: {suite}"] = benchmark(suite, counted, methods)
        else:
            tables[f"Evaluation: {suite}"] = evaluation(suite, methods, confidence)
    return tables


def benchmark(suite: str, counted: dict[str, str], methods: list[Method]) -> Table:
    """Return percent by task in the paper's form, above the paper's own rows of the nearest size if it has any.

    `counted` has the metric of each task.
    """
    records = {method.name: method.records(suite) for method in methods}
    everything = [record for found in records.values() for record in found]
    keys = [f"{task}/{metric}" for task, metric in counted.items()]
    keys += ["average"] if any("average" in record["results"] for record in everything) else []
    rows = [
        [method.name, count(method.first.counts["params"]), *(percent(records[method.name], key) for key in keys)]
        for method in methods
    ]
    notes = [
        "Percent, the mean over seeds. ±: one run's standard error over the questions, as the harness gives it (seeds "
        "share the questions, so it does not shrink with their number)."
    ]
    counts = [(method.name, len(records[method.name]), len(method.runs)) for method in methods]
    if partly := [f"{name} ({found} of {runs})" for name, found, runs in counts if 0 < found < runs]:
        notes.append(f"Not every seed has been evaluated: {', '.join(partly)}.")
    if limits := sorted({record["limit"] for record in everything if record.get("limit")}):
        notes.append(f"Only the first {', '.join(map(str, limits))} questions of each task.")
    steps = {record.get("step") for record in everything}
    if len(steps) > 1:
        notes.append(f"Not all at the same step: {', '.join(sorted(map(str, steps)))}.")
    if suite in published.SUITES:
        size = published.nearest(suite, max(method.first.counts["params"] for method in methods))
        for row in published.rows(suite, size):
            scores = [*row["scores"].values(), *([row["average"]] if "average" in keys else [])]
            rows.append([f"published: {row['model']}", count(row["params"]), *(f"{score:.2f}" for score in scores)])
        notes.append(
            f"Published: the TPA paper (arXiv 2501.06425) at {size}, the nearest size it has, after 49 B tokens of "
            "FineWeb-Edu-100B; it gives no standard errors."
        )
    return Table(["method", "parameters", *(key.split("/")[0] for key in keys)], rows, notes)


def percent(records: list[dict], key: str) -> str:
    found = [record for record in records if record["results"].get(key) is not None]
    if not found:
        return DASH
    mean = f"{100 * statistics.fmean(record['results'][key] for record in found):.2f}"
    errors = [(record.get("stderr") or {}).get(key) for record in found]
    return mean if None in errors else f"{mean} ± {100 * statistics.fmean(errors):.2f}"


def evaluation(suite: str, methods: list[Method], confidence: float) -> Table:
    """Return the numbers of a suite without tasks, as means over seeds."""
    results = {method.name: [record["results"] for record in method.records(suite)] for method in methods}
    keys = list(dict.fromkeys(key for found in results.values() for result in found for key in result))
    rows = []
    for name, found in results.items():
        values = [[result[key] for result in found if isinstance(result.get(key), int | float)] for key in keys]
        rows.append([name, *(with_interval(estimate(value, confidence)) for value in values)])
    return Table(["method", *(key.replace("_", " ") for key in keys)], rows)
