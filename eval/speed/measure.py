"""How the benchmarks time, which versions they print with a time, and the kinds of values their options have."""

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from typing import Annotated

import torch
from pydantic import AfterValidator, Field

from configs.errors import ConfigError
from configs.kinds import LONGEST_TEXT, MOST_SEQUENCES
from training.device import available_memory, format_bytes


def _some(values: list) -> list:
    if not values:
        raise ValueError("name at least one")
    return values


Count = Annotated[int, Field(ge=1, le=LONGEST_TEXT)]
Length = Annotated[int, Field(ge=2, le=LONGEST_TEXT)]  # of a text that a model learns from
Batch = Annotated[int, Field(ge=1, le=MOST_SEQUENCES)]
Rounds = Annotated[int, Field(ge=1, le=1000)]
Some = AfterValidator(_some)  # of a list that must not be empty
GPU_PACKAGES = ("triton", "flash-attn", "flash-mla")


def check_memory(keys: str, needed: float, device: torch.device) -> None:
    """Raise a ConfigError that names `keys` if a measurement needs more bytes than the device has."""
    available = available_memory(device)
    if needed > available:
        raise ConfigError(f"{keys}: need about {format_bytes(needed)}, and {format_bytes(available)} are available")


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions of what a number depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        for package in GPU_PACKAGES:
            with suppress(metadata.PackageNotFoundError):
                found[package] = metadata.version(package)
    return found


def timer(
    step: Callable[[], object], device: torch.device, reset: Callable[[], object] = lambda: None, captured: bool = True
) -> Callable[[], tuple[float, float]]:
    """Return a function that runs `step` once and returns its `milliseconds`; `reset` runs before it, untimed.

    On a GPU the step is captured in a CUDA graph, after a few runs that compile and tune it, and timed by events.
    `captured=False`: not captured, for a step whose host waits for the device.
    """
    launch = step
    if device.type == "cuda":
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                reset()
                step()
        torch.cuda.current_stream(device).wait_stream(side)
        reset()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            launch = graph.replay

    def run() -> tuple[float, float]:
        reset()
        return milliseconds(launch, device)

    run()
    return run


def milliseconds(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return (time by the clock, time to compare by) of one step: a GPU's own twice, or a CPU's processor time.

    On a machine that others use too, the processor's time tells more than the clock's.
    """
    if device.type != "cuda":
        began, worked = time.perf_counter(), time.process_time()
        step()
        return (time.perf_counter() - began) * 1e3, (time.process_time() - worked) * 1e3
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    step()
    ended.record()
    ended.synchronize()
    return (began.elapsed_time(ended),) * 2


def in_turns(runs: list[Callable[[], tuple[float, float]]], rounds: int) -> list[tuple[float, float]]:
    """Return the medians of what `milliseconds` returns, of each run, over rounds in which each has its turn."""
    times = [[run() for run in runs] for _ in range(rounds)]
    return [tuple(map(statistics.median, zip(*column, strict=True))) for column in zip(*times, strict=True)]


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second that a large copy moves, those it reads and those it writes together."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    ((ms, _),) = in_turns([timer(lambda: target.copy_(source), device)], rounds=7)
    return 2 * source.nbytes / ms * 1e3
