"""Hydra entry points that end well: bad input is one message and exit code 2, `--cfg job` prints what would run."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError, did_you_mean, each
from configs.load import RENAMED, Command, load, to_dict

CONFIGS = Path(__file__).parent.resolve()
INTERRUPTED = 130  # what shells make of Ctrl-C
GROUPS = {path.name for path in CONFIGS.iterdir() if any(path.glob("**/*.yaml"))}
OmegaConf.register_new_resolver("pick", lambda key, values: values.get(key, values["other"]), replace=True)
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def choices(group: str) -> list[str]:
    """Return the names of the YAML files of a group, sorted."""
    folder = CONFIGS / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


@contextmanager
def config_errors() -> Iterator[None]:
    """Raise what Hydra and OmegaConf raise as ConfigError."""
    try:
        yield
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").partition("/")
        if new := RENAMED.get(f"{group}={name}"):
            raise ConfigError(f"{group}={name}: has a new name; use {new}") from error
        raise ConfigError(
            f"{group}={name}: there is no configs/{group}/{name}.yaml; {did_you_mean(name, choices(group))}"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(line.strip() for line in str(error).splitlines() if "hydra.cc" not in line)
        if isinstance(error, OverrideParseException) and error.override not in text:
            text = f"{error.override}: {text}"
        raise ConfigError(text) from error


def compose(schema: type[Command], overrides: list[str]) -> DictConfig:
    """Return the tree that Hydra makes of the YAML of `schema` and command-line overrides."""
    running = GlobalHydra.instance()
    around, running.hydra = running.hydra, None  # a Hydra app may compose further configurations
    try:
        with config_errors(), hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            ours, hydras = take_plain(overrides, schema)
            return merged(hydra.compose(schema.yaml, [force(override, schema) for override in hydras]), ours)
    finally:
        running.hydra = around


def configured(schema: type[Command], overrides: list[str], **context):
    """Return the configuration that a command with these overrides would get."""
    return load(compose(schema, overrides), schema, **context)


def combinations(overrides: list[str]) -> list[list[str]]:
    """Return what Hydra's own sweeper makes of comma-separated values, ranges and globs."""
    with config_errors():
        parsed = OverridesParser.create().parse_overrides(overrides)
        return [list(words) for batch in BasicSweeper.split_arguments(parsed, None) for words in batch]


def app(
    main: Callable[[Command], int | None],
    schema: type[Command],
    texts: tuple[str, ...] = (),  # keys whose values are taken as they stand, and not by Hydra's grammar
    check_sweep: Callable[[list], None] = lambda configs: None,  # sees all of them before the first job starts
) -> None:
    """Run `main(configuration)` as a Hydra app; what it returns is the exit code (under `-m` of each job in turn)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print with its own exit code 1
    args = get_args_parser().parse_args()
    ours, hydras = take_plain(args.overrides, schema)
    given = [verbatim(arg, texts) for arg in hydras]

    def job(tree: DictConfig) -> None:
        try:
            code = main(load(merged(tree, ours), schema))
        except ConfigError as error:
            fail(error)
        if code:
            sys.exit(code)

    with ending_well(), config_errors():
        forced = {arg: force(text, schema) for arg, text in zip(hydras, given, strict=True)}
        if args.cfg == "job" and not args.package:
            print(as_yaml(to_dict(configured(schema, [*given, *ours]))), end="")
        else:
            if args.multirun and not any(arg.startswith("hydra/sweeper=") for arg in given):
                check_sweep(each(lambda words: configured(schema, [*words, *ours]), combinations(given)))
            sys.argv[1:] = [forced.get(arg, arg) for arg in sys.argv[1:] if arg not in ours]
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=schema.yaml)(job)()


def as_yaml(tree: dict) -> str:
    """Return plain values as YAML, in their order."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def command(main: Callable[[list[str]], int], usage: str | None = None) -> None:
    """Run `main(arguments)` of a command that is no Hydra app; --help prints `usage` if argparse does not."""
    if usage and {"-h", "--help"} & set(sys.argv[1:]):
        print(usage)
        sys.exit(0)
    with ending_well():
        sys.exit(main(sys.argv[1:]))


@contextmanager
def ending_well() -> Iterator[None]:
    """End bad input and Ctrl-C with a message and an exit code instead of a traceback."""
    try:
        yield
    except ConfigError as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


@functools.cache
def known_keys(schema: type[Command]) -> tuple[set[str], set[str]]:
    """Return the groups that the YAML of `schema` chooses from, and the other top-level keys."""
    tree = OmegaConf.load(CONFIGS / f"{schema.yaml}.yaml")
    entries = (key for entry in tree.defaults if OmegaConf.is_dict(entry) for key in entry)
    chosen = {key for key in entries if key in GROUPS}
    return chosen, set(schema.model_fields) - chosen


def take_plain(overrides: list[str], schema: type[Command]) -> tuple[list[str], list[str]]:
    """Split off the overrides of plain keys that have a group's name, which Hydra would take for the group."""
    names = known_keys(schema)[1] & GROUPS
    ours = [override for override in overrides if override.partition("=")[0].lstrip("+") in names]
    return ours, [override for override in overrides if override not in ours]


def merged(tree: DictConfig, overrides: list[str]) -> DictConfig:
    OmegaConf.set_struct(tree, False)  # Hydra's: the keys of a class need not be in its YAML
    return OmegaConf.merge(tree, OmegaConf.from_dotlist([override.lstrip("+") for override in overrides]))


def force(override: str, schema: type[Command]) -> str:
    """Return `key=value` as `++key=value`: Hydra takes any key, and our checks report all unknown ones together."""
    key = override.split("=", 1)[0]
    if not key.strip("+~@ "):
        raise ConfigError(f"{override}: has no key; overrides are KEY=VALUE")
    chosen, plain = known_keys(schema)
    group = key.split("@")[0]
    if group in GROUPS - chosen:  # of other commands; Hydra's message would be about its own grammar
        raise ConfigError(f"{key}: unknown key; {did_you_mean(key, plain | chosen)}")
    is_plain = "=" in override and key[:1] not in "+~" and not key.startswith("hydra.") and "/" not in key
    return f"++{override}" if is_plain and group not in chosen else override


def verbatim(override: str, texts: tuple[str, ...]) -> str:
    """Quote the value of `key=value` for Hydra if the key is one of `texts` and the value is not quoted already."""
    key, equals, text = override.partition("=")
    if key.lstrip("+") not in texts or not equals or QUOTED.fullmatch(text):
        return override
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # OmegaConf's interpolation
    return f"{key}='" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + (r"\'" if m[2] else ""), plain) + "'"


def fail(error: ConfigError) -> None:
    """Print every mistake once (rank 0 speaks for all) and exit with 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        count = len(error.errors)
        print(f"{count} errors in the configuration:" if count > 1 else "Configuration error:", file=sys.stderr)
        for line in error.errors:
            print(f"  {line}", file=sys.stderr)
    sys.exit(2)
