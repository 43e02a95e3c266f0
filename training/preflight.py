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
from data.shards import Shard, read_manifest
from model.counting import checkpoint_bytes, training_bytes
from model.transformer import TransformerConfig
from training.config import Config
from training.device import Runtime, available_memory, device_name, format_bytes, synchronize, time_matmul
from training.ranks import gather

PROBE_NUMBERS = 4 * 2**20  # of the all-reduce
SLOW = 1.25  # times the median at which a rank is pointed out


@dataclass
class Preflight:
    """Rows to print, and what makes training impossible; the same on every rank."""

    rows: dict[str, str] = field(default_factory=dict)
    fatal: list[str] = field(default_factory=list)


@dataclass
class RankReport:
    """What one rank knows of its machine."""

    rank: int
    host: str
    device: str
    available: float  # bytes
    seconds: float  # of a matrix product
    fingerprint: str  # of the data
    broken_shard: str | None  # what is wrong with the shard that this rank reads

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


def preflight(config: Config, runtime: Runtime, network: TransformerConfig) -> Preflight:
    """Check devices, memory, network, disk and data; every rank calls it."""
    found, device = Preflight(), runtime.device
    manifest = read_manifest(config.data.dir)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    own = RankReport(
        runtime.rank,
        socket.gethostname(),
        device_name(device) if device.type == "cuda" else "cpu",
        available_memory(device),
        statistics.median(time_matmul(device, runtime.dtype, 1024 if device.type == "cpu" else 4096, rounds=5)),
        manifest.fingerprint,
        broken(Path(config.data.dir), shards[runtime.rank % len(shards)]),
    )
    ranks = gather(own)
    check_devices(found, ranks)
    check_memory(found, needed_memory(config, runtime, network), device, ranks)
    if runtime.world_size > 1:
        check_all_reduce(found, runtime)
        check_speed(found, ranks)
    check_disk(found, Path(config.run.dir), config.trainer.keep_checkpoints, checkpoint_bytes(network))
    check_data(found, ranks, len(shards))
    return found


def check_devices(found: Preflight, ranks: list[RankReport]) -> None:
    hosts, kinds = sorted({r.host for r in ranks}), Counter(r.device for r in ranks)
    where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts"
    warning = ": not all the same" if len(kinds) > 1 else ""
    found.rows["devices"] = f"{', '.join(f'{count} x {kind}' for kind, count in kinds.items())} on {where}{warning}"


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


def check_memory(found: Preflight, needs: dict[str, float], device: torch.device, ranks: list[RankReport]) -> None:
    """Compare the estimate with what is free; processes on one host's CPU share its memory."""
    sharing = Counter(r.host for r in ranks if device.type == "cpu")
    free, poorest = min((r.available / max(1, sharing[r.host]), r.rank) for r in ranks)
    total = sum(needs.values())
    states = total - needs["activations"] - needs["buffers"]
    parts = ", ".join(f"{key} {format_bytes(value)}" for key, value in needs.items() if value)
    available = f"{format_bytes(free)} available"
    found.rows["memory"] = f"about {format_bytes(total)} a process ({parts}), {available}"
    if states > free:
        found.fatal.append(
            f"weights, gradients and optimizer take {format_bytes(states)} a process, and {ranks[poorest]} has "
            f"{available}: use more processes, a higher ZeRO stage or deepspeed=zero3_offload"
        )
    elif total > free:
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
    rate = 2 * (world - 1) / world * probe.numel() * 4 / max(gather(min(seconds))) / 1e9
    found.rows["all-reduce"] = f"{world} ranks agree, {rate:.2f} GB/s a rank" if right else "wrong"
    if not right:
        found.fatal.append("an all-reduce gave a wrong sum: the network or the communication library is broken")


def check_speed(found: Preflight, ranks: list[RankReport]) -> None:
    slowest = max(ranks, key=lambda r: r.seconds)
    ratio = slowest.seconds / statistics.median(r.seconds for r in ranks)
    warning = ": it will delay the others" if ratio > SLOW else ""
    found.rows["slowest rank"] = f"{slowest}, {ratio:.2f} x the median time of a matrix product{warning}"


def check_disk(found: Preflight, run_dir: Path, keep_checkpoints: int, needed: int) -> None:
    folder = run_dir.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = gather(shutil.disk_usage(existing).free)[0]  # rank 0 writes
    found.rows["disk"] = f"{format_bytes(free)} free, a checkpoint takes {format_bytes(needed)}"
    if needed > free:
        found.fatal.append(
            f"a checkpoint takes {format_bytes(needed)}, and {existing} has {format_bytes(free)} free: change run.dir"
        )
    elif (keep_checkpoints + 1) * needed > free:
        found.rows["disk"] += f": too little for the {keep_checkpoints + 1} that exist at a time"


def broken(data_dir: Path, shard: Shard) -> str | None:
    """Return what is wrong with a shard, if anything."""
    path = data_dir / shard.file
    return None if sha256_of(path) == shard.sha256 else f"{path}: does not have the checksum of its manifest"


def check_data(found: Preflight, ranks: list[RankReport], shards: int) -> None:
    """Compare what the ranks see in data.dir; the sizes of all shards were compared when they were opened."""
    found.rows["data"] = f"{shards} shards have their sizes, and {min(len(ranks), shards)} of them their checksums"
    found.fatal += [r.broken_shard for r in ranks if r.broken_shard]
    others = [r for r in ranks if r.fingerprint != ranks[0].fingerprint]
    found.fatal += [f"{r} sees other data in data.dir than {ranks[0]}" for r in others]
