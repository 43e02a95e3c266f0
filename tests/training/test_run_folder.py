"""A run folder is data, whoever made it."""

import sys

import pytest

from configs.app import as_yaml, configured
from configs.block import to_dict
from configs.errors import ConfigError
from tests.conftest import SMALL_RUN
from training.config import Config
from training.run_folder import read_config

PAYLOAD = """
import pathlib
pathlib.Path("{folder}/has_run").touch()
from model.attention.multi_head import MultiHeadConfig
class Payload(MultiHeadConfig):
    pass
"""


@pytest.fixture
def tree(tmp_path):
    return to_dict(configured(Config, [*SMALL_RUN, "model=mha", f"run.dir={tmp_path}"]))


@pytest.fixture
def payload(tmp_path, monkeypatch):
    """A module that can be imported, and leaves a file behind if it is."""
    (tmp_path / "stranger.py").write_text(PAYLOAD.format(folder=tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return "stranger.Payload"


@pytest.mark.parametrize("group", ["model", "core"])
def test_reading_a_run_folder_imports_nothing_that_it_names(tmp_path, tree, payload, group):
    tree[group]["_target_"] = payload
    (tmp_path / "config.yaml").write_text(as_yaml(tree))
    with pytest.raises(ConfigError, match="config.yaml: _target_=stranger.Payload: is code.*set T6_PACKAGES=stranger"):
        read_config(tmp_path)
    assert not (tmp_path / "has_run").exists()


def test_a_package_of_ones_own_is_allowed(tmp_path, tree, payload, monkeypatch):
    tree["model"]["_target_"] = payload
    (tmp_path / "config.yaml").write_text(as_yaml(tree))
    monkeypatch.setenv("T6_PACKAGES", "other,stranger")
    assert type(read_config(tmp_path).model).__name__ == "Payload"


def test_nothing_in_a_run_folder_is_resolved(tmp_path, tree, monkeypatch):
    monkeypatch.setenv("SECRET", "key")
    tree["run"]["name"] = "${oc.env:SECRET}"
    (tmp_path / "config.yaml").write_text(as_yaml(tree))
    try:
        assert "key" not in str(read_config(tmp_path))
    except ConfigError as error:  # a name that no folder can have
        assert "key" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "config.yaml: cannot be read as YAML .it has aliases"),
        ("[" * 5000, "config.yaml: cannot be read as YAML"),
        ("a: b: c", "config.yaml: cannot be read as YAML"),
        ("[1]", "config.yaml: must be a mapping"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_message(tmp_path, content, message):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)
