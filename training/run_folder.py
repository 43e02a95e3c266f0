"""The run folder: making one, and reading the configuration that one was made with."""

from pathlib import Path

import yaml

from configs.app import as_yaml
from configs.errors import ConfigError, writing
from configs.load import load, to_dict
from data.files import write_atomic
from training.config import Config, upgrade


def read_config(run_dir: str | Path) -> Config:
    """Return the configuration that a run folder was made with. ConfigError if there is none."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: is not a run folder (it has no config.yaml)")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of configuration keys")
    # The device of training may not exist on this machine.
    return load(upgrade(tree) | {"device": "auto"}, Config, world_size=1)


def is_finished(run_dir: str | Path) -> bool:
    """Return whether the run folder holds a run that is done; its horizon is part of a run's identity."""
    return (Path(run_dir) / "summary.json").exists()


def create_run_folder(config: Config) -> None:
    """Make the folder and its config.yaml. ConfigError if it cannot be written."""
    folder = Path(config.run.dir)
    with writing("run.dir", folder, "; choose another with run.dir="):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", as_yaml(to_dict(config)))
