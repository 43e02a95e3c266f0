"""Benchmarks of a run in training: inside the job, or as Slurm jobs of their own that read its checkpoints."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from configs.app import compose
from configs.errors import ConfigError
from configs.load import load_flat
from configs.schema import Config
from configs.schema_eval import EvalConfig
from data.tokenizers import Tokenizer
from eval.loading import LoadedRun
from eval.results import collect, inbox_of, save
from model.transformer import Transformer
from training.metrics import read_metrics
from training.setup import Runtime

CODE = Path(__file__).resolve().parent.parent
SCRIPT = CODE / "slurm" / "eval.sbatch"
MACHINE = ("device", "dtype")  # of a job of its own
OF_THE_JOB = ("SLURM_", "SBATCH_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_")


class Benchmarks:
    """What `trainer.benchmark_every` and `trainer.benchmarks` ask for. ConfigError where a suite cannot be had."""

    def __init__(self, config: Config, runtime: Runtime, say: Callable[[str], None]):
        self.config, self.runtime, self.say = config, runtime, say
        self.trainer = trainer = config.trainer
        self.every = trainer.benchmark_every if trainer.benchmarks else None
        self.inbox = inbox_of(config.run.dir)
        self.suites: dict[str, EvalConfig] = {}
        self.said: set[str] = set()
        if not self.every:
            return
        if trainer.benchmark_job and not (SCRIPT.exists() and shutil.which("sbatch")):
            raise ConfigError(f"trainer.benchmark_job=true: needs Slurm's sbatch, and {SCRIPT}")
        for name in trainer.benchmarks:
            self.suites[name] = load_flat(compose("eval", self.arguments(name)), EvalConfig)
            self.check_arguments(self.suites[name])
        if runtime.is_main and not trainer.benchmark_job:
            self.check()

    def arguments(self, suite: str) -> list[str]:
        """Of `python -m eval.run`."""
        trainer = self.trainer
        limit = [] if trainer.benchmark_limit is None else [f"limit={trainer.benchmark_limit}"]
        return [
            f"run={self.config.run.dir}", f"suite={suite}", *limit, f"batch_size={trainer.micro_batch_size}",
            *trainer.benchmark_overrides,
        ]  # fmt: skip

    def check_arguments(self, suite: EvalConfig) -> None:
        """ConfigError for what an evaluation takes and a benchmark does not."""
        plain = EvalConfig(suite.suite, run=self.config.run.dir)
        fixed = ["run", "step", "rope_scaling", "rope_factor", *([] if self.trainer.benchmark_job else MACHINE)]
        wrong = [f"{key}={getattr(suite, key)}" for key in fixed if getattr(suite, key) != getattr(plain, key)]
        wrong += ["suite.prefetch=true"] * getattr(suite.suite, "prefetch", False)
        if wrong:
            raise ConfigError(
                f"trainer.benchmark_overrides: {', '.join(wrong)}: benchmarks take the model as it is trained, at "
                "their step; evaluate it otherwise with python -m eval.run"
            )

    def check(self) -> None:
        """Find now, and not in the middle of the run, what data and tasks are missing."""
        from eval.run import check_suite

        for suite in self.suites.values():
            check_suite(suite.suite)

    def due(self, step: int) -> bool:
        """The last step counts too."""
        return bool(self.every) and (step % self.every == 0 or step == self.trainer.horizon)

    def job_due(self, step: int) -> bool:
        return self.trainer.benchmark_job and self.due(step)

    def run_due(self, step: int) -> bool:
        return not self.trainer.benchmark_job and self.due(step)

    def owed(self, step: int) -> bool:
        """Whether the run was ended at this step before its benchmarks were; rank 0 knows."""
        if not (step and self.run_due(step)):
            return False
        lines = read_metrics(Path(self.config.run.dir) / "metrics.jsonl")
        return not any(line["step"] == step and any(key.startswith("eval/") for key in line) for line in lines)

    def run(
        self, model: Transformer, tokenizer: Tokenizer, step: int, alive: Callable[[str], None] = lambda doing: None
    ) -> dict[str, float]:
        """Run the suites on the model as it stands; their results by the names of metrics.jsonl (rank 0 has them).

        Nothing random of training's is touched. A suite that fails costs its results, not the run. `alive` is told of
        every forward pass.
        """
        from eval.run import run_suite

        here = LoadedRun(
            Path(self.config.run.dir), self.config, step, step * self.trainer.tokens_per_step, model,
            tokenizer, self.runtime, lockstep=self.config.deepspeed.stage == 3,
        )  # fmt: skip
        found: dict[str, float] = {}
        training = model.training
        model.eval()
        sign = model.register_forward_pre_hook(lambda *_: alive(f"step {step}, benchmarks"))
        for name, suite in self.suites.items():
            try:
                with torch.compiler.set_stance("force_eager"):  # a compiled model would be compiled for every length
                    outcome = run_suite(here, suite)
                if self.runtime.is_main:
                    save(here, suite.suite.name, outcome, suite.limit)
                    scores = outcome.metrics(suite.suite.name)
                    shown = [f"{key.removeprefix('eval/')} {value:.4f}" for key, value in list(scores.items())[:4]]
                    self.say(f"step {step}, {name}: {', '.join(shown)}{', ...' * (len(scores) > 4)}")
                    found |= scores
            except Exception as error:
                self.say(f"step {step}: the benchmark {name} failed, training goes on: {error}")
        sign.remove()
        model.train(training)
        return found

    # --- as jobs of their own
    def submit(self, step: int) -> None:
        """Submit the suites on the checkpoint of `step`, which stays until they are done; rank 0 does it."""
        if not self.runtime.is_main:
            return
        self.inbox.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not of_the_job(key)}
        environment |= {"T6_CODE": str(CODE), "T6_RUN": str(Path(self.config.run.dir).absolute())}
        for name, suite in self.suites.items():
            options = ["--parsable", *self.trainer.benchmark_sbatch, str(SCRIPT)]
            command = ["sbatch", *options, *self.arguments(name), f"step={step}"]
            mark = pending(self.inbox, suite.suite.name, step)
            mark.touch()
            try:
                done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
            except (OSError, subprocess.SubprocessError) as error:
                mark.unlink()
                reason = (getattr(error, "stderr", None) or str(error)).strip()
                self.say(f"step {step}: the benchmark {name} could not be submitted, training goes on: {reason}")
                continue
            self.say(f"step {step}: the benchmark {name} is Slurm job {done.stdout.strip()}")

    def keep(self, policy: Callable[[list[dict]], set[int]]) -> Callable[[list[dict]], set[int]]:
        """A policy of checkpoints that keeps those which jobs have yet to read, too."""

        def wanted(manifests: list[dict]) -> set[int]:
            waiting = {int(path.stem.rpartition("_step_")[2]) for path in self.inbox.glob("*.pending")}
            return policy(manifests) | waiting & {manifest["step"] for manifest in manifests}

        return wanted

    def collect(self, log: Callable[[int, int, dict], None]) -> None:
        """Pass on what evaluations of this run have left since, at the steps that they belong to; rank 0 does it."""
        collect(self.config.run.dir, log, self.warn)

    def warn(self, line: str) -> None:
        """Say it, once."""
        if line not in self.said:
            self.said.add(line)
            self.say(line)


def of_the_job(variable: str) -> bool:
    """Whether an environment variable belongs to this job, and would mislead one that it submits."""
    return variable != "SLURM_CONF" and variable.startswith(OF_THE_JOB)


def pending(inbox: Path, suite: str, step: int) -> Path:
    """The mark of a job that has not ended yet."""
    return inbox / f"{suite}_step_{step:08d}.pending"
