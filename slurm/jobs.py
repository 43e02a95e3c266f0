"""What goes into Slurm's queue for some runs: the scripts of their jobs, and which waits for which."""

import argparse
import json
import re
import shlex
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from configs.schema import Config
from slurm import scheduler
from slurm.estimate import Estimate
from slurm.snapshot import ROOT, snapshot, snapshot_dir
from training.checkpoint import write_atomic
from training.run_folder import is_finished

# The options of sbatch that say where a job may run and who pays: they hold for the jobs that follow too.
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
    def job_file(self) -> Path:
        return Path(self.dir) / "job.json"  # which jobs train and evaluate it, for slurm.status


@dataclass
class Job:
    """One submission: `slurm/<kind>.sbatch` on one list of arguments, or a job array with a task for each."""

    kind: str
    name: str
    folder: Path  # of its script, and of its log until a task has a run's
    log: str
    tasks: list[tuple[dict[str, str], list[str]]]  # shell variables and arguments
    options: list[str]

    def command(self, dependency: str | None = None) -> list[str]:
        folder = str(self.folder).replace("%", "%%")  # which begins a pattern of Slurm's
        options = [f"--job-name={self.name}", f"--output={folder}/{self.log}", *self.options]
        options += [f"--array=0-{len(self.tasks) - 1}"] if len(self.tasks) > 1 else []
        after = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
        return [*options, *after]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.kind}.sbatch"

    def script(self) -> str:
        """The exact script: the header of `slurm/<kind>.sbatch`, what the task is, and that file of the snapshot."""
        template = (ROOT / "slurm" / f"{self.kind}.sbatch").read_text()
        header = [line for line in template.splitlines() if line.startswith("#SBATCH")]
        settings = [
            " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
            + f"; set -- {shlex.join(words)}"
            for variables, words in self.tasks
        ]
        if len(settings) > 1:
            cases = (f"  {number}) {setting} ;;" for number, setting in enumerate(settings))
            settings = ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
        lines = ["#!/bin/bash", f"# sbatch {shlex.join(self.command())} {shlex.quote(str(self.path))}", *header]
        early = ["trap 'warned=yes' USR1"] if "USR1" in template else []
        lines += [*early, *settings, f'. "$T6_CODE/slurm/{self.kind}.sbatch"']
        return "\n".join(lines) + "\n"


def read_jobs(run_dir: str | Path) -> dict[str, str]:
    """The jobs that were submitted for a run: {"train": "12", "eval": "13"}, or `12_3` for a task of an array."""
    try:
        return json.loads((Path(run_dir) / "job.json").read_text())["jobs"]
    except (OSError, ValueError, KeyError):
        return {}


def quoted(value: str) -> str:
    """A value as Hydra's grammar takes it."""
    if re.fullmatch(r"[\w./-]+", value):
        return value
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + "'"


def plan(runs: list[Run], options: argparse.Namespace, sbatch_options: list[str]) -> list[Job]:
    """The jobs of these runs: training, evaluation of each, and, of several, their comparison."""
    for_all = [word for word in sbatch_options if word.split("=")[0].removeprefix("--") in FOR_ALL_JOBS]
    no_gpu = [word for word in sbatch_options if word == "--gpus-per-task=0"]
    train_options = [f"--nodes={options.nodes}", f"--ntasks-per-node={options.ntasks_per_node}", *sbatch_options]
    sweep = len(runs) > 1
    name = sweep_name(runs) if sweep else runs[0].config.run.name
    folder = Path("runs/.slurm", name) if sweep else Path(runs[0].dir)
    folder, number = folder.absolute(), "%A_%a" if sweep else "%j"
    todo = [run for run in runs if not is_finished(run.config)]
    code = {run.dir: str(snapshot_dir(run.dir)) for run in runs}
    tasks = [({"T6_CODE": code[run.dir]}, run.overrides) for run in todo]
    jobs = [Job("train", name, folder, f"slurm-{number}.log", tasks, train_options)] if todo else []
    if options.eval and todo:
        many = ["-m"] if len(options.eval) > 1 else []
        suites = [*many, f"suite={','.join(options.eval)}"]
        tasks = [
            ({"T6_CODE": code[run.dir], "T6_RUN": str(Path(run.dir).absolute())}, [f"run={quoted(run.dir)}", *suites])
            for run in todo
        ]
        jobs.append(Job("eval", f"eval-{name}", folder, f"slurm-eval-{number}.log", tasks, for_all + no_gpu))
    if options.eval and sweep:
        out = f"out={Path('runs', name, 'compare')}"
        tasks = [({"T6_CODE": code[runs[0].dir]}, [*(run.dir for run in runs), out])]
        jobs.append(Job("compare", f"compare-{name}", folder, "slurm-compare-%j.log", tasks, for_all))
    return jobs


def sweep_name(runs: list[Run]) -> str:
    """The same combinations have the same name, so that the same command goes on."""
    return f"sweep-{sha256('|'.join(sorted(run.dir for run in runs)).encode()).hexdigest()[:8]}"


def submit(jobs: list[Job], runs: list[Run], environment: dict[str, str], command: str) -> dict[str, str]:
    """Write the scripts, copy the code, submit each job after the one before; the jobs' ids by kind."""
    for run in runs:
        snapshot(run.dir)
    ids: dict[str, str] = {}
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(job.path, job.script())
        dependency = None
        if job.kind == "eval" and "train" in ids:  # each run's evaluation waits for that run alone
            dependency = f"{'aftercorr' if len(job.tasks) > 1 else 'afterok'}:{ids['train']}"
        elif ids:
            dependency = f"afterany:{list(ids.values())[-1]}"  # what failed is left out of the comparison, not the rest
        said = scheduler.sbatch(["--parsable", *job.command(dependency), str(job.path)], environment)
        ids[job.kind] = said.split(";")[0]
        record(jobs, runs, ids, command)
    return ids


def record(jobs: list[Job], runs: list[Run], ids: dict[str, str], command: str) -> None:
    """job.json in every run's folder."""
    todo = [run for run in runs if not is_finished(run.config)]
    for number, run in enumerate(todo):
        own = {
            job.kind: f"{ids[job.kind]}_{number}" if len(job.tasks) > 1 else ids[job.kind]
            for job in jobs
            if job.kind in ids and job.kind != "compare"
        }
        facts = {"jobs": own, "command": command, "submitted": time.strftime("%F %T")}
        write_atomic(run.job_file, json.dumps(facts, indent=2) + "\n")
