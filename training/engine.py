"""The DeepSpeed engine around the model, the process group that it needs, and its whole state by parameter name."""

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from configs.errors import ConfigError
from configs.load import remedy, shown
from training.checkpoint import read_manifest
from training.config import Config
from training.device import Runtime
from training.ranks import backend_of, join

SHORTEST_TIMEOUT = 1800.0  # seconds; other ranks wait this long while rank 0 prepares data


def import_deepspeed(device_type: str):
    """Return DeepSpeed for this device, quiet, and without the CPU extension that training never uses."""
    os.environ["DS_ACCELERATOR"] = device_type
    warnings.filterwarnings("ignore", module="deepspeed")
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)  # of what DeepSpeed calls
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import real_accelerator
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if real_accelerator.get_accelerator().device_name() != device_type:  # of an earlier run of this process
        real_accelerator.ds_accelerator = None  # chosen again, by DS_ACCELERATOR
    if device_type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_distributed(runtime: Runtime, rank_timeout: float) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs); a process that is alone makes one of its own."""
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 products remain
    backend = backend_of(runtime.device)
    timeout = timedelta(seconds=max(SHORTEST_TIMEOUT, 2 * rank_timeout))  # the watchdog ends the process earlier
    deepspeed = import_deepspeed(runtime.device.type)
    from deepspeed.comm.torch import TorchBackend

    TorchBackend.new_group = lambda self, ranks: torch.distributed.new_group(ranks, timeout)  # its own forgets it
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    join(backend, timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


def shut_down() -> None:
    """Take the process group down and let go of the engine, so that the same process can start another run."""
    gc.collect()
    if torch.distributed.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()


def release_memory() -> None:
    """Let go of an engine that nothing names any more: it and its hooks refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make whatever is random in a step a function of (seed, step, rank), so that a resumed run repeats it."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


def build_engine(config: Config, runtime: Runtime, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """Return the engine: fp32 parameters sharded by `deepspeed.config`. ConfigError for what DeepSpeed refuses."""
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
        raise ConfigError(*refused(error, config.deepspeed.config)) from None
    except deepspeed.DeepSpeedConfigError as error:
        raise ConfigError(f"deepspeed.config: {error}") from None
    if config.trainer.compile:
        engine.compile()
    return engine


def refused(error: ValidationError, config: dict[str, Any]) -> Iterator[str]:
    """Yield what DeepSpeed's classes find wrong, which name a key within its block and not the block."""
    for detail in error.errors():
        first = detail["loc"][0]
        block = [name for name, keys in config.items() if isinstance(keys, dict) and first in keys][:1]
        key = ".".join(map(str, ("deepspeed.config", *block, *detail["loc"])))
        what = "unknown key" if detail["type"] == "extra_forbidden" else remedy(detail)
        yield f"{key}={shown(detail['input'])}: {what}"


def gather_state(engine, alive: Callable[[], None]) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """Return the optimizer's scalars, such as the number of updates, and tensors by file and name, on rank 0 alone.

    Files are "model", the weights by parameter, and "optimizer", its moments by `<moment>.<parameter>`; all are whole,
    in fp32 and on the CPU. Every rank calls it; each parameter is followed by a call of `alive`.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage, is_main = engine.zero_optimization_stage(), torch.distributed.get_rank() == 0
    has_master = stage == 3 or engine.bfloat16_enabled()  # the fp32 weights lie next to the parameters
    optimizer = inner_optimizer(engine)
    first = {key: value for key, value in next(iter(optimizer.state.values()), {}).items() if value is not None}
    names = [key for key, value in first.items() if isinstance(value, Tensor) and value.ndim > 0]
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        weight = safe_get_full_fp32_param(parameter) if has_master else parameter.detach()
        if is_main:
            weights[name] = stored(weight)
        for key in names:
            moment = safe_get_full_optimizer_state(parameter, key) if stage else optimizer.state[parameter][key]
            if is_main:
                moments[f"{key}.{name}"] = stored(moment)
        alive()
    scalars = {key: float(value) for key, value in first.items() if key not in names}
    return scalars, {"model": weights, "optimizer": moments}


def stored(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32, copy=True).contiguous()


def restore(engine, folder: Path) -> None:
    """Give the engine, whose model has the weights of a checkpoint, the rest: moments, fp32 weights of bf16 ones."""
    if engine.bfloat16_enabled():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            for name, parameter in engine.module.named_parameters():
                put(engine, parameter, file.get_tensor(name))
    facts = read_manifest(folder)
    updates = facts.get("optimizer_updates")  # of AdamW, all that older checkpoints have
    scalars = facts.get("optimizer_scalars", {"step": float(updates)} if updates else {})
    with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
        moments = sorted({key.partition(".")[0] for key in file.keys()})  # noqa: SIM118
        if not (scalars or moments):
            return
        stage, optimizer = engine.zero_optimization_stage(), inner_optimizer(engine)
        for owned in owned_tensors(engine):
            numbers = {key: torch.tensor(value, device=owned.device) for key, value in scalars.items()}
            optimizer.state[owned] = numbers | {key: torch.zeros_like(owned) for key in moments}
        if stage in (1, 2):
            engine.optimizer._lazy_init_hp_params_optimizer_state()  # so that parameters find their moments
        for name, parameter in engine.module.named_parameters():
            for key in moments:
                put(engine, parameter, file.get_tensor(f"{key}.{name}"), key)


def inner_optimizer(engine) -> torch.optim.Optimizer:
    """Return the torch optimizer itself: at stage 0 the engine's, above that inside of DeepSpeed's."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def owned_tensors(engine) -> list[Tensor]:
    """Return what the inner optimizer steps on this rank: parameters at stage 0, flat partitions of them above."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    if stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def put(engine, parameter: Tensor, value: Tensor, moment: str | None = None) -> None:
    """Put `value` in a moment of a parameter or, without one, in the fp32 weights of which its bf16 ones are copies."""
    from deepspeed import utils

    stage = engine.zero_optimization_stage()
    if stage == 0:
        state = engine.optimizer.state[parameter]
        state[moment] = value.to(state[moment].device, state[moment].dtype)  # some optimizers have shapes of their own
        return
    kind, value = ("local", own_part(parameter, value)) if stage == 3 else ("full", value)
    if moment is None:
        getattr(utils, f"safe_set_{kind}_fp32_param")(parameter, value)
    else:
        getattr(utils, f"safe_set_{kind}_optimizer_state")(parameter, value, moment)


def own_part(parameter: Tensor, value: Tensor) -> Tensor:
    """Return this rank's part of `value` at stage 3, the last one padded, which DeepSpeed's setter forgets."""
    part, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padding = part * torch.distributed.get_world_size() - value.numel()
    return torch.nn.functional.pad(value.flatten(), (0, padding))[rank * part : (rank + 1) * part]
