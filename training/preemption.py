"""Signals that ask a run to save and end: SIGUSR1 and SIGTERM (Slurm's warnings), SIGINT (Ctrl-C)."""

import signal
from contextlib import contextmanager

PREEMPTED = 75  # the exit code after saving: the same command resumes


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
