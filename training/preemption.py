"""Signals that ask a run to save and end: SIGUSR1 and SIGTERM (Slurm's warnings), SIGINT (Ctrl-C)."""

import signal

PREEMPTED = 75  # exit code: saved, start me again


class Preemption:
    """A context in which a signal sets `requested`; a second Ctrl-C interrupts at once."""

    signals = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested: str | None = None

    def __enter__(self) -> "Preemption":
        self.previous = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
