"""Benchmarks in training: inside the job without a trace in the run, and as jobs of their own."""

import json
import os
import signal
import stat

import pytest

import train
from configs.app import configured
from configs.errors import ConfigError
from eval import in_training
from eval import run as eval_run
from eval.benchmarks import HarnessSuite
from tests.eval.helpers import evaluation
from training.config import Config
from training.jsonl import read_lines

BENCHMARKS = ["trainer.benchmark_every=4", "trainer.benchmarks=[builtin_cloze]", "trainer.benchmark_limit=6",
              "trainer.benchmark_overrides=['suite.tasks=[cloze]']"]  # fmt: skip


def lines(folder, *, evaluations: bool) -> list[dict]:
    return [line for line in read_lines(folder / "metrics.jsonl") if any("eval/" in key for key in line) == evaluations]


def test_benchmarks_are_logged_at_their_step_and_leave_no_trace_in_training(small_run, tmp_path):
    plain, other = [*small_run, f"run.dir={tmp_path}/plain"], [*small_run, f"run.dir={tmp_path}/other", *BENCHMARKS]
    assert train.main(configured(Config, plain)) == train.main(configured(Config, other)) == 0
    before, after = (lines(tmp_path / name, evaluations=False) for name in ("plain", "other"))
    for one, two in zip(before, after, strict=True):
        assert {key: two[key] for key in one if "perf" not in key} == {
            key: one[key] for key in one if "perf" not in key
        }
    scored = {line["step"]: line["eval/cloze/acc_norm"] for line in lines(tmp_path / "other", evaluations=True)}
    assert scored.keys() == {4, 8}
    record = json.loads((tmp_path / "other/results/builtin_cloze_limit=6_tasks=cloze.json").read_text())
    assert record["step"] == 8 and record["limit"] == 6 and record["results"]["cloze/acc_norm"] == scored[8]
    # The same suite on the checkpoint, by the command, gives the same scores.
    arguments = [f"run={tmp_path}/other", "suite=builtin_cloze", "suite.tasks=[cloze]", "limit=6"]
    assert eval_run.main(evaluation(*arguments, "step=4")) == 0
    older = json.loads((tmp_path / "other/results/builtin_cloze_step_00000004_limit=6_tasks=cloze.json").read_text())
    assert older["results"]["cloze/acc_norm"] == pytest.approx(scored[4])


def test_a_failing_benchmark_costs_its_results_only(small_run, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(HarnessSuite, "run", fail)
    assert train.main(configured(Config, [*small_run, *BENCHMARKS])) == 0
    assert "the benchmark builtin_cloze failed, training continues: no such luck" in capsys.readouterr().out


def test_a_run_that_is_ended_before_its_benchmarks_has_its_checkpoint_and_makes_up_for_them(
    small_run, tmp_path, monkeypatch
):
    config, original, run_suite = configured(Config, [*small_run, *BENCHMARKS]), train.seed_step, HarnessSuite.run

    def warn(seed, step, rank):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        original(seed, step, rank)

    def end(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "seed_step", warn)
    assert train.main(config) == 75  # at once
    monkeypatch.setattr(train, "seed_step", original)
    monkeypatch.setattr(HarnessSuite, "run", end)
    with pytest.raises(KeyboardInterrupt):
        train.main(config)  # in the benchmark that it owes
    assert not lines(tmp_path / "run", evaluations=True)
    done = []

    def count(suite, run, options):
        done.append(run.step)
        return end() if run.step == 8 else run_suite(suite, run, options)

    monkeypatch.setattr(HarnessSuite, "run", count)
    with pytest.raises(KeyboardInterrupt):
        train.main(config)  # in the last one
    assert (tmp_path / "run/checkpoints/step_00000008/manifest.json").exists()
    monkeypatch.setattr(HarnessSuite, "run", run_suite)
    assert train.main(config) == 0
    assert done == [4, 8] and [line["step"] for line in lines(tmp_path / "run", evaluations=True)] == [4, 8]
    assert [line["step"] for line in lines(tmp_path / "run", evaluations=False)] == list(range(1, 9))


def test_what_cannot_be_benchmarked_is_refused_before_anything_is_made(small_run, tmp_path):
    with pytest.raises(ConfigError, match="there is no configs/suite/imagenet.yaml"):
        configured(Config, [*small_run, "trainer.benchmarks=[imagenet]"])
    missing = ["trainer.benchmarks=[paper_zeroshot]", f"trainer.benchmark_overrides=['suite.data_dir={tmp_path}/none']"]
    with pytest.raises(ConfigError, match="there is no such folder"):
        train.main(configured(Config, [*small_run, "trainer.benchmark_every=4", *missing]))
    for suite, override, message in (
        ("perplexity", f"suite.files=[{tmp_path}/none/*.txt]", "suite.files: no file matches"),
        ("long_context", f"suite.data_dir={tmp_path}/none", "suite.data_dir=.*/none: not prepared"),
        ("builtin_cloze", "step=3,core.kernel=sdpa", "step=3, core.kernel=sdpa: benchmarks take the model"),
        ("builtin_cloze", "core.kernel=sdpa", "core.kernel=sdpa: benchmarks take the model as it is trained"),
        ("builtin_cloze", "dtype=bf16", "trainer.benchmark_overrides: dtype=bf16: benchmarks take the model as it is"),
    ):
        words = [f"trainer.benchmarks=[{suite}]", f"trainer.benchmark_overrides={override.split(',')}"]
        with pytest.raises(ConfigError, match=message):
            train.main(configured(Config, [*small_run, "trainer.benchmark_every=4", *words]))
    assert not (tmp_path / "run").exists()


def test_jobs_of_their_own_keep_their_checkpoints_and_are_logged_at_their_steps(small_run, tmp_path, monkeypatch):
    """A scheduler that runs the job at a later step stands for Slurm: tests/slurm has a real one."""
    submitted = tmp_path / "submitted"
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$*" >> {submitted}\nenv | grep -c WORLD_SIZE >> {tmp_path}/leaks\necho 7\n'
    )
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(in_training, "SCRIPT", sbatch)
    run, original = tmp_path / "run", in_training.Benchmarks.due

    def due(self, step):  # between steps 6 and 7 the first job gets its turn
        if step == 7 and not (run / "results/builtin_cloze_step_00000002_limit=6_tasks=cloze.json").exists():
            assert eval_run.main(evaluation(*submitted.read_text().splitlines()[0].split()[2:])) == 0
        return original(self, step)

    monkeypatch.setattr(in_training.Benchmarks, "due", due)
    overrides = [
        *small_run,
        *BENCHMARKS,
        "trainer.benchmark_every=2",
        "trainer.benchmark_job=true",
        "trainer.keep_checkpoints=1",
    ]
    assert train.main(configured(Config, overrides)) == 0
    assert [line.split()[-1] for line in submitted.read_text().splitlines()] == [f"step={n}" for n in (2, 4, 6, 8)]
    assert set((tmp_path / "leaks").read_text().split()) == {"0"}
    (scored,) = lines(run, evaluations=True)
    assert scored["step"] == 2 and scored["tokens"] == 1024 and "eval/cloze/acc_norm" in scored
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"step_00000004", "step_00000006", "step_00000008"}  # the first one has been read
    # The others get theirs when the run is finished: then the evaluation itself adds the line.
    assert eval_run.main(evaluation(*submitted.read_text().splitlines()[1].split()[2:])) == 0
    assert [line["step"] for line in lines(run, evaluations=True)] == [2, 4]


def test_what_cannot_be_read_in_the_inbox_is_named_once_and_left(small_run, tmp_path, capsys):
    inbox = tmp_path / "run/results/inbox"
    inbox.mkdir(parents=True)
    (inbox / "broken_step_00000002.json").write_text("[]")
    (inbox / "folder_step_00000002.json").mkdir()
    good = {"step": 2, "tokens": 1024, "metrics": {"eval/good/loss": 1.5}}
    (inbox / "good_step_00000002.json").write_text(json.dumps(good))
    assert train.main(configured(Config, small_run)) == 0
    out = capsys.readouterr().out
    assert out.count("broken_step_00000002.json: these results cannot be logged (TypeError") == 1
    assert out.count("folder_step_00000002.json: these results cannot be logged (IsADirectoryError") == 1
    assert lines(tmp_path / "run", evaluations=True) == [{"step": 2, "tokens": 1024, "eval/good/loss": 1.5}]
    assert not (inbox / "good_step_00000002.json").exists()
