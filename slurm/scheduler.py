"""Slurm's commands, and the site's settings (`slurm/site.env`) that they run with."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from configs.errors import ConfigError

SITE_FILE = Path("slurm/site.env")


def site_environment(file: Path = SITE_FILE) -> dict[str, str]:
    """The environment with what the site's file sets. ConfigError where the shell cannot read it."""
    if not file.is_file():
        return dict(os.environ)
    read = ["bash", "-c", 'set -ae; . "$0" >&2; env -0', str(file)]
    done = subprocess.run(read, capture_output=True)
    if done.returncode:
        raise ConfigError(f"{file}: cannot be read ({done.stderr.decode(errors='replace').strip()})")
    lines = done.stdout.decode(errors="surrogateescape").split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def available(environment: dict[str, str]) -> bool:
    """Whether a cluster answers here."""
    try:
        return subprocess.run(["sinfo", "-h"], env=environment, capture_output=True, timeout=20).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def sbatch(arguments: list[str], environment: dict[str, str], script: str | None = None) -> str:
    """What sbatch says: with --parsable the job's id, with --test-only (on its standard error) when it would start.

    The script is a file among the arguments, or `script`, so that nothing has to be written for a test.

    ConfigError with its own words where it refuses.
    """
    done = subprocess.run(["sbatch", *arguments], env=environment, input=script, capture_output=True, text=True)
    if done.returncode:
        reasons = [line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines()]
        told = "; ".join(reason for reason in reasons if reason) or f"exit code {done.returncode}"
        options = " ".join(argument for argument in arguments if argument.startswith("--"))
        raise ConfigError(f"sbatch refuses the job: {told} (its options: {options})")
    return (done.stdout or done.stderr).strip()


def queued(jobs: list[str]) -> dict[str, tuple[str, str]]:
    """Of these jobs (`12`, or `12_3` of an array) those in the queue: state and, while it waits, the reason."""
    if not jobs or not shutil.which("squeue"):
        return {}
    listed = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i|%A|%T|%r"], capture_output=True, text=True)
    found = {}
    for line in listed.stdout.splitlines():
        name, number, state, reason = line.split("|", 3)
        for job in {name, number} & set(jobs):
            found[job] = (state, reason)
    return found


def ended(job: str) -> tuple[str, str] | None:
    """State and exit code of a job that is over, while Slurm or its accounting remembers it."""
    if shutil.which("scontrol"):
        shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
        facts = dict(re.findall(r"(\w+)=(\S*)", shown.splitlines()[0])) if shown.strip() else {}
        if facts.get("JobState", "PENDING") not in ("PENDING", "RUNNING", "COMPLETING"):
            return facts["JobState"], facts.get("ExitCode", "")
    if shutil.which("sacct"):
        command = ["sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode"]
        shown = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if "|" in shown:
            state, _, code = shown.splitlines()[-1].partition("|")
            return state.split()[0], code
    return None
