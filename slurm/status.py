"""Show the runs of a project: `python -m slurm.status [FOLDER ...]` of run folders, or of folders of them (runs).

Everything is read from the run folders, so it works without Slurm; if Slurm is here, it tells whether a job waits or
runs, or how it ended.
"""

import argparse
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Column, Table

from configs.app import command
from configs.errors import ConfigError, each
from slurm import scheduler
from slurm.jobs import read_jobs
from training.checkpoint import problems, read_manifest
from training.jsonl import read_lines
from training.metrics import read_events
from training.run_folder import is_finished, read_config

QUIET_AFTER = 600  # seconds in which a running job should have written something
FAULTS = re.compile(
    r"^(?P<python>[\w.]*(Error|Exception|Interrupt)\b.*)|"
    r"^(?P<training>(Giving up at step|The job ends:|Training cannot work here:).*)|"
    r"^(slurmstepd|srun)[^:]*: error: (?P<slurm>.*(CANCELLED|[Kk]illed|oom|Out Of Memory|Node failure|Segmentation).*)"
)


@dataclass
class Status:
    run: str
    state: str  # finished, running, pending, requeued, stopped or failed
    problem: str | None
    metrics: dict[str, float]  # the last number of each
    horizon: int | None
    checkpoint: tuple[int, float] | None  # the step of the most recent complete one, and its age in seconds
    restarts: int


def find_runs(folders: list[str]) -> list[Path]:
    """Return the run folders among and in `folders`. ConfigError for a folder that has none."""

    def is_run(path: Path) -> bool:
        return any(any(path.glob(name)) for name in ("config.yaml", "job.json", "slurm-*.log"))

    def runs_in(folder: str) -> list[Path]:
        runs = [Path(folder)] if is_run(Path(folder)) else sorted(filter(is_run, Path(folder).glob("*/")))
        if not runs:
            raise ConfigError(f"{folder}: is not a run folder and has none")
        return runs

    return list(chain.from_iterable(each(runs_in, folders)))


def job_logs(folder: Path) -> dict[str, Path]:
    """Return the logs of a run's training jobs by the job's id, the oldest first."""
    logs = sorted(folder.glob("slurm-[0-9]*.log"), key=lambda path: path.stat().st_mtime)
    return {path.stem.removeprefix("slurm-"): path for path in logs}


def read_status(folder: Path, queue: dict[str, tuple[str, str]]) -> Status:
    """Return the status of a run, given the jobs in Slurm's queue (`scheduler.queued`)."""
    metrics = {"step": 0, "tokens": 0}
    for line in read_lines(folder / "metrics.jsonl"):
        metrics |= {key: value for key, value in line.items() if value is not None}
    horizon = checkpoint = None
    with suppress(ConfigError):
        horizon = read_config(folder).trainer.horizon
    for path in sorted(folder.glob("checkpoints/step_*/manifest.json")):
        with suppress(OSError, ValueError):
            checkpoint = read_manifest(path.parent)["step"], time.time() - path.stat().st_mtime
    starts = [event["event"] for event in read_events(folder)].count("start")
    return Status(str(folder), *find_state(folder, queue), metrics, horizon, checkpoint, restarts=max(0, starts - 1))


def find_state(folder: Path, queue: dict[str, tuple[str, str]]) -> tuple[str, str | None]:
    """Return (the state of a run, its problem)."""
    if is_finished(folder):
        return "finished", None
    logs, submitted = job_logs(folder), read_jobs(folder)
    jobs = [*reversed(logs), *([submitted["train"]] if "train" in submitted else [])]
    files = [*logs.values(), *folder.glob("metrics.jsonl"), *folder.glob("config.yaml")]
    quiet = time.time() - max((path.stat().st_mtime for path in files), default=0)
    silence = f"nothing written for {duration(quiet)}" if files else "has not started"
    for job in jobs:
        if job in queue:
            state, reason = queue[job]
            if state == "RUNNING":
                return "running", silence if quiet > QUIET_AFTER else None
            return state.lower(), f"waits: {reason}" if state == "PENDING" else None
    log = "".join(path.read_text(errors="replace") for path in logs.values())
    found, reports = fault(log), re.findall(r"^=== job \d+: (.*) \[", log, re.MULTILINE)
    report = reports[-1] if reports else ""
    if report.startswith("failed"):
        return "failed", "; ".join(filter(None, [report, found]))
    ended = scheduler.ended(jobs[0]) if jobs else None
    if report.endswith("requeueing") and not ended:
        return "requeued", None
    if quiet < QUIET_AFTER and not ended and not (found and re.search(r"\bJOB\b", found)):
        return "running", None
    end = f"job {jobs[0]} ended as {ended}" if ended else silence
    return "stopped", "; ".join(filter(None, [end, found or trouble(folder)]))


def fault(log: str) -> str | None:
    """Return the line of a log that tells best why its last start ended: a mistake, an exception, or Slurm's reason."""
    lines = re.split(r"^=== job \d+: start", log, flags=re.MULTILINE)[-1].splitlines()
    for number, line in enumerate(lines):
        if re.match(r"(\d+ errors in the configuration|Configuration error):", line):
            return " ".join(text.strip() for text in lines[number + 1 : number + 4] if text.startswith("  "))
    matches = [match for line in lines if (match := FAULTS.match(line))]
    for kind, which in (("training", -1), ("python", -1), ("slurm", 0)):
        found = [match[kind] for match in matches if match[kind]]
        if found:
            return found[which].strip("* ")
    return None


def trouble(folder: Path) -> str | None:
    """Return what is wrong by the run's own files: its last event, its last loss, its most recent checkpoint."""
    event = next(reversed(read_events(folder)), {})
    if "reason" in event:  # a rollback, giving up, a checkpoint that was not saved
        return f"{event['event']} at step {event['step']}: {event['reason']}"
    losses = [line for line in read_lines(folder / "metrics.jsonl") if "train/loss" in line]
    if losses and losses[-1]["train/loss"] is None:
        return f"the loss of step {losses[-1]['step']} is not finite"
    newest = max(folder.glob("checkpoints/step_*"), default=None)
    return next(iter(problems(newest)), None) if newest else None


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))  # as in 1 day, 2:03:04


def show(statuses: list[Status], console: Console) -> None:
    specs = {"tokens": ",", "train/loss": ".4f", "val/loss": ".4f", "perf/tokens_per_second": ",.0f"}
    table = Table(Column("run", no_wrap=True), "state", box=box.SIMPLE_HEAD)
    for column in ("step", "tokens", "loss", "val loss", "tokens/s", "last checkpoint", "restarts"):
        table.add_column(column, justify="right", no_wrap=True)
    for status in statuses:
        cells = [format(status.metrics[key], spec) if key in status.metrics else "" for key, spec in specs.items()]
        steps = f"{status.metrics['step']:,}" + (f" / {status.horizon:,}" if status.horizon else "")
        saved = f"{status.checkpoint[0]:,}, {duration(status.checkpoint[1])} ago" if status.checkpoint else ""
        table.add_row(status.run, status.state, steps, *cells, saved, str(status.restarts))
    console.width = max(console.width, 200)  # a line that is too long is better than one cut off
    console.print(table)
    for status in statuses:
        if status.problem:
            console.print(f"{status.run}: {status.problem}", markup=False)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m slurm.status", description="Show the runs of a project.")
    parser.add_argument("folders", nargs="*", default=["runs"], help="run folders, or folders of them (default: runs)")
    runs = find_runs(parser.parse_args(arguments).folders)
    jobs = {job for run in runs for job in [*job_logs(run), *read_jobs(run).values()]}
    queue = scheduler.queued(sorted(jobs))
    show([read_status(run, queue) for run in runs], Console(highlight=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    command(main)
