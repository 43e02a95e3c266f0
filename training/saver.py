"""Saving beside training: the state is copied between two steps, and written while the next ones run."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from training.checkpoint import checkpoint_dir, prune, write
from training.engine_state import gather


class CheckpointSaver:
    """Writes the checkpoints of a run, one at a time; every rank calls every method, rank 0 writes.

    Of all whole checkpoints, given by their manifests, the steps that `keep` returns stay. A checkpoint that cannot be
    written (a full disk, say) is told to `failed`, and those before it are untouched. `background` False makes `save`
    wait until its checkpoint is there.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: Callable[[list[dict]], set[int]],
        failed: Callable[[int, str], None],
        background: bool = True,
        alive: Callable[[str], None] = lambda doing: None,
    ):
        self.run_dir, self.keep, self.failed, self.background, self.alive = run_dir, keep, failed, background, alive
        self.thread: threading.Thread | None = None
        self.step: int | None = None
        self.failure: str | None = None

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, *exc) -> None:
        self._wait()

    def save(self, engine, step: int, facts: dict) -> None:
        """Save the engine's state as the checkpoint of `step`; `facts` join its manifest."""
        self._wait()  # so that no more than one copy of the state is in memory
        self.step = step
        weights, moments, updates = gather(engine, lambda: self.alive(f"saving step {step}"))
        if torch.distributed.get_rank() == 0:
            manifest = {"step": step, "optimizer_updates": updates, **facts}
            tensors = {"model": weights, "optimizer": moments}
            self.thread = threading.Thread(target=self._write, args=(manifest, tensors), name="checkpoint")
            self.thread.start()
        if not self.background:
            self._wait()

    def finish(self) -> bool:
        """Wait for the checkpoint that is being written; whether it is there, on every rank."""
        self._wait()
        failure = [self.failure]
        torch.distributed.broadcast_object_list(failure)
        return failure[0] is None

    def _wait(self) -> None:
        if self.thread is not None:
            while self.thread.is_alive():
                self.alive(f"writing step {self.step}")
                self.thread.join(timeout=1)
            self.thread = None
            if self.failure:
                self.failed(self.step, self.failure)

    def _write(self, manifest: dict, tensors: dict) -> None:
        self.failure = None
        try:
            write(self.run_dir, manifest, tensors)
        except Exception as error:  # training goes on whatever it is
            folder = checkpoint_dir(self.run_dir, manifest["step"])
            self.failure = f"{folder}: {error}"
            if not (folder / "manifest.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
            return
        try:
            prune(self.run_dir, self.keep, manifest["step"])
        except Exception as error:
            print(f"old checkpoints of {self.run_dir} could not be deleted, training goes on: {error}")
