"""Runs of train.py on several processes, started as their users start them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

import train
from configs.app import compose
from configs.load import load
from tests.conftest import ROOT
from training.metrics import read_metrics


def torchrun(processes: int, *launcher_options: str) -> list[str]:
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*python, *launcher_options]


def start(overrides: list[str], processes: int, *launcher_options: str, script: Path | str = "train.py"):
    """A run in the background, its output in one pipe."""
    command = [*torchrun(processes, *launcher_options), str(script), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(overrides: list[str], processes: int = 1, script: Path | str = "train.py") -> str:
    """A run to its end, which must be a good one; its output."""
    if processes == 1 and script == "train.py":
        assert train.main(load(compose("train", overrides))) == 0
        return ""
    process = start(overrides, processes, script=script)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-5000:]
    return output


def worker(process: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of a rank of a run that `start` started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank) and "train.py" in " ".join(child.cmdline()):
            return child
    raise ProcessLookupError(f"rank {rank} is not there")


def wait_for(what: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()[0][-5000:]
        time.sleep(0.02)


def curve(folder: Path) -> dict[int, tuple[float, ...]]:
    keys = ("train/loss", "optim/grad_norm", "val/loss")
    return {line["step"]: tuple(line[k] for k in keys if k in line) for line in read_metrics(folder / "metrics.jsonl")}


def last_step(folder: Path) -> int:
    return max(curve(folder), default=0)


def deviation(ours: dict, theirs: dict) -> float:
    """The largest difference between two curves; infinite where they don't have the same steps."""
    if ours.keys() != theirs.keys() or any(len(ours[step]) != len(theirs[step]) for step in ours):
        return float("inf")
    return max(abs(a - b) for step in ours for a, b in zip(ours[step], theirs[step], strict=True))


def events(folder: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
