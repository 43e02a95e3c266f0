"""metrics.jsonl survives torn lines and resumes; W&B may fail."""

import json
from types import SimpleNamespace

import pytest

from training import metrics
from training.metrics import Metrics, drop_lines_after, plot_loss, read_metrics, wandb_mode


@pytest.fixture
def config(tmp_path):
    return SimpleNamespace(
        run=SimpleNamespace(dir=str(tmp_path), name="x"),
        wandb=SimpleNamespace(mode="offline", project="p", group=None, tags=[]),
        model=SimpleNamespace(name="t6"),
        size=SimpleNamespace(name="tiny"),
    )


def test_a_torn_line_is_left_out_and_lines_past_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "tokens": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "tok')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1, "tokens": 1}\n{"step": 2, "tokens": 2}\n'


def test_numbers_that_json_cannot_hold_become_null(config, tmp_path):
    config.wandb.mode = "disabled"
    record = Metrics(config, {}, 0)
    record.log(1, 10, {"train/loss": float("nan"), "optim/grad_norm": float("inf"), "optim/lr": 0.5})
    record.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "tokens": 10, "train/loss": None, "optim/grad_norm": None, "optim/lr": 0.5}
    plot_loss(tmp_path, "a plot of nothing but gaps")


def test_wandb_that_cannot_start_or_fails_later_does_not_stop_a_run(config, tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**kwargs):
        raise OSError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", refuse)
        record = Metrics(config, {}, 0)
        record.log(1, 10, {"train/loss": 1.0})
        record.close()
    assert "W&B could not start (no network)" in capsys.readouterr().out

    record = Metrics(config, {"a": 1}, 1)
    assert record.wandb is not None
    monkeypatch.setattr(record.wandb, "log", refuse)
    record.log(2, 20, {"train/loss": 0.5})
    record.log(3, 30, {"train/loss": 0.4})
    record.close()
    assert "W&B failed and is off from here on" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_the_wandb_run_is_a_function_of_the_folder(config, tmp_path):
    ids = []
    for _ in range(2):
        record = Metrics(config, {}, 0)
        ids.append(record.wandb.id)
        record.close()
    assert ids[0] == ids[1]


def test_auto_is_online_only_where_somebody_is_logged_in(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode("auto") == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode("auto") == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode("auto") == "online" and wandb_mode("disabled") == "disabled"


def test_the_longest_matching_device_name_wins(monkeypatch):
    import torch

    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert metrics.peak_flops(torch.device("cuda", 0), torch.bfloat16) == peak
