"""A dead or hung rank ends the job, and is named.

Collectives alone wait for a lost rank as long as their backend's time-out, and then report a closed connection. So
every rank also tells the others once a second, over its own connection to the rendezvous store, that it is alive and
how far it has come, and ends the process if one has not been heard of, or none has moved, for too long.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

from torch.distributed import PrefixStore, TCPStore

T = TypeVar("T")
BEAT_SECONDS = 1.0
PAUSE = 5.0  # seconds that this thread can only have slept through if the process was suspended
DONE = "done"
ENDING = "The job ends: {}. The same command resumes from the last checkpoint."


@dataclass
class Peer:
    """What is known of another rank, or of this one."""

    rank: int
    beat: int = 0
    marks: int = 0  # how often it has reported progress
    doing: str = "starting"
    where: str = "?"
    error: str | None = None
    heard: float = field(default_factory=time.monotonic)  # when `beat` last changed
    moved: float = field(default_factory=time.monotonic)  # when `marks` last changed

    def update(self, message: str) -> None:
        beat, marks, self.doing, self.where, self.error = json.loads(message)
        now = time.monotonic()
        if beat != self.beat:
            self.beat, self.heard = beat, now
        if marks != self.marks:
            self.marks, self.moved = marks, now

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.where})"


class Watchdog:
    """A context around everything that ranks do together; it does nothing in a process that is alone.

    `mark` reports that this rank moves, and what it is doing. After `timeout` seconds without a message from a rank, or
    without any rank moving once all have started, the process prints which one and ends with exit code 1.
    """

    def __init__(self, rank: int, world_size: int, timeout: float):
        self.me = Peer(rank, where=f"{socket.gethostname()}, pid {os.getpid()}")
        self.others = [Peer(r) for r in range(world_size) if r != rank]
        self.timeout = timeout
        self.contact = time.monotonic()
        self.stopped = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.others:
            self.address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.beats = threading.Thread(target=self._beat, name="watchdog_beat", daemon=True)
            self.beats.start()
            threading.Thread(target=self._judge, name="watchdog_judge", daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Tell the others how this rank ends; if another rank's end is the reason, print that and exit with 1."""
        if not self.others:
            return
        reason = self.explain(error) if isinstance(error, RuntimeError) and in_collective(error) else None
        if error is not None and reason is None:
            self.me.error = f"{type(error).__name__}: {error}"
        self.me.doing = DONE
        self.stopped.set()
        self.beats.join(timeout=2 * BEAT_SECONDS)
        if reason:
            print(ENDING.format(reason), file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    def mark(self, doing: str) -> None:
        self.me.marks += 1
        self.me.moved = time.monotonic()
        self.me.doing = doing

    def watched(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """Yield the items, each of them a sign that this rank moves."""
        for item in items:
            self.mark(doing)
            yield item

    def judge(self) -> str | None:
        """Return what is wrong with the ranks, if anything."""
        now, limit = time.monotonic(), self.timeout
        working = [peer for peer in (self.me, *self.others) if peer.doing != DONE]
        if now - self.contact > limit:
            return (
                f"{self.me} has had no contact with the rendezvous at {self.address[0]}:{self.address[1]} "
                f"for {now - self.contact:.0f} s: its host, rank 0's, is down or cut off"
            )
        silent = [peer for peer in working if peer is not self.me and now - peer.heard > limit]
        if silent:
            return "; ".join(f"{p} has been silent for {now - p.heard:.0f} s (last: {p.doing})" for p in silent)
        begun = len(working) > 1 and all(peer.marks for peer in working)  # starting up may take its time
        if begun and all(now - peer.moved > limit for peer in working):
            least = min(peer.marks for peer in working)
            behind = "; ".join(f"{peer}, {peer.doing}" for peer in working if peer.marks == least)
            return f"no rank has moved for {limit:.0f} s; furthest behind: {behind}"
        return None

    def explain(self, error: BaseException) -> str:
        """Return which rank's end made a collective fail with `error`."""
        deadline = time.monotonic() + 6 * BEAT_SECONDS
        while time.monotonic() < deadline:
            for peer in self.others:
                if peer.error:
                    return f"{peer} failed: {peer.error}"
                if peer.doing != DONE and time.monotonic() - peer.heard > 4 * BEAT_SECONDS:
                    return f"{peer} is gone (last: {peer.doing})"
            time.sleep(BEAT_SECONDS / 4)
        return f"a connection to another rank broke: {error}".splitlines()[0]

    def _beat(self) -> None:
        store = None
        while True:
            last = self.stopped.is_set()
            try:
                store = store or self._connect()
                me = self.me
                me.beat += 1
                store.set(str(me.rank), json.dumps([me.beat, me.marks, me.doing, me.where, me.error]))
                for peer in self.others:
                    if store.check([str(peer.rank)]):
                        peer.update(store.get(str(peer.rank)).decode())
                self.contact = time.monotonic()
            except RuntimeError:  # the store's errors; _judge decides how long they may last
                store = None
            if last:
                return
            self.stopped.wait(BEAT_SECONDS)

    def _connect(self) -> PrefixStore:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        host, port = self.address
        client = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self.timeout), wait_for_workers=False)
        return PrefixStore(f"watchdog/{attempt}", client)

    def forgive(self, seconds: float) -> None:
        """Count as if the last `seconds` had not been: this process was suspended, and heard of nobody."""
        self.contact += seconds
        for peer in (self.me, *self.others):
            peer.heard += seconds
            peer.moved += seconds

    def _judge(self) -> None:
        woke = time.monotonic()
        while not self.stopped.wait(BEAT_SECONDS / 2):
            asleep, woke = time.monotonic() - woke, time.monotonic()
            if asleep > PAUSE:
                self.forgive(asleep)
            verdict = self.judge()
            if verdict and not self.stopped.is_set():
                print(ENDING.format(verdict), file=sys.stderr, flush=True)
                os._exit(1)


def in_collective(error: BaseException) -> bool:
    """Return whether an error was raised inside torch.distributed."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("torch/distributed/" in frame.filename for frame in frames[-3:])
