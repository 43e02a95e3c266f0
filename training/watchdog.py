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
DONE = "done"


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
        self.peers = {r: Peer(r) for r in range(world_size)} | {rank: self.me}
        self.timeout = timeout
        self.contact = time.monotonic()
        self.stopped = threading.Event()
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> "Watchdog":
        if len(self.peers) > 1:
            self.address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.contact = time.monotonic()
            for peer in self.peers.values():
                peer.heard = peer.moved = self.contact
            for task in (self._beat, self._judge):
                self.threads.append(threading.Thread(target=task, name=f"watchdog{task.__name__}", daemon=True))
                self.threads[-1].start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.me.doing, self.me.error = DONE, None if error is None else f"{type(error).__name__}: {error}"
        self.stopped.set()
        if self.threads:
            self.threads[0].join(timeout=2 * BEAT_SECONDS)

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
        now = time.monotonic()
        limit = self.timeout
        working = [peer for peer in self.peers.values() if peer.doing != DONE]
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
            behind = [peer for peer in working if peer.marks == min(p.marks for p in working)]
            least = "; ".join(f"{p}, {p.doing}" for p in behind)
            return f"no rank has moved for {limit:.0f} s; furthest behind: {least}"
        return None

    def explain(self, error: BaseException) -> str | None:
        """Return which rank's end made a collective fail with `error`; None if the error is this rank's own."""
        if not (self.threads and in_collective(error)):
            return None
        deadline = time.monotonic() + 6 * BEAT_SECONDS
        while time.monotonic() < deadline:
            now = time.monotonic()
            for peer in self.peers.values():
                if peer is not self.me and peer.error:
                    return f"{peer} failed: {peer.error}"
                if peer is not self.me and peer.doing != DONE and now - peer.heard > 4 * BEAT_SECONDS:
                    return f"{peer} is gone (last: {peer.doing})"
            time.sleep(BEAT_SECONDS / 4)
        return f"a connection to another rank broke: {error}".splitlines()[0]

    def _beat(self) -> None:
        store = None
        while True:
            last = self.stopped.is_set()
            try:
                store = store or self._connect()
                self.me.beat += 1
                self.me.heard = time.monotonic()
                me = self.me
                store.set(str(me.rank), json.dumps([me.beat, me.marks, me.doing, me.where, me.error]))
                for peer in self.peers.values():
                    if peer is not me and store.check([str(peer.rank)]):
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

    def _judge(self) -> None:
        while not self.stopped.wait(BEAT_SECONDS / 2):
            verdict = self.judge()
            if verdict and not self.stopped.is_set():
                print(f"{ENDING.format(verdict)}", file=sys.stderr, flush=True)
                os._exit(1)


ENDING = "The job ends: {}. The same command resumes from the last checkpoint."


def in_collective(error: BaseException) -> bool:
    """Return whether an error was raised inside torch.distributed."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("torch/distributed/" in frame.filename for frame in frames[-3:])
