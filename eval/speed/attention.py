"""How the cost of training grows with the length, core by core: `python -m eval.speed.attention [lengths=[4096,...]]`.

Attention alone, forward and backward, on random queries, keys and values: time, memory and operations of each core at
each length, the ratio to the first core at that length, and the exponent of growth, as JSON lines.
"""

import ctypes
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from configs.app import app, configured
from configs.errors import ConfigError, each
from configs.load import Command
from eval.speed.measure import Batch, Count, Length, Rounds, Some, check_memory, in_turns, milliseconds, versions
from model.attention.base import AttentionConfig, AttentionCore, Dense
from model.mask import AttentionMask
from training.config import Config
from training.device import Device, Dtype, Runtime, device_name, dtype_name, find_runtime

LENGTHS = {"cpu": [1024, 4096, 16384], "cuda": [1024, 4096, 16384, 65536, 131072]}
Rival = tuple[AttentionConfig, AttentionCore]


class AttentionSpeedConfig(Command):
    yaml: ClassVar[str] = "speed_attention"

    # Names in configs/core, each perhaps with overrides: "cores=[full,'sequence_tensor core.fold=[32,32,64]']".
    # The others are compared with the first.
    cores: Annotated[list[str], Some] = Field(["full", "sliding_window", "sequence_tensor"])
    model: str = "mha"  # whose heads: the widths of queries, keys and values
    size: str = "small"
    n_heads: Count | None = 2  # null: the model's
    lengths: list[Length] = Field([])  # default: LENGTHS
    batch: Batch = 1
    rounds: Rounds = 3  # every core is timed so many times, in turns; the median counts
    exponent_from: Count = 4096  # the length from which the exponent of growth is fitted
    device: Device = "auto"
    dtype: Dtype = "auto"


def contestant(config: AttentionSpeedConfig, core: str, length: int, runtime: Runtime) -> Rival:
    """Return the mechanism and the core that `core`, a name with overrides, means at this length.

    ConfigError if it cannot be composed, or cannot attend there.
    """
    chosen = [f"model={config.model}", f"size={config.size}", "tokenizer=gpt2", f"trainer.seq_len={length}"]
    if config.n_heads is not None:
        chosen.append(f"model.n_heads={config.n_heads}")
    whole = configured(Config, [*chosen, *f"core={core}".split()], world_size=1)
    try:
        whole.core.check(whole.model, runtime.device.type, runtime.dtype)
    except ValueError as error:
        raise ConfigError(f"cores={core}: {error}") from None
    return whole.model, whole.core


def training_step(rival: Rival, batch: int, length: int, runtime: Runtime) -> Callable[[], None]:
    """Return a function that attends and takes the gradients of queries, keys and values, all given."""
    torch.manual_seed(0)
    (attention, core), options = rival, {"device": runtime.device, "dtype": runtime.dtype}
    shape = (batch, length, attention.n_heads)
    widths = (attention.qk_head_dim, attention.qk_head_dim, attention.v_head_dim)
    qkv = [torch.randn(*shape, width, **options, requires_grad=True) for width in widths]
    hops = core.hops(torch.arange(length, device=runtime.device)[None])
    gradient = torch.randn(*shape, attention.v_head_dim, **options)

    def step() -> None:
        for x in qkv:
            x.grad = None
        core.attend([Dense(*qkv) for _ in hops], AttentionMask(), attention.scale).backward(gradient)

    return step


def peak_memory(step: Callable[[], None], device: torch.device) -> int | None:
    """Return the bytes that a step needs beyond its inputs: allocated on a GPU, resident on a CPU (None: unknown)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    marks = []
    with suppress(OSError, AttributeError, TypeError):  # only Linux has these
        ctypes.CDLL(None).malloc_trim(0)  # give back what was freed, so that it counts when it is taken again
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        marks.append(high_water_mark())
    step()
    return high_water_mark() - marks[0] if marks else None


def high_water_mark() -> int:
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def least_memory(
    config: AttentionSpeedConfig, by_length: list[list[Rival]], lengths: list[int], runtime: Runtime
) -> int:
    """Return the bytes of queries, keys, values and their gradients at the longest length: all cores hold theirs."""
    widths = (a.n_heads * (2 * a.qk_head_dim + a.v_head_dim) for a, _ in by_length[lengths.index(max(lengths))])
    return 2 * config.batch * max(lengths) * sum(widths) * runtime.dtype.itemsize


def rows(config: AttentionSpeedConfig, length: int, rivals: list[Rival], runtime: Runtime) -> Iterator[dict]:
    """Yield a row for each core at a length."""
    device, tokens = runtime.device, config.batch * length
    steps = [training_step(rival, config.batch, length, runtime) for rival in rivals]
    memory = [peak_memory(step, device) for step in steps]  # this warms up too
    medians = in_turns([partial(milliseconds, step, device) for step in steps], config.rounds)
    for name, (attention, core), used, (ms, compared) in zip(config.cores, rivals, memory, medians, strict=True):
        yield {
            "model": config.model, "size": config.size, "n_heads": attention.n_heads,
            "head_dim": attention.qk_head_dim, "core": name, "kernel": core.kernel, "fold": getattr(core, "fold", None),
            "device": device_name(device), "dtype": dtype_name(runtime.dtype), "batch": config.batch, "length": length,
            "ms": ms, "compared_ms": compared, "times_as_fast": medians[0][1] / compared,
            "tokens_per_second": 1e3 * tokens / ms, "flops": 3 * core.flops_per_token(attention, length) * tokens,
            "memory_bytes": used, "versions": versions(device),
        }  # fmt: skip


def exponent(rows: list[dict]) -> float | None:
    """Return the slope of log(time) over log(length), by least squares; None for a single length."""
    x, y = ([math.log(row[key]) for row in rows] for key in ("length", "compared_ms"))
    return statistics.linear_regression(x, y).slope if len(rows) > 1 else None


def main(config: AttentionSpeedConfig) -> int:
    runtime = find_runtime(config.device, config.dtype)
    lengths = config.lengths or LENGTHS[runtime.device.type]
    by_length = each(lambda n: each(lambda core: contestant(config, core, n, runtime), config.cores), lengths)
    needed = least_memory(config, by_length, lengths, runtime)
    check_memory(f"lengths={max(lengths)}, batch={config.batch}", needed, runtime.device)
    training_step(by_length[0][0], 1, lengths[0], runtime)()  # what the first use of anything costs
    long: dict[str, list[dict]] = {core: [] for core in config.cores}
    for length, rivals in zip(lengths, by_length, strict=True):
        for row in rows(config, length, rivals, runtime):
            print(json.dumps(row), flush=True)
            if length >= config.exponent_from:
                long[row["core"]].append(row)
    exponents = {core: exponent(found) for core, found in long.items()}
    print(json.dumps({"exponents": exponents, "from_length": config.exponent_from}), flush=True)
    return 0


if __name__ == "__main__":
    app(main, AttentionSpeedConfig)
