"""Suites of lm-evaluation-harness's tasks: run, summed up, and set next to what the paper reports."""

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
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from pydantic import Field, model_validator

from configs.errors import Mistakes
from configs.kinds import LONGEST_TEXT, Name, OptionalPath
from eval import published
from eval.config import EvalConfig, SuiteConfig
from eval.harness import HarnessModel
from eval.loading import LoadedRun
from eval.results import Outcome
from eval.tables import Table
from eval.tasks import download, load_tasks
from eval.units import in_unit, labelled, unit_of
from training.ranks import rank

logging.getLogger("lm_eval").setLevel(logging.ERROR)


class HarnessSuite(SuiteConfig):
    """Tasks of lm-evaluation-harness, and ours that are made from the built-in corpus or the run's own data."""

    how = ("data_dir", "prefetch", "samples")

    name: Name = "harness"
    tasks: list[str] = Field(default_factory=list)
    num_fewshot: int | None = Field(None, ge=0, le=1000)  # null: each task's own
    metrics: dict[str, str] = Field(default_factory=dict)  # of a task that counts; default: acc_norm, acc, or its first
    data_dir: OptionalPath = None  # a folder with <task>_<split>.jsonl: no network is used
    prefetch: bool = False  # fill data_dir from the network, and evaluate nothing
    # null: the run's seq_len; longer requests lose their beginning
    max_length: int | None = Field(None, ge=2, le=LONGEST_TEXT)
    samples: bool = False  # write each question with its answers' scores next to the results

    @model_validator(mode="after")
    def _check_together(self):
        lines = []
        if not self.tasks:
            lines.append(f"tasks=[]: name the tasks, as in suite={self.name} suite.tasks=[arc_easy,piqa]")
        if self.prefetch and not self.data_dir:
            lines.append("data_dir is not set: suite.prefetch=true needs the folder to fill")
        if lines:
            raise Mistakes(*lines)
        return self

    @property
    def needs_run(self) -> bool:
        return not self.prefetch

    def fetch(self) -> None:
        download(self.tasks, self.data_dir)

    def check(self) -> None:
        load_tasks(self.tasks, self.data_dir)

    def run(self, run: LoadedRun, options: EvalConfig) -> Outcome | None:
        """Return the scores of the tasks, as fractions, and their average, on rank 0."""
        with undisturbed():
            model = HarnessModel(run, options.batch_size, self.max_length)
            found = lm_eval.simple_evaluate(
                model,
                tasks=load_tasks(self.tasks, self.data_dir, run),
                num_fewshot=self.num_fewshot,
                limit=options.limit,
                bootstrap_iters=1000,
                torch_random_seed=None,  # our model's draws have seeds of their own
                log_samples=self.samples,
                task_manager=TaskManager(include_defaults=False),
            )
        return outcome_of(run, self, found, model.shortened) if rank() == 0 else None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Seed Python and numpy as the harness's command does before it loads tasks, some of which draw, and afterwards
    restore their random state; show none of the harness's progress, and start no worker processes."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    datasets.disable_progress_bars()
    quiet = patch.object(lm_eval.api.task, "tqdm", functools.partial(lm_eval.api.task.tqdm, disable=True))
    try:
        with quiet, patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        datasets.enable_progress_bars()


def outcome_of(run: LoadedRun, suite: HarnessSuite, found: dict, shortened: int) -> Outcome:
    """Return the harness's results as ours: flat, the tasks' own scores first.

    `shortened` is the number of requests that lost their beginning.
    """
    results, stderr = flat_scores(found["results"])
    counted = {task: headline(suite, task, results) for task in asked(suite.tasks, found)}
    scores = [results[f"{task}/{metric}"] for task, metric in counted.items()]
    if len(scores) > 1 and {*map(unit_of, counted.values())} == {"%"}:
        results["average"] = sum(scores) / len(scores)
    table = str(score_table(run, suite.name, counted, results, stderr))
    if shortened:
        limit = f"suite.max_length={suite.max_length or run.context}"
        table += f"\n\n{shortened:,} requests were longer than {limit} tokens and lost their beginning"
    files = {".md": table + "\n"}
    if suite.samples:
        lines = [{"task": task, **sample} for task, samples in found["samples"].items() for sample in samples]
        files["_samples.jsonl"] = "".join(json.dumps(line, default=str) + "\n" for line in lines)
    shots = f"_{suite.num_fewshot}shot" if suite.num_fewshot else ""
    questions = {task: counts["effective"] for task, counts in found["n-samples"].items()}
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "datasets")}
    details = {"metrics": counted, "num_fewshot": suite.num_fewshot, "questions": questions, "shortened": shortened}
    return Outcome(
        results, stderr, tasks={task: task + shots for task in counted}, details=details, shown=table, files=files,
        versions=versions | {"tasks": found["versions"]},
    )  # fmt: skip


def flat_scores(by_task: dict[str, dict]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the harness's scores and their standard errors by `<task>/<metric>`, or `<task>/<metric>_<filter>`."""
    results, stderr = {}, {}
    for task, scores in by_task.items():
        for key, value in scores.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, int | float) and filtered:
                suffix = "" if filtered == "none" else f"_{filtered}"
                group = stderr if metric.endswith("_stderr") else results
                group[f"{task}/{metric.removesuffix('_stderr')}{suffix}"] = float(value)
    return results, stderr


def asked(tasks: list[str], found: dict) -> list[str]:
    """Return the tasks that have scores, in the suite's order; instead of a tag the tasks that it stands for."""
    scored = [task for task, scores in found["results"].items() if any("," in key for key in scores)]
    inside = {child for children in found.get("group_subtasks", {}).values() for child in children}
    of_tags = [task for task in scored if task not in tasks and task not in inside]
    return [task for task in tasks if task in scored] + of_tags


def headline(suite: HarnessSuite, task: str, results: dict[str, float]) -> str:
    """Return the metric of a task that counts: the suite's choice, else acc_norm, else acc, else its first."""
    metrics = [key.split("/", 1)[1] for key in results if key.rsplit("/", 1)[0] == task]
    wanted = [suite.metrics.get(task), "acc_norm", "acc", *metrics]
    return next(metric for metric in wanted if metric in metrics)


def score_table(
    run: LoadedRun, suite: str, counted: dict[str, str], results: dict[str, float], stderr: dict[str, float]
) -> Table:
    """Return the scores of the run, their standard errors, and the scores of the paper's models of the nearest size.

    `counted` has the metric of each task.
    """
    keys = {task: f"{task}/{metric}" for task, metric in counted.items()}
    if "average" in results:
        keys["average"] = "average"
    params = sum(getattr(p, "ds_numel", p.numel()) for p in run.model.parameters())  # the former under ZeRO-3
    rows = [
        [f"{run.config.run.name}, {params / 1e6:.3g}M", *(in_unit(key, results[key]) for key in keys.values())],
        ["± standard error", *(in_unit(key, stderr[key]) if key in stderr else "" for key in keys.values())],
    ]
    if suite in published.SUITES and published.tasks(suite).keys() >= counted.keys():
        size = published.nearest(suite, params)
        for row in published.rows(suite, size):
            scores = published.shown(suite, row, counted)
            rows.append([f"paper: {row['model']}, {size}", *(scores[task] for task in keys)])
    units = {unit_of(key) for key in keys.values()}
    named = {task: task if unit_of(key) == "%" else f"{task} {labelled(key)}" for task, key in keys.items()}
    return Table(["percent" if units == {"%"} else "task", *(keys if units == {"%"} else named.values())], rows)
