"""A copy of the code in the run folder, so that a requeued job runs the code it started with.

`python -m slurm.snapshot OVERRIDES` is what a job submitted by bare `sbatch` does at its first start: it checks the
configuration, copies the code and prints the folder of the copy. `slurm.submit` does both before it submits the job.
"""

import functools
import hashlib
import os
import shutil
from pathlib import Path

from configs.app import command, configured
from configs.errors import ConfigError
from training.config import Config

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".yaml", ".sh", ".sbatch", ".env"}
EXCLUDED = {"tests", "__pycache__"}


@functools.cache
def code() -> tuple[str, dict[Path, bytes]]:
    """Return (12 hex digits of the content, the files that a job runs): train.py and the packages, without tests.

    They are read once, so that an edit during a submission reaches all of its jobs or none.
    """
    files = [path for package in ROOT.glob("*/__init__.py") for path in package.parent.rglob("*")]
    paths = sorted(path.relative_to(ROOT) for path in [ROOT / "train.py", *files] if path.suffix in SUFFIXES)
    contents = {path: (ROOT / path).read_bytes() for path in paths if EXCLUDED.isdisjoint(path.parts)}
    digest = hashlib.sha256()
    for path, content in contents.items():
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12], contents


def snapshot_dir(run_dir: str | Path) -> Path:
    """Return the absolute path of the code's copy in a run folder; equal code has the same path."""
    return Path(run_dir).absolute() / "code" / code()[0]


def snapshot(run_dir: str | Path) -> Path:
    """Copy the code into a run folder, unless that copy exists, and return its absolute path."""
    folder = snapshot_dir(run_dir)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        if not folder.exists():
            for path, content in code()[1].items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_bytes(content)
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
