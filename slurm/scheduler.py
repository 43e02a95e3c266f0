"""Slurm's commands, and the site's settings (`slurm/site.env`) that they run with."""

import os
import subprocess
from pathlib import Path

from configs.errors import ConfigError

SITE_FILE = Path("slurm/site.env")
WAITING_OR_RUNNING = ("PENDING", "RUNNING", "COMPLETING")
OPTIONS = {  # of sbatch, by the variable of the environment that sets them (man sbatch); those that place a job
    "SBATCH_ACCOUNT": "account", "SBATCH_CLUSTERS": "clusters", "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node", "SBATCH_GRES": "gres", "SBATCH_MEM_PER_CPU": "mem-per-cpu",
    "SBATCH_MEM_PER_NODE": "mem", "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation", "SBATCH_TIMELIMIT": "time",
}  # fmt: skip


def site_environment(file: Path = SITE_FILE) -> dict[str, str]:
    """Return the environment with the variables that the site's file sets. ConfigError if bash cannot read the file."""
    if not file.is_file():
        return dict(os.environ)
    done = subprocess.run(["bash", "-c", 'set -ae; . "$0" >&2; env -0', str(file)], capture_output=True)
    if done.returncode:
        raise ConfigError(f"{file}: cannot be read ({done.stderr.decode(errors='replace').strip()})")
    variables = done.stdout.decode(errors="surrogateescape").split("\0")
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)


def options_of(environment: dict[str, str]) -> list[str]:
    """Return the options that sbatch takes from the environment, for a script that is to keep them."""
    return [f"--{option}={environment[name]}" for name, option in OPTIONS.items() if environment.get(name)]


def available(environment: dict[str, str]) -> bool:
    """Return whether a Slurm cluster answers here."""
    try:
        return subprocess.run(["sinfo", "-h"], env=environment, capture_output=True, timeout=20).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def sbatch(arguments: list[str], environment: dict[str, str], script: str | None = None) -> str:
    """Return what sbatch prints: the job's id with --parsable, the expected start with --test-only.

    The script is a file among `arguments`, or the text `script`. ConfigError with sbatch's own words if it refuses.
    """
    done = subprocess.run(["sbatch", *arguments], env=environment, input=script, capture_output=True, text=True)
    if done.returncode:
        lines = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines()]
        reasons = "; ".join(filter(None, lines)) or f"exit code {done.returncode}"
        options = " ".join(argument for argument in arguments if argument.startswith("--"))
        raise ConfigError(f"sbatch refuses the job: {reasons} (its options: {options})")
    return (done.stdout or done.stderr).strip()  # --test-only prints on standard error


def queued(jobs: list[str]) -> dict[str, tuple[str, str]]:
    """Return (state, reason for waiting) of the `jobs` that are in the queue; a task of an array is called `12_3`."""
    found = {}
    for line in output_of("squeue", "--me", "-h", "-r", "-o", "%i|%A|%T|%r").splitlines() if jobs else []:
        name, number, state, reason = line.split("|", 3)
        found |= {job: (state, reason) for job in jobs if job in (name, number)}
    return found


def ended(job: str) -> str | None:
    """Return the state that a job ended in, as long as Slurm or its accounting remembers it."""
    remembered = output_of("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").split()
    accounted = output_of("sacct", "-X", "-n", "-P", "-j", job, "-o", "State").split()
    states = [state for state in remembered[:1] + accounted[:1] if state not in WAITING_OR_RUNNING]
    return next(iter(states), None)


def output_of(*command: str) -> str:
    """Return what a command prints; nothing if it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""
