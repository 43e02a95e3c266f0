"""What an evaluation leaves: results/<suite>.json, what was drawn, a line in metrics.jsonl, and the same in W&B."""

import importlib.metadata
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from configs.errors import ConfigError
from eval.loading import LoadedRun
from training.checkpoint import newest, write_atomic
from training.metrics import metrics_line
from training.wandb_run import log_evaluation


@dataclass
class Outcome:
    """Results by flat key: `loss`, or `<task>/<metric>` where they belong to tasks."""

    results: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, str] | None = None  # the tasks to log, and the names to log them by; None: there are no tasks
    versions: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)  # what else the JSON file holds: curves, settings
    shown: list[RenderableType] = field(default_factory=list)  # in the terminal; default: the results
    files: dict[str, str | Callable[[Path], None]] = field(default_factory=dict)  # by suffix: text, or what draws it

    def metrics(self, suite: str) -> dict[str, float]:
        """The results by the names that they have in metrics.jsonl and W&B."""
        named = {}
        for key, value in self.results.items():
            task, slash, metric = key.partition("/")
            if self.tasks is None or not slash:
                named[f"eval/{suite}/{key}"] = value
            elif task in self.tasks:
                named[f"eval/{self.tasks[task]}/{metric}"] = value
        return named


def save(run: LoadedRun, suite: str, outcome: Outcome, limit: int | None, variant: str = "") -> Path:
    """Write the results and the files beside them; `variant` goes into the files' names. Rank 0 calls it."""
    record = {
        "run": run.config.run.name,
        "suite": suite,
        "step": run.step,
        "tokens": run.tokens,
        "limit": limit,
        "results": outcome.results,
        "stderr": outcome.stderr,
        "versions": {name: importlib.metadata.version(name) for name in ("torch",)} | outcome.versions,
    }
    folder = run.dir / "results"
    folder.mkdir(exist_ok=True)
    for suffix, content in outcome.files.items():
        path = folder / f"{suite}{variant}{suffix}"
        if isinstance(content, str):
            write_atomic(path, content)
        else:
            draw(content, path)
    path = folder / f"{suite}{variant}.json"
    write_atomic(path, json.dumps(finite(record | outcome.details), indent=2) + "\n")
    return path


def check_writable(run_dir: Path) -> None:
    """ConfigError where the results of an evaluation would find no place: before it, not after it."""
    folder = Path(run_dir) / "results"
    existing = folder if folder.exists() else folder.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ConfigError(f"{folder}: cannot be written; evaluate a copy of the run folder")


def draw(picture: Callable[[Path], None], path: Path) -> None:
    """Write a picture so that a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    picture(partial)
    os.replace(partial, path)


def finite(value):
    """The same with null for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def variant_of(run: LoadedRun, step: int | None, rope_scaling: str, rope_factor: float | None) -> str:
    """What tells the files of an older checkpoint, or of a scaled RoPE, from those of the run as it stands."""
    latest = None if step is None else newest(run.dir, warn=lambda line: None)
    older = latest is not None and latest.name != f"step_{step:08d}"
    scaled = "" if rope_scaling == "none" else f"_{rope_scaling}{rope_factor:g}"
    return (f"_step_{step:08d}" if older else "") + scaled


def log(run: LoadedRun, suite: str, metrics: dict[str, float], path: Path) -> None:
    """Add the results to the run, at the step that they belong to: a line of metrics.jsonl, and W&B.

    A run that is not finished has one writer, the training process, which finds them in its inbox. `path` is what
    `save` returned.
    """
    inbox = inbox_of(run.dir)
    inbox.mkdir(parents=True, exist_ok=True)
    found = {"step": run.step, "tokens": run.tokens, "metrics": metrics}
    write_atomic(inbox / f"{suite}_step_{run.step:08d}.json", json.dumps(found))
    if (run.dir / "summary.json").exists():
        with open(run.dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            collect(run.dir, lambda *found: file.write(metrics_line(*found)))
    log_evaluation(run.dir, path.stem, json.loads(path.read_text()), sorted(path.parent.glob(f"{path.stem}*.png")))


def inbox_of(run_dir: Path) -> Path:
    return Path(run_dir) / "results" / "inbox"


def collect(
    run_dir: Path, log: Callable[[int, int, dict[str, float]], None], warn: Callable[[str], None] = print
) -> None:
    """Pass on (step, tokens, metrics) of what evaluations have left in the inbox, each to one caller.

    What cannot be taken from there is named to `warn` and left.
    """
    for path in sorted(inbox_of(run_dir).glob("*.json")):
        try:
            found = json.loads(path.read_text())
            line = found["step"], found["tokens"], found["metrics"]
            path.unlink()
        except FileNotFoundError:
            continue  # somebody else was here
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"{path}: these results cannot be logged ({type(error).__name__}: {error})")
            continue
        log(*line)


def show(outcome: Outcome, path: Path) -> None:
    """Print the results and where they are."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 120)  # a table is better cut by the terminal than wrapped
    for item in outcome.shown:
        console.print(item)
    if not outcome.shown:
        for name, value in outcome.results.items():
            spread = f"  ± {outcome.stderr[name]:.4f}" if name in outcome.stderr else ""
            console.print(f"{name:>16}  {value:,.4f}{spread}" if isinstance(value, float) else f"{name:>16}  {value:,}")
    console.print(f"{'written to':>16}  {path}")
    for suffix in outcome.files:
        console.print(f"{'':>16}  {path.with_name(path.stem + suffix)}")
