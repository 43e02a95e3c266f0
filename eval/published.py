"""The numbers that the TPA paper reports (arXiv 2501.06425), from published.yaml, to compare ours with."""

import math
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


def nearest(suite: str, num_params: int) -> str:
    """Return the size with scores in `suite` that is nearest to `num_params` in ratio."""
    return min(SUITES[suite]["scores"], key=lambda size: abs(math.log(SIZES[size] / num_params)))


def rows(suite: str, size: str) -> list[dict[str, Any]]:
    """Return [{model, params, scores: {task: percent}, average}], a row for each of the paper's models of that size."""
    return [
        {"model": model, "params": SIZES[size], "scores": dict(zip(tasks(suite), values, strict=False)),
         "average": values[-1]}
        for model, values in SUITES[suite]["scores"].get(size, {}).items()
    ]  # fmt: skip
