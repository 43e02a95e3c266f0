"""Hydra entry points that end well: bad input is one message and exit code 2, `--cfg job` prints what would run."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.load import did_you_mean, load
from configs.schema import Config, ConfigError, to_dict

CONFIGS = Path(__file__).parent.resolve()
INTERRUPTED = 130  # what shells make of Ctrl-C
GROUPS = {path.name for path in CONFIGS.iterdir() if any(path.glob("**/*.yaml"))}


@contextmanager
def config_errors() -> Iterator[None]:
    """What Hydra and OmegaConf raise, as ConfigError."""
    try:
        yield
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").partition("/")
        raise ConfigError(
            f"{group}={name}: there is no configs/{group}/{name}.yaml; {did_you_mean(name, error.options or [])}"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(line.strip() for line in str(error).splitlines() if "hydra.cc" not in line)
        raise ConfigError(text) from error


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """The tree that Hydra makes of `configs/<config_name>.yaml` and command-line overrides."""
    running = GlobalHydra.instance()
    around, running.hydra = running.hydra, None  # a Hydra app may compose further configurations
    try:
        with config_errors(), hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose(config_name, [force(override) for override in overrides])
    finally:
        running.hydra = around


def app(main: Callable[[Config], int | None], config_name: str = "train", load: Callable[[DictConfig], Config] = load):
    """Run `main(load(tree))` as a Hydra app; what `main` returns is the exit code (under `-m` of each job in turn)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print with its own exit code 1
    args = get_args_parser().parse_args()
    sys.argv[1:] = [force(arg) if arg in args.overrides else arg for arg in sys.argv[1:]]

    def job(tree: DictConfig) -> None:
        try:
            code = main(load(tree))
        except ConfigError as error:
            fail(error)
        if code:
            sys.exit(code)

    with ending_well(), config_errors():
        if args.cfg == "job" and not args.package:
            print(OmegaConf.to_yaml(OmegaConf.create(to_dict(load(compose(config_name, args.overrides))))), end="")
        else:
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()


def command(main: Callable[[list[str]], int], usage: str | None = None) -> None:
    """Run `main(arguments)` of a command that is no Hydra app; --help prints `usage` where argparse doesn't."""
    if usage and {"-h", "--help"} & set(sys.argv[1:]):
        print(usage)
        sys.exit(0)
    with ending_well():
        sys.exit(main(sys.argv[1:]))


@contextmanager
def ending_well() -> Iterator[None]:
    """Bad input and Ctrl-C are a message and an exit code, not a traceback."""
    try:
        yield
    except ConfigError as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def force(override: str) -> str:
    """`key=value` as `++key=value`: Hydra takes any key, and our own checks name all the unknown ones together."""
    key = override.split("=", 1)[0]
    is_group = key.split("@")[0] in GROUPS or "/" in key
    plain = "=" in override and key[:1] not in "+~" and not key.startswith("hydra.") and not is_group
    return f"++{override}" if plain else override


def fail(error: ConfigError) -> None:
    """Print every mistake once (rank 0 speaks for all) and exit with 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        count = len(error.errors)
        print(f"{count} errors in the configuration:" if count > 1 else "Configuration error:", file=sys.stderr)
        for line in error.errors:
            print(f"  {line}", file=sys.stderr)
    sys.exit(2)
