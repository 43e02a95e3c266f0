"""ZeRO stages and world sizes agree, and a run saved under one resumes under another. Real processes over gloo."""

import shutil

import pytest

from configs.app import configured
from configs.errors import ConfigError
from tests.conftest import SMALL_MLA, SMALL_RUN
from tests.distributed.helpers import curve, deviation, run, run_several
from training.config import Config

FP32, BF16 = 1e-4, 0.02  # the largest differences in loss and gradient norm that rounding explains


@pytest.fixture(scope="module")
def reference(small_data, tmp_path_factory):
    """Return overrides, and the curve of one process at stage 0. The ranks are divisible by no number of processes."""
    extra = ["model.k_rank=3", "trainer.samples=1", "optim.lr=1e-2", "trainer.micro_batch_size=2"]
    overrides = [*SMALL_RUN, *small_data, *extra]
    folder = tmp_path_factory.mktemp("reference") / "run"
    run([*overrides, f"run.dir={folder}"])
    return overrides, curve(folder), folder


@pytest.mark.parametrize("stage", [1, 2, 3, "3_offload"])
def test_stages_agree_on_one_process(reference, tmp_path, stage):
    overrides, expected, _ = reference
    run([*overrides, f"run.dir={tmp_path}/run", f"deepspeed=zero{stage}"])
    assert deviation(curve(tmp_path / "run"), expected) < FP32


@pytest.mark.parametrize("model", ["t6_noncontextual_a", "mla"])
def test_parameters_outside_of_linear_layers_are_sharded_too(reference, tmp_path, model):
    """Stage 3 gathers a module's own parameters (constant factors, norm weights) when its forward pass begins."""
    overrides, _, _ = reference
    mine = [o for o in overrides if not o.startswith("model.")] + [f"model={model}"]
    mine += SMALL_MLA if model == "mla" else []
    for stage in (0, 3):
        run([*mine, f"run.dir={tmp_path}/{stage}", f"deepspeed=zero{stage}"])
    assert deviation(curve(tmp_path / "3"), curve(tmp_path / "0")) < FP32


ON_TWO = {  # runs on two processes
    "zero0": ["deepspeed=zero0", "trainer.micro_batch_size=1"],
    "zero3_hpz": ["deepspeed=zero3_hpz", "++deepspeed.config.zero_optimization.zero_hpz_partition_size=2"],
    "zero2_bf16": ["deepspeed=zero2", "trainer.dtype=bf16"],
}


@pytest.fixture(scope="module")
def on_two(reference, tmp_path_factory):
    """Return the folder of the runs of ON_TWO."""
    overrides, folder = reference[0], tmp_path_factory.mktemp("two")
    run_several([[*overrides, *own, f"run.dir={folder}/{name}"] for name, own in ON_TWO.items()], 2)
    return folder


@pytest.mark.parametrize(("name", "next_stage"), [("zero0", 3), ("zero3_hpz", 2)])
def test_two_processes_agree_and_one_resumes_from_them(reference, on_two, name, next_stage):
    overrides, expected, _ = reference
    folder = on_two / name
    assert deviation(curve(folder), expected) < FP32
    forget_after(folder, 4)
    run([*overrides, f"run.dir={folder}", f"deepspeed=zero{next_stage}"])
    assert deviation(curve(folder), expected) < FP32


def test_one_loss_curve_from_one_to_two_to_four_processes_and_back(reference, tmp_path):
    """And from stage 1 to 3 to 2 on the way; each start resumes from the one before."""
    overrides, expected, _ = reference
    mine = [*overrides, f"run.dir={tmp_path}/run", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=9"]
    way = [(1, "1", 2), (2, "3", 4), (4, "2", 6), (1, "1", 8)]
    for processes, stage, until in way:
        run([*mine, f"deepspeed=zero{stage}"], processes)
        assert deviation(curve(tmp_path / "run"), expected) < FP32, f"{processes} processes, stage {stage}"
        if until < 8:
            forget_after(tmp_path / "run", until)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resuming_at_the_same_stage_is_bit_identical(reference, tmp_path, stage):
    overrides, _, _ = reference
    mine = [*overrides, f"run.dir={tmp_path}/run", f"deepspeed=zero{stage}"]
    run(mine)
    whole = curve(tmp_path / "run")
    forget_after(tmp_path / "run", 4)
    run(mine)
    assert curve(tmp_path / "run") == whole


def test_bf16_is_the_same_at_every_stage(reference, on_two, tmp_path):
    overrides, expected, _ = reference
    for stage in (0, 3):
        run([*overrides, f"run.dir={tmp_path}/{stage}", f"deepspeed=zero{stage}", "trainer.dtype=bf16"])
    curves = [curve(folder) for folder in (tmp_path / "0", tmp_path / "3", on_two / "zero2_bf16")]
    for found in curves:
        assert 0 < deviation(found, expected) < BF16
        assert deviation(found, curves[0]) < BF16 / 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_bf16_engine_trains_and_resumes_bit_for_bit(reference, tmp_path, stage):
    overrides, expected, _ = reference
    mine = [*overrides, f"run.dir={tmp_path}/run", f"deepspeed=zero{stage}", "++deepspeed.config.bf16.enabled=true"]
    run(mine)
    whole = curve(tmp_path / "run")
    assert 0 < deviation(whole, expected) < 5 * BF16  # the residual stream is bf16 too
    forget_after(tmp_path / "run", 4)
    run(mine)
    assert curve(tmp_path / "run") == whole


def test_deepspeeds_own_bf16_engine_is_refused_if_it_is_wrong(reference):
    overrides, _, _ = reference
    with pytest.raises(ConfigError, match="bf16 engine is wrong at ZeRO stage 0"):
        configured(Config, [*overrides, "deepspeed=zero0", "++deepspeed.config.bf16.enabled=true"])
    with pytest.raises(ConfigError, match=r"trainer.dtype=fp32: deepspeed.config.bf16.enabled=true"):
        configured(Config, [*overrides, "deepspeed=zero1", "++deepspeed.config.bf16.enabled=true",
                            "trainer.dtype=fp32"])  # fmt: skip


def test_a_node_that_does_not_divide_the_processes_is_refused(reference):
    with pytest.raises(
        ConfigError, match=r"zero_hpz_partition_size=8: must divide the number of processes, which is 1"
    ):
        run([*reference[0], "deepspeed=zero3_hpz"])


def forget_after(folder, step: int) -> None:
    """Leave a run folder as if the run had been interrupted after its checkpoint of `step`."""
    (folder / "summary.json").unlink(missing_ok=True)
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
