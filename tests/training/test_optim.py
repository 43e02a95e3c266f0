"""Schedules, parameter groups and peak rates against values worked out by hand."""

import math
import shutil

import pytest
import torch
from safetensors import safe_open

import train
from configs.app import configured
from configs.errors import ConfigError
from model.transformer import Transformer
from tests.model.helpers import small_network
from training.config import Config
from training.device import peak_flops
from training.jsonl import read_lines
from training.optim import OptimConfig, ScheduleConfig, build_optimizer, describe, learning_rate


def test_a_configuration_draws_no_random_number():
    before = torch.random.get_rng_state()
    configured(Config, ["optim=sgd", "++optim.args.momentum=0.9"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_cosine_rises_falls_and_ends_at_its_minimum():
    schedule = ScheduleConfig(name="cosine", warmup_steps=10, min_lr_ratio=0.05)
    rates = [learning_rate(step, 2.0, schedule, 110) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[59] == pytest.approx(2.0 * (0.05 + 0.95 / 2))  # half-way down
    assert rates[-1] == pytest.approx(0.1) and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_wsd_is_flat_then_linear():
    schedule = ScheduleConfig(name="wsd", warmup_steps=5, min_lr_ratio=0.1, decay_fraction=0.2)
    rates = [learning_rate(step, 1.0, schedule, 100) for step in range(1, 101)]
    assert rates[4:80] == [1.0] * 76
    assert rates[89] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_a_run_shorter_than_its_warm_up_only_rises(name):
    schedule = ScheduleConfig(name=name, warmup_steps=100)
    assert [learning_rate(step, 1.0, schedule, 3) for step in (1, 2, 3)] == [0.01, 0.02, 0.03]


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_a_schedule_that_counts_from_zero_is_one_step_behind(name, warmup_steps):
    schedule = ScheduleConfig(name=name, warmup_steps=warmup_steps)
    rates = [learning_rate(step, 1.0, schedule, 100) for step in range(1, 101)]
    behind = [learning_rate(step, 1.0, schedule.replace(first_step=0), 101) for step in range(1, 102)]
    assert behind[1:] == rates and behind[0] == (0.0 if warmup_steps else 1.0)


@pytest.mark.parametrize(
    ("schedule", "horizon", "said"),
    [
        ({"name": "cosine", "warmup_steps": 10}, 100, "cosine, 10 steps of warm-up to 0.002, ends at 0.0002"),
        (
            {"name": "cosine", "warmup_steps": 20_000},
            1_600,
            "the warm-up is longer than the run, which only reaches 8%",
        ),
        ({"name": "wsd", "warmup_steps": 10, "decay_fraction": 0.001}, 100, "it falls by 90% of optim.lr in one step"),
        ({"name": "cosine", "warmup_steps": 99}, 100, "it falls by 90% of optim.lr in one step"),
        ({"name": "wsd", "warmup_steps": 90, "decay_fraction": 1.0}, 100, "it falls by 82% of optim.lr in one step"),
        ({"name": "cosine", "warmup_steps": 0}, 1, "ends at 0.0002"),
    ],
)
def test_what_is_unusual_in_a_schedule_is_said(schedule, horizon, said):
    words = describe(2e-3, ScheduleConfig(**schedule), horizon)
    assert said in words and (":" in words) == ("one step" in said or "longer" in said)


@pytest.mark.parametrize(("decay_all", "undecayed"), [(False, 4), (True, 0)])
def test_one_dimensional_parameters_do_not_decay_unless_asked(decay_all, undecayed):
    net = Transformer(small_network("mla"))  # the one with norm weights: two a layer
    optimizer = build_optimizer(net, OptimConfig(name="adamw", lr=1e-3, weight_decay=0.1, decay_all=decay_all))
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert len(groups.get(0.0, [])) == undecayed
    assert sum(map(len, groups.values())) == len(list(net.parameters()))
    assert all(p.ndim == 1 for p in groups.get(0.0, []))


def test_the_measured_peak_is_a_rate_that_a_product_of_that_machine_reaches():
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert math.isfinite(peak) and 1e8 < peak < 1e15


@pytest.mark.parametrize(
    ("overrides", "moments"),
    [
        (["optim=sgd"], {"momentum_buffer"}),
        (["optim.name=NAdam", "deepspeed=zero2"], {"exp_avg", "exp_avg_sq"}),
        (["optim.name=adagrad", "deepspeed=zero3"], {"sum"}),
        (["optim.name=adafactor", "++optim.args.eps=[1e-8,1e-3]"], {"row_var", "col_var"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_any_optimizer_resumes_bit_for_bit(small_run, tmp_path, overrides, moments):
    def run(name: str) -> list[float]:
        assert (
            train.main(configured(Config, [*small_run, *overrides, "trainer.samples=0", f"run.dir={tmp_path}/{name}"]))
            == 0
        )
        return [line["train/loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]

    whole = run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts/summary.json").unlink()
    shutil.rmtree(tmp_path / "parts/checkpoints/step_00000008")
    config = tmp_path / "parts/config.yaml"
    config.write_text(config.read_text().replace(f"{tmp_path}/whole", f"{tmp_path}/parts"))
    assert run("parts") == whole and whole[-1] < whole[0]
    with safe_open(tmp_path / "parts/checkpoints/step_00000008/optimizer.safetensors", framework="pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} >= moments  # noqa: SIM118


def test_an_optimizer_of_whole_matrices_is_refused_where_they_are_shared_out():
    with pytest.raises(ConfigError, match="optim.name=muon: updates whole matrices, and deepspeed=zero1"):
        configured(Config, ["optim.name=muon", "deepspeed=zero1"])
