"""The numbers that the TPA paper reports (arXiv 2501.06425), from published.yaml, to compare ours with."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

PUBLISHED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SUITES: dict[str, dict] = PUBLISHED["suites"]  # tasks and scores by the name of the suite
SIZES: dict[str, int] = PUBLISHED["sizes"]  # numbers of parameters, smallest first
DECODING: list[dict[str, float]] = PUBLISHED["decoding"]  # Figure 5: batch, length, milliseconds a token by mechanism

# The paper's name of a mechanism by ours (`model.name`).
NAMES = {"mha": "MHA", "mqa": "MQA", "gqa": "GQA", "mla": "MLA", "t6_kvonly": "TPA-KVonly", "t6": "TPA"}


def tasks(suite: str) -> dict[str, str]:
    """Return the tasks of a suite by lm-evaluation-harness's name, and the metric that the paper takes from each."""
    return SUITES[suite]["tasks"]


def scores_of(suite: str) -> dict[str, dict[str, list[float]]]:
    """Return by size and model the scores of the tasks and their average, or only the average if it is all we know."""
    known = SUITES[suite].get("averages", {})
    alone = {size: {model: [average] for model, average in found.items()} for size, found in known.items()}
    return SUITES[suite].get("scores", alone)


def nearest(suite: str, num_params: int) -> str:
    """Return the size with scores in `suite` that is nearest to `num_params` in ratio."""
    return min(scores_of(suite), key=lambda size: abs(math.log(SIZES[size] / num_params)))


def rows(suite: str, size: str) -> list[dict[str, Any]]:
    """Return [{model, params, scores: {task: percent}, average}], a row for each of the paper's models of that size.

    There are no scores if only the average is known.
    """
    return [
        {"model": model, "params": SIZES[size], "scores": dict(zip(tasks(suite), values[:-1], strict=False)),
         "average": values[-1]}
        for model, values in scores_of(suite).get(size, {}).items()
    ]  # fmt: skip


def shown(suite: str, row: dict[str, Any], wanted: Iterable[str]) -> dict[str, str]:
    """Return the scores of a row for the tasks `wanted` and their average, a dash for what is not known."""
    scores = {task: row["scores"][task] for task in wanted if task in row["scores"]}
    average = row["average"] if {*wanted} == tasks(suite).keys() else None
    if average is None and scores.keys() == {*wanted}:
        average = sum(scores.values()) / len(scores)
    values = {task: scores.get(task) for task in wanted} | {"average": average}
    return {key: "-" if value is None else f"{value:.2f}" for key, value in values.items()}
