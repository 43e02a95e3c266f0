"""Standard output and error that a full disk does not turn into the end of a run."""

import sys
from contextlib import suppress
from typing import Any


class Lenient:
    """A text stream whose failing writes are dropped: Slurm puts the log on the disk that checkpoints fill."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def make_streams_lenient() -> None:
    """Let this process write on, from here to its end, when its standard streams fail."""
    if not isinstance(sys.stdout, Lenient):  # as they are from the second run of a sweep on
        sys.stdout = Lenient(sys.stdout)
        sys.stderr = Lenient(sys.stderr)
