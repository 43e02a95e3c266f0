"""The code of a run, copied into its folder, so that a job that starts again runs what it began with.

`python -m slurm.snapshot OVERRIDES` is what a job that bare `sbatch` submitted does at its first start: it checks the
configuration, copies the code and prints where it is. `slurm.submit` does both before the job is in the queue.
"""

import functools
import hashlib
import os
import shutil
import sys
from pathlib import Path

from configs.app import compose, ending_well
from configs.errors import ConfigError
from configs.load import load
from configs.schema import Config

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".yaml", ".sh", ".sbatch", ".env"}
LEFT_OUT = {"tests", "__pycache__"}


@functools.cache
def code() -> tuple[str, dict[Path, bytes]]:
    """(12 hex digits of the content, everything that a job runs): train.py and the packages beside it, without tests.

    Read once, so that what is edited while jobs are submitted reaches all of them or none.
    """
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    found = [path for package in packages for path in package.rglob("*") if path.suffix in SUFFIXES]
    files = sorted(path.relative_to(ROOT) for path in [ROOT / "train.py", *found])
    contents = {path: (ROOT / path).read_bytes() for path in files if not LEFT_OUT & set(path.parts)}
    digest = hashlib.sha256()
    for path, content in contents.items():
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12], contents


def snapshot_dir(run_dir: str | Path) -> Path:
    """Where the snapshot of the code is in a run folder: the same code is the same folder, never written again."""
    return Path(run_dir).absolute() / "code" / code()[0]


def snapshot(run_dir: str | Path) -> Path:
    """Copy the code into a run folder; the absolute path of the copy."""
    folder = snapshot_dir(run_dir)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        if not folder.exists():
            for path, content in code()[1].items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_bytes(content)
            partial.rename(folder)
    except OSError as error:
        if not folder.exists():  # not copied by another job of the same run meanwhile
            raise ConfigError(f"run.dir={run_dir}: the code cannot be copied there ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def main(overrides: list[str]) -> Config:
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    return load(compose("train", overrides), world_size=tasks)


if __name__ == "__main__":
    with ending_well():
        print(snapshot(main(sys.argv[1:]).run.dir))
