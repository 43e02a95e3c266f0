"""The device of a process: which one, in what precision, how much memory it has and how fast it is at best."""

import os
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import psutil
import torch
from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError

from configs.errors import ConfigError

# Dense bf16 matrix throughput in FLOP/s by the makers' data sheets, without sparsity.
PEAK_BF16_FLOPS = {
    "A10": 125e12, "A100": 312e12, "A40": 149.7e12, "A6000": 154.8e12, "B200": 2250e12, "GH200": 989e12,
    "H100": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H200": 989e12, "L4": 121e12, "L40S": 362e12,
    "L40": 181e12, "RTX 3090": 71e12, "RTX 4090": 165.2e12, "V100": 125e12,
}  # fmt: skip
PARTIAL_GPUS = ("MIG", "LAPTOP", "MAX")  # words in the name of a GPU that is less than its namesake


def _available(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA GPU here; use device=cpu or device=auto")
    return device


Device = Annotated[Literal["auto", "cpu", "cuda"], AfterValidator(_available)]  # auto: a GPU if there is one
Dtype = Literal["auto", "fp32", "bf16"]  # auto: bf16 on a GPU, fp32 on a CPU; bf16 is autocast over fp32 weights


@dataclass(frozen=True)
class Runtime:
    """Where this process runs. `dtype` is what the forward pass computes in; parameters are fp32 master weights."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.dtype == torch.float32 else self.dtype


def find_runtime(device: str, dtype: str, bf16_engine: bool = False) -> Runtime:
    """Return device, precision and ranks (torchrun's variables). ConfigError if this process has no GPU of its own."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: this node has {torch.cuda.device_count()} GPUs; start one process a GPU"
        )
    if dtype == "auto":  # of parameters that DeepSpeed keeps in bf16 on a CPU too
        dtype = "bf16" if device == "cuda" or bf16_engine else "fp32"
    chosen = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Runtime(chosen, precision, rank, int(os.environ.get("WORLD_SIZE", 1)))


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or for a CPU the number of threads that PyTorch uses."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_matmul(device: torch.device, dtype: torch.dtype, width: int, rounds: int) -> list[float]:
    """Return the seconds that each of `rounds` products of two [width, width] matrices took."""
    a, seconds = torch.randn(width, width, device=device, dtype=dtype), []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def known_peak(name: str) -> float | None:
    """Return the data sheet's bf16 FLOP/s of the GPU called `name`; None for one that is not known as a whole."""
    words = re.split(r"[\s-]+", name.upper())
    if any(word in words for word in PARTIAL_GPUS):
        return None
    text = f" {' '.join(words)} "
    known = [key for key in PEAK_BF16_FLOPS if f" {key.upper()} " in text]
    return PEAK_BF16_FLOPS[max(known, key=len)] if known else None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return what MFU is a share of: the data sheet's bf16 rate of a known GPU, else the fastest product measured."""
    if device.type == "cuda" and dtype == torch.bfloat16 and (known := known_peak(device_name(device))):
        return known
    width = 1024 if device.type == "cpu" else 8192
    return 2 * width**3 / min(time_matmul(device, dtype, width, rounds=6))


def memory_gb(device: torch.device) -> float:
    """Return the peak memory in GB: allocated on the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def available_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take: of the GPU, or of the host within its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"]) - int(stat["active_file"])
        return min(available, int((group / "memory.max").read_text()) - used)
    except (OSError, KeyError, ValueError):  # no such group, or no limit
        return available


def format_bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def parse_bytes(value: object) -> float:
    """Return a memory size such as 24GiB, 80GB or 512MiB in bytes. ValueError for anything else."""
    try:
        text = str(value).strip()
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = 0
    if not size or text[-1].isdigit():
        raise ValueError("must be a size such as 24GiB or 80GB")
    return size


Bytes = Annotated[float, Field(gt=0, le=2**60), BeforeValidator(parse_bytes)]
