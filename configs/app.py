"""Hydra entry points that end well: bad input is one message and exit code 2, `--cfg job` prints what would run."""

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.block import Block, Choice, to_dict, types_of
from configs.errors import ConfigError, did_you_mean, each
from configs.help import help_text
from configs.load import RENAMED, Command, load

CONFIGS = Path(__file__).parent.resolve()
OWN_CONFIGS = "T6_CONFIGS"  # an environment variable: folders of the user's with GROUP/NAME.yaml, separated by colons
INTERRUPTED = 130  # what shells make of Ctrl-C
GROUPS = {path.name for path in CONFIGS.iterdir() if any(path.glob("**/*.yaml"))}
OmegaConf.register_new_resolver("pick", lambda key, values: values.get(key, values["other"]), replace=True)
# What is meant for Hydra's grammar: interpolations, functions, quotes and escapes.
HYDRAS = re.compile(r"""\$\{|^\w+\(.*\)$|^['"]|['"]$|\\[\\{}()\[\]:=,\s]""", re.DOTALL)
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def own_folders() -> list[Path]:
    """Return the folders of the user's own YAML files."""
    return [Path(name).resolve() for name in os.environ.get(OWN_CONFIGS, "").split(os.pathsep) if name]


class OwnConfigs(SearchPathPlugin):
    """Lets every composition, in a command or inside one, find the user's own YAML files."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in own_folders():
            search_path.append("own", f"file://{folder}")


Plugins.instance().register(OwnConfigs)


def add_own_folder(folder: str) -> None:
    """Look for YAML files in a folder too, also in processes started from here. ConfigError if there is none."""
    if not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder}: there is no such folder")
    os.environ[OWN_CONFIGS] = os.pathsep.join(map(str, [*own_folders(), Path(folder).resolve()]))


def choices(group: str) -> list[str]:
    """Return the names of the YAML files of a group, the user's own included, sorted."""
    folders = [folder / group for folder in (CONFIGS, *own_folders())]
    return sorted({str(path.relative_to(at).with_suffix("")) for at in folders for path in at.rglob("*.yaml")})


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
        lines = [line.strip() for line in str(error).splitlines() if "hydra.cc" not in line]
        text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type=")))
        text = text.replace(
            "Cannot merge DictConfig with ListConfig", "a list cannot take the place of a group of keys"
        )
        if (key := getattr(error, "full_key", None)) and key not in text:
            text = f"{key}: {text}"
        if isinstance(error, OverrideParseException):
            override = error.override.removeprefix("++")
            text = f"{override}: cannot be read; put a text that has special characters in quotes, as in KEY=\"'a, b'\""
        raise ConfigError(re.sub(r"(^|\s|')\+\+(?=[\w.]+=)", r"\1", text)) from error


def compose(schema: type[Command], overrides: list[str]) -> DictConfig:
    """Return the tree that Hydra makes of the YAML of `schema` and command-line overrides."""
    running = GlobalHydra.instance()
    around, running.hydra = running.hydra, None  # a Hydra app may compose further configurations
    try:
        with config_errors(), hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            ours, hydras = take_plain(overrides, schema)
            given = [force(as_text(override, schema), schema) for override in hydras]
            return merged(hydra.compose(schema.yaml, given), ours)
    finally:
        running.hydra = around


def configured(schema: type[Command], overrides: list[str], **context):
    """Return the configuration that a command with these overrides would get."""
    return load(compose(schema, overrides), schema, **context)


def combinations(overrides: list[str], schema: type[Command]) -> list[list[str]]:
    """Return what Hydra's own sweeper makes of comma-separated values, ranges and globs."""
    with config_errors():
        parsed = OverridesParser.create().parse_overrides([as_text(override, schema) for override in overrides])
        return [list(words) for batch in BasicSweeper.split_arguments(parsed, None) for words in batch]


def app(
    main: Callable[[Command], int | None],
    schema: type[Command],
    texts: tuple[str, ...] = (),  # keys whose values are taken as they stand, commas and all
    check_sweep: Callable[[list], None] = lambda configs: None,  # sees all of them before the first job starts
) -> None:
    """Run `main(configuration)` as a Hydra app; what it returns is the exit code (under `-m` of each job in turn)."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print with its own exit code 1
    args = get_args_parser().parse_intermixed_args()  # options may stand between overrides
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in args.overrides] + args.overrides
    ours, hydras = take_plain(args.overrides, schema)
    given = [verbatim(arg) if key_of(arg) in texts else as_text(arg, schema) for arg in hydras]

    def job(tree: DictConfig) -> None:
        try:
            code = main(load(merged(tree, ours), schema))
        except ConfigError as error:
            fail(error)
        if code:
            sys.exit(code)

    with ending_well(), config_errors():
        if args.shell_completion:
            raise ConfigError("--shell-completion: these commands complete in no shell; --help lists the keys")
        if args.config_dir:
            add_own_folder(args.config_dir)
            sys.argv[1:] = without_option(sys.argv[1:], "--config-dir", "-cd")
        if args.help:
            groups = {group: choices(group) for group in sorted(known_keys(schema)[0])}
            usage = inspect.getdoc(inspect.getmodule(main)) or ""
            print(help_text(usage, compose(schema, [*given, *ours]), schema, groups))
            return
        forced = {arg: force(text, schema) for arg, text in zip(hydras, given, strict=True)}
        if args.cfg == "job" and not args.package:
            print(as_yaml(to_dict(configured(schema, [*given, *ours]))), end="")
        else:
            if args.multirun and not any(arg.startswith("hydra/sweeper=") for arg in given):
                check_sweep(each(lambda words: configured(schema, [*words, *ours]), combinations(given, schema)))
            sys.argv[1:] = [forced.get(arg, arg) for arg in sys.argv[1:] if arg not in ours]
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=schema.yaml)(job)()


def without_option(words: list[str], *names: str) -> list[str]:
    """Return command-line words without an option and its value."""
    kept = [word for word in words if word.partition("=")[0] not in names or "=" not in word]
    return [word for before, word in zip(["", *kept], kept, strict=False) if not {before, word} & set(names)]


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
        if wrong := [word for word in sys.argv[1:] if re.search("[\ud800-\udfff]", word)]:  # bytes by themselves
            raise ConfigError(*(f"{os.fsencode(word)!r}: is not UTF-8" for word in wrong))
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


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def verbatim(override: str) -> str:
    """Return `key=value` with the value in quotes, unless it is, so that Hydra takes it for a text as it stands."""
    key, equals, text = override.partition("=")
    if not equals or QUOTED.fullmatch(text):
        return override
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # OmegaConf's interpolation
    return f"{key}='" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + (r"\'" if m[2] else ""), plain) + "'"


def as_text(override: str, schema: type[Command]) -> str:
    """Return `key=value` with quotes around what is text by its key, and something else by Hydra's grammar.

    So `run.name=2024_01_01` is no number and `data.files=[a=b.txt]` no mistake. Commas still separate the values of a
    sweep, and what is written in Hydra's grammar (null, quotes, interpolations, functions) stays.
    """
    key, equals, text = override.partition("=")
    kind = kind_of(key.lstrip("+"), schema)
    if not equals or kind is None or text in ("", "null") or HYDRAS.search(text):
        return override
    if kind is list and text[0] + text[-1] == "[]":
        words = [word.strip() for word in text[1:-1].split(",")]
        is_plain = all(words) and not set("[]{}") & set(text[1:-1])
        return f"{key}=[{','.join(map(quote, words))}]" if is_plain else override
    if kind is Choice and is_grammatical(override):
        return override
    return f"{key}=" + ",".join(map(quote, text.split(",") if kind is str else [text]))


def quote(text: str) -> str:
    return text if text == "null" else verbatim(f"={text}")[1:]


def is_grammatical(override: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(override))
    except HydraException:
        return False


def kind_of(key: str, schema: type[Block]) -> type | None:
    """Return str or list for a key of a text or of texts, Choice for one of a class yet to be chosen, else None."""
    for part in key.split("."):
        if issubclass(schema, Choice):
            return Choice
        field = schema.model_fields.get(part)
        if field is None:
            return None
        schema = field.annotation if inspect.isclass(field.annotation) else Block
        if field.annotation == list[str]:
            return list
        if types_of(field.annotation) <= {str, NoneType}:
            return str
        if not issubclass(schema, Block):
            return None
    return None


def fail(error: ConfigError) -> None:
    """Print every mistake once (rank 0 speaks for all) and exit with 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        count = len(error.errors)
        print(f"{count} errors in the configuration:" if count > 1 else "Configuration error:", file=sys.stderr)
        for line in error.errors:
            print(f"  {line}", file=sys.stderr)
    sys.exit(2)
