"""metrics.jsonl survives torn lines and resumes; W&B may fail."""

import json

import pytest

from configs.app import configured
from training.config import Config
from training.device import known_peak
from training.jsonl import read_lines
from training.metrics import Metrics, drop_lines_after
from training.plots import plot_loss


@pytest.fixture
def config(small_run):
    return configured(Config, [*small_run, "wandb.mode=offline"])


def test_a_torn_line_is_left_out_and_lines_past_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "tokens": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "tok')
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1, "tokens": 1}\n{"step": 2, "tokens": 2}\n'


def test_numbers_that_json_cannot_hold_become_null(config, tmp_path):
    config.wandb.mode, config.run.dir = "disabled", str(tmp_path)
    record = Metrics(config, 0)
    record.log(1, 10, {"train/loss": float("nan"), "optim/grad_norm": float("inf"), "optim/lr": 0.5})
    record.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "tokens": 10, "train/loss": None, "optim/grad_norm": None, "optim/lr": 0.5}
    plot_loss(tmp_path, "a plot of nothing but gaps")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),  # another GPU than the A10
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a seventh of one
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_peak_is_that_of_the_whole_name(name, peak):
    assert known_peak(name) == peak
