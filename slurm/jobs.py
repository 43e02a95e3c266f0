"""The Slurm jobs of some runs: their scripts, and which job waits for which."""

import json
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from configs.app import verbatim
from configs.errors import ConfigError
from configs.kinds import has_controls
from data.files import write_atomic
from slurm import scheduler, shell
from slurm.estimate import Estimate
from slurm.snapshot import ROOT, snapshot, snapshot_dir
from training.config import Config
from training.stored import is_finished

# The options of sbatch that say where a job may run and who pays: the evaluation and the comparison get them too.
FOR_ALL_JOBS = ("account", "clusters", "constraint", "partition", "qos", "reservation")


@dataclass
class Run:
    overrides: list[str]
    config: Config
    needs: Estimate

    @property
    def dir(self) -> str:
        return self.config.run.dir

    @property
    def finished(self) -> bool:
        return is_finished(self.dir)

    def task(self, arguments: list[str], **variables: str) -> str:
        """Return a line of shell that sets the run's code, `variables`, and the arguments of the script."""
        variables = {"T6_CODE": str(snapshot_dir(self.dir))} | variables
        settings = " ".join(f"{name}={shell.quote(value)}" for name, value in variables.items())
        return f"{settings}; set -- {shell.join(arguments)}"


@dataclass
class Job:
    """One submission of `slurm/<kind>.sbatch`: a job, or a job array if there are several tasks."""

    kind: str
    name: str
    folder: Path  # of its script, and of its log until a task knows its run folder
    log: str  # its file name, where % begins a number of the job
    tasks: list[str]  # lines of shell
    options: list[str]  # for sbatch
    after: str = ""  # how it waits for the job before it

    @property
    def path(self) -> Path:
        return self.folder / f"{self.kind}.sbatch"

    def command(self, previous: str | None = None) -> list[str]:
        """Return the arguments of sbatch, except the script; `previous` is the id of the job to wait for."""
        folder = str(self.folder).replace("%", "%%")  # a single % begins one of Slurm's patterns
        options = [f"--job-name={self.name}", f"--output={folder}/{self.log}", *self.options]
        if len(self.tasks) > 1:
            options.append(f"--array=0-{len(self.tasks) - 1}")
        if previous:
            options += [f"--dependency={self.after}:{previous}", "--kill-on-invalid-dep=yes"]
        return options

    def script(self, site_options: list[str]) -> str:
        """Return the script: its options, the tasks, and `slurm/<kind>.sbatch` of the snapshot, which it sources.

        Its options are those of that file, of the site (`scheduler.options_of`) and of this job, the last of a name
        counting, so that sbatch makes the same job of the script alone, except what the job waits for.
        """
        template = (ROOT / "slurm" / f"{self.kind}.sbatch").read_text()
        of_kind = [line.removeprefix("#SBATCH ") for line in template.splitlines() if line.startswith("#SBATCH ")]
        options = {option.partition("=")[0]: option for option in [*of_kind, *site_options, *self.command()]}
        lines = ["#!/bin/bash", *map(shell.directive, options.values())]
        if "USR1" in template:
            lines.append("trap 'warned=yes' USR1")
        if len(self.tasks) > 1:
            cases = [f"  {number}) {task} ;;" for number, task in enumerate(self.tasks)]
            lines += ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
        else:
            lines += self.tasks
        return "\n".join([*lines, f'. "$T6_CODE/slurm/{self.kind}.sbatch"', ""])


def plan(runs: list[Run], train_options: list[str], suites: list[str], sbatch_options: list[str]) -> list[Job]:
    """Return the jobs of `runs`: training, evaluation and, of a sweep, the comparison."""
    unfinished = [run for run in runs if not run.finished]
    in_array, in_sweep = len(unfinished) > 1, len(runs) > 1
    name = sweep_name(runs) if in_sweep else runs[0].config.run.name
    folder = Path("runs/.slurm", name).absolute() if in_sweep else Path(runs[0].dir).absolute()
    number = "%A_%a" if in_array else "%j"
    shared = [option for option in sbatch_options if option.split("=")[0].removeprefix("--") in FOR_ALL_JOBS]
    jobs = []
    if unfinished:
        tasks = [run.task(run.overrides) for run in unfinished]
        jobs.append(Job("train", name, folder, f"slurm-{number}.log", tasks, [*train_options, *sbatch_options]))
    if unfinished and suites:
        several = ["-m"] if len(suites) > 1 else []  # before the keys: Hydra takes it nowhere between them
        tasks = [
            run.task(
                [*several, verbatim(f"run={run.dir}"), f"suite={','.join(suites)}"],
                T6_RUN=str(Path(run.dir).absolute()),
            )
            for run in unfinished
        ]
        options = shared + [option for option in sbatch_options if option == "--gpus-per-task=0"]
        after = "aftercorr" if in_array else "afterok"  # the training of the same run has succeeded
        jobs.append(Job("eval", f"eval-{name}", folder, f"slurm-eval-{number}.log", tasks, options, after))
    if in_sweep and suites:
        task = runs[0].task([*(str(Path(run.dir).absolute()) for run in runs), f"out={Path('runs', name, 'compare')}"])
        # Runs that failed are left out of the comparison, so it does not depend on their success.
        jobs.append(Job("compare", f"compare-{name}", folder, "slurm-compare-%j.log", [task], shared, "afterany"))
    return jobs


def sweep_name(runs: list[Run]) -> str:
    """Return a name that depends on the run folders alone, so that the same command resumes the same sweep."""
    return f"sweep-{sha256('|'.join(sorted(run.dir for run in runs)).encode()).hexdigest()[:8]}"


def check_names(jobs: list[Job], runs: list[Run]) -> None:
    """Raise a ConfigError for folders that Slurm cannot write a log to."""
    lines = []
    for folder in dict.fromkeys([*(Path(run.dir).absolute() for run in runs), *(job.folder for job in jobs)]):
        if has_controls(str(folder)):
            lines.append(f"run.dir={str(folder)!r}: has a line break or another character that cannot be shown")
        elif "\\" in str(folder):
            lines.append(f"run.dir={folder}: has a backslash, which Slurm drops from the name of a log")
    if lines:
        raise ConfigError(*lines)


def submit(
    jobs: list[Job], runs: list[Run], environment: dict[str, str], command: str, suites: list[str]
) -> dict[str, str]:
    """Copy the code, write the scripts, submit each job after the one before, and return their ids by kind.

    Each run gets a job.json, which `slurm.job_files` reads; several runs are an array.
    """
    for run in runs:
        snapshot(run.dir)
    unfinished, ids = [run for run in runs if not run.finished], {}
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(job.path, job.script(scheduler.options_of(environment)))
        arguments = ["--parsable", *job.command(next(reversed(ids.values()), None)), str(job.path)]
        ids[job.kind] = scheduler.sbatch(arguments, environment).split(";")[0]
        for number, run in enumerate(unfinished):
            task = f"_{number}" if len(unfinished) > 1 else ""
            own = {kind: f"{job}{task}" for kind, job in ids.items() if kind != "compare"}
            facts = {"jobs": own, "suites": suites, "command": command, "submitted": time.strftime("%F %T")}
            write_atomic(Path(run.dir) / "job.json", json.dumps(facts, indent=2) + "\n")
    return ids
