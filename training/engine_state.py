"""The state of a DeepSpeed engine by parameter name, whole and in fp32, whatever its ZeRO stage and world size.

An optimizer's state is what torch.optim keeps for each parameter: moments of the parameter's size, whatever they are
called, and scalars such as the number of updates, which are the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from training.checkpoint import read_manifest


@dataclass
class EngineState:
    """Tensors on rank 0's CPU (none on other ranks): weights by parameter, moments by `<moment>.<parameter>`."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)  # of the optimizer, by name; empty before the first update


def gather_state(engine, alive: Callable[[], None] = lambda: None) -> EngineState:
    """Return the engine's state. Every rank calls it, and `alive` is called after each parameter."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage, is_main = engine.zero_optimization_stage(), torch.distributed.get_rank() == 0
    has_master = stage == 3 or engine.bfloat16_enabled()  # the fp32 weights lie next to the parameters
    optimizer, state = inner_optimizer(engine), EngineState()
    first = next(iter(optimizer.state.values()), {})
    moments = [key for key, value in first.items() if isinstance(value, Tensor) and value.ndim > 0]
    state.scalars = {key: float(value) for key, value in first.items() if key not in moments}
    for name, parameter in engine.module.named_parameters():
        weight = safe_get_full_fp32_param(parameter) if has_master else parameter.detach()
        if is_main:
            state.weights[name] = stored(weight)
        for key in moments:
            own = optimizer.state[parameter][key] if stage == 0 else None
            moment = safe_get_full_optimizer_state(parameter, key) if stage else own
            if is_main:
                state.moments[f"{key}.{name}"] = stored(moment)
        alive()
    return state


def stored(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32, copy=True).contiguous()


def restore(engine, folder: Path) -> None:
    """Give the engine, whose model has a checkpoint's weights already, the rest of the checkpoint.

    Each rank keeps the part that it owns of the moments and, if parameters are bf16, of the fp32 weights.
    """
    if engine.bfloat16_enabled():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            for name, parameter in engine.module.named_parameters():
                put(engine, parameter, file.get_tensor(name))
    scalars = saved_scalars(read_manifest(folder))
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


def saved_scalars(manifest: dict) -> dict[str, float]:
    """Return the optimizer's scalars; older checkpoints have AdamW's number of updates alone."""
    updates = manifest.get("optimizer_updates")
    return manifest.get("optimizer_scalars", {"step": float(updates)} if updates else {})


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
