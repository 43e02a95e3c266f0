"""The runs of a project at a glance: `python -m slurm.status [FOLDER ...]` of run folders, or folders of them (runs).

Everything is read from the run folders, so it works where there is no Slurm; where there is one, it knows best whether
a job waits, runs, or how it ended.
"""

import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from configs.app import command
from configs.errors import ConfigError
from slurm import scheduler
from slurm.jobs import read_jobs
from training.checkpoint import problems, read_manifest
from training.metrics import read_metrics
from training.run_folder import read_config, read_events

QUIET_AFTER = 600  # seconds without a word from a run that should be running
FAULTS = re.compile(
    r"^(?P<python>[\w.]*(Error|Exception|Interrupt)\b.*)|^(?P<training>(GIVING UP|THE JOB ENDS|TRAINING CANNOT)\b.*)|"
    r"^(slurmstepd|srun)[^:]*: error: (?P<slurm>.*(CANCELLED|[Kk]illed|oom|Out Of Memory|Node failure|Segmentation).*)"
)


@dataclass
class Status:
    run: str
    state: str  # finished, running, pending, requeued, stopped or failed
    step: int
    horizon: int | None
    tokens: int
    train_loss: float | None
    val_loss: float | None
    tokens_per_second: float | None
    checkpoint: int | None  # step of the newest whole one
    checkpoint_age: float | None  # seconds
    restarts: int
    problem: str | None


def find_runs(folders: list[str]) -> list[Path]:
    """Run folders among and in `folders`. ConfigError for a folder that holds none."""

    def is_run(path: Path) -> bool:
        return any((path / name).exists() for name in ("config.yaml", "job.json")) or any(path.glob("slurm-*.log"))

    found, errors = [], []
    for folder in map(Path, folders):
        inside = [folder] if is_run(folder) else sorted(path for path in folder.glob("*/") if is_run(path))
        if not inside:
            errors.append(f"{folder}: is no run folder and holds none")
        found += inside
    if errors:
        raise ConfigError(*errors)
    return found


def job_logs(folder: Path) -> list[Path]:
    """The logs of a run's training jobs, the oldest first."""
    return sorted(folder.glob("slurm-[0-9]*.log"), key=lambda path: path.stat().st_mtime)


def last(lines: list[dict], key: str):
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def newest_checkpoint(folder: Path) -> tuple[dict, float] | tuple[None, None]:
    """The manifest of the newest finished checkpoint and its age in seconds; its files are not read."""
    for path in sorted(folder.glob("checkpoints/step_*/manifest.json"), reverse=True):
        try:
            return read_manifest(path.parent), time.time() - path.stat().st_mtime
        except (OSError, ValueError):
            continue
    return None, None


def horizon_of(folder: Path) -> int | None:
    try:
        return read_config(folder).trainer.horizon
    except ConfigError:
        return None


def read_status(folder: Path, queue: dict[str, tuple[str, str]]) -> Status:
    """A run's status, given the jobs in Slurm's queue (`scheduler.queued`)."""
    lines, logs = read_metrics(folder / "metrics.jsonl"), job_logs(folder)
    text = "".join(path.read_text(errors="replace") for path in logs)
    manifest, age = newest_checkpoint(folder)
    state, problem = find_state(folder, text, queue)
    return Status(
        run=str(folder),
        state=state,
        step=lines[-1]["step"] if lines else 0,
        horizon=horizon_of(folder),
        tokens=lines[-1]["tokens"] if lines else 0,
        train_loss=last(lines, "train/loss"),
        val_loss=last(lines, "val/loss"),
        tokens_per_second=last(lines, "perf/tokens_per_second"),
        checkpoint=manifest and manifest["step"],
        checkpoint_age=age,
        restarts=max(0, sum(event["event"] == "start" for event in read_events(folder)) - 1),
        problem=problem,
    )


def find_state(folder: Path, log: str, queue: dict[str, tuple[str, str]]) -> tuple[str, str | None]:
    """(the state of a run, what is wrong with it)."""
    if (folder / "summary.json").exists():
        return "finished", None
    jobs = [path.stem.removeprefix("slurm-") for path in reversed(job_logs(folder))]
    jobs += [job for job in [read_jobs(folder).get("train")] if job]
    quiet = time.time() - max((path.stat().st_mtime for path in written_by(folder)), default=0)
    for job in jobs:
        if job in queue:
            state, reason = queue[job]
            if state != "RUNNING":
                return state.lower(), None if state != "PENDING" else f"waits: {reason}"
            silent = f"nothing written for {ago(quiet)}" if quiet > QUIET_AFTER else None
            return "running", silent
    said = re.findall(r"^=== job \d+: (.*) \[", log, re.MULTILINE)
    if said and said[-1].startswith("failed"):
        return "failed", "; ".join(filter(None, [said[-1], fault(log)]))
    over = scheduler.ended(jobs[0]) if jobs else None
    if said and said[-1].endswith("back into the queue") and not over:
        return "requeued", None
    found = fault(log)
    if not over and quiet < QUIET_AFTER and not (found and re.search(r"\bJOB\b", found)):
        return "running", None
    written = bool(written_by(folder))
    silence = f"nothing written for {ago(quiet)}" if written else "has not started"
    why = f"job {jobs[0]} ended as {over[0]}" if over else silence
    found = found or last_trouble(folder) or bad_loss(folder) or broken_checkpoint(folder)
    return "stopped", "; ".join(filter(None, [why, found]))


def written_by(folder: Path) -> list[Path]:
    return [path for path in (folder / "metrics.jsonl", folder / "config.yaml", *job_logs(folder)) if path.exists()]


def fault(log: str) -> str | None:
    """The line of a log that says best why it ended: Python's last exception, or Slurm's word."""
    lines = log.splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"=== job \d+: start", line)]
    lines = lines[starts[-1] :] if starts else lines
    for number, line in enumerate(lines):
        if re.match(r"(\d+ errors in the configuration|Configuration error):", line):
            return " ".join(text.strip() for text in lines[number + 1 : number + 4] if text.startswith("  "))
    found = [match for line in lines if (match := FAULTS.match(line))]
    for kind in ("training", "python", "slurm"):
        of_kind = [match[kind] for match in found if match[kind]]
        if of_kind:
            return of_kind[0 if kind == "slurm" else -1].strip("* ")
    return None


def last_trouble(folder: Path) -> str | None:
    """What the run itself noted last, if that was trouble: a rollback, giving up, a checkpoint that failed."""
    event = next(reversed(read_events(folder)), {})
    return f"{event['event']} at step {event['step']}: {event['reason']}" if "reason" in event else None


def bad_loss(folder: Path) -> str | None:
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]
    return f"the loss of step {lines[-1]['step']} is not finite" if lines and lines[-1]["train/loss"] is None else None


def broken_checkpoint(folder: Path) -> str | None:
    newest = sorted(folder.glob("checkpoints/step_*"))[-1:]
    return next((line for path in newest for line in problems(path)), None)


def ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def show(statuses: list[Status], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    columns = ("run", "state", "step", "tokens", "loss", "val loss", "tokens/s", "last checkpoint", "restarts")
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=True)
    for status in statuses:
        saved = "" if status.checkpoint is None else f"{status.checkpoint:,}, {ago(status.checkpoint_age)} ago"
        table.add_row(
            status.run,
            status.state,
            f"{status.step:,}" + (f" / {status.horizon:,}" if status.horizon else ""),
            f"{status.tokens:,}",
            number(status.train_loss, ".4f"),
            number(status.val_loss, ".4f"),
            number(status.tokens_per_second, ",.0f"),
            saved,
            str(status.restarts),
        )
    console.width = max(console.width, 200)  # rather over the edge than cut
    console.print(table)
    for status in statuses:
        if status.problem:
            console.print(f"{status.run}: {status.problem}", markup=False)


def number(value: float | None, format: str) -> str:
    return "" if value is None else f"{value:{format}}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m slurm.status", description="The runs of a project at a glance.")
    parser.add_argument("folders", nargs="*", default=["runs"], help="run folders, or folders of them (default: runs)")
    runs = find_runs(parser.parse_args(arguments).folders)
    jobs = {path.stem.removeprefix("slurm-") for run in runs for path in job_logs(run)}
    jobs |= {job for run in runs for job in read_jobs(run).values()}
    queue = scheduler.queued(sorted(jobs))
    show([read_status(run, queue) for run in runs], Console(highlight=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    command(main)
