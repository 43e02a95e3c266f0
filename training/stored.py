"""What a run folder holds, as plain values: read without torch and without running or believing what is in it."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError
from data.files import seal, sha256_of
from training.jsonl import read_lines

# Keys from which others follow: once one of them differs, those that begin so say nothing more.
DECIDING = {"size.name": ("size.", "model."), "deepspeed.name": ("deepspeed.",)}
LARGEST, DEEPEST = 1_000_000, 50  # characters, and levels, of a config.yaml
TOLD_BY_NAME = ("tokenizer", "data")


def read_tree(run_dir: str | Path) -> dict[str, Any]:
    """Return the configuration in a run folder as nested mappings, not validated. ConfigError if there is none."""
    path = Path(run_dir) / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{run_dir}: is not a run folder (it has no config.yaml)")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
        check_bounds(text)
        tree = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of configuration keys")
    return tree


def check_bounds(text: str) -> None:
    """Raise a YAMLError for a text that would take long to read, or become a huge tree."""
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"it has more than {LARGEST:,} characters")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, by which a short file can become a huge tree")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")


def is_finished(run_dir: str | Path) -> bool:
    """Return whether the run folder holds a run that is done; its horizon is part of a run's identity."""
    return (Path(run_dir) / "summary.json").exists()


def is_count(value: Any) -> bool:
    """Return whether a value is a number of steps or tokens as a line of metrics has it."""
    return type(value) is int and 0 <= value < 2**63


def read_events(run_dir: str | Path) -> list[dict]:
    """Return what happened to a run, oldest first: starts, rollbacks, pre-emptions, checkpoints that failed.

    Lines that are no events are left out.
    """
    lines = read_lines(Path(run_dir) / "events.jsonl")
    events = [line for line in lines if isinstance(line.get("event"), str) and isinstance(line.get("step"), int)]
    return [event for event in events if event["event"] != "rollback" or isinstance(event.get("to_step"), int)]


def last_step(max_steps: int | None, max_tokens: int | None, tokens_per_step: int) -> int:
    """Return the step at which a run ends, by whichever of the two limits comes first; one of them is not None."""
    by_tokens = max_tokens and math.ceil(max_tokens / tokens_per_step)
    return min(filter(None, (max_steps, by_tokens)))


def checkpoint_dir(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def checkpoint_dirs(run_dir: str | Path) -> list[Path]:
    """Return the folders of checkpoints, oldest first. Whatever else lies there is somebody else's."""
    found = (Path(run_dir) / "checkpoints").glob("step_*")
    folders = [path for path in found if re.fullmatch(r"step_[0-9]{8,}", path.name) and path.is_dir()]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def problems(folder: Path, checksums: bool = True) -> list[str]:
    """Return what is wrong with a checkpoint, a line each; without `checksums` only what its files' sizes show."""
    try:
        return _problems(folder, checksums)
    except OSError as error:
        return [f"{folder}: cannot be read ({error})"]


def _problems(folder: Path, checksums: bool) -> list[str]:
    try:
        manifest = read_manifest(folder)
        if manifest["checksum"] != seal(manifest):
            return [f"{folder / 'manifest.json'}: does not have its own checksum"]
        files = manifest["files"].items()
    except FileNotFoundError:
        return [f"{folder}: has no manifest.json, so it was never finished"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / 'manifest.json'}: cannot be read ({error!r})"]
    found = []
    for name, facts in files:
        path = folder / name
        if Path(name).name != name:
            found.append(f"{path}: is no file of the checkpoint")
        elif not path.exists():
            found.append(f"{path}: is missing")
        elif path.stat().st_size != facts["bytes"]:
            found.append(f"{path}: has {path.stat().st_size} bytes instead of {facts['bytes']}")
        elif checksums and sha256_of(path) != facts["sha256"]:
            found.append(f"{path}: does not have the checksum of its manifest")
    return found


def telling_keys(ours: Mapping[str, Any], everyone: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys that tell a flat configuration from others, the most telling first.

    Keys that follow from another are left out: those of a mechanism are compared among runs of that mechanism only, a
    size stands for its widths, and data and tokenizers are told by their names if these differ.
    """
    mechanism, everyone = ours.get("model.name"), list(everyone)
    alike = [other for other in everyone if other.get("model.name") == mechanism]
    keys = [key for key in ours if any(other.get(key) != ours[key] for other in alike)]
    first = ["model.name"] if len(alike) < len(everyone) else []
    for deciding, followers in DECIDING.items():
        if deciding in keys:
            first.append(deciding)
            keys = [key for key in keys if not key.startswith(followers)]
    blocks = tuple(f"{block}." for block in TOLD_BY_NAME)
    own = [key for key in keys if not key.startswith(blocks) and not key.endswith("_target_")]
    for block in TOLD_BY_NAME:
        theirs = [key for key in keys if key.startswith(f"{block}.")]
        own += [f"{block}.name"] if f"{block}.name" in theirs else theirs
    return [*first, *own]
