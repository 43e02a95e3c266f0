"""Work in many processes with the results in order, and reports of how far it is."""

import multiprocessing
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)
REPORT_EVERY = 60  # seconds, if there is no terminal


def count_workers(workers: int | None) -> int:
    """Return `workers`, or the number of cores that this process may use."""
    if workers is not None:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable, items: Iterable, workers: int | None, setup: Callable | None = None, setup_args: tuple = ()
) -> Iterator:
    """Yield `function(item)` in the order of `items`; each process calls `setup(*setup_args)` first.

    Only a few items are under way at any time, so neither the items nor the results have to fit in memory. One worker
    works in this process. Worker processes end with this one, however it ends.
    """
    workers = count_workers(workers)
    if workers == 1:
        if setup:
            setup(*setup_args)
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(setup, setup_args))
    try:
        pool.submit(os.getpid).result()  # the processes start before `items` can start threads
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(setup: Callable | None, setup_args: tuple) -> None:
    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()
    if setup:
        setup(*setup_args)


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # a parent that was killed (SIGKILL) told the pool nothing, which would wait for work forever


def report(text: str, enabled: bool = True) -> None:
    if enabled:
        console.print(text, markup=False)


class Rates:
    """Counts and their rates: a changing line on a terminal, else a line now and then; a summary line at the end.

    `done` is what an earlier start counted, which is not in the rates. Use it as a context and count as in
    `advance(documents=5, tokens=9)`.
    """

    def __init__(self, label: str, enabled: bool, **done: int):
        self.label, self.enabled = label, enabled
        self.counts, self.done = Counter(done), Counter(done)
        self.line = console.status(label) if enabled and console.is_terminal else None

    def __enter__(self) -> "Rates":
        self.start = self.last_report = time.monotonic()
        if self.line:
            self.line.start()
        return self

    def __exit__(self, *error) -> None:
        if self.line:
            self.line.stop()
        report(f"{self.label}: {self.rates()} in {time.monotonic() - self.start:.1f} s", self.enabled)

    def advance(self, **counts: int) -> None:
        self.counts.update(counts)
        if self.line:
            self.line.update(f"{self.label}: {self.rates()}")
        elif time.monotonic() - self.last_report > REPORT_EVERY:
            self.last_report = time.monotonic()
            report(f"{self.label}: {self.rates()}", self.enabled)

    def rates(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        rates = {unit: (count - self.done[unit]) / seconds for unit, count in self.counts.items()}
        return ", ".join(f"{count:,} {unit} ({rates[unit]:,.0f}/s)" for unit, count in self.counts.items())
