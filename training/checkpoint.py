"""Checkpoints that don't depend on how a run was sharded.

Every checkpoint holds the whole fp32 state by parameter name, whatever the ZeRO stage and the number of processes it
was saved from: any stage and any world size can go on from it, and evaluation reads the weights without DeepSpeed.

    step_00000100/  model.safetensors      the weights (the tied head is left out)
                    optimizer.safetensors  AdamW's moments, exp_avg.<name> and exp_avg_sq.<name>
                    manifest.json          step, tokens, identity, versions; each file's size and sha256, and its own.
                                           Written last: a checkpoint exists when its manifest does
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import ConfigError
from data.shards import sha256_of, write_atomically

MOMENTS = ("exp_avg", "exp_avg_sq")


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never part of one."""
    write_atomically(path, [text.encode()])


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def save(engine, run_dir: Path, step: int, facts: dict, keep: Callable[[list[dict]], set[int]]) -> str | None:
    """Save the engine's state as the checkpoint of `step`; every rank calls it, rank 0 writes.

    `facts` join the manifest. Of all whole checkpoints, given by their manifests, the steps that `keep` returns stay.
    None, or on every rank why it could not be written (a full disk, say): then the checkpoints there are untouched.
    """
    weights, moments, updates = gather(engine)
    failure = [None]
    if torch.distributed.get_rank() == 0:
        try:
            write(
                run_dir, {"step": step, "optimizer_updates": updates, **facts}, {"model": weights, "optimizer": moments}
            )
            prune(run_dir, keep)
        except (OSError, SafetensorError) as error:
            failure = [f"{checkpoint_dir(run_dir, step)}: {error}"]
            shutil.rmtree(checkpoint_dir(run_dir, step), ignore_errors=True)
    torch.distributed.broadcast_object_list(failure)
    return failure[0]


def write(run_dir: Path, manifest: dict, tensors: dict[str, dict[str, Tensor]]) -> None:
    """The files of one checkpoint, the manifest last, and then `latest`."""
    folder = checkpoint_dir(run_dir, manifest["step"])
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name, named in tensors.items():
        path = folder / f"{name}.safetensors"
        save_file(named, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(folder.iterdir())}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    manifest = {**manifest, "versions": versions, "files": files}
    write_atomic(folder / "manifest.json", json.dumps(manifest | {"checksum": seal(manifest)}, indent=2))
    write_atomic(Path(run_dir) / "latest", folder.name)


def prune(run_dir: Path, keep: Callable[[list[dict]], set[int]]) -> None:
    """Delete the checkpoints that `keep` does not name, and what was left of unfinished ones."""
    folders = sorted((Path(run_dir) / "checkpoints").glob("step_*"))
    manifests = {folder: read_manifest(folder) for folder in folders if (folder / "manifest.json").exists()}
    kept = keep(list(manifests.values()))
    for folder in folders:
        if folder not in manifests or manifests[folder]["step"] not in kept:
            shutil.rmtree(folder)


def keepers(last: int, every: int | None, best: bool) -> Callable[[list[dict]], set[int]]:
    """A policy: the newest `last`, each step that is a multiple of `every`, and the one with the lowest val_loss."""

    def keep(manifests: list[dict]) -> set[int]:
        steps = sorted(manifest["step"] for manifest in manifests)
        kept = set(steps[-last:]) | {step for step in steps if every and step % every == 0}
        scored = [manifest for manifest in manifests if manifest.get("val_loss") is not None]
        if best and scored:
            kept.add(min(scored, key=lambda manifest: manifest["val_loss"])["step"])
        return kept

    return keep


def seal(manifest: dict) -> str:
    """The checksum of a manifest's own content."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty if it is whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["checksum"] != seal(manifest):
            return [f"{folder / 'manifest.json'}: does not have its own checksum"]
        files = manifest["files"].items()
    except FileNotFoundError:
        return [f"{folder}: has no manifest.json, so it was never finished"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{folder / 'manifest.json'}: cannot be read ({error!r})"]
    found = []
    for name, facts in files:
        path = folder / name
        if not path.exists():
            found.append(f"{path}: is missing")
        elif path.stat().st_size != facts["bytes"]:
            found.append(f"{path}: has {path.stat().st_size} bytes instead of {facts['bytes']}")
        elif sha256_of(path) != facts["sha256"]:
            found.append(f"{path}: does not have the checksum of its manifest")
    return found


def newest(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run, if there is one; broken ones are named to `warn` and passed over."""
    for folder in sorted((Path(run_dir) / "checkpoints").glob("step_*"), reverse=True):
        broken = problems(folder)
        if not broken:
            return folder
        for line in broken:
            warn(f"{line}; taking the checkpoint before")
    return None


def find(source: str, warn: Callable[[str], None]) -> Path:
    """The checkpoint that `trainer.init_from` names: a checkpoint folder, or the newest of a run folder."""
    folder = Path(source)
    found = folder if (folder / "manifest.json").exists() else newest(folder, warn)
    if found is None:
        raise ConfigError(f"trainer.init_from={source}: is neither a checkpoint nor a run folder with a whole one")
    return found


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Fill the model (before the engine wraps it) from a checkpoint. ConfigError names the tensors that don't fit."""
    weights = load_file(folder / "model.safetensors")
    own = dict(model.named_parameters())  # names a tied weight once
    wrong = [f"{name}: the checkpoint has none" for name in own.keys() - weights.keys()]
    wrong += [f"{name}: the model has none" for name in weights.keys() - own.keys()]
    wrong += [f"{name}: {list(weights[name].shape)} in the checkpoint, {list(own[name].shape)} in the model"
              for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]  # fmt: skip
    if wrong:
        raise ConfigError(f"{folder}: the weights don't fit this model:" + "".join(f"\n    {w}" for w in sorted(wrong)))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


# --- the engine's state by parameter name ---------------------------------------------------------------------------


def gather(engine) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Weights and moments by name, whole, in fp32, on rank 0's CPU (empty elsewhere), and the updates made so far."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage, main = engine.zero_optimization_stage(), torch.distributed.get_rank() == 0
    optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    updates = int(next(iter(optimizer.state.values()))["step"]) if optimizer.state else 0
    weights, moments = {}, {}
    for name, parameter in engine.module.named_parameters():
        whole = {name: safe_get_full_fp32_param(parameter) if stage == 3 else parameter.detach()}
        if updates:
            for key in MOMENTS:
                whole[f"{key}.{name}"] = (optimizer.state[parameter][key] if stage == 0
                                          else safe_get_full_optimizer_state(parameter, key))  # fmt: skip
        if main:
            for key, tensor in whole.items():
                copy = tensor.to("cpu", torch.float32, copy=True).contiguous()
                (weights if key == name else moments)[key] = copy
    return weights, moments, updates


def load_optimizer(engine, folder: Path) -> None:
    """Give the engine's optimizer the moments of a checkpoint; each rank keeps the part that it owns."""
    updates = read_manifest(folder)["optimizer_updates"]
    if not updates:
        return
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    for owned in owned_tensors(engine):
        step = torch.tensor(float(updates), device=owned.device)
        optimizer.state[owned] = {"step": step} | {key: torch.zeros_like(owned) for key in MOMENTS}
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # so that parameters find their moments
    with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
        for name, parameter in engine.module.named_parameters():
            for key in MOMENTS:
                set_moment(parameter, key, file.get_tensor(f"{key}.{name}"), optimizer, stage)


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


def set_moment(parameter: Tensor, key: str, value: Tensor, optimizer: torch.optim.Optimizer, stage: int) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if stage == 0:
        optimizer.state[parameter][key].copy_(value)
    elif stage == 3:  # DeepSpeed's own setter forgets the padding of the last partition
        part, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
        padded = torch.nn.functional.pad(
            value.flatten(), (0, part * torch.distributed.get_world_size() - value.numel())
        )
        safe_set_local_optimizer_state(parameter, padded[rank * part : (rank + 1) * part], key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
