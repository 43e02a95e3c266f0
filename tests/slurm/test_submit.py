"""What slurm.submit decides before there is a queue: estimates, scripts, snapshots, the site's settings."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.app import compose
from configs.errors import ConfigError
from configs.load import load
from slurm import scheduler, snapshot, submit
from slurm.estimate import GIB, estimate
from slurm.jobs import quoted
from tests.conftest import SMALL_RUN


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder, and no cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    return tmp_path


def words(small_data, *more: str) -> list[str]:
    return [*SMALL_RUN, *small_data, *more]


def test_the_estimate_is_counted():
    config = load(compose("train", ["size=xl", "tokenizer=gpt2", "deepspeed=zero2", "trainer.global_batch_size=32"]), 8)
    config.trainer.max_steps, config.trainer.max_tokens = None, 50 * 10**9
    made = estimate(config, gpus=8, gpu="H100", peak=1e15, mfu=0.4)
    params = 1.55e9
    assert made.memory["weights"] == pytest.approx(4 * params, rel=0.02)
    assert made.memory["optimizer"] == pytest.approx(12 * params / 8, rel=0.02)
    assert made.gib == pytest.approx(sum(made.memory.values()) / GIB)
    assert made.hours == pytest.approx(50e9 * 6 * params / (8 * 0.4e15) / 3600, rel=0.1)  # 6N a token
    assert estimate(config, 8, "H100", 1e15, 0.4, tokens_per_second=50e9 / 7200).hours == pytest.approx(2, rel=1e-3)


def test_a_dry_run_prints_scripts_that_run_and_creates_nothing(small_data, alone, capsys):
    name = "it's $HOME 'x'"
    given = words(small_data, f"run.name={quoted(name)}", "wandb.tags=[a, b c]")
    assert submit.main(["--dry-run", "--nodes=2", "--ntasks-per-node=1", "--partition=big", "--time=1:00", *given]) == 0
    out = capsys.readouterr().out
    assert list(alone.iterdir()) == [] and "GiB a GPU" in out and "assumed" in out
    train, evaluation = out.split("\n$ sbatch ")[1:]
    assert "--nodes=2 --ntasks-per-node=1 --partition=big --time=1:00" in train
    assert "--partition=big" in evaluation and "--nodes=2" not in evaluation and "--time=1:00" not in evaluation
    # The script, with the file that it sources replaced by one that prints its arguments, gives them as typed.
    for script, expected in ((train, given), (evaluation, [f"run={quoted(f'runs/{name}')}", "suite=perplexity"])):
        lines = [line for line in script.splitlines()[1:] if not line.startswith(". ")]
        shell = "\n".join([*lines, 'printf "%s\\0" "$@"'])
        said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
        assert said.split("\0")[:-1] == expected


def test_a_sweep_is_one_array_with_a_run_a_task(small_data, alone, capsys):
    sweep = ["-m", "model=t6,mha", "optim.lr=3e-4,6e-4", "--ntasks-per-node=1", "--dry-run"]
    assert submit.main([*sweep, *words(small_data)]) == 0
    out = capsys.readouterr().out
    assert out.count("--array=0-3") >= 2 and out.count("slurm/train.sbatch") == 1
    for number, (model, lr) in enumerate((m, lr) for m in ("t6", "mha") for lr in ("3e-4", "6e-4")):
        line = next(line for line in out.splitlines() if line.startswith(f"  {number}) T6_CODE="))
        assert f" model={model} " in line and f" optim.lr={float(lr)} " in line and " wandb.group=sweep-" in line


def test_mistakes_come_together_and_name_what_was_given(small_data, alone):
    def errors(*given: str) -> str:
        with pytest.raises(ConfigError) as raised:
            submit.main([*given, *words(small_data)])
        return str(raised.value)

    assert "-N" not in errors("--nodes", "0", "--gpu=Z9") and "--gpu=Z9: must be one of A10" in errors("--gpu=Z9")
    assert "4: is not an override (KEY=VALUE); give options of sbatch as --OPTION=VALUE" in errors("-N", "4")
    assert "--eval=nothing: must be none or some of" in errors("--eval=nothing")
    found = errors("-m", "--ntasks-per-node=1", "optim.lr=-1,-2")
    assert "optim.lr=-1.0: must be" in found and "optim.lr=-2.0: must be" in found
    assert "would share it" in errors("-m", "--ntasks-per-node=1", "run.name=same", "optim.lr=1e-3,2e-3")
    assert "no Slurm cluster answers here" in errors("--ntasks-per-node=1")
    assert list(alone.iterdir()) == []


def test_a_command_ends_with_code_2_and_one_message():
    done = subprocess.run([sys.executable, "-m", "slurm.submit", "model=nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model=nothing: there is no configs/model/nothing.yaml" in done.stderr


def test_a_snapshot_runs_and_is_never_written_again(tmp_path):
    folder = snapshot.snapshot(tmp_path / "run")
    assert folder == snapshot.snapshot_dir(tmp_path / "run") and folder.parent == tmp_path / "run/code"
    assert not (folder / "tests").exists() and (folder / "slurm/common.sh").is_file()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert snapshot.snapshot(tmp_path / "run") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    done = subprocess.run(
        [sys.executable, folder / "train.py", "model=mla", "--cfg", "job"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "kv_lora_rank" in done.stdout, done.stderr


def test_the_sites_settings_reach_sbatch_and_fill_what_is_not_given(alone, capsys, small_data):
    Path("slurm").mkdir()
    Path("slurm/site.env").write_text(
        'export SBATCH_ACCOUNT="a b" T6_GPUS_PER_NODE=2 T6_GPU=H100\nCONTAINER=(x y)\nT6_GPU_MEMORY=1MiB\n'
    )
    environment = scheduler.site_environment()
    assert environment["SBATCH_ACCOUNT"] == "a b" and environment["T6_GPU"] == "H100"
    assert submit.main(["--dry-run", *words(small_data, "device=auto", "trainer.micro_batch_size=4")]) == 0
    out = capsys.readouterr().out
    assert "on 1 x 2 = 2 tasks" in out and "35% MFU of 2 x H100" in out and "more than the 0 GiB" in out
    Path("slurm/site.env").write_text("export X=$(false)\nbroken (\n")
    with pytest.raises(ConfigError, match="slurm/site.env: cannot be read"):
        scheduler.site_environment()


def test_the_example_of_site_settings_can_be_read(tmp_path):
    example = snapshot.ROOT / "slurm/site.env.example"
    every = "\n".join(line.removeprefix("# ") if "=" in line else line for line in example.read_text().splitlines())
    (tmp_path / "site.env").write_text(every)
    found = scheduler.site_environment(tmp_path / "site.env")
    assert found["SBATCH_ACCOUNT"] == "myproject" and found["T6_MFU"] == "0.4"
