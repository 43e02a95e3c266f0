"""Work in many processes with the results in order, and reports of how far it is."""

import multiprocessing
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from configs.errors import ConfigError

REPORT_EVERY = 20  # seconds

_function: Callable | None = None  # what a worker process does with each item


def ordered_map(function: Callable, items: Iterable, workers: int | None) -> Iterator:
    """Yield `function(item)` in the order of `items`; None workers are as many as this process may use cores.

    Only a few items are under way at any time, so neither the items nor the results have to fit in memory. One worker
    works in this process. Worker processes keep their `function`, and end with this process, however it ends.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(function,))
    try:
        pool.submit(os.getpid).result()  # the processes start before `items` can start threads
        pending = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"data.workers={workers}: a worker process was ended from outside, as when memory runs out; the same "
            "command resumes, and fewer workers take less memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(function: Callable) -> None:
    global _function
    _function = function
    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


def work(item):
    return _function(item)


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # a parent that was killed (SIGKILL) told the pool nothing, which would wait for work forever


def report(text: str, enabled: bool = True) -> None:
    if enabled:
        print(text, file=sys.stderr, flush=True)


class Rates:
    """Counts and their rates, reported now and then, and at the end.

    `done` is what an earlier start counted, which is not in the rates. Use it as a context and count as in
    `advance(documents=5, tokens=9)`.
    """

    def __init__(self, label: str, enabled: bool, **done: int):
        self.label, self.enabled = label, enabled
        self.counts, self.done = Counter(done), done

    def __enter__(self) -> "Rates":
        self.start = self.last_report = time.monotonic()
        return self

    def __exit__(self, *error) -> None:
        self.report()

    def advance(self, **counts: int) -> None:
        self.counts.update(counts)
        if time.monotonic() - self.last_report > REPORT_EVERY:
            self.report()

    def report(self) -> None:
        self.last_report = time.monotonic()
        seconds = max(self.last_report - self.start, 1e-9)
        counts = (
            f"{count:,} {unit} ({(count - self.done.get(unit, 0)) / seconds:,.0f}/s)"
            for unit, count in self.counts.items()
        )
        report(f"{self.label}: {', '.join(counts)} in {seconds:.1f} s", self.enabled)
