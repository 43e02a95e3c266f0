"""Everything a run holds while it trains: the pre-emption signals, the process group, the lock and the watchdog."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from training.config import Config
from training.device import Runtime
from training.engine import init_distributed, shut_down
from training.ranks import from_main
from training.run_folder import RunLock
from training.stored import is_finished
from training.streams import make_streams_lenient
from training.watchdog import Watchdog

PREEMPTED = 75  # the exit code after saving: the same command resumes
FINISHED = "{} is finished; choose another run.name to train again"


class Preemption:
    """A context in which a signal sets `requested`, which the training loop reads after each step.

    Ctrl-C interrupts at once while there is nothing to save yet, and the second time, but never inside of `saving`.
    """

    signals = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested: str | None = None
        self.training = False  # there is something to save
        self.is_saving = False

    def __enter__(self) -> "Preemption":
        self.previous = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextmanager
    def saving(self):
        self.is_saving = True
        try:
            yield
        finally:
            self.is_saving = False

    def _handle(self, number: int, frame) -> None:
        at_once = not self.training or (self.requested and not self.is_saving)
        if number == signal.SIGINT and at_once:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


@dataclass
class Session:
    preemption: Preemption
    watchdog: Watchdog


class Ended(Exception):
    """A run that ends without training: a message and an exit code."""


@contextmanager
def session(
    config: Config, runtime: Runtime, say: Callable[[str], None], prepare: Callable[[], object]
) -> Iterator[Session]:
    """Hold what a run needs, and let go of it however the run ends. Every rank enters it.

    Rank 0 calls `prepare` before the process group forms. Raise Ended for a run that is finished or in use elsewhere.
    What a block's `around_training(run_dir, runtime)` returns, a profiler's for example, is entered as a context.
    """
    make_streams_lenient()
    run_dir, rank_timeout = config.run.dir, config.trainer.rank_timeout
    with Preemption() as preemption:
        if runtime.is_main:
            prepare()
        init_distributed(runtime, rank_timeout)
        lock = RunLock(Path(run_dir))
        try:
            if reason := from_main(lambda: lock.acquire(rank_timeout / 2, say)):  # the other ranks wait here
                raise Ended(reason, 1)
            if from_main(lambda: is_finished(run_dir)):  # by the process that had the lock
                raise Ended(FINISHED.format(run_dir), 0)
            with Watchdog(runtime.rank, runtime.world_size, rank_timeout) as watchdog, ExitStack() as contexts:
                for block in dict(config).values():
                    if hasattr(block, "around_training"):
                        contexts.enter_context(block.around_training(Path(run_dir), runtime))
                yield Session(preemption, watchdog)
        finally:
            shut_down()
            lock.release()
