"""What a run stands on: the device, the process group, seeds, and the DeepSpeed engine around the model."""

import gc
import itertools
import logging
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from pydantic import ValidationError

from configs.schema import Config, ConfigError

T = TypeVar("T")
GROUPS = itertools.count()  # of this process, one after the other, as in a sweep


@dataclass(frozen=True)
class Runtime:
    """Where this process runs. `dtype` is what the forward pass computes in; parameters are fp32 master weights."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.dtype == torch.float32 else self.dtype


def find_runtime(config: Config) -> Runtime:
    """Device, precision and ranks (torchrun's variables), without touching any of them."""
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # fmt: skip
    kind = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: this node has {torch.cuda.device_count()} GPUs; start one process a GPU"
        )
    automatic = "bf16" if kind == "cuda" or config.deepspeed.bf16_engine else "fp32"
    dtype = automatic if config.trainer.dtype == "auto" else config.trainer.dtype
    device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    return Runtime(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], rank, local_rank, world_size)


def import_deepspeed(device_type: str):
    """DeepSpeed for this device, quiet, and without the CPU extension that it would compile and training never uses."""
    os.environ["DS_ACCELERATOR"] = device_type
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore", module="deepspeed")
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # of what DeepSpeed calls
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import real_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if real_accelerator.get_accelerator().device_name() != device_type:  # of an earlier run of this process
        real_accelerator.ds_accelerator = None  # chosen anew, by DS_ACCELERATOR
    if device_type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_distributed(runtime: Runtime, rank_timeout: float) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs); a lone process makes one of its own.

    Collectives give up only after twice `rank_timeout`, when the watchdog should have ended the process long ago.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ["T6_LONE_PROCESS"] = "1"
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 products remain
    backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=max(1800.0, 2 * rank_timeout))  # others wait here while rank 0 prepares data
    deepspeed = import_deepspeed(runtime.device.type)
    from deepspeed.comm.torch import TorchBackend

    TorchBackend.new_group = lambda self, ranks: torch.distributed.new_group(ranks, timeout)  # its own forgets it
    join(backend, timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def join(backend: str, timeout: timedelta | None = None) -> None:
    """Make the process group that the launcher's variables describe."""
    limit = timeout or torch.distributed.default_pg_timeout
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=limit))
    # torchrun keeps its store over restarts and from run to run of a sweep, with the addresses of before (torch 2.13).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = torch.distributed.PrefixStore(f"attempt {attempt} group {next(GROUPS)}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def from_main(decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on every rank; a ConfigError that it raises too."""
    answer = [None]
    if torch.distributed.get_rank() == 0:
        try:
            answer = [decide()]
        except ConfigError as error:
            answer = [error]
    torch.distributed.broadcast_object_list(answer)
    if isinstance(answer[0], ConfigError):
        raise answer[0]
    return answer[0]


def release_memory() -> None:
    """Let go of an engine that nothing names any more: it and its hooks refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shut_down() -> None:
    """Take the process group down and let go of the engine, so that the same process can start another run."""
    gc.collect()
    if torch.distributed.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()
    if os.environ.pop("T6_LONE_PROCESS", None):
        for key in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(key, None)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make whatever is random in a step a function of (seed, step, rank), so that a resumed run repeats it."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


def build_engine(config: Config, runtime: Runtime, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """The DeepSpeed engine: fp32 parameters sharded as `deepspeed.config` says; precision is the model's autocast."""
    ours = {
        "train_batch_size": config.trainer.global_batch_size,
        "train_micro_batch_size_per_gpu": config.trainer.micro_batch_size,
        "gradient_accumulation_steps": config.trainer.accumulation_steps(runtime.world_size),
        "zero_allow_untested_optimizer": True,
        # At stage 0 DeepSpeed clips without telling the norm: training.optim clips there.
        "gradient_clipping": config.optim.grad_clip if config.deepspeed.stage else 0.0,
    }
    # DeepSpeed's own timer waits for the GPU before and after every micro-batch.
    theirs = {"timers": {"throughput": {"enabled": False}}} | config.deepspeed.config
    deepspeed = import_deepspeed(runtime.device.type)
    options = {"model": model, "optimizer": optimizer, "dist_init_required": False}
    try:
        engine, *_ = deepspeed.initialize(config=theirs | ours, **options)
    except ValidationError as error:  # pydantic's, of DeepSpeed's own keys
        raise ConfigError(
            *(f"deepspeed.config: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        ) from None
    except deepspeed.DeepSpeedConfigError as error:
        raise ConfigError(f"deepspeed.config: {error}") from None
    if config.trainer.compile:
        engine.compile()
    return engine


def agree(mean: torch.Tensor, flag: bool) -> tuple[float, bool]:
    """The mean of a scalar over all ranks, and whether `flag` is set on any, on every rank."""
    values = torch.stack((mean.detach().double(), torch.tensor(float(flag), dtype=torch.double, device=mean.device)))
    torch.distributed.all_reduce(values)
    total, flags = values.tolist()
    return total / torch.distributed.get_world_size(), flags > 0
