"""Everything a run holds while it trains: the pre-emption signals, the process group, the lock and the watchdog."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from training.config import Config
from training.device import Runtime
from training.engine import init_distributed, shut_down
from training.lock import RunLock
from training.preemption import Preemption
from training.ranks import from_main
from training.run_folder import is_finished
from training.streams import make_streams_lenient
from training.watchdog import ENDING, Watchdog

FINISHED = "{} is finished; choose another run.name to train again"


@dataclass
class Session:
    preemption: Preemption
    watchdog: Watchdog


class Ended(Exception):
    """A run that ends without training, or whose ranks cannot continue together: a message and an exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@contextmanager
def session(
    config: Config, runtime: Runtime, say: Callable[[str], None], prepare: Callable[[], object]
) -> Iterator[Session]:
    """Hold what a run needs, and let go of it however the run ends. Every rank enters it.

    Rank 0 calls `prepare` first; the others wait for it where the process group forms. Raise Ended for a run that is
    finished or that another process trains, and if another rank's end is the reason for an error here.
    """
    make_streams_lenient()
    run_dir, rank_timeout = config.run.dir, config.trainer.rank_timeout
    with Preemption() as preemption:
        if runtime.is_main:
            prepare()
        init_distributed(runtime, rank_timeout)
        watchdog = Watchdog(runtime.rank, runtime.world_size, rank_timeout)
        lock = RunLock(Path(run_dir))
        try:
            patience = rank_timeout / 2  # the other ranks wait for rank 0 here
            if reason := from_main(lambda: lock.acquire(patience, say)):
                raise Ended(reason, 1)
            if from_main(lambda: is_finished(run_dir)):  # by the process that had the lock
                raise Ended(FINISHED.format(run_dir), 0)
            with watchdog:
                yield Session(preemption, watchdog)
        except RuntimeError as error:
            if not (reason := watchdog.explain(error)):
                raise
            print(ENDING.format(reason), file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        finally:
            shut_down()
            lock.release()
