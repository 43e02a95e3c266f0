"""Kill a run again and again: `python -m tests.distributed.torture [kills=50] [processes=2] [stage=2] [seed=0]`

A run is killed with SIGKILL, all its processes at once, at random moments: while it starts, between any two steps, and
while it writes a checkpoint. The same command starts it again each time, and nothing else is done. In the end its
metrics must be those of a run that nobody disturbed, to the last bit. Exits with 1 where they are not.
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
from tests.distributed.helpers import curve, events, last_step, run, start

MOMENTS = ("starting", "training", "saving")
STEPS_A_LIFE = 12
SCRIPT = Path(__file__).with_name("slow_saves.py")


def main(kills="50", processes="2", stage="2", seed="0") -> int:
    console, chance = Console(highlight=False, soft_wrap=True), random.Random(int(seed))
    kills, processes, steps = int(kills), int(processes), STEPS_A_LIFE * (int(kills) + 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [*SMALL_RUN, *prepare_small_data(folder), f"trainer.max_steps={steps}", "trainer.samples=0",
                     "trainer.eval_every=20", "trainer.checkpoint_every=2", "trainer.micro_batch_size=2",
                     f"deepspeed=zero{stage}"]  # fmt: skip
        run([*overrides, f"run.dir={folder}/whole"], processes)
        whole, parts = curve(folder / "whole"), folder / "parts"
        began, done = time.monotonic(), Counter()
        while sum(done.values()) < kills:
            moment = chance.choice(MOMENTS)
            process = start([*overrides, f"run.dir={parts}"], processes, script=SCRIPT)
            step = live(process, moment, parts, chance)
            if process.poll() is not None:
                break  # it came to its end first, or failed: what it left will tell
            kill(process)
            done[moment] += 1
            console.print(f"kill {sum(done.values()):>3}/{kills}  while {moment:<8}  at step {step}/{steps}")
        run([*overrides, f"run.dir={parts}"], processes, script=SCRIPT)
        same, restarts = curve(parts) == whole, events(parts).count("start") - 1
    how = ", ".join(f"{count} while {moment}" for moment, count in sorted(done.items()))
    console.print(f"{sum(done.values())} kills ({how}), {restarts} restarts after a first step, "
                  f"{time.monotonic() - began:.0f} s; {steps} steps of metrics "
                  f"{'EQUAL' if same else 'DIFFER FROM'} those of the undisturbed run")  # fmt: skip
    return int(not same or sum(done.values()) < kills)


def kill(process) -> None:
    """The launcher and its workers, which have sessions of their own, all at once."""
    launcher = psutil.Process(process.pid)
    for each in (launcher, *launcher.children(recursive=True)):
        each.kill()
    process.communicate()


def live(process, moment: str, folder: Path, chance: random.Random) -> int:
    """Wait for a moment to kill at; the step that the run had logged by then."""
    first = last_step(folder) if folder.exists() else 0
    if moment == "starting":
        wait(process, lambda: False, chance.uniform(0, 6))
    elif moment == "training":
        goal = first + chance.randint(1, STEPS_A_LIFE)
        wait(process, lambda: folder.exists() and last_step(folder) >= goal)
        time.sleep(chance.uniform(0, 0.1))
    else:
        wait(process, lambda: started(folder) and last_step(folder) > first)
        wait(process, lambda: unfinished(folder))
        time.sleep(chance.uniform(0, 0.4))
    return last_step(folder)


def started(folder: Path) -> bool:
    return (folder / "checkpoints").exists()


def unfinished(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(not (path / "manifest.json").exists() for path in (folder / "checkpoints").glob("step_*"))


def wait(process, until, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not until():
        time.sleep(0.002)


if __name__ == "__main__":
    sys.exit(main(**dict(argument.split("=", 1) for argument in sys.argv[1:])))
