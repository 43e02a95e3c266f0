"""A run's model, ready to evaluate: read from a checkpoint without DeepSpeed, or as it stands in training."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs.schema import Config, ConfigError
from data.tokenizers import Tokenizer, load_tokenizer
from eval.ranks import from_main
from model.cores.base import AttentionCore
from model.transformer import Transformer, TransformerConfig
from training.checkpoint import checkpoint_dir, load_weights, newest, problems, read_manifest
from training.run_folder import check_core, read_config
from training.setup import Runtime, find_runtime

FULL = ("sdpa", "flash_tpa")  # cores of full attention


@dataclass
class LoadedRun:
    """`model` is in eval mode on the runtime's device. `lockstep`: all ranks must call it equally often (ZeRO-3)."""

    dir: Path
    config: Config
    step: int
    tokens: int
    model: Transformer
    tokenizer: Tokenizer
    runtime: Runtime
    lockstep: bool = False

    @property
    def context(self) -> int:
        """Tokens that the model was trained to see."""
        return self.config.trainer.seq_len

    def scale_rope(self, kind: str, factor: float | None) -> None:
        """Read texts `factor` times as long as in training from here on; `none` takes it back.

        Where training has scaled RoPE already, both factors count from the length that it began at.
        """
        trained, attention = self.config.model, self.model.config.attention
        attention.rope_scaling, attention.rope_factor = trained.rope_scaling, trained.rope_factor
        attention.rope_original_length = trained.rope_original_length
        if kind != "none" and factor != 1:
            attention.rope_scaling, attention.rope_factor = kind, trained.rope_factor * factor
            attention.rope_original_length = trained.rope_original_length or self.context


def config_of(run: str, device: str = "auto", dtype: str = "auto") -> Config:
    """The configuration of the run folder `run`, to be read on this device. ConfigError if it is none."""
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        others = sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))
        raise ConfigError(
            f"run={run}: is not a run folder; " + (f"there are {', '.join(others)}" if others else "train one first")
        )
    config = read_config(folder)
    config.device, config.trainer.dtype = device, dtype
    return config


def load_run(
    run: str, device: str = "auto", dtype: str = "auto", step: int | None = None, core: AttentionCore | None = None
) -> LoadedRun:
    """The newest whole checkpoint of the run folder `run`, or the one of `step`. ConfigError if there is none.

    Of several processes rank 0 chooses: a run that trains may save another checkpoint in between. `core`: another way
    to compute the full attention that the run was trained with.
    """
    folder, config = Path(run), config_of(run, device, dtype)
    found = from_main(
        lambda: newest(folder, warn=partial(print, file=sys.stderr)) if step is None else checkpoint_of(folder, step)
    )
    if found is None:
        raise ConfigError(f"run={run}: has no whole checkpoint yet")
    if core:
        if config.core.name not in FULL:
            raise ConfigError(
                f"run={run}: was trained with core={config.core.name}, not the full attention of {core.name}"
            )
        config.core = core
    runtime = find_runtime(config)
    tokenizer = load_tokenizer(config.tokenizer, config.data.dir)
    check_core(config, runtime)
    try:
        model = Transformer(TransformerConfig.from_config(config, tokenizer.end_of_text), runtime.autocast_dtype)
    except ValueError as error:
        raise ConfigError(f"run={run}: {error}") from None
    load_weights(model, found)
    facts = read_manifest(found)
    return LoadedRun(
        folder, config, facts["step"], facts["tokens"], model.to(runtime.device).eval(), tokenizer, runtime
    )


def checkpoint_of(folder: Path, step: int) -> Path:
    found = checkpoint_dir(folder, step)
    if not found.is_dir():
        steps = sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))
        there = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
        raise ConfigError(f"step={step}: {folder} has no checkpoint of it; {there}")
    if broken := problems(found):
        raise ConfigError(*broken)
    return found
