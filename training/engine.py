"""The DeepSpeed engine around the model, and the process group that it needs."""

import gc
import logging
import os
import socket
import warnings
from datetime import timedelta

import torch
from pydantic import ValidationError

from configs.errors import ConfigError
from training.config import Config
from training.device import Runtime
from training.ranks import backend_of, join

LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")  # a launcher's variables
ALONE = "T6_LONE_PROCESS"  # set while a process without a launcher has a group of its own
SHORTEST_TIMEOUT = 1800.0  # seconds; other ranks wait this long while rank 0 prepares data


def import_deepspeed(device_type: str):
    """Return DeepSpeed for this device, quiet, and without the CPU extension that training never uses."""
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
        real_accelerator.ds_accelerator = None  # chosen again, by DS_ACCELERATOR
    if device_type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_distributed(runtime: Runtime, rank_timeout: float) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs); a process that is alone makes one of its own.

    Collectives give up only after twice `rank_timeout`, when the watchdog should have ended the process long ago.
    """
    if "RANK" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        os.environ.update(zip(LAUNCHER, ("127.0.0.1", port, "0", "0", "1"), strict=True), **{ALONE: "1"})
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 products remain
    backend = backend_of(runtime.device)
    timeout = timedelta(seconds=max(SHORTEST_TIMEOUT, 2 * rank_timeout))
    deepspeed = import_deepspeed(runtime.device.type)
    from deepspeed.comm.torch import TorchBackend

    TorchBackend.new_group = lambda self, ranks: torch.distributed.new_group(ranks, timeout)  # its own forgets it
    join(backend, timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def shut_down() -> None:
    """Take the process group down and let go of the engine, so that the same process can start another run."""
    gc.collect()
    if torch.distributed.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()
    if os.environ.pop(ALONE, None):
        for key in LAUNCHER:
            os.environ.pop(key, None)


def release_memory() -> None:
    """Let go of an engine that nothing names any more: it and its hooks refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make whatever is random in a step a function of (seed, step, rank), so that a resumed run repeats it."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


def build_engine(config: Config, runtime: Runtime, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """Return the DeepSpeed engine: fp32 parameters sharded as `deepspeed.config` says; the model autocasts itself.

    ConfigError for what DeepSpeed refuses in its configuration.
    """
    ours = {
        "train_batch_size": config.trainer.global_batch_size,
        "train_micro_batch_size_per_gpu": config.trainer.micro_batch_size,
        "gradient_accumulation_steps": config.trainer.accumulation_steps(runtime.world_size),
        "zero_allow_untested_optimizer": True,
        # At stage 0 DeepSpeed clips without reporting the norm: training.optim clips there.
        "gradient_clipping": config.optim.grad_clip if config.deepspeed.stage else 0.0,
    }
    # DeepSpeed's own timer waits for the GPU before and after every micro-batch.
    theirs = {"timers": {"throughput": {"enabled": False}}} | config.deepspeed.config
    deepspeed = import_deepspeed(runtime.device.type)
    try:
        engine, *_ = deepspeed.initialize(
            config=theirs | ours, model=model, optimizer=optimizer, dist_init_required=False
        )
    except ValidationError as error:  # pydantic's, of DeepSpeed's own keys
        lines = [f"deepspeed.config.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(*lines) from None
    except deepspeed.DeepSpeedConfigError as error:
        raise ConfigError(f"deepspeed.config: {error}") from None
    if config.trainer.compile:
        engine.compile()
    return engine
