"""Work in many processes with the results in order, and reports of how far it is."""

import gc
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from configs.errors import ConfigError

REPORT_EVERY = 20  # seconds

_function: Callable | None = None  # what a worker process does with each item


def ordered_map(function: Callable, items: Iterable, workers: int | None) -> Iterator:
    """Yield `function(item)` in the order of `items`, of which only a few are under way at any time.

    None workers are as many as this process may use cores; one worker is this process, others end with it.
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
    gc.freeze()  # what a fork has inherited, threads among it, is not this process's to tidy up
    threading.Thread(target=end_with_parent, name="end-with-parent", daemon=True).start()


def work(item):
    return _function(item)


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # a parent that was killed (SIGKILL) told the pool nothing, which would wait for work forever


def report(text: str, enabled: bool = True) -> None:
    if enabled:
        print(text, file=sys.stderr, flush=True)


def with_rates(items: Iterable, label: str, enabled: bool, **counts: Callable[[Any], int]) -> Iterator:
    """Yield `items`; report now and then, and at the end, the totals of `counts` over them, and their rates."""
    start = last_report = time.monotonic()
    totals = Counter(dict.fromkeys(counts, 0))
    try:
        for item in items:
            yield item
            totals.update({unit: count(item) for unit, count in counts.items()})
            if time.monotonic() - last_report > REPORT_EVERY:
                last_report = time.monotonic()
                report(f"{label}: {rates(totals, last_report - start)}", enabled)
    finally:
        report(f"{label}: {rates(totals, time.monotonic() - start)}", enabled)


def rates(totals: dict[str, int], seconds: float) -> str:
    shown = (f"{count:,} {unit} ({count / max(seconds, 1e-9):,.0f}/s)" for unit, count in totals.items())
    return f"{', '.join(shown)} in {seconds:.1f} s"
