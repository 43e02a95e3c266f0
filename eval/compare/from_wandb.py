"""Runs of a W&B project as run folders, so that they are compared as any others: `wandb:ENTITY/PROJECT[/GROUP]`.

It needs a network. What comes is what training/wandb_run.py sent: configuration, history, counts; not checkpoints.
"""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from configs.errors import ConfigError
from training.checkpoint import write_atomic


def fetch(name: str, out: Path) -> list[Path]:
    """The training runs that `name` stands for, written as folders into `out`; those folders."""
    import wandb

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
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{name}: W&B did not answer ({error}); it needs a network and `wandb login`") from None
    if not folders:
        raise ConfigError(f"{name}: has no training runs")
    return folders


def write_folder(folder: Path, config: dict[str, Any], history, summary: dict[str, Any]) -> Path:
    """A run folder from W&B's configuration (flat, `/` between the parts), history and summary."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = OmegaConf.create({})
    for key, value in config.items():
        if not key.startswith("_"):
            OmegaConf.update(tree, key.replace("/", "."), value, force_add=True)
    write_atomic(folder / "config.yaml", OmegaConf.to_yaml(tree))
    lines: dict[int, dict] = {}
    for item in history:
        step, kept = item.get("step"), {}
        for key, value in item.items():
            if "/" in key and not key.startswith("plots/") and (value is None or isinstance(value, int | float)):
                kept[key] = value
        if step is not None and kept:
            lines.setdefault(step, {"step": step, "tokens": item["tokens"]}).update(kept)
    write_atomic(folder / "metrics.jsonl", "".join(json.dumps(lines[step]) + "\n" for step in sorted(lines)))
    facts = {"step": max(lines, default=0), "data_fingerprint": summary.get("data_fingerprint"),
             "tokenizer_fingerprint": summary.get("tokenizer_fingerprint")}  # fmt: skip
    write_atomic(folder / "checkpoint_facts.json", json.dumps(facts) + "\n")
    if "unigram_entropy" in summary:  # which a run's end adds
        write_atomic(folder / "summary.json", json.dumps({"unigram_entropy": summary["unigram_entropy"]}) + "\n")
    return folder
