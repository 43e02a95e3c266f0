"""Hydra entry points that end well: bad input is one message and exit code 2, `--cfg job` prints the resolved configuration."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.schema import Config, ConfigError, did_you_mean, load, to_dict

CONFIGS = Path(__file__).parent.resolve()
GROUPS = {path.name for path in CONFIGS.iterdir() if path.is_dir() and any(path.glob("**/*.yaml"))}


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """The tree that Hydra makes of `configs/<config_name>.yaml` and command-line overrides."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(config_name, overrides)


def app(main: Callable[[Config], int | None], config_name: str = "train", load: Callable[[DictConfig], Config] = load):
    """Run `main(load(tree))` as a Hydra app; what `main` returns is the exit code (under `-m` of each job in turn)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print with its own exit code 1
    try:
        args = get_args_parser().parse_args()
        if args.cfg == "job" and not args.package:
            print(OmegaConf.to_yaml(OmegaConf.create(to_dict(load(compose(config_name, args.overrides))))), end="")
            return

        def job(tree: DictConfig) -> None:
            try:
                code = main(load(tree))
            except ConfigError as error:
                fail(error)
            if code:
                sys.exit(code)

        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()
    except ConfigError as error:
        fail(error)
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, config_name, args.overrides, load))


def explain(error: Exception, config_name: str, overrides: list[str], load) -> ConfigError:
    """Hydra stops at the first unknown key: force every key in, so that our own checks find them all together."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").partition("/")
        return ConfigError(f"{group}={name}: there is no configs/{group}/{name}.yaml; {did_you_mean(name, error.options)}")
    try:
        load(compose(config_name, [force(override) for override in overrides]))
    except ConfigError as ours:
        return ours
    except (HydraException, OmegaConfBaseException):  # not a matter of keys, such as an override that does not parse
        pass
    return ConfigError(" ".join(line.strip() for line in str(error).splitlines() if "hydra.cc" not in line))


def force(override: str) -> str:
    key = override.split("=", 1)[0]
    plain = "=" in override and key[:1] not in "+~" and not key.startswith("hydra") and key.split("@")[0] not in GROUPS
    return f"++{override}" if plain else override


def fail(error: ConfigError) -> None:
    """Print every mistake once (rank 0 speaks for all) and exit with 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        count = len(error.errors)
        print(f"{count} errors in the configuration:" if count > 1 else "Configuration error:", file=sys.stderr)
        for line in error.errors:
            print(f"  {line}", file=sys.stderr)
    sys.exit(2)
