"""Show the runs of a project: `python -m slurm.status [FOLDER ...]` of run folders, or of folders of them (runs).

Everything is read from the run folders, so it works without Slurm; if Slurm is here, it tells whether a job waits or
runs, or how it ended. What cannot be read in a run folder is a problem of that run alone.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from configs.app import command
from configs.errors import ConfigError, each
from configs.kinds import has_controls, usable_path
from configs.load import flatten
from slurm import scheduler
from slurm.job_files import Log, Submission, log_paths, read_jobs, read_logs, read_submission
from training.jsonl import read_lines
from training.stored import (
    checkpoint_dirs,
    checkpoint_step,
    is_count,
    is_finished,
    last_step,
    problems,
    read_events,
    read_tree,
    telling_keys,
)

QUIET_AFTER = 600  # seconds in which a running job should have written something
DIFFERENCES = 3  # keys in the column `differs`
OF_EACH_RUN = ("run.name", "run.dir", "data.dir", "wandb.", "device")  # keys that say nothing about how runs compare
SHOWN = {"tokens": ",", "train/loss": ".4f", "val/loss": ".4f", "perf/tokens_per_second": ",.0f"}
COUNTS = ("step", "tokens")
Queue = dict[str, tuple[str, str]]  # (state, reason for waiting) of the jobs that wait or run
T = TypeVar("T")


@dataclass
class Status:
    run: str
    state: str = "unknown"  # finished, running, pending, requeued, stopped, failed or unknown
    problems: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))  # the last number of each
    horizon: int | None = None
    checkpoint: tuple[int, float] | None = None  # the step of the most recent complete one, and its age in seconds
    restarts: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # flat `key: value` pairs of the configuration

    def read(self, of: Callable[..., T], *arguments, otherwise: T) -> T:
        """Return `of(*arguments)`; if that cannot be read, note why and return `otherwise`."""
        try:
            return of(*arguments)
        except ConfigError as error:
            found = error.errors
        except OSError as error:
            found = [f"{error.filename}: cannot be read ({error.strerror})"]
        except Exception as error:  # whatever a foreign file may cause: the other runs are to be shown
            found = [f"what it holds makes no sense ({type(error).__name__}: {error})"]
        self.problems += [line for line in found if line not in self.problems]
        return otherwise


def find_runs(folders: list[str]) -> list[Path]:
    """Return the run folders among and in `folders`, at any depth. ConfigError for a folder that has none."""

    def is_run(path: Path) -> bool:
        return any((path / name).exists() for name in ("config.yaml", "job.json")) or bool(log_paths(path))

    def inside(path: Path) -> list[Path]:
        try:
            if is_run(path):
                return [path]
            folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
        except OSError:  # a folder that cannot be opened is shown as a run with that problem
            return [path]
        return [run for folder in folders for run in ([] if is_loop(folder) else inside(folder))]

    def is_loop(path: Path) -> bool:
        return path.is_symlink() and path.resolve() in path.absolute().parents

    def runs_in(folder: str) -> list[Path]:
        try:
            usable_path(folder)
        except ValueError as error:
            raise ConfigError(f"{folder}: {error}") from None
        runs = inside(Path(folder)) if Path(folder).is_dir() else []
        if not runs:
            raise ConfigError(f"{folder}: is not a run folder and has none")
        return runs

    return list(chain.from_iterable(each(runs_in, folders)))


def jobs_of(folder: Path) -> list[str]:
    """Return the ids of the jobs that a run folder names, without those in files that cannot be read."""
    status = Status(str(folder))
    named = status.read(read_jobs, folder, otherwise={}).values()
    return [*named, *(job for kind in ("train", "eval") for job in status.read(log_paths, folder, kind, otherwise={}))]


def read_status(folder: Path, queue: Queue) -> Status:
    """Return the status of a run, given the jobs in Slurm's queue (`scheduler.queued`)."""
    status = Status(str(folder))
    status.read(fill, status, folder, queue, otherwise=None)
    return status


def fill(status: Status, folder: Path, queue: Queue) -> None:
    """Read each fact by itself, so that one that cannot be read costs no other."""
    has_config = (folder / "config.yaml").exists()  # a job that waits has none yet
    status.settings = flatten(status.read(read_tree, folder, otherwise={})) if has_config else {}
    if has_config and status.settings:
        status.horizon = status.read(horizon, status.settings, otherwise=None)
    status.metrics |= status.read(last_numbers, folder, otherwise={})
    status.checkpoint = status.read(last_checkpoint, folder, otherwise=None)
    status.restarts = status.read(restarts, folder, otherwise=0)
    submitted = status.read(read_submission, folder, otherwise=Submission())
    logs = status.read(read_logs, folder, otherwise=[])
    status.state, problem = status.read(find_state, folder, logs, submitted.jobs, queue, otherwise=("unknown", None))
    status.problems += [problem] if problem else []
    evaluations = status.read(read_logs, folder, "eval", otherwise=[])
    if status.state != "finished":  # what was submitted with the training still waits for it, or went with it
        submitted = Submission()
    status.problems += status.read(failed_evaluations, folder, evaluations, submitted, queue, otherwise=[])


def horizon(settings: dict[str, Any]) -> int:
    """Return the last step of a run with this configuration. ConfigError for limits that are no numbers."""
    keys = [f"trainer.{key}" for key in ("max_steps", "max_tokens", "seq_len", "global_batch_size")]
    values = [settings.get(key) for key in keys]
    wrong = [
        f"config.yaml: {key}={value!r}: must be a positive number"
        for key, value in zip(keys, values, strict=True)
        if not (is_count(value) and value) and not (value is None and key in keys[:2])
    ]
    if values[:2] == [None, None]:
        wrong.append(f"config.yaml: has neither {keys[0]} nor {keys[1]}")
    if wrong:
        raise ConfigError(*wrong)
    steps, tokens, length, batch = values
    return last_step(steps, tokens, length * batch)


def last_numbers(folder: Path) -> dict[str, float]:
    """Return the last number of each metric. ConfigError for a line whose step, tokens or metrics are no numbers."""
    found = {}
    for line in read_lines(folder / "metrics.jsonl"):
        for key, value in line.items():
            if (key in COUNTS and not is_count(value)) or (key in SHOWN and not is_number(value)):
                raise ConfigError(f"metrics.jsonl: has a line with {key}={value!r}, which is no number")
            found |= {key: value} if is_number(value) and value is not None else {}
    return found


def is_number(value: Any) -> bool:
    """Return whether it is a number as metrics.jsonl has them; null stands for one that is not finite."""
    return value is None or is_count(value) or isinstance(value, float)


def last_checkpoint(folder: Path) -> tuple[int, float] | None:
    """Return (step, age in seconds) of the most recent checkpoint that is complete by its files' sizes."""
    for path in reversed(checkpoint_dirs(folder)):
        if not problems(path, checksums=False):
            return checkpoint_step(path), time.time() - (path / "manifest.json").stat().st_mtime
    return None


def restarts(folder: Path) -> int:
    return max(0, sum(event.get("event") == "start" for event in read_events(folder)) - 1)


def find_state(folder: Path, logs: list[Log], submitted: dict[str, str], queue: Queue) -> tuple[str, str | None]:
    """Return (the state of a run, its problem)."""
    if is_finished(folder):
        return "finished", None
    jobs = [*(log.job for log in reversed(logs)), *([submitted["train"]] if "train" in submitted else [])]
    files = [path for path in (folder / "metrics.jsonl", folder / "config.yaml") if path.exists()]
    written = [*(log.written for log in logs), *(path.stat().st_mtime for path in files)]
    quiet = time.time() - max(written, default=0)
    silence = f"nothing written for {duration(quiet)}" if written else "has not started"
    for job in jobs:
        if job in queue:
            state, reason = queue[job]
            if state == "RUNNING":
                return "running", silence if quiet > QUIET_AFTER else None
            return state.lower(), f"waits: {reason}" if state == "PENDING" else None
    report, found = (logs[-1].report, logs[-1].fault) if logs else ("", None)
    if report.startswith("failed"):
        return "failed", "; ".join(filter(None, [report, found]))
    ended = scheduler.ended(jobs[0]) if jobs else None
    if report.endswith("requeueing") and not ended:
        return "requeued", None
    if quiet < QUIET_AFTER and not ended and not (found and " JOB " in f" {found} "):
        return "running", None
    end = f"job {jobs[0]} ended as {ended}" if ended else silence
    return "stopped", "; ".join(filter(None, [end, found or trouble(folder)]))


def trouble(folder: Path) -> str | None:
    """Return what is wrong by the run's own files: its last event, its last loss, its most recent checkpoint."""
    event = next(reversed(read_events(folder)), {})
    if "reason" in event:  # a rollback, giving up, a checkpoint that was not saved
        return f"{event.get('event')} at step {event.get('step')}: {event['reason']}"
    losses = [line for line in read_lines(folder / "metrics.jsonl") if "train/loss" in line]
    if losses and losses[-1]["train/loss"] is None:
        return f"the loss of step {losses[-1].get('step')} is not finite"
    newest = checkpoint_dirs(folder)[-1:]
    return next((line for path in newest for line in problems(path)), None)


def failed_evaluations(folder: Path, logs: list[Log], submitted: Submission, queue: Queue) -> list[str]:
    """Return which evaluations ended without results, a line each: of those that did the same, the last one counts.

    Those that were repeated since, by whatever command, are left out.
    """
    lines = []
    for log in {log.work or log.job: log for log in logs}.values():
        if log.job in queue or log.report == "done" or (log.suites and has_results(folder, log.suites, log.written)):
            continue
        ended, quiet = None, time.time() - log.written
        if log.report.startswith("failed"):
            end = log.report
        elif ended := scheduler.ended(log.job):
            end = f"ended as {ended}"
        elif quiet > QUIET_AFTER:
            end = f"has written nothing for {duration(quiet)}"
        else:
            continue
        lines.append("; ".join(filter(None, [f"evaluation job {log.job} {end}", log.fault])))
    job = submitted.jobs.get("eval")
    started = any(
        log.job == job or (log.suites == submitted.suites and log.written >= submitted.time)  # a task of an array has
        for log in logs  # two ids: that of the array and its number, and one of its own, by which its log is called
    )
    if job and job not in queue and not started and not has_results(folder, submitted.suites, submitted.time):
        end = f"ended as {ended}" if (ended := scheduler.ended(job)) else "is no longer in the queue"
        lines.append(f"evaluation job {job} {end}, and there are no results of {', '.join(submitted.suites)}")
    return lines


def has_results(folder: Path, suites: list[str], since: float) -> bool:
    """Return whether all suites have results that were written later."""
    found = [(path.name, path.stat().st_mtime) for path in folder.glob("results/*.json")]
    return all(any(name.startswith(suite) and at > since for name, at in found) for suite in suites)


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))  # as in 1 day, 2:03:04


def differences(statuses: list[Status]) -> list[str]:
    """Return for each run the few settings in which it differs from the others that are shown."""
    everyone = [
        {key: value for key, value in status.settings.items() if not key.startswith(OF_EACH_RUN)} for status in statuses
    ]
    known = [settings for settings in everyone if settings]
    return [" ".join(f"{key}={own.get(key)}" for key in telling_keys(own, known)[:DIFFERENCES]) for own in everyone]


def plain(text: str) -> Text:
    """Return a text that is shown as it stands, without markup, on one line."""
    return Text("".join(c.encode("unicode_escape").decode() if has_controls(c) else c for c in text))


def cells(status: Status) -> list[str]:
    """Return the row of a run, without what differs."""
    numbers = [format(status.metrics[key], spec) if key in status.metrics else "" for key, spec in SHOWN.items()]
    steps = f"{status.metrics['step']:,}" + (f" / {status.horizon:,}" if status.horizon else "")
    saved = f"{status.checkpoint[0]:,}, {duration(status.checkpoint[1])} ago" if status.checkpoint else ""
    return [status.run, status.state, steps, *numbers, saved, str(status.restarts)]


def show(statuses: list[Status], console: Console) -> None:
    table = Table(Column("run", no_wrap=True), "state", box=box.SIMPLE_HEAD)
    for column in ("step", "tokens", "loss", "val loss", "tokens/s", "last checkpoint", "restarts"):
        table.add_column(column, justify="right", no_wrap=True)
    told = differences(statuses)
    if any(told):
        table.add_column("differs", no_wrap=True)
    for status, differs in zip(statuses, told, strict=True):
        table.add_row(*map(plain, [*cells(status), *([differs] if any(told) else [])]))
    console.width = max(console.width, console.measure(table).maximum, 200)  # rather too long a line than one cut off
    console.print(table)
    for status in statuses:
        for problem in status.problems:
            console.print(plain(f"{status.run}: {problem}"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m slurm.status", description="Show the runs of a project.")
    parser.add_argument("folders", nargs="*", default=["runs"], help="run folders, or folders of them (default: runs)")
    runs = find_runs(parser.parse_args(arguments).folders)
    queue = scheduler.queued(sorted({job for run in runs for job in jobs_of(run)}))
    show([read_status(run, queue) for run in runs], Console(highlight=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    command(main)
