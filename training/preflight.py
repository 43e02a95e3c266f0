"""What is looked at before the first step, in seconds: whether this machine, with this data, can do this run."""

import os
import shutil
import socket
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from configs.schema import Config
from data.shards import TokenShards, sha256_of
from model.counting.memory import checkpoint_bytes, training_bytes
from model.transformer import TransformerConfig
from training.setup import Runtime

PROBE_NUMBERS = 4 * 2**20  # of the all-reduce
SLOW = 1.25  # times the median at which a rank is pointed out
SKEW_SECONDS = 1.0


@dataclass
class Preflight:
    """Rows to print, numbers to log, and what makes training impossible; the same on every rank."""

    rows: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    fatal: list[str] = field(default_factory=list)


def preflight(config: Config, runtime: Runtime, network: TransformerConfig) -> Preflight:
    """Look at everything; every rank calls it."""
    found = Preflight()
    ranks = everyone(
        {
            "host": socket.gethostname(),
            "device": torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "cpu",
            "available": available_memory(runtime.device),
            "seconds": time_products(runtime),
            "data": look_at_data(config, runtime),
        }
    )
    check_devices(found, ranks)
    if note := config.core.training_note(config.model, runtime.device.type):
        found.rows["core"] = note
    check_memory(found, config, runtime, network, ranks)
    if runtime.world_size > 1:
        check_all_reduce(found, runtime)
        check_speed(found, ranks)
        check_clocks(found, runtime, ranks)
    check_disk(found, config, network)
    check_data(found, ranks)
    return found


def everyone(value) -> list:
    """`value` of every rank, by rank."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def name(ranks: list[dict], rank: int) -> str:
    return f"rank {rank} ({ranks[rank]['host']})"


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def check_devices(found: Preflight, ranks: list[dict]) -> None:
    counts = Counter((r["host"], r["device"]) for r in ranks)
    shown = [f"{count} x {device} on {host}" for (host, device), count in list(counts.items())[:4]]
    found.rows["devices"] = ", ".join(shown) + (f" and {len(counts) - 4} more" if len(counts) > 4 else "")
    kinds = sorted({r["device"] for r in ranks})
    if len(kinds) > 1:
        found.rows["devices"] += f": NOT ALL THE SAME ({', '.join(kinds)})"


def check_memory(found: Preflight, config: Config, runtime: Runtime, network: TransformerConfig, ranks: list) -> None:
    """The estimate beside what is free; processes of one host share its memory where they run on its CPU."""
    needs = training_bytes(config, runtime.world_size, 2 if runtime.dtype == torch.bfloat16 else 4)
    here = Counter(r["host"] for r in ranks)
    shared = runtime.device.type == "cpu"
    free = [r["available"] / (here[r["host"]] if shared else 1) for r in ranks]
    least = min(range(len(free)), key=free.__getitem__)
    total, states = sum(needs.values()), sum(needs.values()) - needs["activations"] - needs["buffers"]
    parts = ", ".join(f"{key} {size(value)}" for key, value in needs.items() if value)
    found.rows["memory"] = f"about {size(total)} a process ({parts}), {size(free[least])} available"
    found.numbers |= {"memory_needed_gb": total / 1e9, "memory_available_gb": free[least] / 1e9}
    where = f"{name(ranks, least)} has {size(free[least])} available"
    if states > free[least]:
        found.fatal.append(
            f"weights, gradients and optimizer take {size(states)} a process, and {where}: "
            "use more processes, a higher ZeRO stage or deepspeed=zero3_offload"
        )
    elif total > free[least]:
        found.rows["memory"] += ": LIKELY TOO LITTLE; a smaller trainer.micro_batch_size or activation_checkpointing"


def check_all_reduce(found: Preflight, runtime: Runtime) -> None:
    world, seconds = runtime.world_size, []
    for _ in range(3):
        probe = torch.full((PROBE_NUMBERS,), float(runtime.rank + 1), device=runtime.device)
        synchronize(runtime.device)
        start = time.perf_counter()
        torch.distributed.all_reduce(probe)
        synchronize(runtime.device)
        seconds.append(time.perf_counter() - start)
    right = all(everyone(bool((probe == world * (world + 1) / 2).all())))
    # What each rank sends in a ring all-reduce, over the slowest rank's best time.
    bandwidth = 2 * (world - 1) / world * probe.numel() * 4 / max(everyone(min(seconds)))
    found.rows["all-reduce"] = f"{world} ranks agree, {bandwidth / 1e9:.2f} GB/s a rank"
    found.numbers["all_reduce_gb_per_second"] = bandwidth / 1e9
    if not right:
        found.rows["all-reduce"] = "WRONG"
        found.fatal.append("an all-reduce gave a wrong sum: the network or the communication library is broken")


def check_speed(found: Preflight, ranks: list[dict]) -> None:
    seconds = [r["seconds"] for r in ranks]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    ratio = seconds[slowest] / statistics.median(seconds)
    found.rows["slowest rank"] = f"{name(ranks, slowest)}, {ratio:.2f} x the median time of a matrix product"
    found.numbers["slowest_rank_over_median"] = ratio
    if ratio > SLOW:
        found.rows["slowest rank"] += ": IT WILL HOLD THE OTHERS UP"


def check_clocks(found: Preflight, runtime: Runtime, ranks: list[dict]) -> None:
    torch.distributed.barrier()
    now = everyone(time.time())
    skew = max(now) - min(now)
    found.rows["clocks"] = f"within {skew:.3f} s" + (": LOGS OF RANKS WILL NOT LINE UP" if skew > SKEW_SECONDS else "")
    found.numbers["clock_skew_seconds"] = skew


def check_disk(found: Preflight, config: Config, network: TransformerConfig) -> None:
    folder = Path(config.run.dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    at_a_time = config.trainer.keep_checkpoints + 1
    free, needed = everyone(shutil.disk_usage(existing).free)[0], checkpoint_bytes(network)  # rank 0 writes
    found.rows["disk"] = f"{size(free)} free, a checkpoint takes {size(needed)}"
    found.numbers |= {"disk_free_gb": free / 1e9, "checkpoint_gb": needed / 1e9}
    if needed > free:
        found.fatal.append(f"a checkpoint takes {size(needed)}, and {existing} has {size(free)} free: change run.dir")
    elif at_a_time * needed > free:
        found.rows["disk"] += f": TOO LITTLE FOR THE {at_a_time} THAT ARE THERE AT A TIME"


def look_at_data(config: Config, runtime: Runtime) -> tuple[str, int, str | None]:
    """This rank's view: the fingerprint, the number of shards, what is wrong with the one that it reads whole."""
    shards = [TokenShards(config.data.dir, split) for split in ("train", "val")]  # compares sizes with the manifest
    listed = [shard for part in shards for shard in part.manifest.splits[part.split].shards]
    one = listed[runtime.rank % len(listed)]
    path = Path(config.data.dir) / one.file
    wrong = None if sha256_of(path) == one.sha256 else f"{path}: does not have the checksum of its manifest"
    return shards[0].manifest.fingerprint, len(listed), wrong


def check_data(found: Preflight, ranks: list[dict]) -> None:
    fingerprint, shards, _ = ranks[0]["data"]
    checked = min(len(ranks), shards)
    found.rows["data"] = f"{shards} shards have their sizes, and {checked} of them their checksums"
    found.fatal += [r["data"][2] for r in ranks if r["data"][2]]
    for rank, r in enumerate(ranks):
        if r["data"][0] != fingerprint:
            found.fatal.append(f"{name(ranks, rank)} sees other data in data.dir than {name(ranks, 0)}")


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or of the host within its control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(meminfo["MemAvailable:"]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"]) - int(stat["active_file"])
        return min(available, int((group / "memory.max").read_text()) - used)
    except (OSError, KeyError, ValueError):  # no such group, or no limit
        return available


def time_products(runtime: Runtime) -> float:
    """Seconds of a matrix product in the run's precision: the median of a few."""
    width = 1024 if runtime.device.type == "cpu" else 4096
    a = torch.ones(width, width, device=runtime.device, dtype=runtime.dtype)
    times = []
    for _ in range(5):
        synchronize(runtime.device)
        start = time.perf_counter()
        a @ a
        synchronize(runtime.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
