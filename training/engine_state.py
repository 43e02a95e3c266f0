"""The state of a DeepSpeed engine by parameter name, whole and in fp32, whatever its ZeRO stage and world size."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from training.checkpoint import MOMENTS, read_manifest


def gather(engine, alive: Callable[[], None] = lambda: None) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Weights and moments by name, copied to rank 0's CPU (empty elsewhere), and the updates made so far.

    Every rank calls it, and `alive` after each parameter.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage, main = engine.zero_optimization_stage(), torch.distributed.get_rank() == 0
    has_master = stage == 3 or engine.bfloat16_enabled()  # the fp32 weights lie beside the parameters
    optimizer = inner_optimizer(engine)
    updates = int(next(iter(optimizer.state.values()))["step"]) if optimizer.state else 0
    weights, moments = {}, {}
    for name, parameter in engine.module.named_parameters():
        whole = {name: safe_get_full_fp32_param(parameter) if has_master else parameter.detach()}
        if updates:
            for key in MOMENTS:
                whole[f"{key}.{name}"] = (optimizer.state[parameter][key] if stage == 0
                                          else safe_get_full_optimizer_state(parameter, key))  # fmt: skip
        if main:
            for key, tensor in whole.items():
                copy = tensor.to("cpu", torch.float32, copy=True).contiguous()
                (weights if key == name else moments)[key] = copy
        alive()
    return weights, moments, updates


def restore(engine, folder: Path) -> None:
    """Give the engine, whose model has a checkpoint's weights already, the rest of the checkpoint.

    Each rank keeps the part that it owns of the moments and, where parameters are bf16, of the fp32 weights.
    """
    if engine.bfloat16_enabled():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            for name, parameter in engine.module.named_parameters():
                set_master(engine, parameter, file.get_tensor(name))
    updates = read_manifest(folder)["optimizer_updates"]
    if not updates:
        return
    stage, optimizer = engine.zero_optimization_stage(), inner_optimizer(engine)
    for owned in owned_tensors(engine):
        step = torch.tensor(float(updates), device=owned.device)
        optimizer.state[owned] = {"step": step} | {key: torch.zeros_like(owned) for key in MOMENTS}
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # so that parameters find their moments
    with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
        for name, parameter in engine.module.named_parameters():
            for key in MOMENTS:
                set_moment(engine, parameter, key, file.get_tensor(f"{key}.{name}"))


def inner_optimizer(engine) -> torch.optim.Optimizer:
    """The torch optimizer itself: at stage 0 the engine's, above inside of DeepSpeed's."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def owned_tensors(engine) -> list[Tensor]:
    """What the inner optimizer steps on this rank: the parameters at stage 0, flat partitions of them above."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    return (
        engine.optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else engine.optimizer.single_partition_of_fp32_groups
    )


def set_master(engine, parameter: Tensor, value: Tensor) -> None:
    """Put `value` in the fp32 weights from which the engine makes its bf16 parameter."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if engine.zero_optimization_stage() == 3:
        safe_set_local_fp32_param(parameter, own_part(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def set_moment(engine, parameter: Tensor, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage == 0:
        engine.optimizer.state[parameter][key].copy_(value)
    elif stage == 3:
        safe_set_local_optimizer_state(parameter, own_part(parameter, value), key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def own_part(parameter: Tensor, value: Tensor) -> Tensor:
    """This rank's part of `value` at stage 3, the last one padded, which DeepSpeed's setter of the whole forgets."""
    part, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padding = part * torch.distributed.get_world_size() - value.numel()
    return torch.nn.functional.pad(value.flatten(), (0, padding))[rank * part : (rank + 1) * part]
