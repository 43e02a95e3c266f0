"""Checkpoints that don't depend on how a run was sharded.

Every checkpoint holds the whole fp32 state by parameter name: any ZeRO stage and any number of processes can resume
from it, and evaluation reads the weights without DeepSpeed.

    step_00000100/  model.safetensors      the weights (the tied head is left out)
                    optimizer.safetensors  the optimizer's moments, as exp_avg.<parameter> and exp_avg_sq.<parameter>
                    manifest.json          step, tokens, identity, versions; each file's size and sha256, and its own.
                                           Written last: a checkpoint exists when its manifest does
"""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_model, save_file
from torch import Tensor

from configs.errors import ConfigError
from data.files import seal, sha256_of, write_atomic
from training.config import upgrade_identity
from training.stored import checkpoint_dir, checkpoint_dirs, problems, read_manifest

INIT_FROM = "trainer.init_from"
NO_SOURCE = {
    INIT_FROM: "{}={}: is neither a checkpoint, a run folder with a complete one, nor a Hugging Face folder",
    "trainer.fork_from": "{}={}: is neither a checkpoint nor a run folder with a complete one",
}
ARCHITECTURE = ("model.", "size.", "tokenizer.")  # of a run's identity: what its weights mean
NOT_ARCHITECTURE = (
    "model.rope_base", "model.rope_scaling", "model.rope_factor", "model.rope_original_length",
    "size.name", "size.match", "size.match_tolerance", "tokenizer.name",
)  # fmt: skip


def write(run_dir: Path, manifest: dict, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write the files of one checkpoint, the manifest last, and then `latest`."""
    folder = checkpoint_dir(run_dir, manifest["step"])
    shutil.rmtree(folder, ignore_errors=True)
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


def adopt(run_dir: Path, other: Path, changes: dict) -> Path:
    """Copy the checkpoint of another run, with `changes` of its manifest, as the most recent of this one; return it."""
    manifest = read_manifest(other) | changes
    folder = checkpoint_dir(run_dir, manifest["step"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in manifest["files"]:
        shutil.copyfile(other / name, folder / name)
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    write_atomic(folder / "manifest.json", json.dumps(manifest | {"checksum": seal(manifest)}, indent=2))
    write_atomic(Path(run_dir) / "latest", folder.name)
    return folder


def prune(run_dir: Path, keep: Callable[[list[dict]], set[int]], last: int) -> None:
    """Delete the checkpoints that `keep` does not return, those past the `last` step of training, and broken ones."""
    folders = [folder for folder in checkpoint_dirs(run_dir) if not folder.is_symlink()]
    manifests = {folder: read_manifest(folder) for folder in folders if not problems(folder, checksums=False)}
    kept = keep([manifest for manifest in manifests.values() if manifest["step"] <= last])
    for folder in folders:
        if folder not in manifests or manifests[folder]["step"] not in kept:
            shutil.rmtree(folder)


def keepers(last: int, every: int | None, best: bool) -> Callable[[list[dict]], set[int]]:
    """Return a policy: keep the last `last`, multiples of `every`, and if `best` the one with the lowest val_loss."""

    def keep(manifests: list[dict]) -> set[int]:
        steps = sorted(manifest["step"] for manifest in manifests)
        kept = set(steps[-last:]) | {step for step in steps if every and step % every == 0}
        scored = [manifest for manifest in manifests if manifest.get("val_loss") is not None]
        if best and scored:
            kept.add(min(scored, key=lambda manifest: manifest["val_loss"])["step"])
        return kept

    return keep


def newest(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the most recent complete checkpoint of a run, if any; broken ones are reported to `warn` and skipped."""
    for folder in reversed(checkpoint_dirs(run_dir)):
        broken = problems(folder)
        if not broken:
            return folder
        for line in broken:
            warn(f"{line}; taking the checkpoint before it, if there is one")
    return None


def check_source(source: str, key: str = INIT_FROM) -> None:
    """Raise a ConfigError unless `source` is a folder in which `find` may find a checkpoint."""
    if not any((folder / "manifest.json").exists() for folder in (Path(source), *checkpoint_dirs(source))):
        raise ConfigError(NO_SOURCE[key].format(key, source))


def find(source: str, warn: Callable[[str], None], key: str = INIT_FROM) -> Path:
    """Return the checkpoint that `key` names, itself or its run folder. ConfigError if none is whole."""
    folder = Path(source)
    if (folder / "manifest.json").exists():
        if broken := problems(folder):
            raise ConfigError(*(f"{key}: {line}" for line in broken))
        return folder
    if found := newest(folder, warn):
        return found
    raise ConfigError(NO_SOURCE[key].format(key, source))


def differing(there: dict, ours: dict) -> str:
    """Return the keys in which two runs' identities differ, a line each; empty if they are the same."""
    there = upgrade_identity(there)
    keys = [key for key in sorted(there.keys() | ours.keys()) if there.get(key) != ours.get(key)]
    return "".join(f"\n    {key}: {there.get(key)!r} there, {ours.get(key)!r} here" for key in keys)


def check_same_run(folder: Path, identity: dict, data_fingerprint: str) -> None:
    """Raise a ConfigError unless a checkpoint is of the run with this identity, on this data."""
    manifest = read_manifest(folder)
    if keys := differing(manifest["identity"], identity):
        raise ConfigError(f"{folder}: is a checkpoint of another run; move it away, or choose another run.name:{keys}")
    check_same_data(folder, manifest, data_fingerprint)


def check_same_data(folder: Path, manifest: dict, data_fingerprint: str) -> None:
    saved = manifest["data_fingerprint"]
    if saved != data_fingerprint:
        raise ConfigError(
            f"{folder}: was trained on other data than data.dir holds now (fingerprint {saved[:12]}, not "
            f"{data_fingerprint[:12]}); prepare that data again or choose another run.name"
        )


def check_same_architecture(folder: Path, identity: dict, tokenizer_fingerprint: str) -> None:
    """Raise a ConfigError unless a checkpoint's weights mean the same in a run with this identity and tokenizer."""

    def architecture(identity: dict, fingerprint: str) -> dict:
        keys = (key for key in identity if key.startswith(ARCHITECTURE) and key not in NOT_ARCHITECTURE)
        return {key: identity[key] for key in keys} | {"tokenizer.fingerprint": fingerprint}

    manifest = read_manifest(folder)
    there = architecture(manifest["identity"], manifest["tokenizer_fingerprint"])
    if keys := differing(there, architecture(identity, tokenizer_fingerprint)):
        raise ConfigError(f"trainer.init_from: {folder} has another architecture or tokenizer:{keys}")


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Fill the model, before the engine wraps it, from a checkpoint. ConfigError names the tensors that do not fit."""
    try:
        load_model(model, folder / "model.safetensors")
    except RuntimeError as error:
        raise ConfigError(f"{folder}: the weights do not fit this model: {error}") from None
