"""Suites of lm-evaluation-harness's tasks: run, summed up, and set beside what the paper reports."""

import functools
import importlib.metadata
import json
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import datasets
import lm_eval
import lm_eval.api.task
import numpy as np
import torch
from lm_eval.tasks import TaskManager
from rich.table import Table

from configs.schema_eval import EvalConfig, HarnessSuite
from eval import published, ranks
from eval.harness import HarnessModel
from eval.loading import LoadedRun
from eval.results import Outcome
from eval.tasks import load_tasks

SHORT = {
    "arc_easy": "ARC-E", "arc_challenge": "ARC-C", "boolq": "BoolQ", "hellaswag": "HellaSw.", "openbookqa": "OBQA",
    "piqa": "PIQA", "winogrande": "W.G.", "mmlu": "MMLU", "sciq": "SciQ",
}  # fmt: skip

SHARES = {"acc", "acc_norm", "acc_bytes", "exact_match", "f1"}  # metrics between 0 and 1, shown in percent


def harness_suite(run: LoadedRun, config: EvalConfig) -> Outcome | None:
    """The scores of the suite's tasks, as fractions, and their average; rank 0 has them."""
    suite: HarnessSuite = config.suite
    with aside():
        found = lm_eval.simple_evaluate(
            HarnessModel(run, config.batch_size, suite.max_length, suite.add_bos),
            tasks=load_tasks(suite, run),
            num_fewshot=suite.num_fewshot,
            limit=config.limit,
            bootstrap_iters=1000,
            log_samples=suite.samples,
            task_manager=TaskManager(include_defaults=False),
        )
    return outcome(run, suite, found) if ranks.place()[0] == 0 else None


@contextmanager
def aside() -> Iterator[None]:
    """Without the harness's log, progress bars and worker processes, and with the random state of Python, numpy and
    torch as it was: the harness seeds them all."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}),
            patch.object(lm_eval.api.task, "tqdm", functools.partial(lm_eval.api.task.tqdm, disable=True)),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        logger.setLevel(level)
        datasets.enable_progress_bars()


def outcome(run: LoadedRun, suite: HarnessSuite, found: dict) -> Outcome:
    """The harness's results as ours: flat, the tasks' own scores first."""
    results, stderr = {}, {}
    for task, scores in found["results"].items():
        for key, value in scores.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or not filtered:
                continue
            name = f"{task}/{metric.removesuffix('_stderr')}" + ("" if filtered == "none" else f"_{filtered}")
            (stderr if metric.endswith("_stderr") else results)[name] = float(value)
    counted = {task: headline(suite, task, results) for task in asked(suite, found)}
    scores = {task: results[f"{task}/{metric}"] for task, metric in counted.items()}
    if len(scores) > 1 and SHARES.issuperset(counted.values()):
        results["average"] = sum(scores.values()) / len(scores)
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "datasets")}
    table = Scores(run, suite, counted, results, stderr)
    files = {".md": table.markdown()}
    if suite.samples:
        lines = [{"task": task, **sample} for task, samples in found["samples"].items() for sample in samples]
        files["_samples.jsonl"] = "".join(json.dumps(line, default=str) + "\n" for line in lines)
    shots = f"_{suite.num_fewshot}shot" if suite.num_fewshot else ""
    questions = {task: counts["effective"] for task, counts in found["n-samples"].items()}
    return Outcome(
        results, stderr, {task: task + shots for task in counted}, versions | {"tasks": found["versions"]},
        details={"metrics": counted, "num_fewshot": suite.num_fewshot, "questions": questions},
        shown=[table.rich()], files=files,
    )  # fmt: skip


def asked(suite: HarnessSuite, found: dict) -> list[str]:
    """The suite's tasks that have scores, in its order; a tag's tasks in its place are those found."""
    have = [task for task in suite.tasks if any("," in key for key in found["results"].get(task, {}))]
    inside = {child for children in found.get("group_subtasks", {}).values() for child in children}
    more = [task for task in found["results"] if task not in suite.tasks and task not in inside]
    return have + [task for task in more if any("," in key for key in found["results"][task])]


def headline(suite: HarnessSuite, task: str, results: dict[str, float]) -> str:
    """The metric of a task that counts: the suite's choice, else acc_norm, else acc, else its first."""
    have = [key.split("/", 1)[1] for key in results if key.rsplit("/", 1)[0] == task]
    wanted = [suite.metrics.get(task), "acc_norm", "acc", *have]
    return next(metric for metric in wanted if metric in have)


class Scores:
    """The table row of a run beside the paper's for the nearest size."""

    def __init__(self, run: LoadedRun, suite: HarnessSuite, counted: dict[str, str], results: dict, stderr: dict):
        self.tasks = list(counted)
        self.header = [SHORT.get(task, task) for task in self.tasks]
        params = sum(getattr(p, "ds_numel", p.numel()) for p in run.model.parameters())  # the former under ZeRO-3
        keys = [f"{task}/{metric}" for task, metric in counted.items()]
        if averaged := "average" in results:
            self.header.append("average")
            keys.append("average")
        self.rows = [
            [f"{run.config.run.name}, {params / 1e6:.3g}M", *(shown(key, results[key]) for key in keys)],
            ["± standard error", *(shown(key, stderr[key]) if key in stderr else "" for key in keys)],
        ]
        if suite.name in published.suites() and all(task in published.tasks(suite.name) for task in self.tasks):
            size = published.nearest(suite.name, params)
            whole = self.tasks == list(published.tasks(suite.name))
            for row in published.rows(suite.name, size):
                scores = [row["scores"][task] for task in self.tasks]
                average = row["average"] if whole else sum(scores) / len(scores)
                cells = [*scores, average] if averaged else scores
                self.rows.append([f"paper: {row['model']}, {size}", *(f"{cell:.2f}" for cell in cells)])

    def rich(self) -> Table:
        table = Table("shares in percent", box=None, pad_edge=False)
        for name in self.header:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [["", *self.header], ["---"] * (len(self.header) + 1), *self.rows]
        return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def shown(key: str, value: float) -> str:
    """A score as the table has it: shares in percent."""
    is_share = key.rpartition("/")[2] in {*SHARES, "average"}
    return f"{100 * value if is_share else value:.2f}"
