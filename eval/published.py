"""The numbers that the TPA paper reports (arXiv 2501.06425), from published.yaml, to compare ours with."""

import math
from pathlib import Path
from typing import Any

import yaml

PUBLISHED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

# The paper's name of a mechanism by ours (`model.name`).
NAMES = {"mha": "MHA", "mqa": "MQA", "gqa": "GQA", "mla": "MLA", "t6_kvonly": "TPA-KVonly", "t6": "TPA"}


def suites() -> list[str]:
    """Return the names of the suites that the paper has scores of."""
    return list(PUBLISHED["suites"])


def tasks(suite: str) -> dict[str, str]:
    """Return the tasks of a suite by lm-evaluation-harness's name, and the metric that the paper takes from each."""
    return PUBLISHED["suites"][suite]["tasks"]


def sizes() -> dict[str, int]:
    """Return the paper's sizes and their numbers of parameters, smallest first."""
    return PUBLISHED["sizes"]


def nearest(suite: str, num_params: int) -> str:
    """Return the size with scores in `suite` that is nearest to `num_params` in ratio."""
    return min(PUBLISHED["suites"][suite]["scores"], key=lambda size: abs(math.log(sizes()[size] / num_params)))


def rows(suite: str, size: str) -> list[dict[str, Any]]:
    """Return [{model, params, scores: {task: percent}, average}], a row for each of the paper's models of that size."""
    return [
        {"model": model, "params": sizes()[size], "scores": dict(zip(tasks(suite), values, strict=False)),
         "average": values[-1]}
        for model, values in PUBLISHED["suites"][suite]["scores"].get(size, {}).items()
    ]  # fmt: skip


def decoding() -> list[dict[str, float]]:
    """Return milliseconds a token of the paper's Figure 5: [{batch, length, MHA, MQA, GQA, MLA, TPA}]."""
    return PUBLISHED["decoding"]
