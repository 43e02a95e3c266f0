"""Whether a run may start: everything that can be found wrong before anything is created."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from configs.errors import ConfigError, each
from data.loader import EvalLoader, TrainLoader
from data.prepare import ensure_prepared, prepared
from data.shards import TokenShards
from data.sources.base import source_of
from model.attention.base import AttentionConfig, AttentionCore
from training.checkpoint import check_source, differing
from training.config import Config
from training.device import Runtime
from training.run_folder import read_config


def check_before_start(config: Config, runtime: Runtime) -> None:
    """Raise one ConfigError with everything that would stop this run; create nothing."""
    checks = (
        lambda: check_nodes(config.deepspeed.zero, runtime.world_size),
        lambda: check_core(config.core, config.model, runtime),
        lambda: check_data(config),
        lambda: check_init_from(config),
        lambda: check_run_folder(config),
    )
    each(lambda check: check(), checks)


def check_sweep(configs: list[Config]) -> None:
    """Check each run of a sweep before the first of them starts."""
    check_folders(config.run.dir for config in configs)
    each(lambda config: check_before_start(config, config.runtime()), configs)


def check_folders(folders: Iterable[str]) -> None:
    """Raise a ConfigError if runs of a sweep would share a folder."""
    count = Counter(os.path.abspath(folder) for folder in folders)
    if shared := sorted(folder for folder in count if count[folder] > 1):
        remedy = "several runs of the sweep would share it; leave run.name and run.dir unset"
        raise ConfigError(*(f"run.dir={folder}: {remedy}" for folder in shared))


def check_nodes(zero: dict, world_size: int) -> None:
    node = zero.get("zero_hpz_partition_size", 1)
    if not (isinstance(node, int) and node >= 1 and world_size % node == 0):
        raise ConfigError(
            f"deepspeed.config.zero_optimization.zero_hpz_partition_size={node}: must divide the number of processes, "
            f"which is {world_size}; it is the number of GPUs of a node"
        )


def check_core(core: AttentionCore, attention: AttentionConfig, runtime: Runtime) -> None:
    """Raise a ConfigError for what the core cannot do with this mechanism, on this device."""
    try:
        core.check(attention, runtime.device.type, runtime.dtype)
    except ValueError as error:
        raise ConfigError(f"core={core.name}: {error}") from None


def check_data(config: Config) -> None:
    trainer = config.trainer
    if source_of(config.data).on_first_use and not prepared(config.data, config.tokenizer):
        return  # rank 0 prepares it
    ensure_prepared(config.data, config.tokenizer)
    batch = (trainer.seq_len, 0, trainer.micro_batch_size, trainer.global_batch_size, 0, 1)
    TrainLoader(TokenShards(config.data.dir, "train"), *batch)
    EvalLoader(TokenShards(config.data.dir, "val"), trainer.seq_len, trainer.micro_batch_size, 0, 1, max_samples=None)


def check_init_from(config: Config) -> None:
    if config.trainer.init_from and not any(Path(config.run.dir).glob("checkpoints/step_*")):  # else it resumes
        check_source(config.trainer.init_from)


def check_run_folder(config: Config) -> None:
    folder = Path(config.run.dir)
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"run.dir={folder}: cannot be a folder, since {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"run.dir={folder}: {parent} is not writable; choose another with run.dir=")
    if not (folder / "config.yaml").exists():
        return
    if config.trainer.resume == "never":
        raise ConfigError(f"run.dir={folder}: holds a run, and trainer.resume=never; choose another run.name")
    if keys := differing(read_config(folder).identity(), config.identity()):
        raise ConfigError(f"run.dir={folder}: holds another run; choose another run.name, or the same settings:{keys}")
