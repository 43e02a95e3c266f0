"""How the cost of training grows with the length, core by core: `python -m eval.speed.attention [lengths=[4096,...]]`.

Attention alone, forward and backward, on random queries, keys and values: time, memory and operations of each core at
each length, the ratio to the first core at that length, and the exponent of growth. JSON lines go to standard output, a
table to standard error.
"""

import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from configs.app import app, compose
from configs.load import load, load_flat
from configs.schema import ConfigError, at_least, check_machine
from eval.speed.measure import device_name, versions
from model.attention.base import AttentionConfig, Dense, unturned
from model.cores.base import AttentionCore, AttentionMask

LENGTHS = {"cpu": (1024, 4096, 16384), "cuda": (1024, 4096, 16384, 65536, 131072)}


@dataclass
class AttentionSpeedConfig:
    cores: list[str] = field(default_factory=list)
    model: str = "mha"
    size: str = "small"
    n_heads: int | None = None
    lengths: list[int] = field(default_factory=list)
    batch: int = 1
    rounds: int = 3
    exponent_from: int = 4096
    device: str = "auto"
    dtype: str = "auto"
    overrides: list[str] = field(default_factory=list)

    def errors(self):
        yield from at_least(1, "", self, "n_heads", "batch", "rounds")
        if not self.cores:
            yield "cores=[]: name at least one"
        if any(length < 1 for length in self.lengths):
            yield f"lengths={self.lengths}: must be at least 1"
        yield from check_machine(self)


def contestant(config: AttentionSpeedConfig, core: str, length: int) -> tuple[AttentionConfig, AttentionCore]:
    """The mechanism and the core that `core`, a name and perhaps overrides after it, means at this length."""
    name, *own = core.split()
    chosen = [f"model={config.model}", f"size={config.size}", "tokenizer=gpt2", f"trainer.seq_len={length}"]
    whole = load(compose("train", [*chosen, f"core={name}", *config.overrides, *own]), world_size=1)
    if config.n_heads is not None:
        whole.model.n_heads = config.n_heads
    return whole.model, whole.core


def training_step(attention: AttentionConfig, core: AttentionCore, batch: int, length: int, device, dtype) -> Callable:
    """A function that attends and takes the gradients of queries, keys and values, all given."""
    torch.manual_seed(0)
    widths = (attention.qk_head_dim, attention.qk_head_dim, attention.v_head_dim)
    shape = (batch, length, attention.n_heads)
    qkv = [torch.randn(*shape, n, device=device, dtype=dtype, requires_grad=True) for n in widths]
    positions = torch.arange(length, device=device)[None]
    gradient = torch.randn(*shape, attention.v_head_dim, device=device, dtype=dtype)

    def step() -> None:
        for x in qkv:
            x.grad = None
        core(Dense(*qkv), unturned, positions, AttentionMask(), attention.scale).backward(gradient)

    return step


def timed(step: Callable, device: torch.device) -> tuple[float, float]:
    """(milliseconds by the clock, milliseconds to compare by) of one step: a GPU's own, or the processor's.

    The processor's time tells more than the clock's on a machine that others use too.
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


def peak_memory(step: Callable, device: torch.device) -> int | None:
    """Bytes that a step needs beyond its inputs: allocated on a GPU, resident (Linux's high-water mark) on a CPU."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it is counted when it is taken again
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is resident now
    except (OSError, AttributeError):
        step()
        return None
    before = resident("VmRSS")
    step()
    return max(0, resident("VmHWM") - before)


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def points(config: AttentionSpeedConfig, device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    """One row for each length and core."""
    for length in config.lengths or LENGTHS[device.type]:
        found = [contestant(config, core, length) for core in config.cores]
        memory = []
        for attention, core in found:  # this warms up too
            memory.append(peak_memory(training_step(attention, core, config.batch, length, device, dtype), device))
        steps = [training_step(attention, core, config.batch, length, device, dtype) for attention, core in found]
        times = [[timed(step, device) for step in steps] for _ in range(config.rounds)]
        clock, compared = ([[run[kind] for run in column] for column in zip(*times, strict=True)] for kind in (0, 1))
        first = statistics.median(compared[0])
        for i, (attention, core) in enumerate(found):
            ms, work = statistics.median(clock[i]), statistics.median(compared[i])
            tokens = config.batch * length
            yield {
                "model": config.model, "size": config.size, "n_heads": attention.n_heads,
                "head_dim": attention.qk_head_dim, "core": config.cores[i], "fold": getattr(core, "fold", None),
                "device": device_name(device), "dtype": str(dtype).removeprefix("torch."), "batch": config.batch,
                "length": length, "ms": ms, "processor_ms": None if device.type == "cuda" else work,
                "tokens_per_second": 1e3 * tokens / ms, "flops": 3 * core.flops_per_token(attention, length) * tokens,
                "memory_bytes": memory[i], "times_as_fast": first / work, "compared_ms": work,
            }  # fmt: skip


def exponent(rows: list[dict]) -> float | None:
    """The slope of log(time) over log(length), by least squares; None for a single length."""
    x, y = ([math.log(row[key]) for row in rows] for key in ("length", "compared_ms"))
    return statistics.linear_regression(x, y).slope if len(rows) > 1 else None


def show(rows: list[dict], exponents: dict[str, float | None], exponent_from: int) -> None:
    cores = list(exponents)
    table = Table(
        box=box.SIMPLE_HEAD, caption=f"times the speed of {cores[0]}; growth fitted from {exponent_from} tokens"
    )
    table.add_column("length", justify="right")
    for core in cores:
        table.add_column(f"{core}\nms, ratio, MiB", justify="right")
    for length in dict.fromkeys(row["length"] for row in rows):
        here = [row for row in rows if row["length"] == length]
        cells = []
        for row in here:
            memory = "" if row["memory_bytes"] is None else f", {row['memory_bytes'] / 2**20:,.0f}"
            cells.append(f"{row['compared_ms']:,.1f}, {row['times_as_fast']:.2f}{memory}")
        table.add_row(f"{length:,}", *cells)
    fitted = ("" if value is None else f"~ length^{value:.2f}" for value in exponents.values())
    table.add_row("growth", *fitted)
    Console(stderr=True, width=max(120, 30 * len(cores))).print(table)


def device_of(config: AttentionSpeedConfig) -> torch.device:
    return torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def main(config: AttentionSpeedConfig) -> int:
    device = device_of(config)
    chosen = config.dtype if config.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[chosen]
    training_step(*contestant(config, "sdpa", 64), 1, 64, device, dtype)()  # what the first use of anything costs
    rows = []
    for row in points(config, device, dtype):
        rows.append(row)
        print(json.dumps(row | {"versions": versions(device)}), flush=True)
    fitted = {
        core: exponent([r for r in rows if r["core"] == core and r["length"] >= config.exponent_from])
        for core in config.cores
    }
    print(json.dumps({"exponents": fitted, "from_length": config.exponent_from}), flush=True)
    show(rows, fitted, config.exponent_from)
    return 0


def load_speed(tree) -> AttentionSpeedConfig:
    """ConfigError, before anything runs, for what cannot be composed or attend at one of the lengths."""
    config = load_flat(tree, AttentionSpeedConfig)
    for core in config.cores:
        for length in config.lengths:
            attention, made = contestant(config, core, length)
            try:
                made.check(attention, device_of(config).type, torch.float32)
            except ValueError as error:
                raise ConfigError(f"cores={core}: {error}") from None
    return config


if __name__ == "__main__":
    app(main, "speed_attention", load=load_speed)
