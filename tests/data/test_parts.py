"""A preparation in parts ends with the bytes of an undivided one, in any order, killed or not."""

import itertools
import multiprocessing
import os
import signal

import pytest

from configs.errors import ConfigError
from data.build import Preparation
from data.prepare import prepare
from tests.data.conftest import make_config, texts, write_jsonl


@pytest.fixture
def make(tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [*texts(60 + 15 * i, seed=i), "", "  "]) for i in range(5)]

    def make(name: str, **data):
        return make_config(tmp_path / name, files, shard_tokens=3000, val_fraction=0.1, **data)

    return make


def contents(dir):
    return {path.name: path.read_bytes() for path in dir.iterdir()}


def names(dir):
    return sorted(path.name for path in dir.iterdir() if not path.name.endswith(".jsonl"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_in_any_order_make_the_same(make, tmp_path, order):
    prepare(*make("whole"), progress=False)
    for part in order:
        assert not (tmp_path / "parts").exists()
        prepare(*make("parts"), progress=False, part=part, parts=3)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert names(tmp_path) == ["parts", "whole"]  # the parts are gone
    assert prepare(*make("parts"), progress=False, part=0, parts=3)  # done already


@pytest.mark.parametrize("saves", [2, 15, 40])
def test_killed_in_a_part_or_while_joining(make, tmp_path, saves):
    """Killed at its n-th journal, in the first part or in the middle of joining; then everything is started again."""
    prepare(*make("whole"), progress=False)

    def run():
        original, calls = Preparation.save, itertools.count(1)

        def killed(self):
            original(self)
            if next(calls) == saves:
                os.kill(os.getpid(), signal.SIGKILL)

        Preparation.save = killed
        for part in range(2):
            prepare(*make("parts"), progress=False, part=part, parts=2)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for part in range(2):
        prepare(*make("parts"), progress=False, part=part, parts=2)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_what_cannot_be_divided_is_refused(make, tmp_path):
    for part, parts, source, match in (
        (0, 6, "files", r"parts=6: the source has 5 file\(s\)"),
        (3, 3, "files", "part=3: must lie between 0 and parts - 1 = 2"),
        (0, 2, "builtin", "parts=2: data.source=builtin is prepared in one piece"),
    ):
        with pytest.raises(ConfigError, match=match):
            prepare(*make("parts", source=source), progress=False, part=part, parts=parts)
    assert names(tmp_path) == []
