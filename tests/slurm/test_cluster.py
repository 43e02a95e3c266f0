"""Jobs on a real cluster. What can run side by side is started together; each test then looks at one of the scenarios."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import train
from configs.app import compose
from configs.load import load
from tests.conftest import ROOT, SMALL_RUN
from tests.slurm.cluster import Cluster, is_pending
from training.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("slurm")]

SECONDS = 240  # for one scenario on a busy machine
STEPS = 40
ODD_NAME = "it's a $HOME \"run\" {of: 1}"
ONE_TASK = ["--ntasks-per-node=1", "--cpus-per-task=1"]


@dataclass
class Scenarios:
    """What is done on the cluster, each in a thread of its own."""

    cluster: Cluster
    checkout: Path
    data: list[str]

    def overrides(self, name: str, *more: str, steps: int = STEPS) -> list[str]:
        small = [word for word in SMALL_RUN if not word.startswith(("trainer.max_steps", "trainer.eval_every"))]
        common = [f"trainer.max_steps={steps}", "trainer.eval_every=20", "trainer.samples=0"]
        return [*small, *self.data, *common, *([f"run.name={name}"] if name else []), *more]

    def sbatch(self, *words: str) -> str:
        return self.cluster("sbatch", "--parsable", *words, cwd=self.checkout).strip()

    def python(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, *words], cwd=cwd or self.checkout, env=self.cluster.environment, capture_output=True,
            text=True, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def run_dir(self, name: str) -> Path:
        return self.checkout / "runs" / name

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted(self.run_dir(name).glob("slurm-[0-9]*.log")))

    def wait_for_steps(self, name: str, count: int) -> None:
        metrics = self.run_dir(name) / "metrics.jsonl"
        self.cluster.wait(lambda: len(read_metrics(metrics)) >= count, SECONDS, f"{count} steps of {name}")

    def wait_for_end(self, job: str) -> dict[str, str]:
        self.cluster.wait(lambda: self.cluster.ended(job), SECONDS, f"end of job {job}")
        return self.cluster.job(job)

    def send(self, job: str, pids: list[int]) -> None:
        """What Slurm does before the time limit; returns when it has reached the (stopped) training processes."""
        self.cluster("scancel", "--batch", "-s", "USR1", job)
        self.cluster.wait(lambda: all(is_pending(pid, signal.SIGUSR1) for pid in pids), SECONDS, "pending SIGUSR1")

    # --- the scenarios -------------------------------------------------------------------------------------------

    def two_nodes(self):
        """Bare sbatch, one task a node."""
        words = ["--nodes=2", *ONE_TASK, "slurm/train.sbatch", *self.tiny("two")]
        return self.wait_for_end(self.sbatch(*words))

    def four_tasks(self):
        """slurm.submit, two tasks a node, with words that a shell or Hydra would like to take apart; evaluation after."""
        odd = ["++deepspeed.config.flops_profiler={enabled: false}", "wandb.tags=[1,b c,'$x']"]
        odd.append("run.name='" + ODD_NAME.replace("'", r"\'") + "'")
        options = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"]
        said = self.python("-m", "slurm.submit", *options, *self.tiny(None), *odd).stdout
        train_job, eval_job = re.findall(r"as job (\d+)", said)
        return said, self.wait_for_end(train_job), self.wait_for_end(eval_job)

    def tiny(self, name: str | None) -> list[str]:
        small = [word for word in self.overrides(name, steps=6) if not word.startswith("size.")]
        return [*small, "model=t6", "size=tiny", "deepspeed=zero2", "trainer.micro_batch_size=2"]

    def torchrun(self):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *self.tiny("torchrun")]
        self.python(*words)

    def warned(self):
        """SIGUSR1 in the middle of a run over two nodes; meanwhile the checkout is edited."""
        job = self.sbatch("--nodes=2", *ONE_TASK, "slurm/train.sbatch", *self.overrides("warned"))
        self.wait_for_steps("warned", 3)
        with self.cluster.held(job) as pids:
            self.send(job, pids)
        return self.wait_for_end(job)

    def first_second(self):
        job = self.sbatch(*ONE_TASK, "slurm/train.sbatch", *self.overrides("first_second"))
        self.cluster.wait(lambda: "start 1" in self.log("first_second"), SECONDS, "start")
        self.cluster("scancel", "--batch", "-s", "USR1", job)
        return self.wait_for_end(job)

    def during_a_save(self):
        """The process is stopped where a checkpoint has no manifest yet; the signal is there when it goes on."""
        more = ["trainer.checkpoint_every=1", "trainer.keep_checkpoints=100"]
        job = self.sbatch(*ONE_TASK, "slurm/train.sbatch", *self.overrides("during_a_save", *more))
        self.wait_for_steps("during_a_save", 1)
        checkpoints, deadline = self.run_dir("during_a_save") / "checkpoints", time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if not unfinished(checkpoints):
                continue
            with self.cluster.held(job) as pids:
                torn = unfinished(checkpoints)
                if torn:
                    self.send(job, pids)
                    break
        return self.wait_for_end(job), torn

    def preempted(self):
        """A job of a higher partition takes the processors; Slurm gives the run GraceTime and sends SIGTERM to its step."""
        spare = ["--partition=spare", "--nodelist=node2", "--ntasks-per-node=1", "--cpus-per-task=20"]
        job = self.sbatch(*spare, "slurm/train.sbatch", *self.overrides("preempted"))
        self.wait_for_steps("preempted", 3)
        with self.cluster.held(job) as pids:
            urgent = ["--partition=urgent", "--nodelist=node2", "--cpus-per-task=20", "--output=/dev/null"]
            other = self.sbatch(*urgent, "--wrap=true")
            self.cluster.wait(lambda: all(is_pending(pid, signal.SIGTERM) for pid in pids), SECONDS, "SIGTERM")
        return self.wait_for_end(job), self.wait_for_end(other)

    def cancelled(self):
        job = self.sbatch(*ONE_TASK, "slurm/train.sbatch", *self.overrides("cancelled", steps=100_000))
        self.wait_for_steps("cancelled", 3)
        self.cluster("scancel", job)
        return self.wait_for_end(job)

    def killed_node(self):
        job = self.sbatch("--nodes=2", *ONE_TASK, "slurm/train.sbatch", *self.overrides("killed_node"))
        self.cluster.wait((self.run_dir("killed_node") / "latest").exists, SECONDS, "checkpoint")
        with self.cluster.held(job):
            self.cluster.kill_node("node2")
        self.cluster.wait(lambda: self.cluster.job(job)["JobState"] == "PENDING", SECONDS, "requeued job")
        self.cluster.start_node("node2")
        return self.wait_for_end(job)

    def sweep(self):
        words = ["--exclude=node2", "--ntasks-per-node=1", "--cpus-per-task=1", "-m", *self.overrides(None, steps=8)]
        said = self.python("-m", "slurm.submit", *words, "model=t6,mha", "optim.lr=1e-3,1e-2").stdout
        jobs = dict(re.findall(r"(\w+) as job (\d+)", said))
        for job in jobs.values():
            self.cluster.wait(lambda job=job: not self.cluster("squeue", "-h", "-j", job).strip(), SECONDS, f"end of {job}")
        return said, jobs

    def submitit(self):
        launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1"]
        launcher += ["+hydra.launcher.additional_parameters={exclude: node2}", "hydra.sweep.dir=runs/submitit"]
        names = ["model=t6,gqa", "run.dir=runs/submitit/${model.name}"]
        return self.python("train.py", "-m", *launcher, *self.overrides(None, steps=4), *names)

    def prepare_array(self):
        folder = self.checkout / "texts"
        folder.mkdir()
        files = sorted(Path(self.data[1].removeprefix("data.dir=")).parent.glob("*.txt"))
        for number in range(6):
            texts = [{"text": path.read_text()} for path in files[number::6]]
            (folder / f"{number}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        words = ["data=files", "data.files=['texts/*.jsonl']", "tokenizer.vocab_size=512", "data.shard_tokens=20000"]
        array = ["--array=0-2", "--exclude=node2", "--cpus-per-task=1", "slurm/prepare.sbatch"]
        job = self.sbatch(*array, *words, "data.dir=data/array")
        self.python("-m", "data.prepare", *words, "data.dir=data/whole", "data.workers=1")
        self.cluster.wait(lambda: not self.cluster("squeue", "-h", "-j", job).strip(), SECONDS, "end of the array")
