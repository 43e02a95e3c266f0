"""What slurm.submit decides before there is a queue: estimates, scripts, snapshots, the site's settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.app import configured, verbatim
from configs.errors import ConfigError
from slurm import scheduler, shell, snapshot, submit
from slurm.estimate import GIB, estimate
from slurm.jobs import Job, check_names
from slurm.options import Options
from tests.conftest import SMALL_RUN
from training.config import Config
from training.device import Runtime


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Work in an empty folder, without a cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    return tmp_path


def words(small_data, *more: str) -> list[str]:
    return [*SMALL_RUN, *small_data, *more]


def test_the_estimate_is_counted():
    given = ["size=xl", "tokenizer=gpt2", "deepspeed=zero2", "trainer.global_batch_size=32", "trainer.max_steps=null",
             "trainer.max_tokens=50000000000"]  # fmt: skip
    config = configured(Config, given, world_size=8)
    runtime = Runtime(torch.device("cuda"), torch.bfloat16, world_size=8)
    made = estimate(config, runtime, Options(gpu="H100", mfu=0.4))
    params, peak = 1.55e9, 989e12
    assert made.memory["weights"] == pytest.approx(4 * params, rel=0.02)
    assert made.memory["optimizer"] == pytest.approx(12 * params / 8, rel=0.02)
    assert made.gib == pytest.approx(sum(made.memory.values()) / GIB)
    assert made.hours == pytest.approx(50e9 * 6 * params / (8 * 0.4 * peak) / 3600, rel=0.1)  # 6N a token
    measured = estimate(config, runtime, Options(tokens_per_second=50e9 / 7200))
    assert measured.hours == pytest.approx(2, rel=1e-3)


def arguments_of(script: str) -> list[str]:
    """Return the arguments that a script gives to the file that it sources, by running its other lines."""
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = [line for line in script.splitlines() if not line.startswith(". ")]
    shell = "\n".join([*lines, 'printf "%s\\0" "$@"'])
    return subprocess.run(["bash", "-c", shell], capture_output=True, check=True).stdout.decode().split("\0")[:-1]


def test_a_dry_run_prints_scripts_that_run_and_creates_nothing(small_data, alone, capsys):
    name = "it's $HOME 'x'"
    given = words(small_data, verbatim(f"run.name={name}"), "wandb.tags=[a, b c]")
    assert submit.main(["--dry-run", "--nodes=2", "--ntasks-per-node=1", "--partition=big", "--time=1:00", *given]) == 0
    out = capsys.readouterr().out
    assert list(alone.iterdir()) == [] and "GiB for each GPU" in out and "assumed" in out
    train, evaluation = out.split("\n$ sbatch ")[1:]
    assert "--nodes=2 --ntasks-per-node=1 --partition=big --time=1:00" in train
    assert "--partition=big" in evaluation and "--nodes=2" not in evaluation and "--time=1:00" not in evaluation
    # The script, with the file that it sources replaced by one that prints its arguments, gives them as typed.
    of_run = verbatim(f"run=runs/{name}")
    for script, expected in ((train, given), (evaluation, [of_run, "suite=perplexity"])):
        assert arguments_of(script.partition("\n")[2]) == expected


def test_a_sweep_is_one_array_with_a_run_a_task(small_data, alone, capsys):
    sweep = ["-m", "model=t6,mha", "optim.lr=3e-4,6e-4", "--ntasks-per-node=1", "--dry-run"]
    assert submit.main([*sweep, *words(small_data)]) == 0
    out = capsys.readouterr().out
    assert out.count("--array=0-3") >= 2 and out.count("slurm/train.sbatch") == 1
    for number, (model, lr) in enumerate((m, lr) for m in ("t6", "mha") for lr in ("3e-4", "6e-4")):
        line = next(line for line in out.splitlines() if line.startswith(f"  {number}) T6_CODE="))
        assert f" model={model} " in line and f" optim.lr={float(lr)} " in line and " wandb.group=sweep-" in line


ODD_WORDS = [
    "it's",
    'a "b"',
    "a\nb",
    "a\n#SBATCH --nodes=9",
    "x\r",
    "\x1b[1mé",
    "$(id) `id`",
    "\\",
    "a\\nb",
    "%j #",
    "",
    "!x",
]


@pytest.mark.parametrize("word", ODD_WORDS)
def test_words_survive_a_shell_on_one_line(word, tmp_path):
    job = Job("train", "a name", tmp_path, "slurm-%j.log", [f"set -- {shell.join([word, 'end'])}"], [])
    script = job.script([])
    assert arguments_of(script) == [word, "end"]
    assert "--nodes=9" not in [line.split()[-1] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len(script.splitlines()) == len(Job("train", "x", tmp_path, "l", ["set --"], []).script([]).splitlines())


def test_folders_and_options_that_slurm_would_garble_are_refused(small_data, alone, monkeypatch):
    def refused(*given: str) -> str:
        with pytest.raises(ConfigError) as raised:
            submit.main(["--dry-run", "--ntasks-per-node=1", *words(small_data, *given)])
        assert "\n" not in str(raised.value)
        return str(raised.value)

    line_break = "must be a path without line breaks"
    assert (
        refused("run.dir='a\n#SBATCH --nodes=9'")
        == f"run.dir='a\\n#SBATCH --nodes=9': {line_break} and other control characters"
    )
    assert "has a line break" in refused("--comment=a\n#SBATCH --nodes=9")
    assert r"run.dir=" in refused(r"run.dir='a\b'") and "has a backslash" in refused(r"run.dir='a\b'")
    assert "must be a plain folder name" in refused("run.name='a\nb'")
    odd = alone / "a\nb"
    odd.mkdir()
    monkeypatch.chdir(odd)
    assert "has a line break" in refused("run.name=plain")
    assert list(odd.iterdir()) == []
    check_names([Job("train", "x", alone / 'it\'s 100% #1 "x"', "l", [], [])], [])


def test_mistakes_come_together_and_name_what_was_given(small_data, alone):
    def errors(*given: str) -> str:
        with pytest.raises(ConfigError) as raised:
            submit.main([*given, *words(small_data)])
        return str(raised.value)

    found = errors("--nodes", "0", "--gpu=Z9", "--mfu=abc")
    assert "--nodes=0: must be at least 1" in found and "--gpu=Z9: must be A10" in found
    assert "--mfu=abc: must be a number (or T6_MFU)" in found
    assert "4: is not an override (KEY=VALUE); give options of sbatch as --OPTION=VALUE" in errors("-N", "4")
    assert "--eval=nothing: must be none or some of" in errors("--eval=nothing")
    found = errors("-m", "--ntasks-per-node=1", "optim.lr=-1,-2")
    assert "optim.lr=-1: must be" in found and "optim.lr=-2: must be" in found
    assert "would share it" in errors("-m", "--ntasks-per-node=1", "run.name=same", "optim.lr=1e-3,2e-3")
    assert "no Slurm cluster answers here" in errors("--ntasks-per-node=1")
    assert list(alone.iterdir()) == []


def test_a_command_ends_with_code_2_and_one_message(tmp_path):
    elsewhere = os.environ | {"PYTHONPATH": str(snapshot.ROOT)}
    command = [sys.executable, "-m", "slurm.submit", "model=nothing"]
    done = subprocess.run(command, cwd=tmp_path, env=elsewhere, capture_output=True, text=True)
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


def test_a_snapshot_has_code_alone_and_keeps_modes(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    tracked = {"train.py": 0o755, "slurm/__init__.py": 0o644, "slurm/common.sh": 0o640, "model/__init__.py": 0o644}
    untracked = {"model/mine.py": 0o600, "model/mine.yaml": 0o644}
    secret = ["slurm/site.env", "slurm/.env", "slurm/login.sh", "model/key.pem", "notes/a.py", ".netrc", "model/x.json"]
    for name in [*tracked, *untracked, *secret]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
        (root / name).chmod((tracked | untracked).get(name, 0o600))

    def names(folder: Path) -> dict[str, int]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_mode & 0o777 for path in files}

    def code() -> dict[str, int]:
        snapshot.code.cache_clear()
        return names(snapshot.snapshot(tmp_path / f"run{len(list(tmp_path.iterdir()))}"))

    monkeypatch.setattr(snapshot, "ROOT", root)
    try:
        assert code() == tracked | untracked | {"slurm/login.sh": 0o600}  # without git, nobody knows whose it is
        for command in (["init", "-q"], ["add", "--force", *tracked]):
            subprocess.run(["git", *command], cwd=root, check=True)
        assert code() == tracked | untracked
    finally:
        snapshot.code.cache_clear()


def test_the_sites_settings_reach_sbatch_and_are_the_defaults(alone, capsys, small_data):
    Path("slurm").mkdir()
    Path("slurm/site.env").write_text(
        'export SBATCH_ACCOUNT="a b" T6_GPUS_PER_NODE=2 T6_GPU=H100\nCONTAINER=(x y)\nT6_GPU_MEMORY=1MiB\n'
    )
    environment = scheduler.site_environment()
    assert environment["SBATCH_ACCOUNT"] == "a b" and environment["T6_GPU"] == "H100"
    assert submit.main(["--dry-run", *words(small_data, "device=auto", "trainer.micro_batch_size=4")]) == 0
    out = capsys.readouterr().out
    assert "on 1 x 2 = 2 tasks" in out and "35% MFU of 2 x H100" in out and "more than the 1.0 MB" in out
    Path("slurm/site.env").write_text("export X=$(false)\nbroken (\n")
    with pytest.raises(ConfigError, match="slurm/site.env: cannot be read"):
        scheduler.site_environment()


def test_the_example_of_site_settings_can_be_read(tmp_path):
    example = snapshot.ROOT / "slurm/site.env.example"
    every = "\n".join(line.removeprefix("# ") if "=" in line else line for line in example.read_text().splitlines())
    (tmp_path / "site.env").write_text(every)
    found = scheduler.site_environment(tmp_path / "site.env")
    assert found["SBATCH_ACCOUNT"] == "myproject" and found["T6_MFU"] == "0.4"
