"""A run's model, ready to evaluate: read from its checkpoint, without DeepSpeed."""

from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config, ConfigError
from data.tokenizers import Tokenizer, load_tokenizer
from model.transformer import Transformer, TransformerConfig
from training.checkpoint import load_weights, newest, read_manifest
from training.run_folder import read_config
from training.setup import Runtime, find_runtime


@dataclass
class LoadedRun:
    dir: Path
    config: Config
    step: int
    tokens: int
    model: Transformer
    tokenizer: Tokenizer
    runtime: Runtime


def load_run(run: str, device: str = "auto", dtype: str = "auto") -> LoadedRun:
    """The newest whole checkpoint of the run folder `run`. ConfigError if there is none."""
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        others = sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))
        raise ConfigError(
            f"run={run}: is not a run folder; " + (f"there are {', '.join(others)}" if others else "train one first")
        )
    config = read_config(folder)
    config.device, config.trainer.dtype = device, dtype
    found = newest(folder, warn=print)
    if found is None:
        raise ConfigError(f"run={run}: has no whole checkpoint yet")
    runtime = find_runtime(config)
    tokenizer = load_tokenizer(config.tokenizer, config.data.dir)
    model = Transformer(TransformerConfig.from_config(config, tokenizer.end_of_text), runtime.autocast_dtype)
    load_weights(model, found)
    facts = read_manifest(found)
    return LoadedRun(
        folder, config, facts["step"], facts["tokens"], model.to(runtime.device).eval(), tokenizer, runtime
    )
