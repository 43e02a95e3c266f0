"""The main job, run for real: python train.py, its run folder, resuming, signals, and everything that stops it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import Field
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import train
from configs.app import app, configured
from configs.block import Block, to_dict
from configs.errors import ConfigError
from configs.load import load
from tests.conftest import ROOT, SMALL_MLA
from training.checks import check_sweep
from training.config import Config
from training.device import Runtime
from training.jsonl import read_lines


def run(overrides: list[str]) -> int:
    return train.main(configured(Config, overrides))


def command(*args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, text=True, capture_output=True, timeout=300, env=os.environ | environment
    )


def losses(folder: Path, key: str = "train/loss") -> dict[int, float]:
    return {line["step"]: line[key] for line in read_lines(folder / "metrics.jsonl") if key in line}


def test_a_run_leaves_the_folder_of_the_contract(small_run, tmp_path):
    done = command("train.py", *small_run, "wandb.mode=offline")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    there = {path.name for path in folder.iterdir()}
    assert there == {
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "checkpoints",
        "latest",
        "loss.png",
        "samples.txt",
        "summary.json",
        "tokenizer.model",
        "wandb",
    }
    assert (folder / "latest").read_text() == "step_00000008"
    assert {p.name for p in (folder / "checkpoints/step_00000008").iterdir()} >= {"manifest.json", "model.safetensors"}
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["tokens"] for line in lines] == [512 * step for step in range(1, 9)]
    assert set(lines[3]) >= {
        "train/loss", "val/loss", "val/perplexity", "val/bits_per_byte", "optim/lr", "optim/grad_norm",
        "perf/tokens_per_second", "perf/mfu", "perf/memory_gb", "perf/training_hours", "perf/training_flops",
    }  # fmt: skip
    assert 0 < lines[-1]["perf/mfu"] < 1
    summary = json.loads((folder / "summary.json").read_text())
    weights = load_file(folder / "checkpoints/step_00000008/model.safetensors")
    assert summary["params"] == sum(tensor.numel() for tensor in weights.values())
    assert "unigram entropy" in done.stdout and "loss.png" in done.stdout and "A sample" in done.stdout
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    # The configuration in the folder is the run: started from it, it is found finished, and nothing is added.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(small_run) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("model", ["t6", "mha", "mqa", "gqa", "mla"])
def test_every_mechanism_trains(small_run, tmp_path, model):
    extra = SMALL_MLA if model == "mla" else []
    assert run([*small_run, f"model={model}", "optim.lr=1e-2", *extra]) == 0
    curve = losses(tmp_path / "run")
    assert curve[8] < curve[1] - 0.3


def test_an_interrupted_run_resumes_bit_for_bit(small_run, tmp_path):
    whole, parts = [*small_run, f"run.dir={tmp_path}/whole"], [*small_run, f"run.dir={tmp_path}/parts"]
    assert run(whole) == 0
    interrupt_at(5, parts)
    assert losses(tmp_path / "parts").keys() == {1, 2, 3, 4, 5}
    assert run(parts) == 0
    for key in ("train/loss", "val/loss", "optim/grad_norm", "optim/lr"):
        assert losses(tmp_path / "parts", key) == losses(tmp_path / "whole", key)


class Interrupted(Exception):
    pass


def interrupt_at(step: int, overrides: list[str]) -> None:
    """End a run between two steps, as a crash would: after its metrics of `step`, with no further checkpoint."""
    original = train.seed_step

    def crash(seed, current, rank):
        if current == step + 1:
            raise Interrupted
        original(seed, current, rank)

    train.seed_step = crash
    try:
        with pytest.raises(Interrupted):
            run(overrides)
    finally:
        train.seed_step = original


def test_a_torn_checkpoint_is_named_and_the_one_before_taken(small_run, tmp_path, capsys):
    assert run([*small_run, f"run.dir={tmp_path}/whole"]) == 0
    overrides = [*small_run, "trainer.checkpoint_every=2"]
    interrupt_at(7, overrides)
    folder = tmp_path / "run/checkpoints"
    weights = folder / "step_00000006/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert run(overrides) == 0
    out = capsys.readouterr().out
    assert "step_00000006/model.safetensors: does not have the checksum" in out and "resumed from step 4" in out
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_signal_saves_and_exits_with_75(small_run, tmp_path):
    args = [*small_run, "trainer.max_steps=4000", "trainer.checkpoint_every=null", "trainer.eval_every=null"]
    process = subprocess.Popen([sys.executable, "train.py", *args], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_lines(tmp_path / "run/metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    step = max(losses(tmp_path / "run"))
    assert f"SIGUSR1: saved step {step}" in out
    assert (tmp_path / "run/latest").read_text() == f"step_{step:08d}"


def test_init_from_starts_a_new_run_from_a_runs_weights(small_run, tmp_path):
    assert run(small_run) == 0
    new = [*small_run, f"run.dir={tmp_path}/new", f"trainer.init_from={tmp_path}/run", "trainer.seq_len=96"]
    new += ["model.rope_scaling=yarn", "model.rope_factor=1.5"]
    assert run(new) == 0
    assert losses(tmp_path / "new")[1] < losses(tmp_path / "run")[1] - 0.3
    with pytest.raises(ConfigError, match=r"another architecture or tokenizer:\n    model.q_rank: 6 there, 5 here$"):
        run([*small_run, f"run.dir={tmp_path}/other", f"trainer.init_from={tmp_path}/run", "model.q_rank=5"])
    assert not (tmp_path / "other").exists()


def test_multirun_runs_one_job_after_another(small_run, tmp_path):
    args = [a for a in small_run if not a.startswith("run.dir")]
    done = command("train.py", "-m", *args, "model=mha,t6", f"run.dir={tmp_path}/${{model.name}}",
                   f"hydra.sweep.dir={tmp_path}/sweep")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / name / "summary.json").exists() for name in ("mha", "t6"))


def test_every_run_of_a_sweep_is_checked_before_the_first(small_run, tmp_path, monkeypatch, capsys):
    def said(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", *small_run, *words])
        with pytest.raises(SystemExit, match="2"):
            app(lambda config: pytest.fail("a run has started"), Config, check_sweep=check_sweep)
        return capsys.readouterr().err.splitlines()[1:]

    swept = "run.dir=" + str(tmp_path / "${model.name}_${core.name}_${optim.lr}")
    assert said(swept, "model=t6,mha", "optim.lr=1e-3,-1,0") == [
        "  optim.lr=-1: must be a positive number", "  optim.lr=0: must be a positive number"
    ]  # fmt: skip
    assert said("optim.lr=1e-3,2e-3")[0].startswith(
        f"  run.dir={tmp_path}/run: several runs of the sweep would share it"
    )
    assert "leave run.name and run.dir unset" in said("optim.lr=1e-3,2e-3")[0]
    same = said("trainer.dtype=fp32,bf16")[0]  # which no default name has
    assert "they differ in trainer.dtype" in same and "run.name='NAME-${trainer.dtype}'" in same
    assert "each with a run.name of its own" in said("trainer.init_from=runs/a,runs/b")[0]
    (line,) = said(swept, "model=mha,t6", "core.kernel=factors")
    assert line.startswith("  core=full: core.kernel=factors") and "model=mha" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_schedules_and_precisions(small_run, tmp_path, schedule, precision):
    extra = [f"schedule={schedule}", "schedule.warmup_steps=2", f"trainer.dtype={precision}", "optim.lr=1e-2"]
    assert run([*small_run, *extra, "trainer.activation_checkpointing=true", "trainer.samples=0"]) == 0
    rates = losses(tmp_path / "run", "optim/lr")
    assert rates[1] == pytest.approx(5e-3) and rates[2] == pytest.approx(1e-2) and rates[8] < 2e-3
    assert losses(tmp_path / "run")[8] < losses(tmp_path / "run")[1]


def test_compile_trains_the_same(small_run, tmp_path):
    plain, compiled = [f"run.dir={tmp_path}/plain"], [f"run.dir={tmp_path}/compiled", "trainer.compile=true"]
    for extra in (plain, compiled):
        assert run([*small_run, "size.n_layers=1", "trainer.max_steps=3", "trainer.samples=0", *extra]) == 0
    a, b = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert all(abs(a[step] - b[step]) < 1e-4 for step in a)


class Profiler(Block):
    """A profiler as somebody would add one: this class in a file of its own, and a field of Config."""

    steps: int = 0

    @contextmanager
    def around_training(self, run_dir: Path, runtime: Runtime):
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=self.steps, repeat=1)
        handler = torch.profiler.tensorboard_trace_handler(str(run_dir / "profile"), f"rank{runtime.rank}")
        with torch.profiler.profile(schedule=schedule, on_trace_ready=handler) as profile:
            hook = register_optimizer_step_post_hook(lambda *_: profile.step())
            yield
            hook.remove()


class Profiled(Config):
    profiler: Profiler = Field(default_factory=Profiler)


def test_a_block_of_the_configuration_may_wrap_training(small_run, tmp_path):
    config = configured(Profiled, [*small_run, "profiler.steps=2"])
    assert train.main(config) == 0
    (trace,) = (tmp_path / "run/profile").glob("rank0*.json")
    assert "ProfilerStep#2" in trace.read_text() and "ProfilerStep#5" not in trace.read_text()
    assert config.identity() == configured(Config, small_run).identity()


# --- bad input: exit code 2, one message, nothing created ------------------------------------------------------------


def test_config_errors_come_together_and_create_nothing(tmp_path):
    done = command(
        "train.py", f"run.dir={tmp_path}/run", "optim.lr=-1", "trainer.max_stepz=5", "model.q_rank=0",
        "trainer.micro_batch_size=3", "model.head_dim=31", "tokenizer.vocab_size=70000", "data.token_dtype=uint16",
        "trainer.seq_len=abc",
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for message in (
        "optim.lr=-1: must be a positive number",
        "trainer.max_stepz: unknown key; did you mean trainer.max_steps?",
        "model.q_rank=0: must be at least 1",
        "model.head_dim=31: RoPE turns pairs of features, so it must be even",
        "tokenizer.vocab_size=70000: data.token_dtype=uint16 holds at most 65536; set data.token_dtype=auto",
        "trainer.seq_len=abc: must be an integer",
    ):
        assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def refused(overrides: list[str], tmp_path: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        run(overrides)
    assert not torch.distributed.is_initialized()


def test_a_folder_that_holds_another_run_is_refused_with_the_keys(small_run, tmp_path):
    assert run(small_run) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    refused(
        [*small_run, "optim.lr=1e-5", "model=mha"], tmp_path, r"(?s)model.name: 't6' there, 'mha' here.*optim.lr: 0.0"
    )
    refused([*small_run, "trainer.resume=never"], tmp_path, "trainer.resume=never")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert run([*small_run, "trainer.micro_batch_size=2", "trainer.log_every=3"]) == 0  # not what makes it that run


def test_data_that_is_missing_short_or_torn_is_refused(small_run, small_data, tmp_path):
    refused([*small_run, f"data.dir={tmp_path}/none"], tmp_path, "not prepared: run `python -m data.prepare data=files")
    nowhere = [f"data.dir={tmp_path}/none", f"trainer.init_from={tmp_path}/none"]
    refused([*small_run, *nowhere], tmp_path, r"(?s)not prepared.*trainer.init_from=.*none: is neither a checkpoint")
    refused([*small_run, "trainer.seq_len=5000000"], tmp_path, "trainer.seq_len=5000000")
    torn = tmp_path / "torn"
    shutil.copytree(small_data[1].removeprefix("data.dir="), torn)
    shard = torn / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-7])
    refused([*small_run, f"data.dir={torn}"], tmp_path, "train_000000.bin")
    assert not (tmp_path / "run").exists()


def test_an_unusable_run_folder_is_refused(small_run, tmp_path):
    (tmp_path / "file").write_text("x")
    refused([*small_run, f"run.dir={tmp_path}/file/run"], tmp_path, "run.dir=.*is a file")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        refused([*small_run, f"run.dir={tmp_path}/locked/run"], tmp_path, "run.dir=.*not writable")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_is_refused_where_there_is_none():
    done = command("train.py", "device=cuda")
    assert done.returncode == 2 and "device=cuda: PyTorch sees no CUDA GPU here" in done.stderr


def test_cfg_job_prints_the_resolved_configuration():
    done = command("train.py", "model=t6", "size=xl", "--cfg", "job")
    tree = yaml.safe_load(done.stdout)
    assert done.returncode == 0 and "${" not in done.stdout
    assert (tree["model"]["n_heads"], tree["size"]["d_ff"], tree["run"]["name"][:6]) == (78, 4266, "t6_xl_")
    assert to_dict(load(tree, Config)) == tree
