"""One process at a time writes into a folder: one trains a run, one fills its W&B run."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from configs.errors import ConfigError


class RunLock:
    """A lock on `<run folder>/.lock`; the system releases it however the process that holds it ends.

    It is there for orphans: workers whose launcher was killed keep training while the run is started again.
    """

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / ".lock"
        self.file: TextIO | None = None

    def acquire(self, patience: float, say: Callable[[str], None]) -> str | None:
        """Wait at most `patience` seconds; return None, or who has the lock. Without file locks nobody has it.

        ConfigError if the folder cannot be written.
        """
        try:
            return self._acquire(patience, say)
        except OSError as error:
            folder = self.path.parent
            raise ConfigError(
                f"run.dir={folder}: cannot be written ({error.strerror}); choose another with run.dir="
            ) from None

    def _acquire(self, patience: float, say: Callable[[str], None]) -> str | None:
        deadline = time.monotonic() + patience
        told = False
        while not self._locked():
            holder = f"{self.path.parent} is in use by {self._holder()}"
            if time.monotonic() > deadline:
                return f"{holder}; end it first, or choose another run.name"
            if not told:
                say(f"{holder}; waiting for {patience:.0f} s")
            told = True
            time.sleep(0.2)
        os.ftruncate(self.file.fileno(), 0)
        os.write(self.file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        return None

    def _locked(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(self.path, "a", encoding="utf-8")
        except FileNotFoundError:
            return False  # its holder has just removed the folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:
            pass  # a file system without locks
        try:
            current = os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            current = False
        if not current:  # its holder has just removed it
            file.close()
            return self._locked()
        self.file = file
        return True

    def _holder(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8") or "another process"
        except FileNotFoundError:
            return "another process"

    def release(self) -> None:
        """Release the lock and remove its file, and the run folder too if nothing else is in it."""
        if self.file:
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()
            self.file.close()
            self.file = None
