"""A run's model, ready to evaluate: read from a checkpoint without DeepSpeed, or as it stands in training."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs.block import Block, to_dict
from configs.errors import ConfigError
from configs.load import load
from data.shards import TokenShards
from data.tokenizers import Tokenizer, load_tokenizer
from model.attention.base import AttentionCore
from model.transformer import Transformer
from training.checkpoint import checkpoint_dir, checkpoint_dirs, load_weights, newest, problems, read_manifest
from training.checks import check_core
from training.config import Config
from training.device import Runtime, find_runtime
from training.ranks import from_main
from training.run_folder import read_config


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
    data_fingerprint: str | None = None  # of what it was trained on

    @property
    def context(self) -> int:
        """The number of tokens that the model was trained to see."""
        return self.config.trainer.seq_len

    def validation(self) -> TokenShards:
        """Return the validation split of the run's data. ConfigError if data.dir holds other data now."""
        shards = TokenShards(self.config.data.dir, "val")
        if self.data_fingerprint not in (None, shards.manifest.fingerprint):
            raise ConfigError(
                f"run={self.dir}: was trained on other data than {shards.dir} holds now; prepare it again"
            )
        return shards

    def scale_rope(self, kind: str, factor: float | None) -> None:
        """Read texts `factor` times as long as in training from here on; `none` undoes it.

        If RoPE was already scaled in training, both factors count from the length at which training began.
        """
        trained, attention = self.config.model, self.model.config.attention
        attention.rope_scaling, attention.rope_factor = trained.rope_scaling, trained.rope_factor
        attention.rope_original_length = trained.rope_original_length
        if kind != "none" and factor != 1:
            attention.rope_scaling, attention.rope_factor = kind, trained.rope_factor * factor
            attention.rope_original_length = trained.rope_original_length or self.context


def config_of(run: str) -> Config:
    """Return the configuration of the run folder `run`. ConfigError if it is none."""
    if not (Path(run) / "config.yaml").is_file():
        others = sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))
        remedy = f"there are {', '.join(others)}" if others else "train one first"
        raise ConfigError(f"run={run}: is not a run folder; {remedy}")
    return read_config(run)


class CoreBlock(Block):
    core: AttentionCore


def load_run(
    run: str, device: str = "auto", dtype: str = "auto", step: int | None = None, kernel: str | None = None
) -> LoadedRun:
    """Return the newest whole checkpoint of the run folder `run`, or that of `step`. ConfigError if there is none.

    Of several processes rank 0 chooses, since a run in training may save another checkpoint in between. `kernel`
    computes what the core attends to in another way than the run's configuration says.
    """
    folder, config = Path(run), config_of(run)
    if kernel is not None:
        chosen = load({"core": to_dict(config.core) | {"kernel": kernel}}, CoreBlock)
        config = config.replace(core=chosen.core)
    runtime = find_runtime(device, dtype, config.deepspeed.bf16_engine)
    check_core(config.core, config.model, runtime)
    checkpoint = from_main(lambda: find_checkpoint(folder, step))
    facts, kept = read_manifest(checkpoint), any(folder.glob("tokenizer.*"))  # older runs have no copy of their own
    tokenizer = load_tokenizer(config.tokenizer, folder if kept else config.data.dir)
    if tokenizer.fingerprint != facts["tokenizer_fingerprint"]:
        place = folder if kept else f"data.dir={config.data.dir}"
        raise ConfigError(f"run={run}: was trained with another tokenizer than {place} holds now; bring that one back")
    try:
        model = Transformer(config.network(tokenizer.end_of_text), runtime.autocast_dtype)
    except ValueError as error:
        raise ConfigError(f"run={run}: {error}") from None
    load_weights(model, checkpoint)
    model = model.to(runtime.device).eval()
    trained = {key: facts[key] for key in ("step", "tokens", "data_fingerprint")}
    return LoadedRun(folder, config, model=model, tokenizer=tokenizer, runtime=runtime, **trained)


def find_checkpoint(run_dir: Path, step: int | None) -> Path:
    """Return the newest whole checkpoint, or that of `step`. ConfigError if there is none, or it is broken."""
    if step is None:
        found = newest(run_dir, warn=partial(print, file=sys.stderr))
        if found is None:
            raise ConfigError(f"run={run_dir}: has no whole checkpoint yet")
        return found
    found = checkpoint_dir(run_dir, step)
    if not found.is_dir():
        steps = [int(path.name.removeprefix("step_")) for path in checkpoint_dirs(run_dir)]
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"step={step}: {run_dir} has no checkpoint of it; there are {there}")
    if broken := problems(found):
        raise ConfigError(*broken)
    return found
