"""The preflight: what is checked in seconds before the first step, whether this machine can do this run."""

import shutil
import socket
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.files import sha256_of
from data.shards import TokenShards
from model.counting import checkpoint_bytes, training_bytes
from model.transformer import TransformerConfig
from training.config import Config
from training.device import Runtime, available_memory, device_name, format_bytes, synchronize, time_matmul
from training.ranks import gather

PROBE_NUMBERS = 4 * 2**20  # of the all-reduce
SLOW = 1.25  # times the median at which a rank is pointed out
SKEW_SECONDS = 1.0


@dataclass
class Preflight:
    """Rows to print, numbers to log, and what makes training impossible; the same on every rank."""

    rows: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    fatal: list[str] = field(default_factory=list)


@dataclass
class RankReport:
    """What one rank knows of its machine. `data`: its fingerprint, the number of shards, and what is wrong with one."""

    host: str
    device: str
    available: int
    seconds: float  # of a matrix product
    data: tuple[str, int, str | None]

    def label(self, rank: int) -> str:
        return f"rank {rank} ({self.host})"


def preflight(config: Config, runtime: Runtime, network: TransformerConfig) -> Preflight:
    """Check devices, memory, network, clocks, disk and data; every rank calls it."""
    found = Preflight()
    width = 1024 if runtime.device.type == "cpu" else 4096
    own = RankReport(
        socket.gethostname(),
        device_name(runtime.device) if runtime.device.type == "cuda" else "cpu",
        available_memory(runtime.device),
        statistics.median(time_matmul(runtime.device, runtime.dtype, width, rounds=5)),
        check_shards(config.data.dir, runtime.rank),
    )
    ranks = gather(own)
    check_devices(found, ranks)
    check_memory(found, needed_memory(config, runtime, network), runtime, ranks)
    if runtime.world_size > 1:
        check_all_reduce(found, runtime)
        check_speed(found, ranks)
        check_clocks(found)
    check_disk(found, Path(config.run.dir), config.trainer.keep_checkpoints, checkpoint_bytes(network))
    check_data(found, ranks)
    found.numbers = {f"preflight/{key}": value for key, value in found.numbers.items()}
    return found


def check_devices(found: Preflight, ranks: list[RankReport]) -> None:
    counts = Counter((r.host, r.device) for r in ranks)
    shown = [f"{count} x {device} on {host}" for (host, device), count in list(counts.items())[:4]]
    found.rows["devices"] = ", ".join(shown) + (f" and {len(counts) - 4} more" if len(counts) > 4 else "")
    kinds = sorted({r.device for r in ranks})
    if len(kinds) > 1:
        found.rows["devices"] += f": not all the same ({', '.join(kinds)})"


def needed_memory(config: Config, runtime: Runtime, network: TransformerConfig) -> dict[str, float]:
    """Return the estimated bytes of a process by what needs them."""
    return training_bytes(
        network,
        tokens=config.trainer.micro_batch_size * config.trainer.seq_len,
        recompute=config.trainer.activation_checkpointing,
        stage=config.deepspeed.stage,
        zero=config.deepspeed.zero,
        world_size=runtime.world_size,
        stored_bytes=2 if config.deepspeed.bf16_engine else 4,
        bytes_per_number=runtime.dtype.itemsize,
    )


def check_memory(found: Preflight, needs: dict[str, float], runtime: Runtime, ranks: list[RankReport]) -> None:
    """Compare the estimate with what is free; processes on one host's CPU share its memory."""
    sharing = Counter(r.host for r in ranks) if runtime.device.type == "cpu" else Counter()
    free = [r.available / max(1, sharing[r.host]) for r in ranks]
    least = min(range(len(free)), key=free.__getitem__)
    total = sum(needs.values())
    states = total - needs["activations"] - needs["buffers"]
    parts = ", ".join(f"{key} {format_bytes(value)}" for key, value in needs.items() if value)
    available = format_bytes(free[least])
    found.rows["memory"] = f"about {format_bytes(total)} a process ({parts}), {available} available"
    found.numbers |= {"memory_needed_gb": total / 1e9, "memory_available_gb": free[least] / 1e9}
    if states > free[least]:
        found.fatal.append(
            f"weights, gradients and optimizer take {format_bytes(states)} a process, and "
            f"{ranks[least].label(least)} has {available} available: "
            "use more processes, a higher ZeRO stage or deepspeed=zero3_offload"
        )
    elif total > free[least]:
        found.rows["memory"] += ": probably too little; use a smaller micro_batch_size or activation_checkpointing"


def check_all_reduce(found: Preflight, runtime: Runtime) -> None:
    world = runtime.world_size
    seconds = []
    for _ in range(3):
        probe = torch.full((PROBE_NUMBERS,), float(runtime.rank + 1), device=runtime.device)
        synchronize(runtime.device)
        start = time.perf_counter()
        torch.distributed.all_reduce(probe)
        synchronize(runtime.device)
        seconds.append(time.perf_counter() - start)
    right = all(gather(bool((probe == world * (world + 1) / 2).all())))
    # What each rank sends in a ring all-reduce, over the slowest rank's best time.
    bandwidth = 2 * (world - 1) / world * probe.numel() * 4 / max(gather(min(seconds)))
    found.rows["all-reduce"] = f"{world} ranks agree, {bandwidth / 1e9:.2f} GB/s a rank"
    found.numbers["all_reduce_gb_per_second"] = bandwidth / 1e9
    if not right:
        found.rows["all-reduce"] = "wrong"
        found.fatal.append("an all-reduce gave a wrong sum: the network or the communication library is broken")


def check_speed(found: Preflight, ranks: list[RankReport]) -> None:
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].seconds)
    ratio = ranks[slowest].seconds / statistics.median(r.seconds for r in ranks)
    label = ranks[slowest].label(slowest)
    found.rows["slowest rank"] = f"{label}, {ratio:.2f} x the median time of a matrix product"
    found.numbers["slowest_rank_over_median"] = ratio
    if ratio > SLOW:
        found.rows["slowest rank"] += ": it will delay the others"


def check_clocks(found: Preflight) -> None:
    torch.distributed.barrier()
    now = gather(time.time())
    skew = max(now) - min(now)
    found.rows["clocks"] = f"within {skew:.3f} s" + (": logs of ranks will not line up" if skew > SKEW_SECONDS else "")
    found.numbers["clock_skew_seconds"] = skew


def check_disk(found: Preflight, run_dir: Path, keep_checkpoints: int, needed: int) -> None:
    folder = run_dir.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = gather(shutil.disk_usage(existing).free)[0]  # rank 0 writes
    found.rows["disk"] = f"{format_bytes(free)} free, a checkpoint takes {format_bytes(needed)}"
    found.numbers |= {"disk_free_gb": free / 1e9, "checkpoint_gb": needed / 1e9}
    if needed > free:
        found.fatal.append(
            f"a checkpoint takes {format_bytes(needed)}, and {existing} has {format_bytes(free)} free: change run.dir"
        )
    elif (keep_checkpoints + 1) * needed > free:
        found.rows["disk"] += f": too little for the {keep_checkpoints + 1} that exist at a time"


def check_shards(data_dir: str, rank: int) -> tuple[str, int, str | None]:
    """Return the data's fingerprint, the number of shards, and what is wrong with the one that this rank reads."""
    shards = [TokenShards(data_dir, split) for split in ("train", "val")]  # compares sizes with the manifest
    listed = [shard for part in shards for shard in part.manifest.splits[part.split].shards]
    one = listed[rank % len(listed)]
    path = Path(data_dir) / one.file
    wrong = None if sha256_of(path) == one.sha256 else f"{path}: does not have the checksum of its manifest"
    return shards[0].manifest.fingerprint, len(listed), wrong


def check_data(found: Preflight, ranks: list[RankReport]) -> None:
    fingerprint, shards, _ = ranks[0].data
    checked = min(len(ranks), shards)
    found.rows["data"] = f"{shards} shards have their sizes, and {checked} of them their checksums"
    for number, r in enumerate(ranks):
        if r.data[2]:
            found.fatal.append(r.data[2])
        if r.data[0] != fingerprint:
            found.fatal.append(f"{r.label(number)} sees other data in data.dir than {ranks[0].label(0)}")
