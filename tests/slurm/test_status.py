"""slurm.status reads run folders as runs leave them, without Slurm."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

import train
from configs.app import configured
from configs.errors import ConfigError
from slurm import status
from slurm.job_files import read_submission
from tests.conftest import ROOT, SMALL_RUN
from training.config import Config


@pytest.fixture(scope="module")
def trained(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("status") / "done"
    overrides = [*SMALL_RUN, *small_data, f"run.dir={folder}", "trainer.samples=0"]
    assert train.main(configured(Config, overrides)) == 0
    return folder


@pytest.fixture
def stopped(trained, tmp_path):
    """Return the run as if it had been interrupted after step 8, a day ago."""
    folder = shutil.copytree(trained, tmp_path / "stopped")
    (folder / "summary.json").unlink()
    grow_old(folder)
    return folder


def grow_old(folder):
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 86400,) * 2)


def log(folder, text: str, job: int = 12) -> None:
    (folder / f"slurm-{job}.log").write_text(f"=== job {job}: start 1, 1 tasks on node1 [2026-11-22 10:00:00]\n{text}")
    grow_old(folder)


def test_a_finished_run(trained, capsys):
    found = status.read_status(trained, {})
    assert (found.state, found.problems, found.metrics["step"], found.horizon) == ("finished", [], 8, 8)
    assert found.metrics["tokens"] == 8 * 512 and found.checkpoint[0] == 8 and found.restarts == 0
    assert status.main([str(trained.parent)]) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "8 / 8" in out and f"{found.metrics['val/loss']:.4f}" in out


def test_what_is_wrong_with_those_that_stopped(stopped):
    def state(text: str) -> tuple[str, str | None]:
        log(stopped, text)
        found = status.read_status(stopped, {})
        return found.state, next(iter(found.problems), None)

    assert status.read_status(stopped, {}).problems == ["nothing written for 1 day, 0:00:00"]
    crash = "Traceback (most recent call last):\n  ...\ntorch.OutOfMemoryError: CUDA out of memory\n"
    failed = "=== job 12: failed with exit code 1 [2026-11-22 10:01:00]\n"
    assert state(crash + failed) == ("failed", "failed with exit code 1; torch.OutOfMemoryError: CUDA out of memory")
    mistake = "Configuration error:\n  optim.lr=-1: must be a positive number\n"
    assert state(mistake + failed)[1].endswith("optim.lr=-1: must be a positive number")
    ending = "The job ends: rank 1 is lost. The same command resumes from the last checkpoint.\n"
    assert state(ending + crash + failed)[1].endswith(ending.strip())
    limit = "slurmstepd: error: *** JOB 12 ON node1 CANCELLED AT 2026-11-22T10:26:23 DUE TO TIME LIMIT ***\n"
    found, problem = state(limit)
    assert found == "stopped" and "DUE TO TIME LIMIT" in problem
    assert state("=== job 12: saved, requeueing [2026-11-22 10:01:00]\n") == ("requeued", None)


def test_the_queue_knows_best(stopped):
    log(stopped, "")
    (stopped / "job.json").write_text(json.dumps({"jobs": {"train": "13_2"}}))
    assert status.read_status(stopped, {"13_2": ("PENDING", "Priority")}).problems == ["waits: Priority"]
    found = status.read_status(stopped, {"12": ("RUNNING", "None")})
    assert (found.state, found.problems) == ("running", ["nothing written for 1 day, 0:00:00"])


def test_a_loss_that_is_not_finite_and_a_broken_checkpoint(stopped):
    lines = (stopped / "metrics.jsonl").read_text()
    (stopped / "metrics.jsonl").write_text(lines + json.dumps({"step": 9, "tokens": 4608, "train/loss": None}) + "\n")
    grow_old(stopped)
    assert "the loss of step 9 is not finite" in status.read_status(stopped, {}).problems[0]
    (stopped / "metrics.jsonl").write_text(lines)
    (stopped / "checkpoints/step_00000008/model.safetensors").write_bytes(b"torn")
    grow_old(stopped)
    assert "has 4 bytes instead of" in status.read_status(stopped, {}).problems[0]


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder and has none"):
        status.main([str(tmp_path)])


def write(content: str | bytes):
    def change(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def replace_by_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("config.yaml", write("a: [1"), "cannot be read as YAML"),
        ("config.yaml", write(b"\xff"), "cannot be read as YAML"),
        ("config.yaml", write("- 1"), "must be a mapping"),
        ("config.yaml", replace_by_folder, "cannot be read as YAML"),
        (
            "config.yaml",
            write("trainer: {max_steps: many, seq_len: 0}"),
            "trainer.max_steps='many': must be a positive",
        ),
        ("config.yaml", write("trainer: 5"), "has neither trainer.max_steps nor trainer.max_tokens"),
        ("metrics.jsonl", write('{"step": "one", "tokens": 5}\n'), "has a line with step='one', which is no number"),
        ("metrics.jsonl", write('{"step": 1, "tokens": 5, "val/loss": [2]}\n'), "val/loss=[2], which is no number"),
        ("metrics.jsonl", write(f'{{"step": 1, "tokens": 1{"0" * 400}}}\n'), "which is no number"),
        ("metrics.jsonl", replace_by_folder, "cannot be read (Is a directory)"),
        ("events.jsonl", replace_by_folder, "cannot be read (Is a directory)"),
        ("job.json", write("[]"), "job.json: is not what slurm.submit writes"),
        ("job.json", write('{"jobs": {"train": 5}}'), "job.json: is not what slurm.submit writes"),
        ("job.json", write('{"jobs": {"train": "5;rm"}}'), "job.json: is not what slurm.submit writes"),
        ("slurm-77.log", replace_by_folder, "slurm-77.log: cannot be read"),
        ("slurm-eval-77.log", replace_by_folder, "slurm-eval-77.log: cannot be read"),
        ("checkpoints/step_00000008/manifest.json", write("[]"), "manifest.json: cannot be read"),
        ("checkpoints/step_00000008/manifest.json", replace_by_folder, "cannot be read"),
    ],
)
def test_a_bad_file_is_a_problem_of_its_own_run(trained, stopped, name, change, expected, capsys):
    change(stopped / name)
    grow_old(stopped)
    assert status.main([str(trained), str(stopped)]) == 0
    out = capsys.readouterr().out
    assert f"{trained} " in out and "8 / 8" in out
    told = [line for line in out.splitlines() if line.startswith(f"{stopped}: ")]
    assert any(expected in line for line in told), out


def test_only_step_and_digits_are_checkpoints(stopped):
    newest = stopped / "checkpoints/step_00000008"
    for name in ("step_backup", "step_00000009_old", "step_12"):
        shutil.copytree(newest, stopped / "checkpoints" / name)
    (stopped / "checkpoints/step_00000010").write_text("a file")
    (newest / "manifest.json").unlink()
    assert status.read_status(stopped, {}).checkpoint[0] == 4
    newest.rename(stopped / "checkpoints/step_100000000")
    assert [path.name for path in status.checkpoint_dirs(stopped)] == ["step_00000004", "step_100000000"]


def test_names_are_shown_as_they_stand(trained, tmp_path, capsys):
    names = ["a[red]b", "[/]", "new\nline", os.fsdecode(b"\xff")]
    for name in names:
        shutil.copytree(trained, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "job.json").write_text("[]")
    assert status.main([str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert all(f"/runs/{shown} " in out for shown in ("a[red]b", "[/]", "new\\nline", "\\udcff")), out
    assert f"{tmp_path}/runs/[/]: " in out


def test_runs_in_folders_of_runs_and_what_differs(trained, tmp_path, capsys):
    for name, seed in (("one", 0), ("mechanisms/t6", 1), ("mechanisms/deep/mha", 1)):
        folder = shutil.copytree(trained, tmp_path / "runs" / name)
        text = (folder / "config.yaml").read_text()
        model = "mha" if "mha" in name else "t6"
        (folder / "config.yaml").write_text(text.replace("  name: t6\n", f"  name: {model}\n", 1) + f"\nx: {seed}\n")
    (tmp_path / "runs/mechanisms/again").symlink_to(tmp_path / "runs")
    (tmp_path / "runs/.slurm").mkdir()
    (tmp_path / "runs/.slurm/config.yaml").write_text("no run")
    assert status.main([str(tmp_path / "runs")]) == 0
    out = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    lines = {line.split()[0].removeprefix(f"{tmp_path}/runs/"): line for line in out}
    assert set(lines) >= {"one", "mechanisms/t6", "mechanisms/deep/mha"} and "differs" in lines["run"]
    assert "model.name=t6 x=0" in lines["one"] and "model.name=t6 x=1" in lines["mechanisms/t6"]
    assert "model.name=mha" in lines["mechanisms/deep/mha"] and "x=" not in lines["mechanisms/deep/mha"]
    assert not any(name.startswith((".slurm", "mechanisms/again")) for name in lines)


def test_failed_evaluations_are_reported(trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "run")
    jobs = {"jobs": {"train": "12", "eval": "13"}, "suites": ["perplexity", "wikitext2"]}
    (folder / "job.json").write_text(json.dumps(jobs))
    assert read_submission(folder).suites == jobs["suites"]

    def found(queue=None) -> list[str]:
        return status.read_status(folder, queue or {}).problems

    missing = "evaluation job 13 is no longer in the queue, and there are no results of perplexity, wikitext2"
    assert found() == [missing] and found({"13": ("PENDING", "Dependency")}) == []
    monkeypatch.setattr(status.scheduler, "ended", {"13": "CANCELLED", "14": "TIMEOUT"}.get)
    assert found() == [missing.replace("is no longer in the queue", "ended as CANCELLED")]

    def log_of(job: int, end: str, suite: str = "perplexity") -> None:
        start = f"=== job {job}: start 1 on node1: eval.run run={folder} suite={suite} [2026-11-22 10:00:00]\n"
        (folder / f"slurm-eval-{job}.log").write_text(start + end)
        os.utime(folder / f"slurm-eval-{job}.log", (time.time() - 86400 + job,) * 2)

    failed = "=== job 13: failed with exit code 1 [2026-11-22 10:01:00]\n"
    log_of(13, "FileNotFoundError: no data\n" + failed)
    assert found() == ["evaluation job 13 failed with exit code 1; FileNotFoundError: no data"]
    log_of(14, "", suite="wikitext2")
    assert found()[1] == "evaluation job 14 ended as TIMEOUT"
    log_of(15, "=== job 15: done [2026-11-22 10:01:00]\n")  # the same again, which succeeds
    assert found() == ["evaluation job 14 ended as TIMEOUT"] and found({"14": ("RUNNING", "None")}) == []
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results/wikitext2.json").write_text("{}")  # and by another command
    assert found() == []
    jobs = {"jobs": {"eval": "20_3"}, "suites": ["paper_zeroshot"]}
    (folder / "job.json").write_text(json.dumps(jobs))
    os.utime(folder / "job.json", (time.time() - 90000,) * 2)
    log_of(24, failed.replace("13", "24"), suite="paper_zeroshot")  # of the array's task, by its other id
    assert found() == ["evaluation job 24 failed with exit code 1"]


def test_it_starts_without_torch():
    code = "import sys, slurm.status; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
