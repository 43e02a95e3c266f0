"""Jobs on a real cluster. What can run side by side is started together; each test looks at one of the scenarios."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import train
from configs.app import configured
from configs.errors import ConfigError
from data.prepare import prepare
from slurm import status, submit
from slurm.jobs import read_jobs
from tests.conftest import ROOT, SMALL_RUN
from tests.slurm.cluster import Cluster, is_pending
from training.config import Config
from training.jsonl import read_lines

SECONDS = 400  # for one scenario on a busy machine
STEPS, TINY_STEPS = 30, 12
ODD_NAME = 'it\'s a $HOME "run" {of: 1}'
ONE_TASK = ["--ntasks-per-node=1", "--cpus-per-task=1"]
one_at_a_time = threading.Lock()  # Hydra composes one configuration at a time


@dataclass
class Scenarios:
    """What is done on the cluster, each in a thread of its own."""

    cluster: Cluster
    checkout: Path
    edited: Path  # a checkout that a scenario may change
    data: list[str]

    def overrides(self, name: str | None, *more: str, steps: int = STEPS) -> list[str]:
        small = [word for word in SMALL_RUN if not word.startswith(("trainer.max_steps", "trainer.eval_every"))]
        common = [f"trainer.max_steps={steps}", "trainer.eval_every=null", "trainer.samples=0"]
        return [*small, *self.data, *common, *([f"run.name={name}"] if name else []), *more]

    def tiny(self, name: str | None) -> list[str]:
        """The shipped size, under ZeRO-2."""
        small = [word for word in self.overrides(name, steps=TINY_STEPS) if not word.startswith("size.")]
        return [*small, "model=t6", "size=tiny", "deepspeed=zero2", "trainer.micro_batch_size=2"]

    def sbatch(self, *words: str, cwd: Path | None = None) -> str:
        return self.cluster("sbatch", "--parsable", *words, cwd=cwd or self.checkout).strip()

    def submit(self, *words: str, name: str) -> dict[str, str]:
        with one_at_a_time:
            assert submit.main(list(words)) == 0
        return read_jobs(self.run_dir(name))

    def train(self, name: str, *words: str, steps: int = STEPS) -> str:
        """A job of one task, submitted without an evaluation."""
        options = [*ONE_TASK, "--eval=none", *(word for word in words if word.startswith("-"))]
        more = [word for word in words if not word.startswith("-")]
        return self.submit(*options, *self.overrides(name, *more, steps=steps), name=name)["train"]

    def python(self, *words: str) -> None:
        done = subprocess.run(
            [sys.executable, *words], cwd=self.checkout, env=self.cluster.environment, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    def run_dir(self, name: str) -> Path:
        return (self.edited if name == "warned" else self.checkout) / "runs" / name

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted(self.run_dir(name).glob("slurm-[0-9]*.log")))

    def wait_for_steps(self, name: str, count: int) -> None:
        metrics = self.run_dir(name) / "metrics.jsonl"
        self.cluster.wait(lambda: len(read_lines(metrics)) >= count, SECONDS, f"{count} steps of {name}")

    def wait_for_end(self, job: str) -> dict[str, str]:
        self.cluster.wait(lambda: self.cluster.ended(job), SECONDS, f"end of job {job}")
        return self.cluster.job(job)

    def wait_for_end_of(self, name: str) -> None:
        self.cluster.wait(lambda: name not in self.cluster("squeue", "-h", "-o", "%j"), SECONDS, f"end of {name}")

    def warn(self, job: str, pids: list[int]) -> None:
        """What Slurm does before the time limit; returns when it has reached the (stopped) training processes."""
        self.cluster("scancel", "--batch", "-s", "USR1", job)
        self.cluster.wait(lambda: all(is_pending(pid, signal.SIGUSR1) for pid in pids), SECONDS, "pending SIGUSR1")

    # --- the scenarios -----------------------------------------------------------------------------------------------

    def four_tasks(self):
        """slurm.submit, two tasks a node, with words that a shell would take apart; an evaluation follows."""
        odd = ["++deepspeed.config.flops_profiler={enabled: false}", "wandb.tags=[1,b c,'$x']"]
        odd.append("run.name='" + ODD_NAME.replace("'", r"\'") + "'")
        options = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"]
        jobs = self.submit(*options, *self.tiny(None), *odd, name=ODD_NAME)
        return self.wait_for_end(jobs["train"]), self.wait_for_end(jobs["eval"])

    def torchrun(self):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        self.python(*launcher, "train.py", *self.tiny("torchrun"))

    def warned(self):
        """SIGUSR1 in the middle of a run over two nodes, by bare sbatch; then the code in its checkout is broken."""
        job = self.sbatch("--nodes=2", *ONE_TASK, "slurm/train.sbatch", *self.tiny("warned"), cwd=self.edited)
        self.wait_for_steps("warned", 3)
        with self.cluster.held(job) as pids:
            self.warn(job, pids)
            for file in (self.edited / "train.py", self.edited / "slurm/common.sh"):
                file.write_text("raise SystemExit 1")
        return self.wait_for_end(job)

    def first_second(self):
        job = self.train("first_second")
        self.cluster.wait(lambda: "start 1" in self.log("first_second"), SECONDS, "start")
        self.cluster("scancel", "--batch", "-s", "USR1", job)
        return self.wait_for_end(job)

    def during_a_save(self):
        """The process is stopped where a checkpoint has no manifest yet; the signal is there when it goes on."""
        job = self.train("during_a_save", "trainer.checkpoint_every=1", "trainer.keep_checkpoints=100")
        checkpoints, deadline, torn = self.run_dir("during_a_save") / "checkpoints", time.monotonic() + SECONDS, []
        while not torn and time.monotonic() < deadline:
            if unfinished(checkpoints):
                with self.cluster.held(job) as pids:
                    torn = unfinished(checkpoints)
                    if torn:
                        self.warn(job, pids)
        return self.wait_for_end(job), torn

    def preempted(self):
        """A job of a higher partition takes the processors: Slurm gives the run GraceTime and its step a SIGTERM."""
        job = self.train("preempted", "--partition=spare", "--nodelist=node2", "--cpus-per-task=20")
        self.wait_for_steps("preempted", 3)
        with self.cluster.held(job) as pids:
            urgent = ["--partition=urgent", "--nodelist=node2", "--cpus-per-task=20", "--output=/dev/null"]
            other = self.sbatch(*urgent, "--wrap=true")
            self.cluster.wait(lambda: all(is_pending(pid, signal.SIGTERM) for pid in pids), SECONDS, "SIGTERM")
        return self.wait_for_end(job), self.wait_for_end(other)

    def cancelled(self):
        job = self.train("cancelled", "--exclude=node2", steps=100_000)
        self.wait_for_steps("cancelled", 3)
        self.cluster("scancel", job)
        return self.wait_for_end(job)

    def killed_node(self):
        job = self.train("killed_node", "--nodes=2")
        self.cluster.wait((self.run_dir("killed_node") / "latest").exists, SECONDS, "checkpoint")
        with self.cluster.held(job):
            self.cluster.kill_node("node2")
        self.cluster.wait(lambda: self.cluster.job(job)["JobState"] == "PENDING", SECONDS, "requeued job")
        self.cluster.start_node("node2")
        return self.wait_for_end(job)

    def benchmarked(self):
        """Benchmarks as jobs of their own: training is stopped until the first has ended, and finds its results."""
        suite = ["trainer.benchmarks=[builtin_cloze]", "trainer.benchmark_limit=4", "trainer.benchmark_every=20"]
        suite += ["trainer.benchmark_overrides=['suite.tasks=[cloze]']", "trainer.keep_checkpoints=1"]
        suite += ["trainer.benchmark_job=true", "trainer.benchmark_sbatch=['--cpus-per-task=1','--exclude=node2']"]
        job = self.train("benchmarked", "--exclude=node2", *suite, steps=40)
        self.cluster.wait(lambda: "is Slurm job" in self.log("benchmarked"), SECONDS, "benchmark's job")
        with self.cluster.held(job) as held:
            first = self.wait_for_end(re.search(r"is Slurm job (\d+)", self.log("benchmarked"))[1])
            before = read_lines(self.run_dir("benchmarked") / "metrics.jsonl")
        self.wait_for_end(job)
        last = self.wait_for_end(re.findall(r"is Slurm job (\d+)", self.log("benchmarked"))[-1])
        return first, last, bool(held), before

    def sweep(self):
        words = [*self.overrides(None, steps=8), "model=t6,mha", "optim.lr=1e-3,1e-2"]
        self.submit("--exclude=node2", *ONE_TASK, "-m", *words, name="")
        self.wait_for_end_of("sweep")

    def submitit(self):
        launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1"]
        launcher += ["+hydra.launcher.additional_parameters={exclude: node2}", "hydra.sweep.dir=runs/submitit"]
        names = ["model=t6,gqa", "run.dir=runs/submitit/${model.name}"]
        self.python("train.py", "-m", *launcher, *self.overrides(None, steps=4), *names)

    def prepare_array(self):
        folder = self.checkout / "texts"
        folder.mkdir()
        files = sorted(Path(self.data[1].removeprefix("data.dir=")).parent.glob("*.txt"))
        for number in range(5):
            texts = [{"text": path.read_text()} for path in files[number::5]]
            (folder / f"{number}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        words = ["data=files", "data.files=['texts/*.jsonl']", "tokenizer.vocab_size=512", "data.shard_tokens=20000"]
        array = ["--job-name=prepare", "--array=0-1", "--exclude=node2", "--cpus-per-task=1", "slurm/prepare.sbatch"]
        self.sbatch(*array, *words, "data.dir=data/array")
        with one_at_a_time:
            whole = configured(Config, [*words, "data.dir=data/whole", "data.workers=1"])
        prepare(whole.data, whole.tokenizer, progress=False)
        self.wait_for_end_of("prepare")


def unfinished(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("step_*") if not (path / "manifest.json").exists()]


TOGETHER = ("four_tasks", "torchrun", "warned", "first_second", "during_a_save", "preempted")
AFTER_THEM = (
    "killed_node",
    "cancelled",
    "benchmarked",
    "sweep",
    "submitit",
    "prepare_array",
)  # on node1 but the first


@pytest.fixture(scope="module")
def scenarios(cluster, checkout, shell, small_data, tmp_path_factory):
    edited = shutil.copytree(checkout, tmp_path_factory.mktemp("edited") / "t6")
    return Scenarios(cluster, checkout, edited, small_data)


@pytest.fixture(scope="module")
def reference(scenarios, tmp_path_factory):
    """The losses of the same run on one process, undisturbed."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert train.main(configured(Config, [*scenarios.overrides(None), f"run.dir={folder}"])) == 0
    return curve(folder)


@pytest.fixture(scope="module")
def outcome(scenarios, reference):
    """`outcome(name)` is what a scenario returned, or raises what it raised."""
    with ThreadPoolExecutor(len(TOGETHER) + len(AFTER_THEM)) as pool:
        running = {name: pool.submit(getattr(scenarios, name)) for name in TOGETHER}

        def outcome(name: str):
            if name not in running:
                for future in list(running.values()):
                    future.exception()  # nobody else is to be on the node that is killed
                running.update({name: pool.submit(getattr(scenarios, name)) for name in AFTER_THEM})
            return running[name].result()

        yield outcome


def curve(folder: Path) -> dict[int, float]:
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    return {line["step"]: line["train/loss"] for line in lines}


def assert_went_on(scenarios, reference, name: str, job: dict[str, str]) -> None:
    """It ended after one restart, with one log and one unbroken curve: that of the undisturbed run."""
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


def test_a_warned_job_saves_goes_back_and_goes_on_with_its_own_code(outcome, scenarios):
    job = outcome("warned")
    outcome("torchrun")
    assert_went_on(scenarios, curve(scenarios.run_dir("torchrun")), "warned", job)
    assert "SIGUSR1: saved" in scenarios.log("warned")


def test_a_signal_in_the_first_second(outcome, scenarios, reference):
    assert_went_on(scenarios, reference, "first_second", outcome("first_second"))


def test_a_signal_during_a_save(outcome, scenarios, reference):
    job, torn = outcome("during_a_save")
    assert_went_on(scenarios, reference, "during_a_save", job)
    assert torn and (torn[0] / "manifest.json").exists()  # the save was finished first


def test_preemption_with_grace(outcome, scenarios, reference):
    job, other = outcome("preempted")
    assert_went_on(scenarios, reference, "preempted", job)
    assert "SIGTERM: saved" in scenarios.log("preempted") and other["JobState"] == "COMPLETED"


def test_a_cancelled_job_saves_and_stays_cancelled(outcome, scenarios):
    job = outcome("cancelled")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert list(scenarios.run_dir("cancelled").glob("checkpoints/*/manifest.json"))
    found = status.read_status(scenarios.run_dir("cancelled"), {})
    assert found.state == "stopped" and "CANCELLED" in found.problem and found.checkpoint[0] == found.metrics["step"]


def test_a_killed_node(outcome, scenarios, reference):
    assert_went_on(scenarios, reference, "killed_node", outcome("killed_node"))


def test_benchmarks_as_jobs_are_logged_at_their_steps(outcome, scenarios):
    first, last, held, before = outcome("benchmarked")
    assert held and first["JobState"] == last["JobState"] == "COMPLETED", scenarios.log("benchmarked")
    assert not any("eval/cloze/acc_norm" in line for line in before)  # the run has one writer
    folder = scenarios.run_dir("benchmarked")
    lines = read_lines(folder / "metrics.jsonl")
    scored = [line["step"] for line in lines if "eval/cloze/acc_norm" in line]
    assert scored == [20, 40] and len(curve(folder)) == 40
    assert json.loads((folder / "results/builtin_cloze.json").read_text())["step"] == 40
    assert len(list(folder.glob("slurm-eval-*.log"))) == 2
    assert not list((folder / "results/inbox").iterdir())


def test_a_sweep_is_an_array_and_each_run_is_evaluated(outcome, scenarios):
    outcome("sweep")
    folders = sorted(path.parent for path in scenarios.run_dir("").glob("*_tiny_*/job.json"))
    assert [folder.name.split("_")[0] for folder in folders] == ["mha", "mha", "t6", "t6"]
    for folder in folders:
        assert json.loads((folder / "results/perplexity.json").read_text())["step"] == 8
        assert list(folder.glob("slurm-[0-9]*.log")) and list(folder.glob("slurm-eval-*.log"))
    configs = [OmegaConf.load(folder / "config.yaml") for folder in folders]
    assert {config.optim.lr for config in configs} == {1e-3, 1e-2}
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


@pytest.mark.parametrize(
    ("site", "devices"), [({}, ["0 0,1", "1 0,1"]), ({"SLURM_GPU_BIND": "map_gpu:0,1"}, ["0 0", "0 1"])]
)
def test_a_task_uses_the_gpu_of_its_rank_or_the_only_one_it_sees(scenarios, tmp_path, monkeypatch, site, devices):
    python, code = tmp_path / "python", tmp_path / "run/code/0"
    python.write_text('#!/bin/sh\necho "device $LOCAL_RANK $CUDA_VISIBLE_DEVICES of $RANK/$WORLD_SIZE"\n')
    python.chmod(0o755)
    shutil.copytree(ROOT / "slurm", code / "slurm", ignore=shutil.ignore_patterns("site.env"))
    for key, value in ({"T6_CODE": str(code), "PYTHON": str(python)} | site).items():
        monkeypatch.setitem(scenarios.cluster.environment, key, value)
    job = scenarios.sbatch("--ntasks-per-node=2", "--cpus-per-task=1", "slurm/train.sbatch")
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
