"""Runs side by side: `python -m eval.compare RUN ... [key=value ...]`

RUN is a run folder, a folder of a sweep (every run in it), or wandb:ENTITY/PROJECT[/GROUP]. Works while runs train.

  out=DIR            where the report goes; default: the runs' common parent/compare
  baseline=METHOD    what the others are compared with; default: mha, else the first
  metric=KEY         what is compared; default: val/loss, or val/bits_per_byte if only the tokenizers differ
  target=NUMBER      of the metric, for the tokens that it takes; default: the worst run's last
  confidence=0.95    of the intervals
  tolerance=0.05     of parameters and FLOPs, to be called matched

The regression gate, for one run: exit code 1 if it is worse than a stored reference.

  reference=FILE     a summary.json, or what update=true wrote
  tolerance=0.01     as a share of the reference's value
  metrics=[KEY,...]  what is judged; default: validation and evaluations
  update=true        write FILE from the run

Exit codes: 0 done, 1 the gate failed, 2 bad input.
"""

import os
import re
import shlex
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from configs.app import command, kind_of
from configs.block import Block
from configs.errors import ConfigError, Mistakes, each
from configs.kinds import OptionalPath, PathText
from configs.load import load
from eval.compare import gate, report, tables
from eval.compare.collect import Method, Run, all_runs, name_methods, read_run, run_folders
from eval.compare.fairness import Fairness, check, verdict
from eval.compare.from_wandb import fetch


class CompareConfig(Block):
    """The options, as the text above explains them."""

    runs: list[PathText]
    out: OptionalPath = None
    baseline: str | None = Field(None, min_length=1)
    metric: str | None = Field(None, min_length=1)
    target: float | None = Field(None, ge=-1e12, le=1e12)
    confidence: float = Field(0.95, gt=0, lt=1)
    tolerance: float | None = Field(None, ge=0, le=10)
    reference: OptionalPath = None
    metrics: list[str] = Field([])
    update: bool = False

    @model_validator(mode="after")
    def _fit(self):
        lines = []
        if not self.runs:
            lines.append("no runs given: name run folders, as in python -m eval.compare runs/A runs/B")
        if not self.reference:
            lines += [f"{key}: only goes with reference=FILE" for key in ("metrics", "update") if getattr(self, key)]
        if lines:
            raise Mistakes(*lines)
        if self.tolerance is None:
            self.tolerance = 0.01 if self.reference else 0.05
        return self


def parse(arguments: list[str]) -> CompareConfig:
    """Return run folders and key=value options, in any order, as a configuration. ConfigError for mistakes."""
    options = [word for word in arguments if re.match(r"(?!runs=)[a-z_]+=", word) and not os.path.exists(word)]
    if flags := [word for word in arguments if word.startswith("-")]:
        raise ConfigError(*(f"{flag}: options are key=value, as in out=DIR; --help lists them" for flag in flags))
    pairs = [option.partition("=")[::2] for option in options]
    tree = dict(each(read_option, pairs))
    return load(tree | {"runs": [word for word in arguments if word not in options]}, CompareConfig)


def read_option(pair: tuple[str, str]) -> tuple[str, Any]:
    """Return the key and the value of an option: texts as they stand, others as YAML."""
    key, text = pair
    if kind_of(key, CompareConfig) is str:
        return key, text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text}: cannot be read ({str(error).splitlines()[0]})") from None
    if value is None:
        raise ConfigError(f"{key}={text}: has no value; leave it out for the default")
    return key, value


def gather(config: CompareConfig) -> tuple[list[Run], list[str]]:
    """Return the runs that are named, and why others of them cannot be read; those of W&B are fetched into `out` first.

    ConfigError if none can be read.
    """

    def folders(name: str) -> list[Path]:
        return fetch(name, Path(config.out or "runs/wandb")) if name.startswith("wandb:") else run_folders(name)

    runs, unreadable = [], []
    for folder in dict.fromkeys(chain.from_iterable(each(folders, config.runs))):
        try:
            runs.append(read_run(folder))
        except ConfigError as error:
            unreadable += error.errors
    if not runs:
        raise ConfigError(*unreadable)
    return runs, [f"left out: {line}" for line in unreadable]


def choose(config: CompareConfig, methods: list[Method], fairness: Fairness) -> tables.Question:
    """Return what is compared, from the options and what the runs have in common."""
    only_bytes = fairness.same_text and not fairness.same_tokens
    metric = config.metric or ("val/bits_per_byte" if only_bytes else "val/loss")
    logged = {key for run in all_runs(methods) for line in run.lines for key in line}
    if config.metric and config.metric not in logged:
        raise ConfigError(f"metric={metric}: no run has logged it; there are {', '.join(sorted(logged))}")
    names = {method.mechanism: method for method in reversed(methods)} | {method.name: method for method in methods}
    if config.baseline and config.baseline not in names:
        known = ", ".join(method.name for method in methods)
        raise ConfigError(f"baseline={config.baseline}: no such method; there are {known}")
    evaluated = [at for run in all_runs(methods) if (at := [tokens for tokens, _ in run.points(metric)])]
    shared = set.intersection(*map(set, evaluated)) if evaluated else set()
    question = tables.Question(
        metric=metric,
        tokens=max(shared, default=min((at[-1] for at in evaluated), default=None)),
        between=bool(evaluated and not shared),
        baseline=names.get(config.baseline or "mha", methods[0]),
        confidence=config.confidence,
        target=config.target,
        comparable=fairness.same_tokens or (fairness.same_text and metric == "val/bits_per_byte"),
    )
    if question.target is None:
        question.target = max((x for method in methods for x in question.values(method).values()), default=None)
    return question


def compare(config: CompareConfig, runs: list[Run], left_out: list[str], command: str) -> int:
    """Write the report on the runs and print its verdict and its first table; return the exit code."""
    methods = name_methods(runs)
    fairness = check(methods, config.tolerance)
    question = choose(config, methods, fairness)
    out = Path(config.out or Path(os.path.commonpath([run.dir.parent for run in runs]), "compare"))
    words, reasons = verdict(fairness, methods)
    path = report.write(methods, (words, reasons + left_out), fairness, question, command, out)
    print("\n  ".join([words, *reasons, *left_out]))
    print(tables.final(methods, question))
    print(f"\nThe report is {path} and {path.with_suffix('.html')}")
    return 0


def main(config: CompareConfig, command: str) -> int:
    runs, left_out = gather(config)
    if not config.reference:
        return compare(config, runs, left_out, command)
    if len(runs) != 1 or left_out:
        raise ConfigError(f"reference={config.reference}: judges one run, and {len(runs)} are given")
    if config.update:
        return gate.update(runs[0], config.reference)
    return gate.judge(runs[0], config.reference, config.tolerance, config.metrics)


if __name__ == "__main__":
    command(lambda arguments: main(parse(arguments), shlex.join(["python", "-m", "eval.compare", *arguments])), __doc__)
