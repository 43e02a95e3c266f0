"""What jobs leave in a run folder: job.json, with their ids, and their logs."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import ConfigError

TAIL = 2**20  # bytes at the end of a log that are read: of a longer last start, its end
ID = r"\d+(?:_\d+)?"  # of a job, or of a task of an array
FAULTS = re.compile(
    r"^(?P<python>[\w.]*(Error|Exception|Interrupt)\b.*)|"
    r"^(?P<training>(Giving up at step|The job ends:|Training cannot work here:).*)|"
    r"^(slurmstepd|srun)[^:]*: error: (?P<slurm>.*(CANCELLED|[Kk]illed|oom|Out Of Memory|Node failure|Segmentation).*)"
)


@dataclass
class Log:
    """The log of a job, by its end."""

    job: str
    text: str
    written: float  # when something was last added, in seconds since 1970

    @property
    def report(self) -> str:
        """The last line of the job script, such as `start 2 on node1: ...` or `failed with exit code 1`; or nothing."""
        return next(reversed(re.findall(r"^=== job \d+: (.*) \[", self.text, re.MULTILINE)), "")

    @property
    def work(self) -> str:
        """What its last start was to do: a command, as far as the log says."""
        return next(reversed(re.findall(r"^=== job \d+: start \d+ on \S+: (.*) \[", self.text, re.MULTILINE)), "")

    @property
    def suites(self) -> list[str]:
        """Of an evaluation: the suites that it was to run."""
        found = re.search(r" suite=([\w,.-]+)", self.work)
        return found[1].split(",") if found else []

    @property
    def fault(self) -> str | None:
        """The line that tells best why its last start ended: a mistake, an exception, or Slurm's reason."""
        lines = re.split(r"^=== job \d+: start", self.text, flags=re.MULTILINE)[-1].splitlines()
        for number, line in enumerate(lines):
            if re.match(r"(\d+ errors in the configuration|Configuration error):", line):
                return " ".join(text.strip() for text in lines[number + 1 : number + 4] if text.startswith("  "))
        matches = [match for line in lines if (match := FAULTS.match(line))]
        for kind, which in (("training", -1), ("python", -1), ("slurm", 0)):
            found = [match[kind] for match in matches if match[kind]]
            if found:
                return found[which].strip("* ")
        return None


def log_paths(run_dir: str | Path, kind: str = "train") -> dict[str, Path]:
    """Return the logs of a run's jobs of a kind, train or eval, by the job's id."""
    name = re.compile(rf"slurm-{'' if kind == 'train' else f'{kind}-'}({ID})\.log")
    found = ((name.fullmatch(path.name), path) for path in Path(run_dir).iterdir())
    return {match[1]: path for match, path in found if match}


def read_logs(run_dir: str | Path, kind: str = "train") -> list[Log]:
    """Return the logs of a run's jobs of a kind, the oldest first. ConfigError for one that cannot be read."""
    return sorted((read_log(*item) for item in log_paths(run_dir, kind).items()), key=lambda log: log.written)


def read_log(job: str, path: Path) -> Log:
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            file.seek(max(0, facts.st_size - TAIL))
            return Log(job, file.read().decode(errors="replace"), facts.st_mtime)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


@dataclass
class Submission:
    """What was submitted for a run, as its job.json tells."""

    jobs: dict[str, str] = field(default_factory=dict)  # ids by kind: {"train": "12"}, or "12_3" for a task of an array
    suites: list[str] = field(default_factory=list)  # that the evaluation was to run
    time: float = 0  # seconds since 1970


def read_submission(run_dir: str | Path) -> Submission:
    """Return what was submitted for a run; nothing if it has no job.json. ConfigError for a file that is not ours."""
    path = Path(run_dir) / "job.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        jobs, suites = facts["jobs"], facts.get("suites", [])
        if not all(re.fullmatch(ID, job) for job in jobs.values()) or any(type(suite) is not str for suite in suites):
            raise ValueError("no ids of jobs or names of suites")
        return Submission(jobs, suites, path.stat().st_mtime)
    except (FileNotFoundError, NotADirectoryError):
        return Submission()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is not what slurm.submit writes ({error!r}); delete it") from None


def read_jobs(run_dir: str | Path) -> dict[str, str]:
    """Return the ids of the jobs submitted for a run by kind."""
    return read_submission(run_dir).jobs
