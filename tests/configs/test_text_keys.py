"""What a key of text is given, it keeps: Hydra's grammar makes no numbers of it, and no mistakes."""

import os
import subprocess
import sys

import pytest

from configs.app import as_text, combinations, configured
from configs.errors import ConfigError
from eval.compare.__main__ import parse
from eval.config import EvalConfig
from tests.conftest import ROOT
from training.config import Config

NAMES = ["2024_01_01", "1e-3", "1_1", "007", "true", "inf", "ünï", "quo'te", "a=b", "~t", "a[b]", "x:y", "(1)", "#1 a"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_as_it_is(name):
    assert configured(Config, [f"run.name={name}"]).run.name == name


@pytest.mark.parametrize("path", ["/d/a=b.txt", "/d/[1].txt", "/d/~x", "/d/2024_01_01", "/d/it's", "/d/a b"])
def test_a_path_stays_as_it_is_alone_or_in_a_list(path):
    config = configured(Config, ["data=files", f"data.files=[{path.replace('[1]', '1')},1_0]", f"data.dir={path}"])
    assert config.data.files == [path.replace("[1]", "1"), "1_0"] and config.data.dir == path
    suite = configured(EvalConfig, [f"run={path}", "suite=paper_zeroshot", f"suite.data_dir={path}x"])
    assert (suite.run, suite.suite.data_dir) == (path, f"{path}x")


def test_what_is_meant_for_hydra_stays_hydras():
    assert as_text("run.name=null", Config) == "run.name=null"
    for override in ("run.name='x'", "run.name=${model.name}_x", "run.name=choice(a,b)", "optim.lr=1e-3", "~run.name",
                     "trainer.benchmark_overrides=[suite.tasks=[a,b]]", "wandb.tags=[]"):  # fmt: skip
        assert as_text(override, Config) == override
    assert configured(Config, ["run.name=${model.name}_x"]).run.name == "t6_x"
    assert configured(Config, ["wandb.tags=[1_0,b]"]).wandb.tags == ["1_0", "b"]


def test_a_sweep_over_texts_keeps_them():
    assert combinations(["run.name=1e-3,b", "optim.lr=1e-3,2e-3"], Config) == [
        ["run.name='1e-3'", "optim.lr=0.001"],
        ["run.name='1e-3'", "optim.lr=0.002"],
        ["run.name='b'", "optim.lr=0.001"],
        ["run.name='b'", "optim.lr=0.002"],
    ]


def test_a_number_where_text_belongs_is_a_mistake_and_no_other_text():
    with pytest.raises(ConfigError, match="suite.data_dir=20240101: must be text"):
        configured(EvalConfig, ["run=x", "suite=paper_zeroshot", "suite.data_dir=2024_01_01"])


def test_options_of_a_comparison_are_texts_too():
    config = parse(["runs/a", "out=2024_01_01", "confidence=0.9", "metrics=[a,b]", "reference=1e-3"])
    assert (config.out, config.confidence, config.metrics) == ("2024_01_01", 0.9, ["a", "b"])
    assert config.reference == "1e-3"


@pytest.mark.parametrize("name", ["a\nb", "..", ".", "a/b", "a\\b", "x" * 300])
def test_a_name_that_no_folder_can_have_is_refused(name):
    with pytest.raises(ConfigError, match="must be a plain folder name"):
        configured(Config, [f"run.name={name}"])


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("wandb.project=a/b", "must have 1 to 128 characters"),
        ("wandb.project=", "must have 1 to 128 characters"),
        (f"wandb.tags=[{'x' * 65}]", "must have 1 to 64 characters"),
        (f"wandb.group={'x' * 129}", "must be at most 128 characters"),
    ],
)
def test_what_wandb_would_refuse_is_refused_before_training(override, remedy):
    with pytest.raises(ConfigError, match=remedy):
        configured(Config, [override])


def test_arguments_that_are_not_utf8_are_one_message():
    command = [sys.executable, "-m", "eval.sample", "run=x", b"prompt=caf\xe9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 2 and b"prompt=caf\\xe9': is not UTF-8" in done.stderr and b"Traceback" not in done.stderr
