"""What is done on the cluster: each scenario submits jobs, disturbs them, and returns how they ended."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from configs.app import configured
from data.prepare import prepare
from slurm import submit
from slurm.job_files import read_jobs
from tests.conftest import SMALL_RUN
from tests.slurm.cluster import Cluster, is_pending
from training.config import Config
from training.metrics import read_lines

SECONDS = 400  # for one scenario on a busy machine
STEPS, TINY_STEPS = 30, 12
ODD_NAME = 'it\'s a $HOME "run" {of: 1} at 50% #2'
ONE_TASK = ["--ntasks-per-node=1", "--cpus-per-task=1"]
one_at_a_time = threading.Lock()  # Hydra composes one configuration at a time


@dataclass
class Scenarios:
    """The scenarios, which may run in threads side by side."""

    cluster: Cluster
    checkout: Path
    edited: Path  # a checkout that a scenario may change
    data: list[str]

    def overrides(self, name: str | None, *more: str, steps: int = STEPS) -> list[str]:
        small = [word for word in SMALL_RUN if not word.startswith(("trainer.max_steps", "trainer.eval_every"))]
        common = [f"trainer.max_steps={steps}", "trainer.eval_every=null", "trainer.samples=0"]
        return [*small, *self.data, *common, *([f"run.name={name}"] if name else []), *more]

    def tiny(self, name: str | None) -> list[str]:
        """Return overrides for a run of the shipped tiny size, under ZeRO-2."""
        small = [word for word in self.overrides(name, steps=TINY_STEPS) if not word.startswith("size.")]
        return [*small, "model=t6", "size=tiny", "deepspeed=zero2", "trainer.micro_batch_size=2"]

    def sbatch(self, *words: str, cwd: Path | None = None) -> str:
        return self.cluster("sbatch", "--parsable", *words, cwd=cwd or self.checkout).strip()

    def submit(self, *words: str, name: str) -> dict[str, str]:
        with one_at_a_time:
            assert submit.main(list(words)) == 0
        return read_jobs(self.run_dir(name))

    def train(self, name: str, *words: str, steps: int = STEPS) -> str:
        """Submit a job of one task without an evaluation, and return its id."""
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
        """Send Slurm's warning of the time limit; return when it has reached the stopped training processes."""
        self.cluster("scancel", "--batch", "-s", "USR1", job)
        self.cluster.wait(lambda: all(is_pending(pid, signal.SIGUSR1) for pid in pids), SECONDS, "pending SIGUSR1")

    # The scenarios

    def four_tasks(self):
        """Submit two tasks on each node, with words that a shell would split, and an evaluation."""
        odd = ["++deepspeed.config.flops_profiler={enabled: false}", "wandb.tags=[1,b c,'$x']"]
        odd.append("run.name='" + ODD_NAME.replace("'", r"\'") + "'")
        options = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"]
        jobs = self.submit(*options, *self.tiny(None), *odd, name=ODD_NAME)
        return self.wait_for_end(jobs["train"]), self.wait_for_end(jobs["eval"])

    def torchrun(self):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        self.python(*launcher, "train.py", *self.tiny("torchrun"))

    def warned(self):
        """Warn a run on two nodes, submitted by bare sbatch, and break the code in its checkout meanwhile."""
        job = self.sbatch("--nodes=2", *ONE_TASK, "slurm/train.sbatch", *self.tiny("warned"), cwd=self.edited)
        self.wait_for_steps("warned", 3)
        with self.cluster.held(job) as pids:
            self.warn(job, pids)
            for file in (self.edited / "train.py", self.edited / "slurm/common.sh"):
                file.write_text("raise SystemExit 1")
        return self.wait_for_end(job)

    def first_second(self):
        """Warn a job when its script has just started."""
        job = self.train("first_second")
        self.cluster.wait(lambda: "start 1" in self.log("first_second"), SECONDS, "start")
        self.cluster("scancel", "--batch", "-s", "USR1", job)
        return self.wait_for_end(job)

    def during_a_save(self):
        """Stop the process while a checkpoint has no manifest yet; the warning is pending when it continues."""
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
        """Submit a job to a higher partition: Slurm sends the steps of the run a SIGTERM, and GraceTime begins."""
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
        """Benchmark in jobs of their own; training is stopped until the first has ended, and finds its results."""
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
        words = [*self.overrides(None, steps=8), "model=t6,mha"]
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
