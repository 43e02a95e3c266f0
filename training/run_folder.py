"""The run folder: making one, and reading the configuration that one was made with.

A run folder may come from somebody else, so it is data: reading one runs no code that it names.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from configs.app import as_yaml
from configs.errors import ConfigError
from configs.load import load, to_dict
from data.files import write_atomic
from training.config import Config, upgrade_core

PACKAGES_VARIABLE = "T6_PACKAGES"  # names packages of the user's, separated by commas


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, by which a short file can become a huge tree."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, which no run folder needs")
        return super().compose_node(parent, index)


def read_config(run_dir: str | Path) -> Config:
    """Return the configuration that a run folder was made with. ConfigError if it has none or names code."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: is not a run folder (it has no config.yaml)")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of configuration keys")
    for target in targets(tree):
        module = str(target).rpartition(".")[0]
        package = module.partition(".")[0]
        if package not in ("model", *os.environ.get(PACKAGES_VARIABLE, "").split(",")) and module not in sys.modules:
            raise ConfigError(
                f"{path}: _target_={target}: is code that did not come with this project, and reading a run folder "
                f"does not run it; if it is your own, set {PACKAGES_VARIABLE}={package} in the environment"
            )
    if isinstance(tree.get("core"), dict):
        tree["core"] = upgrade_core(tree["core"])
    tree["device"] = "auto"  # that of training may not exist on this machine
    return load(tree, Config, world_size=1)


def targets(tree: Mapping) -> Iterator[str]:
    """Yield the classes that a stored configuration names."""
    for key, value in tree.items():
        if key == "_target_":
            yield value
        elif isinstance(value, Mapping):
            yield from targets(value)


def is_finished(run_dir: str | Path) -> bool:
    """Return whether the run folder holds a run that is done; its horizon is part of a run's identity."""
    return (Path(run_dir) / "summary.json").exists()


def create_run_folder(config: Config) -> None:
    """Make the folder and its config.yaml. ConfigError if it cannot be written."""
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", as_yaml(to_dict(config)))
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder}: cannot be written ({error.strerror}); choose another with run.dir="
        ) from None
