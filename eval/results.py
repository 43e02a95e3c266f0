"""What an evaluation leaves: results/<suite>.json, files next to it, a line in metrics.jsonl, and the same in W&B."""

import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from rich.console import Console

from configs.errors import ConfigError
from data.files import write_atomic
from eval.loading import LoadedRun
from eval.units import in_unit
from training.jsonl import append_line
from training.metrics import metrics_line
from training.stored import is_finished
from training.wandb_run import add_evaluation


@dataclass
class Outcome:
    """Results by flat key: `loss`, or `<task>/<metric>` if they belong to tasks."""

    results: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, str] | None = None  # the tasks to log, and the names to log them by; None: there are no tasks
    versions: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)  # what else the JSON file holds: curves, settings
    shown: str = ""  # in the terminal; default: the results
    files: dict[str, str | Callable[[Path], None]] = field(default_factory=dict)  # by suffix: text, or what draws it

    def metrics(self, suite: str) -> dict[str, float]:
        """Return the results by the names that they have in metrics.jsonl and W&B."""
        named = {}
        for key, value in self.results.items():
            task, slash, metric = key.partition("/")
            if self.tasks is None or not slash:
                named[f"eval/{suite}/{key}"] = value
            elif task in self.tasks:
                named[f"eval/{self.tasks[task]}/{metric}"] = value
        return named


def save(run: LoadedRun, name: str, suite: str, outcome: Outcome, limit: int | None) -> Path:
    """Write results/<name>.json and the files next to it; return its path."""
    versions = {"torch": importlib.metadata.version("torch")} | outcome.versions
    record = {
        "run": run.config.run.name, "suite": suite, "step": run.step, "tokens": run.tokens, "limit": limit,
        "results": outcome.results, "stderr": outcome.stderr, "versions": versions,
    }  # fmt: skip
    path = run.dir / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    for suffix, content in outcome.files.items():
        file = path.with_name(path.stem + suffix)
        if callable(content):
            content(file)
        else:
            write_atomic(file, content)
    write_atomic(path, to_json(record | outcome.details, indent=2, inf_nan_mode="null") + b"\n")
    return path


def check_writable(run_dir: str) -> None:
    """Raise a ConfigError, before an evaluation and not after it, if its results could not be written."""
    folder = Path(run_dir) / "results"
    existing = folder if folder.exists() else folder.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ConfigError(f"{folder}: cannot be written; evaluate a copy of the run folder")


# --- results/inbox: a run in training has one writer, the training process, which takes what evaluations leave there


def inbox_of(run_dir: str | Path) -> Path:
    return Path(run_dir) / "results" / "inbox"


def pending(run_dir: str | Path, suite: str, step: int) -> Path:
    """Return the mark of a submitted evaluation that has not ended yet."""
    return inbox_of(run_dir) / f"{suite}_step_{step:08d}.pending"


def log(run: LoadedRun, suite: str, outcome: Outcome, path: Path) -> None:
    """Add results to metrics.jsonl and W&B at the step that they belong to; `path` is what `save` returned."""
    inbox = inbox_of(run.dir)
    inbox.mkdir(parents=True, exist_ok=True)
    found = {"step": run.step, "tokens": run.tokens, "metrics": outcome.metrics(suite)}
    write_atomic(inbox / f"{path.stem}_step_{run.step:08d}.json", json.dumps(found))
    if is_finished(run.dir):
        collect(run.dir, lambda *found: append_line(run.dir / "metrics.jsonl", metrics_line(*found)))
        plots = [path.with_name(path.stem + suffix) for suffix in outcome.files if suffix.endswith(".png")]
        add_evaluation(run.dir, run.config.wandb, plots)


def collect(
    run_dir: str | Path, log: Callable[[int, int, dict[str, float]], None], warn: Callable[[str], None] = print
) -> None:
    """Pass (step, tokens, metrics) of what is in the inbox to `log`, and whatever cannot be taken from it to `warn`.

    Of several callers one gets each result.
    """
    for path in sorted(inbox_of(run_dir).glob("*.json")):
        try:
            found = json.loads(path.read_text())
            line = found["step"], found["tokens"], found["metrics"]
            path.unlink()
        except FileNotFoundError:
            continue  # another process was faster
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"{path}: these results cannot be logged ({type(error).__name__}: {error})")
            continue
        log(*line)


def show(outcome: Outcome, path: Path) -> None:
    """Print the results and where they are."""
    console = Console(highlight=False, soft_wrap=True)
    if outcome.shown:
        console.print(outcome.shown, markup=False)
    else:
        for name, value in outcome.results.items():
            spread = f"  ± {in_unit(name, outcome.stderr[name])}" if name in outcome.stderr else ""
            console.print(f"{name:>16}  {in_unit(name, value)}{spread}")
    console.print(f"{'written to':>16}  {path}")
    for suffix in outcome.files:
        console.print(f"{'':>16}  {path.with_name(path.stem + suffix)}")
