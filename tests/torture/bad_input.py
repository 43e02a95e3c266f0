"""Bad input to every command, in one process: `python -m tests.torture.bad_input [COMMAND ...] [-v]`.

A row of rows/COMMAND.txt is a command line and, behind ->, what the message must name (else the key of the first word).
It is handled if the command refuses it with one clear message that names that, and leaves no file behind. One of these
words may stand in front:

load:     the configuration refuses it (the default): set on a tree that Hydra composed once
compose:  the same, composed by Hydra, where its grammar is what is tested
run:      the command refuses it, which needs more than the configuration to tell
line:     the whole command line, with options that are no overrides

Prints a table and exits with 1 if a row is not handled.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from configs import app
from configs.errors import ConfigError
from configs.load import Command, load
from tests.conftest import SMALL_RUN, offline_gpt2, prepare_small_data
from training.config import Config

ROWS = Path(__file__).parent / "rows"
HYDRA = {  # the commands that are Hydra apps: the module, the class of their configuration
    "train": ("train", "Config"),
    "data.prepare": ("data.prepare", "PrepareConfig"),
    "data.inspect": ("data.inspect", "InspectConfig"),
    "eval.run": ("eval.run", "EvalConfig"),
    "eval.sample": ("eval.sample", "SampleConfig"),
    "eval.speed.training": ("eval.speed.training", "SpeedConfig"),
    "eval.speed.decoding": ("eval.speed.decoding", "DecodingConfig"),
    "eval.speed.attention": ("eval.speed.attention", "AttentionSpeedConfig"),
    "eval.budgets": ("eval.budgets", "BudgetsConfig"),
    "eval.dashboard": ("eval.dashboard", "DashboardConfig"),
    "eval.export": ("eval.export.__main__", "ExportConfig"),
}
OTHERS = {  # and those that are not: the module, what takes their arguments
    "eval.compare": ("eval.compare.__main__", lambda module, words: module.main(module.parse(words), "")),
    "slurm.submit": ("slurm.submit", lambda module, words: module.main(words)),
    "slurm.status": ("slurm.status", lambda module, words: module.main(words)),
}
VERBATIM = {"eval.sample": ("prompt",)}
INTERNAL = ("Traceback", "Input should", "validation error", "<class", "object at 0x", "NoneType", "DictConfig", "++")
PATIENCE = 60  # seconds after which a command is ended that should have refused its input


class Accepted(Exception):
    """Raised for input that should have been refused."""


@dataclass(frozen=True)
class Row:
    command: str
    how: str
    words: tuple[str, ...]
    names: str  # what the message must name

    def __str__(self) -> str:
        line = shlex.join(self.words)
        return f"{self.command}: {line if len(line) < 200 else f'... {line[-190:]}'}"


def rows(command: str, values: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of a command, with `values` in place of {NAME}: paths, a long text, the words of a small run."""
    for line in (ROWS / f"{command}.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        how, _, rest = line.partition(": ") if re.match(r"(load|compose|run|line): ", line) else ("load", "", line)
        given, _, names = rest.partition(" -> ")
        for name, value in values.items():
            given, names = given.replace(f"{{{name}}}", value), names.replace(f"{{{name}}}", value)
        words = tuple(shlex.split(given))
        yield Row(command, how, words, names.strip() or app.key_of(words[0]) if words else names.strip())


def commands() -> list[str]:
    return [*HYDRA, *OTHERS]


def schema_of(command: str) -> type[Command]:
    module, name = HYDRA[command]
    return getattr(importlib.import_module(module), name)


@functools.cache
def composed(schema: type[Command], chosen: tuple[str, ...]) -> DictConfig:
    return app.compose(schema, list(chosen))


def tree_of(schema: type[Command], words: tuple[str, ...], texts: tuple[str, ...]) -> DictConfig:
    """Return the tree that Hydra would make of `words`: the choices of groups composed, the other keys set on it."""
    groups = app.known_keys(schema)[0]
    ours, hydras = app.take_plain(list(words), schema)
    chosen = tuple(word for word in hydras if word[:1] in "+~" or app.key_of(word) in groups)
    tree = copy.deepcopy(composed(schema, chosen))
    with app.config_errors():
        for word in hydras:
            if word not in chosen:
                text = app.verbatim(word) if app.key_of(word) in texts else app.as_text(word, schema)
                given = OverridesParser.create().parse_override(app.force(text, schema))
                OmegaConf.update(tree, given.key_or_group, given.value(), force_add=True)
        return app.merged(tree, ours)


def attempt(row: Row) -> None:
    """Do what the row says, in this process."""
    if row.command in OTHERS:
        module, start = OTHERS[row.command]
        start(importlib.import_module(module), list(row.words))
        return
    schema, texts = schema_of(row.command), VERBATIM.get(row.command, ())
    module = importlib.import_module(HYDRA[row.command][0])
    main = module.main
    if row.how == "compose":
        app.configured(schema, list(row.words))
    elif row.how == "line":
        before, sys.argv = sys.argv, [row.command, *row.words]
        try:
            app.app(main, schema, texts, getattr(module, "check_sweep", lambda configs: None))
        finally:
            sys.argv = before
    else:
        config = load(tree_of(schema, row.words, texts), schema)
        if row.how == "run":
            main(config)


def outcome(row: Row, folder: Path) -> str | None:
    """Return what is wrong with how a row is handled, None if nothing is; `folder` is the working directory."""
    before, printed = listing(folder), io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()), patience():
            attempt(row)
        return "is accepted"
    except ConfigError as error:
        messages = error.errors
    except SystemExit as ended:
        if ended.code != 2:
            return f"exit code {ended.code}"
        messages = printed.getvalue().splitlines()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"[:300]
    text = "\n".join(messages)
    if not re.search(rf"(?<![\w.]){re.escape(row.names)}(?!\w)", text):
        return f"no message names {row.names}: {text}"[:300]
    if found := [word for word in INTERNAL if word in text.replace("++deepspeed.", "").replace("++optim.", "")]:
        return f"internal words, {found}: {text}"[:300]
    left = listing(folder) - before
    return f"leaves {sorted(left)}" if left else None


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """End what takes so long that it must have begun to work."""

    def end(number: int, frame) -> None:
        raise Accepted(f"works for more than {PATIENCE} s")

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def make_world(folder: Path) -> dict[str, str]:
    """Train a small run in `folder` for rows that need one, next to files that are in the way; return the values."""
    (folder / "data").mkdir(parents=True)
    small = [*SMALL_RUN, "trainer.samples=0", "trainer.max_steps=2", *prepare_small_data(folder / "data")]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("train").main(app.configured(Config, [*small, f"run.dir={folder}/run"]))
    (folder / "file.txt").write_text("a text\n")
    (folder / "broken.yaml").mkdir()
    (folder / "broken.yaml/config.yaml").write_text("[")
    return {
        "long": "x" * 300, "run": f"{folder}/run", "data": f"{folder}/data/shards", "file": f"{folder}/file.txt",
        "broken": f"{folder}/broken.yaml", "none": f"{folder}/none", "small": shlex.join(small),
    }  # fmt: skip


def check(wanted: list[Row], folder: Path, say: Callable[[str], None]) -> dict[Row, str]:
    """Return the rows that are not handled, and why; the working directory must be `folder`."""
    found = {}
    for row in wanted:
        began = time.perf_counter()
        if why := outcome(row, folder):
            found[row] = why
        say(f"{time.perf_counter() - began:6.2f} s  {row}  {why or 'handled'}")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.torture.bad_input", description="Try bad input on every command.")
    parser.add_argument("commands", nargs="*", help=f"some of {', '.join(commands())} (default: all)")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every row")
    given = parser.parse_args(arguments)
    table, failures, total = Table("command", "rows", "handled"), {}, Counter()
    with tempfile.TemporaryDirectory() as made:
        offline_gpt2(Path(made))
        values = make_world(Path(made) / "world")
        empty = Path(made) / "empty"
        empty.mkdir()
        os.chdir(empty)
        for command in given.commands or commands():
            wanted = list(rows(command, values))
            bad = check(wanted, empty, print if given.verbose else lambda line: None)
            failures |= bad
            total.update(rows=len(wanted), handled=len(wanted) - len(bad))
            table.add_row(command, str(len(wanted)), str(len(wanted) - len(bad)))
        os.chdir("/")
    table.add_section()
    table.add_row("all", str(total["rows"]), str(total["handled"]))
    for row, why in failures.items():
        print(f"{row}\n    {why}")
    Console().print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
