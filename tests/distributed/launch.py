"""Run train.py with faults: `python tests/distributed/launch.py --fault="hang rank=1 step=5" [overrides]`.

Each function below that is listed in FAULTS is a fault; the words after its name are its arguments.

The faults live here and not behind a hook in `training`, since that would be production code that only tests use. The
functions that they wrap are taken by reference: if one is renamed or moved, the launcher fails at its start. What
happens at a step happens in `Watchdog.mark`, which every rank calls at every stage of a step.
"""

import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable

import train
from configs.app import app
from model.transformer import Transformer
from training import checkpoint, saver
from training.checks import check_sweep
from training.config import Config
from training.watchdog import Watchdog


def add(owner, name: str, before: Callable = lambda *args: None, after: Callable = lambda *args: None) -> None:
    """Call `before` and `after` with the arguments of `owner.name` around each of its calls."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        before(*args)
        result = original(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, wrapped)


def at_each_step(rank: int, act: Callable[[int], None]) -> None:
    """Call `act(step)` on a rank when it has reported that it reads a batch."""

    def after(watchdog: Watchdog, doing: str) -> None:
        reading = re.fullmatch(r"step (\d+), reading a batch", doing)
        if reading and int(os.environ["RANK"]) == rank:
            act(int(reading[1]))

    add(Watchdog, "mark", after=after)


def hang(rank: int, step: int) -> None:
    """The rank lives, and its threads answer, but it never comes to the collective where the others wait."""
    at_each_step(rank, lambda current: time.sleep(3600 if current == step else 0))


def fail(rank: int, step: int) -> None:
    def act(current: int) -> None:
        if current == step:
            raise OSError(5, "Input/output error", "shard 7")

    at_each_step(rank, act)


def kill(rank: int, step: int) -> None:
    """The rank is killed, unless torchrun has started it again."""

    def act(current: int) -> None:
        if current == step and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    at_each_step(rank, act)


def slow_steps(rank: int, past: int, seconds: float, until: str) -> None:
    """The rank takes longer for the steps past step `past`, until the file `until` exists."""
    at_each_step(rank, lambda current: time.sleep(0 if current <= past or os.path.exists(until) else seconds))


def infinite_loss(rank: int, step: int) -> None:
    """The loss of a step is infinite on the rank."""
    steps = [0]
    at_each_step(rank, lambda current: steps.append(current))
    forward = Transformer.forward

    def spoiled(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        return loss + float("inf") if self.training and steps[-1] == step else loss

    Transformer.forward = spoiled


def slow_save(seconds: float) -> None:
    """Writing a checkpoint takes longer; its start is printed."""

    def before(*args) -> None:
        print("writing", flush=True)
        time.sleep(seconds)

    add(saver, "write", before=before)


def slow_files(seconds: float) -> None:
    """Each file of a checkpoint takes longer, so that a checkpoint is incomplete for a while."""
    for name in ("save_file", "sha256_of"):
        add(checkpoint, name, before=lambda *args: time.sleep(seconds))


FAULTS = {fault.__name__: fault for fault in (hang, fail, kill, slow_steps, infinite_loss, slow_save, slow_files)}


def inject(text: str) -> None:
    """Inject a fault: a name of FAULTS and its arguments, as in `hang rank=1 step=5`."""
    name, *words = text.split()
    fault, arguments = FAULTS[name], dict(word.split("=", 1) for word in words)
    fault(**{key: fault.__annotations__[key](value) for key, value in arguments.items()})


if __name__ == "__main__":
    for argument in [argument for argument in sys.argv if argument.startswith("--fault=")]:
        sys.argv.remove(argument)
        inject(argument.removeprefix("--fault="))
    app(train.main, Config, check_sweep=check_sweep)
