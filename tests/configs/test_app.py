"""What every command takes: --help, folders of one's own YAML files, and options of Hydra's that end well."""

import sys

import pytest

from configs.app import OWN_CONFIGS, app, choices, configured, without_option
from configs.errors import ConfigError
from configs.help import comments_of
from eval.config import EvalConfig
from training.config import Config, TrainerConfig


@pytest.fixture
def own(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("_target_: model.attention.multi_head.MultiHeadConfig\nname: mine\n")
    return tmp_path


def run(monkeypatch, schema, *words: str) -> int:
    """Return the exit code of a command with these words that does nothing else than print what it was given."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    try:
        app(lambda config: print(config.model.name, config.optim.lr), schema)
    except SystemExit as ended:
        return ended.code
    return 0


def test_help_has_every_key_with_its_comment(monkeypatch, capsys):
    assert run(monkeypatch, Config, "model=mla", "optim.lr=0.5", "--help") == 0
    shown = capsys.readouterr().out
    assert "model=gqa|mha|" in shown and "optim.lr=0.5" in shown and "the peak of the schedule" in shown
    assert "model.kv_lora_rank=" in shown and "trainer.keep_every=null" in shown
    for line in ("and those whose step is a multiple of this", "or {model}_{size}_{8 hex digits"):
        assert line in shown
    assert all(f"  trainer.{key}=" in shown for key in TrainerConfig.model_fields)
    assert comments_of(EvalConfig)["step"] == "of the checkpoint; null: the newest"


def test_a_folder_of_ones_own_is_found_by_every_composition(own, monkeypatch, capsys):
    monkeypatch.setenv(OWN_CONFIGS, str(own))
    assert "mine" in choices("model") and configured(Config, ["model=mine"]).model.name == "mine"
    monkeypatch.delenv(OWN_CONFIGS)
    with pytest.raises(ConfigError, match="there is no configs/model/mine.yaml"):
        configured(Config, ["model=mine"])


@pytest.mark.parametrize("option", [["--config-dir={}"], ["--config-dir", "{}"], ["-cd", "{}"]])
@pytest.mark.parametrize("mode", [[], ["--cfg", "job"], ["-m", "optim.lr=0.1,0.2"]])
def test_config_dir_works_with_every_mode(own, tmp_path, monkeypatch, capsys, option, mode):
    monkeypatch.setenv(OWN_CONFIGS, "")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, Config, *(word.format(own) for word in option), "model=mine", *mode) == 0
    shown = capsys.readouterr().out
    assert shown.count("mine") == (2 if "-m" in mode else 1) or "name: mine" in shown


def test_what_no_command_does_is_one_message(tmp_path, monkeypatch, capsys):
    for words in (["-sc", "install=bash"], ["--config-dir", f"{tmp_path}/none"]):
        assert run(monkeypatch, Config, *words) == 2
        assert capsys.readouterr().err.count("\n") == 2
    assert without_option(["a=1", "-cd", "x", "b=2", "--config-dir=y"], "--config-dir", "-cd") == ["a=1", "b=2"]
