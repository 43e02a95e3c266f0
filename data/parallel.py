"""Work over many processes with the results in order, and how far it is."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)
LINE_EVERY = 60  # seconds between progress lines where there is no terminal for a bar


def count_workers(workers: int | None) -> int:
    """`workers`, or as many as the cores this process may use."""
    if workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers


def ordered_map(
    function: Callable, items: Iterable, workers: int | None, setup: Callable | None = None, setup_args: tuple = ()
) -> Iterator:
    """Yield `function(item)` in the order of `items`; each process calls `setup(*setup_args)` first.

    Only a few items are under way at any time, so neither the items nor the results have to fit in memory. One worker
    works in this process.
    """
    workers = count_workers(workers)
    if workers == 1:
        if setup:
            setup(*setup_args)
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, initializer=setup, initargs=setup_args) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def say(text: str, enabled: bool = True) -> None:
    if enabled:
        console.print(text, markup=False)


@contextmanager
def progress_bar(label: str, total: int, unit: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A function that counts on: a bar on a terminal, else a line now and then; a summary line at the end."""
    start = last_line = time.monotonic()
    done = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (enabled and console.is_terminal),
    ) as bar:
        task = bar.add_task(label, total=total)

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            bar.advance(task, count)
            if not console.is_terminal and time.monotonic() - last_line > LINE_EVERY:
                last_line = time.monotonic()
                say(f"{label}: {done:,} of {total:,} {unit}", enabled)

        yield advance
    seconds = time.monotonic() - start
    say(f"{label}: {done:,} {unit} in {seconds:.1f} s ({done / max(seconds, 1e-9):,.0f}/s)", enabled)
