"""A copy of the code in the run folder, so that a requeued job runs the code it started with.

`python -m slurm.snapshot OVERRIDES` is what a job submitted by bare `sbatch` does at its first start: it checks the
configuration, copies the code and prints the folder of the copy. `slurm.submit` does both before it submits the job.
"""

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from configs.app import command, configured
from configs.errors import ConfigError
from training.config import Config

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".yaml"}  # of what a job needs, a mechanism included that is not in git yet
TRACKED_SUFFIXES = {".sh", ".sbatch"}  # the same, if git has it; nothing else is copied, no settings of the site
EXCLUDED = {"tests", "__pycache__"}


@functools.cache
def code() -> tuple[str, dict[Path, tuple[bytes, int]]]:
    """Return (12 hex digits of the content, the files that a job runs as content and mode).

    These are train.py and the packages, without tests. They are read once, so that an edit during a submission reaches
    all of its jobs or none.
    """
    contents = {path: ((ROOT / path).read_bytes(), (ROOT / path).stat().st_mode & 0o777) for path in code_paths(ROOT)}
    digest = hashlib.sha256()
    for path, (content, _) in contents.items():
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12], contents


def code_paths(root: Path) -> list[Path]:
    """Return the files that a job of the checkout `root` runs, relative to it, sorted."""
    tracked = tracked_by_git(root)
    files = [path for package in root.glob("*/__init__.py") for path in package.parent.rglob("*")]
    paths = sorted(path.relative_to(root) for path in [root / "train.py", *files] if path.is_file())

    def is_code(path: Path) -> bool:
        is_known = tracked is None or path.as_posix() in tracked
        return path.suffix in SUFFIXES or (path.suffix in TRACKED_SUFFIXES and is_known)

    return [path for path in paths if is_code(path) and EXCLUDED.isdisjoint(path.parts)]


def tracked_by_git(root: Path) -> set[str] | None:
    """Return the files that git tracks in a checkout; None if it is a copy without git, or git is not here."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    files = set(done.stdout.decode(errors="surrogateescape").split("\0"))
    return files if "train.py" in files else None


def snapshot_dir(run_dir: str | Path) -> Path:
    """Return the absolute path of the code's copy in a run folder; equal code has the same path."""
    return Path(run_dir).absolute() / "code" / code()[0]


def snapshot(run_dir: str | Path) -> Path:
    """Copy the code into a run folder, unless that copy exists, and return its absolute path."""
    folder = snapshot_dir(run_dir)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        if not folder.exists():
            for path, (content, mode) in code()[1].items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_bytes(content)
                (partial / path).chmod(mode)
            partial.rename(folder)
    except OSError as error:
        if not folder.exists():  # unless another job of the run has copied it in the meantime
            raise ConfigError(f"run.dir={run_dir}: cannot copy the code there ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def main(overrides: list[str]) -> int:
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    print(snapshot(configured(Config, overrides, world_size=tasks).run.dir))
    return 0


if __name__ == "__main__":
    command(main)
