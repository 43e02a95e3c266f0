"""slurm.status reads run folders as runs leave them, without Slurm."""

import json
import os
import shutil
import time

import pytest

import train
from configs.app import configured
from configs.errors import ConfigError
from slurm import status
from tests.conftest import SMALL_RUN
from training.config import Config


@pytest.fixture(scope="module")
def trained(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("status") / "done"
    overrides = [*SMALL_RUN, *small_data, f"run.dir={folder}", "trainer.samples=0"]
    assert train.main(configured(Config, overrides)) == 0
    return folder


@pytest.fixture
def stopped(trained, tmp_path):
    """Return the run as if it had been interrupted after step 8, a day ago."""
    folder = shutil.copytree(trained, tmp_path / "stopped")
    (folder / "summary.json").unlink()
    grow_old(folder)
    return folder


def grow_old(folder):
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 86400,) * 2)


def log(folder, text: str, job: int = 12) -> None:
    (folder / f"slurm-{job}.log").write_text(f"=== job {job}: start 1, 1 tasks on node1 [2026-11-22 10:00:00]\n{text}")
    grow_old(folder)


def test_a_finished_run(trained, capsys):
    found = status.read_status(trained, {})
    assert (found.state, found.problem, found.metrics["step"], found.horizon) == ("finished", None, 8, 8)
    assert found.metrics["tokens"] == 8 * 512 and found.checkpoint[0] == 8 and found.restarts == 0
    assert status.main([str(trained.parent)]) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "8 / 8" in out and f"{found.metrics['val/loss']:.4f}" in out


def test_what_is_wrong_with_those_that_stopped(stopped):
    def state(text: str) -> tuple[str, str | None]:
        log(stopped, text)
        found = status.read_status(stopped, {})
        return found.state, found.problem

    assert status.read_status(stopped, {}).problem == "nothing written for 1 day, 0:00:00"
    crash = "Traceback (most recent call last):\n  ...\ntorch.OutOfMemoryError: CUDA out of memory\n"
    failed = "=== job 12: failed with exit code 1 [2026-11-22 10:01:00]\n"
    assert state(crash + failed) == ("failed", "failed with exit code 1; torch.OutOfMemoryError: CUDA out of memory")
    mistake = "Configuration error:\n  optim.lr=-1: must be a positive number\n"
    assert state(mistake + failed)[1].endswith("optim.lr=-1: must be a positive number")
    ending = "The job ends: rank 1 is lost. The same command resumes from the last checkpoint.\n"
    assert state(ending + crash + failed)[1].endswith(ending.strip())
    limit = "slurmstepd: error: *** JOB 12 ON node1 CANCELLED AT 2026-11-22T10:26:23 DUE TO TIME LIMIT ***\n"
    found, problem = state(limit)
    assert found == "stopped" and "DUE TO TIME LIMIT" in problem
    assert state("=== job 12: saved, requeueing [2026-11-22 10:01:00]\n") == ("requeued", None)


def test_the_queue_knows_best(stopped):
    log(stopped, "")
    (stopped / "job.json").write_text(json.dumps({"jobs": {"train": "13_2"}}))
    assert status.read_status(stopped, {"13_2": ("PENDING", "Priority")}).problem == "waits: Priority"
    found = status.read_status(stopped, {"12": ("RUNNING", "None")})
    assert (found.state, found.problem) == ("running", "nothing written for 1 day, 0:00:00")


def test_a_loss_that_is_not_finite_and_a_broken_checkpoint(stopped):
    lines = (stopped / "metrics.jsonl").read_text()
    (stopped / "metrics.jsonl").write_text(lines + json.dumps({"step": 9, "tokens": 4608, "train/loss": None}) + "\n")
    grow_old(stopped)
    assert "the loss of step 9 is not finite" in status.read_status(stopped, {}).problem
    (stopped / "metrics.jsonl").write_text(lines)
    (stopped / "checkpoints/step_00000008/model.safetensors").write_bytes(b"torn")
    grow_old(stopped)
    assert "has 4 bytes instead of" in status.read_status(stopped, {}).problem


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder and has none"):
        status.main([str(tmp_path)])
