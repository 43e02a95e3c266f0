"""Kill a run again and again: `python -m tests.distributed.torture [kills=50] [processes=2] [stage=2] [seed=0]`

A run is killed with SIGKILL, all its processes at once, at random moments: while it starts, between any two steps, and
while it writes a checkpoint. Each time the same command starts it again, and nothing else is done. In the end its
metrics must be those of an undisturbed run, to the last bit. Exit with 1 if they are not.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from rich.console import Console

from tests.conftest import SMALL_RUN, prepare_small_data
from tests.distributed.helpers import curve, events, last_step, run, start, torchrun

MOMENTS = ("starting", "training", "saving")
STEPS_A_LIFE = 12
FAULTS = ("slow_files seconds=0.1",)  # so that a kill can meet a checkpoint that is half written


def main(kills="50", processes="2", stage="2", seed="0") -> int:
    console, chance = Console(highlight=False, soft_wrap=True), random.Random(int(seed))
    kills, processes, steps = int(kills), int(processes), STEPS_A_LIFE * (int(kills) + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [*SMALL_RUN, *prepare_small_data(folder), f"trainer.max_steps={steps}", "trainer.samples=0",
                     "trainer.eval_every=20", "trainer.checkpoint_every=2", "trainer.micro_batch_size=2",
                     f"deepspeed=zero{stage}"]  # fmt: skip
        run([*overrides, f"run.dir={folder}/whole"], processes)
        whole, parts = curve(folder / "whole"), folder / "parts"
        start_time, done = time.monotonic(), Counter()
        while sum(done.values()) < kills:
            moment = chance.choice(MOMENTS)
            process = start(torchrun(processes), [*overrides, f"run.dir={parts}"], FAULTS)
            step = wait_for_moment(process, moment, parts, chance)
            if process.poll() is not None:
                break  # it has ended, well or not: its metrics will tell
            kill(process)
            done[moment] += 1
            console.print(f"kill {sum(done.values()):>3}/{kills}  while {moment:<8}  at step {step}/{steps}")
        run([*overrides, f"run.dir={parts}"], processes, FAULTS)
        same, restarts = curve(parts) == whole, events(parts).count("start") - 1
    moments = ", ".join(f"{count} while {moment}" for moment, count in sorted(done.items()))
    console.print(f"{sum(done.values())} kills ({moments}), {restarts} restarts after a first step, "
                  f"{time.monotonic() - start_time:.0f} s; the metrics of {steps} steps "
                  f"{'equal' if same else 'differ from'} those of the undisturbed run")  # fmt: skip
    return int(not same or sum(done.values()) < kills)


def kill(process) -> None:
    """Kill the launcher and its workers, which have sessions of their own, all at once."""
    launcher = psutil.Process(process.pid)
    for each in (launcher, *launcher.children(recursive=True)):
        each.kill()
    process.communicate()


def wait_for_moment(process, moment: str, folder: Path, chance: random.Random) -> int:
    """Wait for the moment to kill the run, and return the last step it has logged."""
    first = last_step(folder) if folder.exists() else 0
    if moment == "starting":
        wait(process, lambda: False, chance.uniform(0, 6))
    elif moment == "training":
        goal = first + chance.randint(1, STEPS_A_LIFE)
        wait(process, lambda: folder.exists() and last_step(folder) >= goal)
        time.sleep(chance.uniform(0, 0.1))
    else:
        wait(process, lambda: has_checkpoints(folder) and last_step(folder) > first)
        wait(process, lambda: unfinished(folder))
        time.sleep(chance.uniform(0, 0.4))
    return last_step(folder)


def has_checkpoints(folder: Path) -> bool:
    return (folder / "checkpoints").exists()


def unfinished(folder: Path) -> bool:
    """Return whether a checkpoint is being written."""
    return any(not (path / "manifest.json").exists() for path in (folder / "checkpoints").glob("step_*"))


def wait(process, until, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not until():
        time.sleep(0.002)


if __name__ == "__main__":
    sys.exit(main(**dict(argument.split("=", 1) for argument in sys.argv[1:])))
