"""The tables of evaluations: benchmarks in the paper's form with its numbers, and whatever else was evaluated."""

import statistics

from eval import published
from eval.compare.collect import Method
from eval.compare.statistics import estimate
from eval.compare.tables import DASH, count
from eval.tables import Table
from eval.units import in_unit, labelled, unit_of


def evaluations(methods: list[Method], confidence: float) -> dict[str, Table]:
    """Return a table of each question (a suite, with its options) that a run has been asked, by their headings."""
    tables = {}
    for name in sorted({name for method in methods for run in method.runs for name in run.results}):
        records = [record for method in methods for record in method.records(name)]
        suite = records[0].get("suite", name)
        counted = {task: metric for record in records for task, metric in record.get("metrics", {}).items()}
        if not counted and suite in published.SUITES:
            counted = published.tasks(suite)
        if counted:
            tables[f"Benchmarks: {name}"] = benchmark(name, suite, counted, methods)
        else:
            tables[f"Evaluation: {name}"] = evaluation(name, methods, confidence)
    return tables


def benchmark(name: str, suite: str, counted: dict[str, str], methods: list[Method]) -> Table:
    """Return the scores by task in the paper's form, above the paper's own rows of the nearest size if it has any.

    `counted` has the metric of each task.
    """
    records = {method.name: method.records(name) for method in methods}
    everything = [record for found in records.values() for record in found]
    keys = {task: f"{task}/{metric}" for task, metric in counted.items()}
    keys |= {"average": "average"} if any("average" in record["results"] for record in everything) else {}
    rows = [
        [
            method.name,
            count(method.first.counts["params"]),
            *(score(records[method.name], key) for key in keys.values()),
        ]
        for method in methods
    ]
    notes = [
        "Means over seeds. ±: one run's standard error over the questions, as the harness gives it (seeds share the "
        "questions, so it does not shrink with their number)."
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
            scores = published.shown(suite, row, counted)
            rows.append([f"published: {row['model']}", count(row["params"]), *(scores[task] for task in keys)])
        notes.append(
            f"Published: the TPA paper (arXiv 2501.06425) at {size}, the nearest size it has, after 49 B tokens of "
            "FineWeb-Edu-100B; it gives no standard errors."
        )
    titles = [task if task == "average" else f"{task} {labelled(key)}" for task, key in keys.items()]
    if {*map(unit_of, keys.values())} == {"%"}:
        titles, notes[0] = list(keys), f"Percent. {notes[0]}"
    return Table(["method", "parameters", *titles], rows, notes)


def score(records: list[dict], key: str) -> str:
    found = [record for record in records if record["results"].get(key) is not None]
    if not found:
        return DASH
    mean = in_unit(key, statistics.fmean(record["results"][key] for record in found))
    errors = [(record.get("stderr") or {}).get(key) for record in found]
    return mean if None in errors else f"{mean} ± {in_unit(key, statistics.fmean(errors))}"


def evaluation(name: str, methods: list[Method], confidence: float) -> Table:
    """Return the numbers of a suite without tasks, as means over seeds."""
    results = {method.name: [record["results"] for record in method.records(name)] for method in methods}
    keys = list(dict.fromkeys(key for found in results.values() for result in found for key in result))

    def cell(key: str, found: list[dict]) -> str:
        mean = estimate([result[key] for result in found if isinstance(result.get(key), int | float)], confidence)
        if mean is None:
            return DASH
        return in_unit(key, mean.mean) + (f" ± {in_unit(key, mean.half)}" if mean.half else "")

    rows = [[name, *(cell(key, found) for key in keys)] for name, found in results.items()]
    return Table(["method", *("/".join([*key.split("/")[:-1], labelled(key)]) for key in keys)], rows)
