"""Saving during training: the state is copied between two steps, and written while the next ones run."""

import contextlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from training.checkpoint import checkpoint_dir, prune, write
from training.engine import gather_state
from training.metrics import log_event
from training.ranks import from_main


@dataclass
class CheckpointSaver(contextlib.AbstractContextManager):
    """Write the checkpoints of a run, one at a time; every rank calls every method, rank 0 writes.

    Those whose steps `keep` returns, given the manifests of all, stay. One that cannot be written (on a full disk, say)
    is reported to `say` and in events.jsonl, and earlier ones are untouched. `alive` is called while waiting.
    """

    run_dir: Path
    keep: Callable[[list[dict]], set[int]]
    say: Callable[[str], None]
    alive: Callable[[str], None]
    thread: threading.Thread | None = None
    step: int | None = None
    failure: str | None = None

    def __exit__(self, *exc) -> None:
        self._wait()

    def save(self, engine, step: int, facts: dict) -> None:
        """Save the engine's state as the checkpoint of `step`; `facts` are added to its manifest."""
        self._wait()  # so that no more than one copy of the state is in memory
        self.step = step
        scalars, tensors = gather_state(engine, lambda: self.alive(f"saving step {step}"))
        if torch.distributed.get_rank() == 0:
            manifest = {"step": step, "optimizer_scalars": scalars, **facts}
            self.thread = threading.Thread(target=self._write, args=(manifest, tensors), name="checkpoint")
            self.thread.start()

    def finish(self) -> bool:
        """Wait for the checkpoint that is being written; return whether it is there, on every rank."""
        self._wait()
        return from_main(lambda: self.failure is None)

    def _wait(self) -> None:
        if self.thread is None:
            return
        while self.thread.is_alive():
            self.alive(f"writing step {self.step}")
            self.thread.join(timeout=1)
        self.thread = None
        if self.failure:
            self.say(f"The checkpoint of step {self.step} could not be saved, training continues: {self.failure}")
            with contextlib.suppress(OSError):  # the disk may have no room for that either
                log_event(self.run_dir, "save_failed", self.step, reason=self.failure)

    def _write(self, manifest: dict, tensors: dict) -> None:
        self.failure, folder = None, checkpoint_dir(self.run_dir, self.step)
        try:
            write(self.run_dir, manifest, tensors)
            prune(self.run_dir, self.keep, self.step)
        except Exception as error:  # training continues whatever it is
            if (folder / "manifest.json").exists():
                print(f"{folder} is saved, but older ones may not have been deleted, training continues: {error}")
            else:
                self.failure = f"{folder}: {error}"
                shutil.rmtree(folder, ignore_errors=True)
