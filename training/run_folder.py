"""The run folder: making one, reading the configuration that one was made with, and locking one.

A run folder may come from somebody else, so it is data: reading one runs no code that it names.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

from configs.app import as_yaml
from configs.block import to_dict
from configs.errors import ConfigError, writing
from configs.load import load
from data.files import make_folder, remove_empty, write_atomic
from data.tokenizers import Tokenizer
from training.config import Config, upgrade
from training.stored import read_tree

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers: nobody has them
PACKAGES_VARIABLE = "T6_PACKAGES"  # names packages of the user's, separated by commas


def read_config(run_dir: str | Path) -> Config:
    """Return the configuration that a run folder was made with. ConfigError if it has none or names code."""
    tree, path = read_tree(run_dir), Path(run_dir) / "config.yaml"
    for target in targets(tree):
        module = str(target).rpartition(".")[0]
        package = module.partition(".")[0]
        if package not in ("model", *os.environ.get(PACKAGES_VARIABLE, "").split(",")) and module not in sys.modules:
            raise ConfigError(
                f"{path}: _target_={target}: is code that did not come with this project, and reading a run folder "
                f"does not run it; if it is your own, set {PACKAGES_VARIABLE}={package} in the environment"
            )
    # The device of training may not exist on this machine.
    return load(upgrade(tree) | {"device": "auto"}, Config, world_size=1)


def targets(tree: Mapping) -> Iterator[str]:
    """Yield the classes that a stored configuration names."""
    for key, value in tree.items():
        if key == "_target_":
            yield value
        elif isinstance(value, Mapping):
            yield from targets(value)


def create_run_folder(config: Config, tokenizer: Tokenizer) -> None:
    """Make the folder, its config.yaml and its copy of the tokenizer. ConfigError if it cannot be written."""
    folder = Path(config.run.dir)
    with writing("run.dir", folder, "; choose another with run.dir="):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
        write_atomic(folder / "config.yaml", as_yaml(to_dict(config)))


class RunLock:
    """A lock on `<folder>/.lock`, of a run folder or its W&B run: one process at a time writes there.

    The system releases it however the process that holds it ends. It is there for orphans: workers whose launcher was
    killed keep training while the run is started again.
    """

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / ".lock"
        self.file: TextIO | None = None
        self.made: list[Path] = []  # folders that were not there

    def acquire(self, patience: float, say: Callable[[str], None]) -> str | None:
        """Wait at most `patience` seconds; return None, or who has the lock. ConfigError if nobody can write there."""
        deadline, told = time.monotonic() + patience, False
        with writing("run.dir", self.path.parent, "; choose another with run.dir="):
            while not self._locked():
                holder = f"{self.path.parent} is in use by {self._holder()}"
                if time.monotonic() > deadline:
                    return f"{holder}; end it first, or choose another run.name"
                if not told:
                    say(f"{holder}; waiting for {patience:.0f} s")
                told = True
                time.sleep(0.2)
            self.path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        return None

    def _locked(self) -> bool:
        self.made = make_folder(self.path.parent) or self.made
        try:
            file = open(self.path, "a", encoding="utf-8")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):  # another process has it, or has just removed the folder
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        if os.fstat(file.fileno()).st_nlink > 0:  # else its holder has just removed it
            self.file = file
        return self.file is not None

    def _holder(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.path.read_text(encoding="utf-8") or "another process"
        return "another process"

    def release(self) -> None:
        """Release the lock and remove its file, the run folder if nothing else is in it, and folders made for it."""
        if self.file:
            self.path.unlink(missing_ok=True)
            remove_empty(dict.fromkeys([self.path.parent, *self.made]))
            self.file.close()
            self.file = None
