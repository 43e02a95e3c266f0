"""Runs side by side: `python -m eval.compare RUN ... [key=value ...]`

RUN is a run folder, a folder of a sweep (every run in it), or wandb:ENTITY/PROJECT[/GROUP]. Works while runs train.

  out=DIR            where the report goes; default: the runs' common parent/compare
  baseline=METHOD    what the others are compared with; default: mha, else the first
  metric=KEY         what is compared; default: val/loss, or val/bits_per_byte if only the tokenizers differ
  target=NUMBER      of the metric, for the tokens that it takes; default: the worst run's last
  confidence=0.95    of the intervals
  smoothing=0.02     of training curves: the share of a run that a point averages over
  tolerance=0.05     of parameters and FLOPs, to be called matched
  time=true          compare training times too; only if nothing else used the machines

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
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.app import command
from configs.errors import ConfigError
from configs.load import load
from eval.compare import gate, report, tables
from eval.compare.collect import Method, Run, name_methods, read_run, run_folders
from eval.compare.config import CompareConfig
from eval.compare.fairness import Fairness, check, verdict
from eval.compare.from_wandb import fetch


def parse(arguments: list[str]) -> CompareConfig:
    """Return run folders and key=value options, in any order, as a configuration. ConfigError for mistakes."""
    options = [word for word in arguments if re.match(r"[a-z_]+=", word) and not Path(word).exists()]
    flags = [word for word in arguments if word.startswith("-")]
    if flags:
        raise ConfigError(*(f"{flag}: options are key=value, as in out=DIR; --help lists them" for flag in flags))
    try:
        tree = OmegaConf.from_dotlist(options)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    if "runs" in tree:
        raise ConfigError("runs=...: name the run folders without a key, as in python -m eval.compare runs/A runs/B")
    tree.runs = [word for word in arguments if word not in options]
    return load(tree, CompareConfig)


def gather(config: CompareConfig) -> list[Run]:
    """Return the runs that are named; those of W&B are fetched into `out` first."""
    folders = []
    for name in config.runs:
        if name.startswith("wandb:"):
            folders += fetch(name, Path(config.out or "runs/wandb"))
        else:
            folders += run_folders([name])
    return [read_run(folder) for folder in dict.fromkeys(folders)]


def choose(config: CompareConfig, methods: list[Method], fairness: Fairness) -> tables.Question:
    """Return what is compared, from the options and what the runs have in common."""
    only_bytes = fairness.same_text and not fairness.same_tokens
    metric = config.metric or ("val/bits_per_byte" if only_bytes else "val/loss")
    logged = {key for method in methods for run in method.runs for line in run.lines for key in line}
    if config.metric and config.metric not in logged:
        raise ConfigError(f"metric={metric}: no run has logged it; there are {', '.join(sorted(logged))}")
    names = {method.mechanism: method for method in reversed(methods)} | {method.name: method for method in methods}
    if config.baseline and config.baseline not in names:
        known = ", ".join(method.name for method in methods)
        raise ConfigError(f"baseline={config.baseline}: no such method; there are {known}")
    baseline = names.get(config.baseline or "mha", methods[0])
    shared = set.intersection(
        *({tokens for tokens, _ in run.points(metric)} for method in methods for run in method.runs)
    )
    tokens = max(shared, default=None)
    comparable = fairness.same_tokens or (fairness.same_text and metric == "val/bits_per_byte")
    question = tables.Question(
        metric, tokens, baseline, config.confidence, config.target, config.time, comparable
    )  # fmt: skip
    if question.target is None:
        question.target = max(
            (value for method in methods for value in question.values(method).values()), default=None
        )  # fmt: skip
    return question


def default_out(folders: list[Path]) -> Path:
    return Path(os.path.commonpath([folder.parent for folder in folders])) / "compare"


def compare(config: CompareConfig, runs: list[Run], command: str) -> int:
    """Write the report on the runs and print its verdict and its first table; return the exit code."""
    methods = name_methods(runs)
    fairness = check(methods, config.tolerance)
    question = choose(config, methods, fairness)
    out = Path(config.out) if config.out else default_out([run.dir for run in runs])
    path = report.write(methods, fairness, question, command, config.smoothing, out)
    words, reasons = verdict(fairness, methods)
    print("\n  ".join([words, *reasons]))
    print(tables.final(methods, question))
    print(f"\nThe report is {path} and {path.with_suffix('.html')}")
    return 0


def judge(config: CompareConfig, runs: list[Run]) -> int:
    """Print how a run differs from the reference (or write that from it); return 1 if the run is worse, else 0."""
    path = config.reference
    if len(runs) != 1:
        raise ConfigError(f"reference={path}: judges one run, and {len(runs)} are in {config.runs[0]}")
    (run,) = runs
    if config.update:
        gate.update(run, path)
        print(f"{path}: written from {run.config.run.name}")
        return 0
    reference = gate.read_reference(path)
    found, worse = gate.judge(run, reference, config.tolerance, config.metrics)
    print(found)
    if reference["tokens"] not in (None, run.tokens):
        print(f"The reference is of {reference['tokens']:,} tokens, the run of {run.tokens:,}.")
    if worse:
        print(f"Worse than {path} by more than {config.tolerance:.2%}, or missing: {', '.join(worse)}")
        return 1
    print(f"Not worse than {path} by more than {config.tolerance:.2%}.")
    return 0


def main(config: CompareConfig, command: str) -> int:
    runs = gather(config)
    return judge(config, runs) if config.reference else compare(config, runs, command)


if __name__ == "__main__":
    command(lambda arguments: main(parse(arguments), shlex.join(["python", "-m", "eval.compare", *arguments])), __doc__)
