"""Whether a run may start: everything that can be found wrong before anything is created."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from configs.block import to_dict
from configs.errors import ConfigError, each, writing
from configs.load import flatten
from data.loader import EvalLoader, TrainLoader
from data.prepare import ensure_prepared, prepared
from data.shards import TokenShards
from data.sources.base import source_of
from model.attention.base import AttentionConfig, AttentionCore
from training import fork, hugging_face
from training.checkpoint import check_source, differing
from training.config import Config
from training.device import Runtime
from training.engine import refused
from training.run_folder import read_config
from training.stored import checkpoint_dirs


def check_before_start(config: Config, runtime: Runtime) -> None:
    """Raise one ConfigError with everything that would stop this run; create nothing."""
    checks = (
        lambda: check_zero(config.deepspeed.zero),
        lambda: check_nodes(config.deepspeed.zero, runtime.world_size),
        lambda: check_core(config.core, config.model, runtime),
        lambda: check_data(config),
        lambda: check_start(config),
        lambda: check_run_folder(config),
    )
    each(lambda check: check(), checks)


def check_sweep(configs: list[Config]) -> None:
    """Check each run of a sweep before the first of them starts."""
    check_folders(configs)
    each(lambda config: check_before_start(config, config.runtime()), configs)


def check_folders(configs: Iterable[Config]) -> None:
    """Raise a ConfigError if runs of a sweep would share a folder."""
    runs: dict[str, list[Config]] = {}
    for config in configs:
        runs.setdefault(os.path.abspath(config.run.dir), []).append(config)
    lines = []
    for folder, sharing in sorted(runs.items()):
        if len(sharing) == 1:
            continue
        remedy = "leave run.name and run.dir unset"
        if all(config.identity() == sharing[0].identity() for config in sharing):  # so the default names are the same
            trees = [flatten(to_dict(config)) for config in sharing]
            keys = [key for key in trees[0] if any(tree.get(key) != trees[0][key] for tree in trees)]
            what = f"{', '.join(keys) or 'nothing'}, which is no part of a run's name"
            remedy = f"they differ in {what}: start them one by one, each with a run.name of its own"
            if keys and not any("/" in str(tree.get(keys[0])) for tree in trees):
                remedy = f"they differ in {what}: put it there, as in run.name='NAME-${{{keys[0]}}}'"
        lines.append(f"run.dir={folder}: several runs of the sweep would share it; {remedy}")
    if lines:
        raise ConfigError(*lines)


def check_zero(zero: dict) -> None:
    """Raise a ConfigError for keys and values of `deepspeed.config.zero_optimization` that DeepSpeed would refuse."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # which training needs, and nothing else

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        raise ConfigError(*refused(error, {"zero_optimization": zero})) from None


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
    ensure_prepared(config.data, config.tokenizer, progress=False)
    batch = (trainer.seq_len, 0, trainer.micro_batch_size, trainer.global_batch_size, 0, 1)
    TrainLoader(TokenShards(config.data.dir, "train"), *batch)
    EvalLoader(TokenShards(config.data.dir, "val"), trainer.seq_len, trainer.micro_batch_size, 0, 1, max_samples=None)


def check_start(config: Config) -> None:
    """Raise a ConfigError if the run cannot start from what `trainer.init_from` or `trainer.fork_from` names."""
    init_from, fork_from = config.trainer.init_from, config.trainer.fork_from
    if checkpoint_dirs(config.run.dir):  # then it resumes
        return
    if fork_from:
        fork.check(config)
    elif init_from and hugging_face.is_export(init_from):
        hugging_face.check(init_from, config.network())
    elif init_from:
        check_source(init_from)


def check_run_folder(config: Config) -> None:
    folder = Path(config.run.dir)
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"run.dir={folder}: cannot be a folder, since {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"run.dir={folder}: {parent} is not writable; choose another with run.dir=")
    with writing("run.dir", folder, "; choose another with run.dir="):  # what a system grants, /proc may still refuse
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    if not (folder / "config.yaml").exists():
        return
    if config.trainer.resume == "never":
        raise ConfigError(f"run.dir={folder}: holds a run, and trainer.resume=never; choose another run.name")
    if keys := differing(read_config(folder).identity(), config.identity()):
        raise ConfigError(f"run.dir={folder}: holds another run; choose another run.name, or the same settings:{keys}")
