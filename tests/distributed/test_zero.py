"""ZeRO stages and world sizes agree, and a run saved under one goes on under another. Real processes over gloo."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from configs.app import compose
from configs.load import load
from tests.conftest import ROOT, SMALL_MLA, SMALL_RUN
from training.metrics import read_metrics

pytestmark = pytest.mark.distributed


def run(overrides: list[str], processes: int = 1) -> None:
    if processes == 1:
        assert train.main(load(compose("train", overrides))) == 0
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    done = subprocess.run([*launcher, "train.py", *overrides], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


def curve(folder: Path) -> dict[int, tuple[float, ...]]:
    keys = ("train/loss", "optim/grad_norm", "val/loss")
    return {line["step"]: tuple(line[k] for k in keys if k in line) for line in read_metrics(folder / "metrics.jsonl")}


def assert_same(ours: dict, theirs: dict, tolerance: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for step in ours:
        assert ours[step] == pytest.approx(theirs[step], abs=tolerance), f"step {step}"


@pytest.fixture(scope="module")
def reference(small_data, tmp_path_factory):
    """Overrides, and the curve of one process at stage 0. Ranks that no number of processes divides."""
    overrides = [
        *SMALL_RUN,
        *small_data,
        "model.k_rank=3",
        "trainer.samples=1",
        "optim.lr=1e-2",
        "trainer.micro_batch_size=2",
    ]
    folder = tmp_path_factory.mktemp("reference") / "run"
    run([*overrides, f"run.dir={folder}"])
    return overrides, curve(folder), folder


@pytest.mark.parametrize("stage", [1, 2, 3, "3_offload"])
def test_stages_agree_on_one_process(reference, tmp_path, stage):
    overrides, expected, _ = reference
    run([*overrides, f"run.dir={tmp_path}/run", f"deepspeed=zero{stage}"])
    assert_same(curve(tmp_path / "run"), expected)


@pytest.mark.parametrize("model", ["t6_noncontextual_a", "t6_noncontextual_b", "t6_third_order", "mla"])
def test_parameters_outside_of_linear_layers_are_sharded_too(reference, tmp_path, model):
    """Stage 3 gathers a module's own parameters (constant factors, norm weights) when its forward pass begins."""
    overrides, _, _ = reference
    mine = [o for o in overrides if not o.startswith("model.")] + [f"model={model}"]
    mine += SMALL_MLA if model == "mla" else []
    for stage in (0, 3):
        run([*mine, f"run.dir={tmp_path}/{stage}", f"deepspeed=zero{stage}"])
    assert_same(curve(tmp_path / "3"), curve(tmp_path / "0"))


@pytest.mark.parametrize(("stage", "next_stage"), [(0, 3), (1, 0), (2, 1), (3, 2)])
def test_two_processes_agree_and_one_goes_on_from_them(reference, tmp_path, stage, next_stage):
    overrides, expected, _ = reference
    mine = [*overrides, f"run.dir={tmp_path}/run"]
    run([*mine, f"deepspeed=zero{stage}", "trainer.micro_batch_size=1"], processes=2)
    assert_same(curve(tmp_path / "run"), expected)
    forget_the_end(tmp_path / "run")
    run([*mine, f"deepspeed=zero{next_stage}"])
    assert_same(curve(tmp_path / "run"), expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_processes_go_on_from_one(reference, tmp_path, stage):
    overrides, expected, folder = reference
    shutil.copytree(folder, tmp_path / "run")
    forget_the_end(tmp_path / "run")
    run([*overrides, f"run.dir={tmp_path}/run", f"deepspeed=zero{stage}"], processes=2)
    assert_same(curve(tmp_path / "run"), expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resuming_at_the_same_stage_is_bit_identical(reference, tmp_path, stage):
    overrides, _, _ = reference
    mine = [*overrides, f"run.dir={tmp_path}/run", f"deepspeed=zero{stage}"]
    run(mine)
    whole = curve(tmp_path / "run")
    forget_the_end(tmp_path / "run")
    run(mine)
    assert curve(tmp_path / "run") == whole


def forget_the_end(folder: Path) -> None:
    """As if the run had been cut off after its checkpoint of step 4."""
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints/step_00000008")
