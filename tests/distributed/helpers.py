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
from configs.app import configured
from tests.conftest import ROOT
from training.config import Config
from training.jsonl import read_lines
from training.stored import read_events

TRAIN, LAUNCH, SEVERAL = (
    ROOT / "train.py",
    Path(__file__).with_name("launch.py"),
    Path(__file__).with_name("several.py"),
)


def torchrun(processes: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]


def python() -> list[str]:
    return [sys.executable]


def start(
    launcher: list[str], overrides: list[str], faults: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen:
    """Start a run in the background, with `faults` of launch.py, and return its process; its output is one pipe."""
    script = [str(LAUNCH), *(f"--fault={fault}" for fault in faults)] if faults else [str(TRAIN)]
    return start_in(folder_of(overrides).parent, [*launcher, *script, *overrides], **environment)


def start_in(folder: Path, command: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def folder_of(overrides: list[str]) -> Path:
    return [Path(word.removeprefix("run.dir=")) for word in overrides if word.startswith("run.dir=")][-1]


def run(overrides: list[str], processes: int = 1, faults: tuple[str, ...] = ()) -> None:
    """Train to the end, which must be a good one; one process without faults is this one."""
    if processes == 1 and not faults:
        assert train.main(configured(Config, overrides)) == 0
    else:
        finish(start(torchrun(processes), overrides, faults))


def run_several(runs: list[list[str]], processes: int) -> None:
    """Train runs one after the other in the same processes."""
    finish(start_in(folder_of(runs[0]).parent, [*torchrun(processes), str(SEVERAL), json.dumps(runs)]))


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-5000:]


def worker(process: subprocess.Popen, rank: int) -> psutil.Process:
    """Return the process of a rank of a run that `start` started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank) and {str(TRAIN), str(LAUNCH)} & set(child.cmdline()):
            return child
    raise ProcessLookupError(f"there is no rank {rank}")


def wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 300.0) -> None:
    """Wait until a condition holds while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition does not hold after {seconds} s"
        assert process.poll() is None, process.communicate()[0][-5000:]
        time.sleep(0.02)


def curve(folder: Path) -> dict[int, tuple[float, ...]]:
    """Return the losses and the gradient norm of each step in a run folder."""
    keys = ("train/loss", "optim/grad_norm", "val/loss")
    return {line["step"]: tuple(line[k] for k in keys if k in line) for line in read_lines(folder / "metrics.jsonl")}


def last_step(folder: Path) -> int:
    return max(curve(folder), default=0)


def deviation(ours: dict, theirs: dict) -> float:
    """Return the largest difference between two curves, infinite if they do not have the same steps."""
    if ours.keys() != theirs.keys() or any(len(ours[step]) != len(theirs[step]) for step in ours):
        return float("inf")
    return max(abs(a - b) for step in ours for a, b in zip(ours[step], theirs[step], strict=True))


def events(folder: Path) -> list[str]:
    return [line["event"] for line in read_events(folder)]
