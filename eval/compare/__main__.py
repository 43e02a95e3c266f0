"""Runs side by side: `python -m eval.compare RUN ... [key=value ...]`

RUN is a run folder, a folder of a sweep (every run in it), or wandb:ENTITY/PROJECT[/GROUP]. Works while runs train.

  out=DIR            where the report goes; default: the runs' common parent/compare
  baseline=METHOD    what the others are compared with; default: mha, else the first
  metric=KEY         what is compared; default: val/loss, or val/bits_per_byte where only the tokenizers differ
  target=NUMBER      of the metric, for the tokens that it takes; default: the worst run's last
  confidence=0.95    of the intervals
  smoothing=0.02     of training curves: the share of a run that a point averages over
  tolerance=0.05     of parameters and FLOPs, to be called matched

The regression gate, for one run: exit code 1 where it is worse than a stored reference.

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
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from configs.app import command
from configs.errors import ConfigError
from configs.load import load_flat
from configs.schema_compare import CompareConfig
from eval.compare import gate, report, tables
from eval.compare.collect import Method, name_methods, read_run, run_folders
from eval.compare.fairness import Fairness, check, verdict


def parse(arguments: list[str]) -> CompareConfig:
    """Run folders and key=value options, in any order. ConfigError for unknown keys and wrong values."""
    is_option = lambda text: re.match(r"[a-z_]+=", text) and not Path(text).exists()  # noqa: E731
    options = [argument for argument in arguments if is_option(argument)]
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise ConfigError(*(f"{flag}: options are key=value, as in out=DIR; --help lists them" for flag in flags))
    try:
        tree = OmegaConf.from_dotlist(options)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    if "reference" in tree and "tolerance" not in tree:
        tree.tolerance = 0.01
    if "runs" in tree:
        raise ConfigError("runs=...: name the run folders without a key, as in python -m eval.compare runs/A runs/B")
    tree.runs = [argument for argument in arguments if argument not in options]
    return load_flat(tree, CompareConfig)


def gather(config: CompareConfig, out: Path | None) -> list:
    """The runs that are named, those of W&B fetched into `out` first."""
    folders = []
    for name in config.runs:
        if name.startswith("wandb:"):
            from eval.compare.from_wandb import fetch

            folders += fetch(name, out or Path("runs") / "wandb")
        else:
            folders += run_folders([name])
    return [read_run(folder) for folder in dict.fromkeys(folders)]


def choose(config: CompareConfig, methods: list[Method], fairness: Fairness) -> tables.Question:
    """What is compared, from the options and what the runs have in common."""
    metric = config.metric
    if metric is None:
        only_bytes = fairness.same_text and not fairness.same_tokens
        metric = "val/bits_per_byte" if only_bytes else "val/loss"
    logged = {key for method in methods for run in method.runs for line in run.lines for key in line}
    if config.metric and config.metric not in logged:
        raise ConfigError(f"metric={metric}: no run has logged it; there are {', '.join(sorted(logged))}")
    named = {method.name: method for method in methods}
    by_mechanism = {method.first.config.model.name: method for method in reversed(methods)}
    if config.baseline and config.baseline not in named | by_mechanism:
        raise ConfigError(f"baseline={config.baseline}: no such method; there are {', '.join(named)}")
    wanted = config.baseline or "mha"
    baseline = named.get(wanted) or by_mechanism.get(wanted) or methods[0]
    seen = [{tokens for tokens, _ in run.points(metric)} for method in methods for run in method.runs]
    shared = set.intersection(*seen) if seen else set()
    tokens = max(shared) if shared else None
    target = config.target
    if target is None:
        target = max((value for method in methods for value in method.at(metric, tokens).values()), default=None)
    return tables.Question(metric, tokens, baseline, config.confidence, target)


def show(console: Console, found: tables.Table) -> None:
    shown = RichTable(box=box.SIMPLE_HEAD)
    for number, column in enumerate(found.columns):
        shown.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in found.rows:
        shown.add_row(*row)
    whole = console.measure(shown, options=console.options.update(max_width=10_000)).maximum
    console.width = max(console.width, whole)  # rather over the edge than cut
    console.print(shown)


def default_out(folders: list[Path]) -> Path:
    return Path(os.path.commonpath([folder.parent for folder in folders])) / "compare"


def main(config: CompareConfig, command: str) -> int:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    runs = gather(config, config.out and Path(config.out))
    if config.reference:
        if len(runs) != 1:
            raise ConfigError(f"reference={config.reference}: judges one run, and {len(runs)} are in {config.runs[0]}")
        if config.update:
            gate.update(runs[0], config.reference)
            console.print(f"{config.reference}: written from {runs[0].name}")
            return 0
        return gate.gate(runs[0], config.reference, config.tolerance, config.metrics, console, show)
    methods = name_methods(runs)
    fairness = check(methods, config.tolerance)
    question = choose(config, methods, fairness)
    out = Path(config.out) if config.out else default_out([run.dir for run in runs])
    comparison = report.Comparison(methods, fairness, question, command, config.smoothing)
    path = report.write(comparison, out)
    words, reasons = verdict(fairness, methods)
    console.print(words)
    for reason in reasons:
        console.print(f"  {reason}")
    final = tables.final(methods, question, report.is_comparable(fairness, question))
    show(console, final)
    for note in final.notes:
        console.print(note)
    console.print(f"\nThe report is {path} and {path.with_suffix('.html')}")
    return 0


if __name__ == "__main__":
    command(lambda arguments: main(parse(arguments), shlex.join(["python", "-m", "eval.compare", *arguments])), __doc__)
