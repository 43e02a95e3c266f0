"""Jobs on a real cluster. Scenarios that can run side by side are started together; each test looks at one of them."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import train
from configs.app import configured
from configs.errors import ConfigError
from slurm import status, submit
from tests.conftest import ROOT
from tests.slurm.scenarios import ODD_NAME, ONE_TASK, TINY_STEPS, Scenarios, one_at_a_time
from training.config import Config
from training.jsonl import read_lines

TOGETHER = ("four_tasks", "torchrun", "warned", "first_second", "during_a_save", "preempted")
AFTER_THEM = ("killed_node", "cancelled", "benchmarked", "sweep", "submitit", "prepare_array")  # most on node1 alone


@pytest.fixture(scope="module")
def scenarios(cluster, checkout, shell, small_data, tmp_path_factory):
    edited = shutil.copytree(checkout, tmp_path_factory.mktemp("edited") / "t6")
    return Scenarios(cluster, checkout, edited, small_data)


@pytest.fixture(scope="module")
def reference(scenarios, tmp_path_factory):
    """Return the losses of the same run on one process, undisturbed."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert train.main(configured(Config, [*scenarios.overrides(None), f"run.dir={folder}"])) == 0
    return curve(folder)


@pytest.fixture(scope="module")
def outcome(scenarios, reference):
    """Return a function of a scenario's name that returns what the scenario returned, or raises what it raised."""
    with ThreadPoolExecutor(len(TOGETHER) + len(AFTER_THEM)) as pool:
        running = {name: pool.submit(getattr(scenarios, name)) for name in TOGETHER}

        def outcome(name: str):
            if name not in running:
                for future in list(running.values()):
                    future.exception()  # wait: no other job may be on the node that is killed
                running.update({name: pool.submit(getattr(scenarios, name)) for name in AFTER_THEM})
            return running[name].result()

        yield outcome


def curve(folder: Path) -> dict[int, float]:
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    return {line["step"]: line["train/loss"] for line in lines}


def assert_resumed(scenarios, reference, name: str, job: dict[str, str]) -> None:
    """Check that a job ended after one restart, with one log, and with the curve of the undisturbed run."""
    log = scenarios.log(name)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert re.findall(r"start (\d+), ", log) == ["1", "2"]
    assert curve(scenarios.run_dir(name)) == pytest.approx(reference, abs=1e-4)


def test_four_tasks_on_two_nodes_train_as_torchrun_does(outcome, scenarios):
    outcome("torchrun")
    job, _ = outcome("four_tasks")
    assert (job["JobState"], job["NumTasks"]) == ("COMPLETED", "4"), scenarios.log(ODD_NAME)
    expected = curve(scenarios.run_dir("torchrun"))
    assert len(expected) == TINY_STEPS
    assert curve(scenarios.run_dir(ODD_NAME)) == pytest.approx(expected, abs=1e-4)


def test_overrides_arrive_as_typed_and_evaluation_follows(outcome, scenarios):
    _, evaluation = outcome("four_tasks")
    folder = scenarios.run_dir(ODD_NAME)
    config = OmegaConf.load(folder / "config.yaml")
    assert config.run.name == ODD_NAME and list(config.wandb.tags) == ["1", "b c", "$x"]
    assert config.deepspeed.config.flops_profiler == {"enabled": False}
    assert evaluation["JobState"] == "COMPLETED", "".join(p.read_text() for p in folder.glob("slurm-eval-*.log"))
    assert json.loads((folder / "results/perplexity.json").read_text())["step"] == TINY_STEPS


def test_a_warned_job_saves_is_requeued_and_resumes_with_its_own_code(outcome, scenarios):
    job = outcome("warned")
    outcome("torchrun")
    assert_resumed(scenarios, curve(scenarios.run_dir("torchrun")), "warned", job)
    assert "SIGUSR1: saved" in scenarios.log("warned")


def test_a_signal_in_the_first_second(outcome, scenarios, reference):
    assert_resumed(scenarios, reference, "first_second", outcome("first_second"))


def test_a_signal_during_a_save(outcome, scenarios, reference):
    job, torn = outcome("during_a_save")
    assert_resumed(scenarios, reference, "during_a_save", job)
    assert torn and (torn[0] / "manifest.json").exists()  # the save was finished first


def test_preemption_with_grace(outcome, scenarios, reference):
    job, other = outcome("preempted")
    assert_resumed(scenarios, reference, "preempted", job)
    assert "SIGTERM: saved" in scenarios.log("preempted") and other["JobState"] == "COMPLETED"


def test_a_cancelled_job_saves_and_stays_cancelled(outcome, scenarios):
    job = outcome("cancelled")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert list(scenarios.run_dir("cancelled").glob("checkpoints/*/manifest.json"))
    found = status.read_status(scenarios.run_dir("cancelled"), {})
    assert (
        found.state == "stopped" and "CANCELLED" in found.problems[0] and found.checkpoint[0] == found.metrics["step"]
    )


def test_a_killed_node(outcome, scenarios, reference):
    assert_resumed(scenarios, reference, "killed_node", outcome("killed_node"))


def test_benchmarks_as_jobs_are_logged_at_their_steps(outcome, scenarios):
    first, last, held, before = outcome("benchmarked")
    assert held and first["JobState"] == last["JobState"] == "COMPLETED", scenarios.log("benchmarked")
    assert not any("eval/cloze/acc_norm" in line for line in before)  # the run has one writer
    folder = scenarios.run_dir("benchmarked")
    lines = read_lines(folder / "metrics.jsonl")
    scored = [line["step"] for line in lines if "eval/cloze/acc_norm" in line]
    assert scored == [20, 40] and len(curve(folder)) == 40
    assert json.loads((folder / "results/builtin_cloze_limit=4_tasks=cloze.json").read_text())["step"] == 40
    assert len(list(folder.glob("slurm-eval-*.log"))) == 2
    assert not list((folder / "results/inbox").iterdir())


def test_a_sweep_is_an_array_and_each_run_is_evaluated(outcome, scenarios):
    outcome("sweep")
    folders = sorted(path.parent for path in scenarios.run_dir("").glob("*_tiny_*/job.json"))
    assert [folder.name.split("_")[0] for folder in folders] == ["mha", "t6"]
    for folder in folders:
        assert json.loads((folder / "results/perplexity.json").read_text())["step"] == 8
        assert list(folder.glob("slurm-[0-9]*.log")) and list(folder.glob("slurm-eval-*.log"))
    configs = [OmegaConf.load(folder / "config.yaml") for folder in folders]
    assert len({config.wandb.group for config in configs}) == 1
    logs = scenarios.run_dir(".slurm").glob("sweep-*/slurm-compare-*.log")
    assert list(scenarios.run_dir("").glob("sweep-*/compare/report.md")), "".join(path.read_text() for path in logs)


def refused(scenarios, words: list[str], match: str) -> None:
    with one_at_a_time, pytest.raises(ConfigError, match=match):
        submit.main([*ONE_TASK, *scenarios.overrides("refused"), *words])
    assert not scenarios.run_dir("refused").exists() and "refused" not in scenarios.cluster("squeue", "-h", "-o", "%j")


def test_mistakes_are_refused_before_the_queue(scenarios):
    refused(scenarios, ["--partition=nowhere"], "sbatch refuses the job: .*invalid partition.*--partition=nowhere")
    three = ["--nodes=3", "trainer.global_batch_size=12"]
    refused(scenarios, three, "sbatch refuses the job: .*(Node count|not available).*--nodes=3")
    refused(scenarios, ["optim.lrr=1"], "optim.lrr: unknown key; did you mean optim.lr?")
    refused(scenarios, ["data.dir=nothing"], "data.dir=nothing: not prepared: run `python -m data.prepare data=files")
    refused(scenarios, ["--ntasks-per-node=3"], "is not a multiple of trainer.micro_batch_size=4 x 3 processes")


def test_a_run_in_the_queue_is_not_submitted_again(scenarios, capsys):
    job = scenarios.train("waiting", "--hold")
    with one_at_a_time, pytest.raises(ConfigError, match=f"runs/waiting: is in the queue already, as job {job}"):
        submit.main([*ONE_TASK, *scenarios.overrides("waiting")])
    capsys.readouterr()
    assert status.main(["runs/waiting"]) == 0
    shown = capsys.readouterr().out
    assert "pending" in shown and "waits: JobHeldUser" in shown
    scenarios.cluster("scancel", job)


def test_a_script_by_itself_is_the_job_that_was_submitted(scenarios, monkeypatch):
    monkeypatch.setenv("SBATCH_TIMELIMIT", "3:00:00")
    name, comment = "it's 100% #1", "a 'b' \\"
    options = ["--hold", "--nodes=2", "--cpus-per-task=3", "--partition=spare", f"--comment={comment}"]
    job = scenarios.train(name, *options)
    monkeypatch.delenv("SBATCH_TIMELIMIT")
    by_hand = scenarios.sbatch(str(scenarios.run_dir(name) / "train.sbatch"))

    def known(job: str) -> dict[str, str]:
        text = scenarios.cluster("scontrol", "show", "job", job).replace(job, "ID")
        lines = dict(line.strip().partition("=")[::2] for line in text.splitlines())
        return {key: line for key, line in lines.items() if "Time" not in key or key == "RunTime"}  # with TimeLimit

    submitted = known(job)
    assert submitted == known(by_hand)
    assert submitted["JobId"] == f"ID JobName={name}" and submitted["Comment"] == comment
    assert "TimeLimit=03:00:00" in submitted["RunTime"] and submitted["NumNodes"].startswith("2")
    scenarios.cluster("scancel", job, by_hand)


@pytest.mark.parametrize(
    ("site", "devices"), [({}, ["0 0,1", "1 0,1"]), ({"SLURM_GPU_BIND": "map_gpu:0,1"}, ["0 0", "0 1"])]
)
def test_a_task_uses_the_gpu_of_its_rank_or_the_only_one_it_sees(scenarios, tmp_path, monkeypatch, site, devices):
    python, code, checkout = tmp_path / "python", tmp_path / "run/code/0", tmp_path / "checkout"
    python.write_text('#!/bin/sh\necho "device $LOCAL_RANK $CUDA_VISIBLE_DEVICES of $RANK/$WORLD_SIZE"\n')
    python.chmod(0o755)
    for folder in (code, checkout):
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.env"))
    for key, value in ({"T6_CODE": str(code), "PYTHON": str(python)} | site).items():
        monkeypatch.setitem(scenarios.cluster.environment, key, value)
    job = scenarios.sbatch("--ntasks-per-node=2", "--cpus-per-task=1", "slurm/train.sbatch", cwd=checkout)
    scenarios.wait_for_end(job)
    log = (tmp_path / f"run/slurm-{job}.log").read_text()
    assert sorted(re.findall(r"device (.*) of \d/2", log)) == devices, log


def test_hydra_submitit_launcher(outcome, scenarios):
    outcome("submitit")
    for model in ("t6", "gqa"):
        assert len(curve(scenarios.run_dir(f"submitit/{model}"))) == 4


def test_data_prepared_by_an_array_is_the_same(outcome, scenarios):
    outcome("prepare_array")
    whole, array = (scenarios.checkout / "data" / name for name in ("whole", "array"))
    contents = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {path.name: path.read_bytes() for path in array.iterdir()} == contents and len(contents) > 20
