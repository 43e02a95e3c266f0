"""The preflight says what it sees, and stops only what cannot work."""

import shutil
from pathlib import Path

import pytest
import torch

import train
from configs.app import configured
from training import preflight
from training.config import Config
from training.device import Runtime


def run(overrides: list[str]) -> int:
    return train.main(configured(Config, [*overrides, "trainer.samples=0"]))


def estimate(overrides: list[str], world_size: int) -> dict[str, float]:
    config = configured(Config, overrides)
    runtime = Runtime(torch.device("cpu"), torch.float32, world_size=world_size)
    return preflight.needed_memory(config, runtime, config.network())


def test_the_table_of_one_process(small_run, capsys):
    assert run(small_run) == 0
    out = capsys.readouterr().out
    table = out[out.index("Preflight") : out.index("T6")]
    assert [line.split()[0] for line in table.splitlines()[1:] if line.strip()] == ["devices", "memory", "disk", "data"]
    assert "1 x cpu on" in table and "2 shards have their sizes" in table


def test_too_little_memory_is_fatal_only_for_what_must_be_there(small_run, tmp_path, monkeypatch, capsys):
    needs = estimate(small_run, 1)
    states = needs["weights"] + needs["gradients"] + needs["optimizer"]
    monkeypatch.setattr(preflight, "available_memory", lambda device: int(0.9 * states))
    assert run(small_run) == 1
    out = capsys.readouterr().out
    assert (
        "Training cannot work here: weights, gradients and optimizer take" in out and "deepspeed=zero3_offload" in out
    )
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(preflight, "available_memory", lambda device: int(1.1 * states))
    assert run(small_run) == 0
    assert "probably too little; use a smaller micro_batch_size" in capsys.readouterr().out


def test_too_little_disk_is_fatal_where_no_checkpoint_fits(small_run, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert run(small_run) == 1
    assert "Training cannot work here: a checkpoint takes" in capsys.readouterr().out
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    assert run(small_run) == 0
    assert "too little for the 3 that exist at a time" in capsys.readouterr().out


def test_data_that_has_changed_is_fatal(small_run, small_data, tmp_path, capsys):
    shards = Path(next(o for o in small_data if o.startswith("data.dir=")).removeprefix("data.dir="))
    shutil.copytree(shards, tmp_path / "shards")
    path = tmp_path / "shards/train_000000.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run([*small_run, f"data.dir={tmp_path}/shards"]) == 1
    assert f"{path}: does not have the checksum of its manifest" in capsys.readouterr().out


@pytest.mark.parametrize(("stage", "numbers"), [(0, 16), (1, 4 + 4 + 12 / 4), (2, 4 + 16 / 4), (3, 20 / 4)])
def test_the_memory_of_the_stages(small_run, stage, numbers):
    """Bytes a parameter on 4 processes, by the ZeRO paper's table, and DeepSpeed's fp32 copy from stage 1 on."""
    needs = estimate([*small_run, f"deepspeed=zero{stage}"], 4)
    params = estimate(small_run, 1)["weights"] / 4
    assert needs["weights"] + needs["gradients"] + needs["optimizer"] == pytest.approx(numbers * params)
