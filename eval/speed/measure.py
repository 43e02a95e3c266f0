"""How the benchmarks time, and what they print beside a time."""

import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def versions(device: torch.device) -> dict[str, str]:
    """Of what a number depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "flash-attn", "flashinfer-python", "flash-mla") if device.type == "cuda" else ():
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if device.type == "cuda" else {})


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def timer(
    step: Callable[[], object], device: torch.device, reset: Callable[[], object] = lambda: None, captured: bool = True
) -> Callable:
    """A function that runs `step` once and returns its milliseconds; `reset` goes before, untimed.

    On a GPU the step is captured in a CUDA graph (unless it must not be, since its host waits for the device), after a
    few runs that compile and tune it, and timed by events.
    """
    if device.type != "cuda":

        def run() -> float:
            reset()
            began = time.perf_counter()
            step()
            return (time.perf_counter() - began) * 1e3

        run()
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            reset()
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    reset()
    launch = step
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        launch = graph.replay

    def replay() -> float:
        reset()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        launch()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended)

    replay()
    return replay


def in_turns(runs: list[Callable[[], float]], rounds: int) -> list[float]:
    """The median time of each, over rounds in which every one has its turn."""
    times = [[run() for run in runs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy moves, what it reads and what it writes together."""
    numbers = 2**28 if device.type == "cuda" else 2**26
    source: Tensor = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    run = timer(lambda: target.copy_(source), device)
    return 2 * source.nbytes / (statistics.median(run() for _ in range(7)) / 1e3)
