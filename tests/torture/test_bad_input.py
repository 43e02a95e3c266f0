"""Bad input to every command is refused with one message that names it, and every key has a row in the table of it."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from configs.app import CONFIGS
from configs.block import Block
from data.sources.mixture import Part
from eval.compare.__main__ import CompareConfig
from slurm.options import Options
from tests.torture import bad_input
from tests.torture.bad_input import HYDRA, Row, check, commands, make_world, rows, schema_of

NOWHERE = {name: f"/nowhere/{name}" for name in ("run", "data", "file", "broken", "none")} | {
    "long": "x" * 300,
    "small": "device=cpu",
}
SLOWEST = "nothing_at_all"  # which makes lm-evaluation-harness read all that it has
COMMANDS = dict.fromkeys(HYDRA) | {"eval.compare": CompareConfig, "slurm.submit": Options}


def schema(command: str) -> type[Block]:
    return COMMANDS[command] or schema_of(command)


def classes(cls: type[Block], group: str) -> list[type[Block]]:
    """Return the classes that a block may have: those that the YAML files of its group name, or itself."""
    paths = sorted((CONFIGS / group).glob("*.yaml")) if inspect.isabstract(cls) else []
    targets = [OmegaConf.load(path).get("_target_") for path in paths]
    return list(dict.fromkeys(get_object(target) for target in targets if target)) or [cls]


def keys(cls: type[Block], prefix: str = "") -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the dotted keys of a configuration, each with the class and the name of the field that it stands for."""
    for name, field in cls.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Block):
            for found in classes(field.annotation, name):
                yield from keys(found, f"{prefix}{name}.")
        elif field.annotation is not Any:  # which is of no concern to this command
            owners = [base for base in cls.__mro__ if name in inspect.get_annotations(base)]
            yield f"{prefix}{name}", ((owners or [cls])[0].__qualname__, name)


def named(row: Row) -> str:
    """Return the key that a row's message must name, as a field has it."""
    return row.names.lstrip("-").replace("-", "_") if row.names.startswith("--") else row.names


def blocks(cls: type[Block], group: str = "") -> Iterator[type[Block]]:
    """Yield the class of every block of a configuration."""
    for found in classes(cls, group):
        yield found
        for name, field in found.model_fields.items():
            if inspect.isclass(field.annotation) and issubclass(field.annotation, Block):
                yield from blocks(field.annotation, name)


def unbounded(node, path: str = "") -> Iterator[str]:
    """Yield where a JSON schema has a number without an upper or a lower bound."""
    if isinstance(node, dict):
        limited = all({end, f"exclusive{end.capitalize()}"} & node.keys() for end in ("minimum", "maximum"))
        if node.get("type") in ("integer", "number") and not limited:
            yield path
        for key, value in node.items():
            yield from unbounded(value, f"{path}.{key}")
    elif isinstance(node, list):
        for value in node:
            yield from unbounded(value, path)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


@pytest.mark.parametrize("command", HYDRA)
def test_a_configuration_refuses_it(command, empty):
    """Every other row, for the sake of time."""
    wanted = [row for row in rows(command, NOWHERE) if row.how == "load"][::2]
    assert wanted and not check(wanted, empty, lambda line: None)


def test_every_command_refuses_it(empty, tmp_path):
    """The whole table, but for what takes long: with a run that was trained, and data that was prepared."""
    values = make_world(tmp_path / "world")
    wanted = [row for command in commands() for row in rows(command, values) if SLOWEST not in " ".join(row.words)]
    assert len(wanted) > 750 and not check(wanted, empty, lambda line: None)


def test_every_key_has_a_row():
    """A key that the same class gives several commands needs a row in one of them."""
    wanted, there = {}, set()
    for command in COMMANDS:
        fields = dict.fromkeys(keys(schema(command)))
        wanted |= {field: key for key, field in fields}
        for row in rows(command, NOWHERE):
            there |= {field for key, field in fields if re.match(rf"{re.escape(key)}(?![\w])", named(row))}
    assert sorted({f"{cls}: {wanted[cls, name]}" for cls, name in wanted.keys() - there}) == []


def test_every_number_has_bounds():
    found = {cls for command in COMMANDS for cls in blocks(schema(command))} | {Part}
    lines = {f"{cls.__name__}{path}" for cls in found for path in unbounded(cls.model_json_schema()["properties"])}
    assert sorted(lines) == []


def test_what_is_not_refused_is_found(empty, monkeypatch):
    accepted = Row("train", "load", ("trainer.seq_len=64",), "trainer.seq_len")
    misnamed = Row("train", "load", ("trainer.seq_len=0",), "trainer.max_steps")
    monkeypatch.setitem(bad_input.OTHERS, "litter", ("json", lambda module, words: (empty / "x").touch() or 1 / 0))
    broken = Row("litter", "load", (), "x")
    found = check([accepted, misnamed, broken], empty, lambda line: None)
    assert list(found) == [accepted, misnamed, broken]
