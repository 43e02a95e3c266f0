"""The code of a run, copied into its folder, so that a job that starts again runs what it began with.

`python -m slurm.snapshot OVERRIDES` is what a job that bare `sbatch` submitted does at its first start: it checks the
configuration, copies the code and prints where it is. `slurm.submit` does both before the job is in the queue.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from configs.app import compose, fail
from configs.errors import ConfigError
from configs.load import load
from configs.schema import Config

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".yaml", ".json", ".sh", ".sbatch", ".env"}
LEFT_OUT = {"tests", "__pycache__"}


def code_files() -> list[Path]:
    """Everything that a job runs, relative to ROOT: train.py and the packages beside it, without data or tests."""
    packages = sorted(path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in LEFT_OUT)
    found = [path for package in packages for path in sorted(package.rglob("*")) if path.suffix in SUFFIXES]
    shards = ROOT / "data" / "shards"
    return [
        path.relative_to(ROOT)
        for path in [ROOT / "train.py", *found]
        if path.is_file() and not LEFT_OUT & set(path.parts) and shards not in path.parents
    ]


def snapshot(run_dir: str | Path, copy: bool = True) -> Path:
    """Copy the code to `<run_dir>/code/<12 hex digits of its content>`; the absolute path of the copy.

    The same code is the same folder, so nothing that a job may be running is ever written again. Without `copy`, where
    the copy would be.
    """
    digest, files = hashlib.sha256(), code_files()
    for file in files:
        content = (ROOT / file).read_bytes()
        digest.update(f"{file.as_posix()}\0{len(content)}\0".encode() + content)
    folder = Path(run_dir).absolute() / "code" / digest.hexdigest()[:12]
    if folder.exists() or not copy:
        return folder
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        for file in files:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, partial / file)
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
    try:
        print(snapshot(main(sys.argv[1:]).run.dir))
    except ConfigError as error:
        fail(error)
