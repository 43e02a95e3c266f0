"""Runs of a W&B project as run folders, to be compared as any others: `wandb:ENTITY/PROJECT[/GROUP]`.

Needs a network. The folders have what training/wandb_run.py sent: configuration, history and counts, no checkpoints.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from configs.errors import ConfigError
from data.files import write_atomic
from training.run_folder import read_config


def fetch(name: str, out: Path) -> list[Path]:
    """Write the training runs that `name` stands for as run folders into `out`, and return these folders.

    ConfigError if there are none, or if W&B does not answer.
    """
    import wandb  # which takes a second that other runs' readers need not spend

    parts = name.removeprefix("wandb:").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ConfigError(f"{name}: must be wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/GROUP")
    filters = {"jobType": "train"} | ({"group": parts[2]} if len(parts) == 3 else {})
    try:
        found = list(wandb.Api(timeout=60).runs("/".join(parts[:2]), filters=filters))
        folders = [
            write_folder(out / "wandb" / run.id, run.config, run.scan_history(page_size=10_000), dict(run.summary))
            for run in found
        ]
    except Exception as error:
        raise ConfigError(f"{name}: W&B did not answer ({error}); it needs a network and `wandb login`") from None
    if not folders:
        raise ConfigError(f"{name}: has no training runs")
    return folders


def write_folder(folder: Path, config: dict[str, Any], history: Iterable[dict], summary: dict[str, Any]) -> Path:
    """Write a run folder from W&B's configuration (flat, with `/` in the keys), history and summary; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = OmegaConf.create({})
    for key, value in config.items():
        if not key.startswith("_"):
            OmegaConf.update(tree, key.replace("/", "."), value, force_add=True)
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(tree))
    lines: dict[int, dict] = {}
    for item in history:
        numbers = {key: value for key, value in item.items() if value is None or isinstance(value, int | float)}
        kept = {key: value for key, value in numbers.items() if "/" in key and not key.startswith("plots/")}
        if kept and item.get("step") is not None:
            lines.setdefault(item["step"], {"step": item["step"], "tokens": item["tokens"]}).update(kept)
    write_atomic(folder / "metrics.jsonl", "".join(json.dumps(lines[step]) + "\n" for step in sorted(lines)))
    facts = {key: summary.get(key) for key in ("data_fingerprint", "tokenizer_fingerprint")}
    facts = {"step": max(lines, default=0)} | facts
    write_atomic(folder / "checkpoint_facts.json", json.dumps(facts) + "\n")
    if facts["step"] >= read_config(folder).trainer.horizon:  # which a run's end leaves
        write_atomic(folder / "summary.json", json.dumps(facts) + "\n")
    return folder
