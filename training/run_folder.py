"""The run folder: what may go into it, and whether a run may start, go on, or is done."""

import json
import os
import time
from collections import Counter
from pathlib import Path

from omegaconf import OmegaConf

from configs.errors import ConfigError, each
from configs.load import load
from configs.schema import Config, to_dict
from data.loader import EvalLoader, TrainLoader
from data.prepare import ON_FIRST_USE, ensure_prepared, prepared
from data.shards import TokenShards
from training.checkpoint import check_source, differing, write_atomic
from training.metrics import Metrics, plot_loss, read_metrics
from training.setup import Runtime, find_runtime


def read_config(run_dir: Path) -> Config:
    """The configuration that a run folder was made with. ConfigError if there is none."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: is not a run folder (it has no config.yaml)")
    return load(OmegaConf.load(path), world_size=1)


def check_before_start(config: Config, runtime: Runtime) -> None:
    """Raise one ConfigError with everything that would stop this run; creates nothing."""
    each(lambda check: check(config, runtime), (check_nodes, check_core, check_data, check_init_from, check_run_folder))


def check_sweep(configs: list[Config]) -> None:
    """`check_before_start` for each run of a sweep, before the first of them starts."""
    check_folders(configs)
    each(lambda config: check_before_start(config, find_runtime(config)), configs)


def check_folders(configs: list[Config]) -> None:
    """Raise a ConfigError where runs of a sweep would go into one folder."""
    folders = Counter(Path(config.run.dir).absolute() for config in configs)
    shared = {config.run.dir for config in configs if folders[Path(config.run.dir).absolute()] > 1}
    if shared:
        raise ConfigError(
            *(
                f"run.dir={folder}: two runs of the sweep would share it; leave run.name and run.dir unset"
                for folder in sorted(shared)
            )
        )


def check_nodes(config: Config, runtime: Runtime) -> None:
    node = config.deepspeed.config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if not (isinstance(node, int) and node >= 1 and runtime.world_size % node == 0):
        raise ConfigError(
            f"deepspeed.config.zero_optimization.zero_hpz_partition_size={node}: must divide the number of processes, "
            f"which is {runtime.world_size}; it is the number of GPUs of a node"
        )


def check_core(config: Config, runtime: Runtime) -> None:
    try:
        config.core.check(config.model, runtime.device.type, runtime.dtype)
    except ValueError as error:
        raise ConfigError(f"core={config.core.name}: {error}") from None


def check_data(config: Config, runtime: Runtime) -> None:
    if config.data.source in ON_FIRST_USE and not prepared(config):
        return  # prepared on first use
    ensure_prepared(config)
    seq_len, micro = config.trainer.seq_len, config.trainer.micro_batch_size
    TrainLoader(TokenShards(config.data.dir, "train"), seq_len, 0, micro, config.trainer.global_batch_size, 0, 1)
    EvalLoader(TokenShards(config.data.dir, "val"), seq_len, micro, 0, 1, max_samples=None)


def check_init_from(config: Config, runtime: Runtime) -> None:
    going_on = any(Path(config.run.dir).glob("checkpoints/step_*"))  # then nothing is read from there any more
    if config.trainer.init_from and not going_on:
        check_source(config.trainer.init_from)


def check_run_folder(config: Config, runtime: Runtime) -> None:
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


def is_finished(config: Config) -> bool:
    """Whether the run folder holds this run, done; the horizon is part of a run's identity."""
    return (Path(config.run.dir) / "summary.json").exists()


def finish(config: Config, counts: dict, unigram_entropy: float, texts: list[str], metrics: Metrics, console) -> None:
    """Write samples.txt, loss.png and summary.json, and show them."""
    run_dir = Path(config.run.dir)
    write_atomic(run_dir / "samples.txt", "\n\n".join(f"--- sample {i}\n{t}" for i, t in enumerate(texts, 1)) + "\n")
    last = [line for line in read_metrics(run_dir / "metrics.jsonl") if "val/loss" in line][-1]
    plot = plot_loss(run_dir, config.run.name, unigram_entropy)
    summary = {"run": config.run.name} | counts | last | {"unigram_entropy": unigram_entropy}
    metrics.summarize(summary, plot, texts)
    if texts:
        console.say(f"\nA sample:\n\n{texts[0]}")
    gain, loss = unigram_entropy - last["val/loss"], last["val/loss"]
    place = f"{abs(gain):.4f} {'under' if gain > 0 else 'over'} the unigram entropy of {unigram_entropy:.4f}"
    rows = {
        "validation loss": f"{loss:.4f} nats a token, {place}",
        "perplexity": f"{last['val/perplexity']:.2f}, {last['val/bits_per_byte']:.4f} bits a byte",
        "loss plot": str(plot),
        "samples": str(run_dir / "samples.txt"),
    }
    console.table("Done", rows)


def read_events(run_dir: Path) -> list[dict]:
    """What happened to a run, oldest first: its starts, rollbacks, pre-emptions, checkpoints that failed."""
    return read_metrics(Path(run_dir) / "events.jsonl")


def log_event(run_dir: Path, event: str, step: int, **facts) -> None:
    """Add a line to events.jsonl; it is on the disk when this returns."""
    path = Path(run_dir) / "events.jsonl"
    line = json.dumps({"time": round(time.time(), 3), "event": event, "step": step, **facts}) + "\n"
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * torn + line)
        file.flush()
        os.fsync(file.fileno())


def create_run_folder(config: Config) -> dict:
    """Make the folder and its config.yaml; the resolved configuration as plain values."""
    tree, folder = to_dict(config), Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(tree)))
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder}: cannot be written ({error.strerror}); choose another with run.dir="
        ) from None
    return tree
