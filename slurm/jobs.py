"""The Slurm jobs of some runs: their scripts, and which job waits for which."""

import json
import re
import shlex
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from data.files import write_atomic
from slurm import scheduler
from slurm.estimate import Estimate
from slurm.snapshot import ROOT, snapshot, snapshot_dir
from training.config import Config
from training.run_folder import is_finished

# The options of sbatch that say where a job may run and who pays: the evaluation and the comparison get them too.
FOR_ALL_JOBS = ("account", "clusters", "constraint", "partition", "qos", "reservation")


@dataclass
class Run:
    overrides: list[str]
    config: Config
    estimate: Estimate | None = None

    @property
    def dir(self) -> str:
        return self.config.run.dir

    @property
    def finished(self) -> bool:
        return is_finished(self.dir)


@dataclass
class Task:
    """What one task of a job array, or a job without an array, runs: shell variables and arguments of the script."""

    variables: dict[str, str]
    arguments: list[str]

    def __str__(self) -> str:
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.variables.items())
        return f"{settings}; set -- {shlex.join(self.arguments)}"


@dataclass
class Job:
    """One submission of `slurm/<kind>.sbatch`: a job, or a job array if there are several tasks."""

    kind: str
    name: str
    folder: Path  # of its script, and of its log until a task knows its run folder
    log: str  # its file name; `%` stands for the numbers of the job
    tasks: list[Task]
    options: list[str]  # for sbatch

    @property
    def path(self) -> Path:
        return self.folder / f"{self.kind}.sbatch"

    def command(self, dependency: str | None = None) -> list[str]:
        """Return the arguments of sbatch, except the script."""
        folder = str(self.folder).replace("%", "%%")  # a single % begins one of Slurm's patterns
        options = [f"--job-name={self.name}", f"--output={folder}/{self.log}", *self.options]
        if len(self.tasks) > 1:
            options.append(f"--array=0-{len(self.tasks) - 1}")
        if dependency:
            options += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
        return options

    def script(self) -> str:
        """Return the script: the header of `slurm/<kind>.sbatch`, the tasks, and that file of the snapshot."""
        template = (ROOT / "slurm" / f"{self.kind}.sbatch").read_text()
        lines = ["#!/bin/bash", f"# sbatch {shlex.join(self.command())} {shlex.quote(str(self.path))}"]
        lines += [line for line in template.splitlines() if line.startswith("#SBATCH")]
        if "USR1" in template:
            lines.append("trap 'warned=yes' USR1")
        if len(self.tasks) == 1:
            lines.append(str(self.tasks[0]))
        else:
            cases = [f"  {number}) {task} ;;" for number, task in enumerate(self.tasks)]
            lines += ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
        lines.append(f'. "$T6_CODE/slurm/{self.kind}.sbatch"')
        return "\n".join(lines) + "\n"


def read_jobs(run_dir: str | Path) -> dict[str, str]:
    """Return the ids of the jobs submitted for a run by kind: {"train": "12"}, or "12_3" for a task of an array."""
    try:
        return json.loads((Path(run_dir) / "job.json").read_text())["jobs"]
    except (OSError, ValueError, KeyError):
        return {}


def quoted(value: str) -> str:
    """Return a value as Hydra's grammar needs it."""
    if re.fullmatch(r"[\w./-]+", value):
        return value
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + "'"


def plan(runs: list[Run], nodes: int, tasks_per_node: int, suites: list[str], sbatch_options: list[str]) -> list[Job]:
    """Return the jobs of the unfinished `runs`: training, the evaluation of each and, if it is a sweep, a comparison."""
    sweep, waiting = len(runs) > 1, [run for run in runs if not run.finished]
    if sweep:
        name = sweep_name(runs)
        folder = Path("runs/.slurm", name).absolute()
    else:
        name = runs[0].config.run.name
        folder = Path(runs[0].dir).absolute()
    number = "%A_%a" if len(waiting) > 1 else "%j"
    shared = [option for option in sbatch_options if option.split("=")[0].removeprefix("--") in FOR_ALL_JOBS]
    no_gpu = [option for option in sbatch_options if option == "--gpus-per-task=0"]

    def code(run: Run) -> dict[str, str]:
        return {"T6_CODE": str(snapshot_dir(run.dir))}

    jobs = []
    if waiting:
        tasks = [Task(code(run), run.overrides) for run in waiting]
        options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks_per_node}", *sbatch_options]
        jobs.append(Job("train", name, folder, f"slurm-{number}.log", tasks, options))
    if waiting and suites:
        suite = [f"suite={suites[0]}"] if len(suites) == 1 else ["-m", f"suite={','.join(suites)}"]
        tasks = [
            Task(code(run) | {"T6_RUN": str(Path(run.dir).absolute())}, [f"run={quoted(run.dir)}", *suite])
            for run in waiting
        ]
        jobs.append(Job("eval", f"eval-{name}", folder, f"slurm-eval-{number}.log", tasks, shared + no_gpu))
    if sweep and suites:
        compared = [*(run.dir for run in runs), f"out={Path('runs', name, 'compare')}"]
        task = Task(code(runs[0]), compared)
        jobs.append(Job("compare", f"compare-{name}", folder, "slurm-compare-%j.log", [task], shared))
    return jobs


def sweep_name(runs: list[Run]) -> str:
    """Return a name that depends on the run folders alone, so that the same command resumes the same sweep."""
    return f"sweep-{sha256('|'.join(sorted(run.dir for run in runs)).encode()).hexdigest()[:8]}"


def submit(jobs: list[Job], runs: list[Run], environment: dict[str, str], command: str) -> dict[str, str]:
    """Copy the code, write the scripts, submit the jobs one after the other, and return their ids by kind."""
    for run in runs:
        snapshot(run.dir)
    ids: dict[str, str] = {}
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(job.path, job.script())
        arguments = ["--parsable", *job.command(dependency(job, ids)), str(job.path)]
        ids[job.kind] = scheduler.sbatch(arguments, environment).split(";")[0]
        record(jobs, runs, ids, command)
    return ids


def dependency(job: Job, ids: dict[str, str]) -> str | None:
    """Return what a job waits for, given the ids of the jobs submitted before it."""
    if job.kind == "eval" and "train" in ids:  # the evaluation of a run waits for the training of that run alone
        return f"{'aftercorr' if len(job.tasks) > 1 else 'afterok'}:{ids['train']}"
    if ids:  # a comparison leaves out the runs that failed
        return f"afterany:{list(ids.values())[-1]}"
    return None


def record(jobs: list[Job], runs: list[Run], ids: dict[str, str], command: str) -> None:
    """Write job.json, which `read_jobs` reads, into the folder of every run that is not finished."""
    for number, run in enumerate(run for run in runs if not run.finished):
        of_run = {}
        for job in jobs:
            if job.kind in ids and job.kind != "compare":
                of_run[job.kind] = f"{ids[job.kind]}_{number}" if len(job.tasks) > 1 else ids[job.kind]
        facts = {"jobs": of_run, "command": command, "submitted": time.strftime("%F %T")}
        write_atomic(Path(run.dir) / "job.json", json.dumps(facts, indent=2) + "\n")
