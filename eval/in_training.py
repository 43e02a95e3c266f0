"""Benchmarks of a run in training: inside the job, or as Slurm jobs of their own that read its checkpoints."""

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from configs.app import configured, verbatim
from configs.block import to_dict
from configs.errors import ConfigError, each
from configs.load import flatten, shown
from data.tokenizers import Tokenizer
from eval.config import EvalConfig, question
from eval.loading import LoadedRun
from eval.results import collect, inbox_of, pending, save
from model.transformer import Transformer
from training.config import Config
from training.device import Runtime
from training.jsonl import read_lines
from training.metrics import Metrics
from training.ranks import from_main
from training.saver import CheckpointSaver

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "slurm" / "eval.sbatch"
FIXED = ("run", "step")  # of an evaluation that is a benchmark
FIXED_IN_JOB = ("core.kernel", "device", "dtype")  # and of one inside the training job
# Environment variables of this job that would mislead one that it submits.
OWN_VARIABLES = ("SLURM_", "SBATCH_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_")


class Benchmarks:
    """What `trainer.benchmark_every` and `trainer.benchmarks` ask for. ConfigError if a suite is unavailable."""

    def __init__(self, config: Config, runtime: Runtime, say: Callable[[str], None]):
        self.config, self.trainer, self.runtime, self.say = config, config.trainer, runtime, say
        self.run_dir, self.warn_once = Path(config.run.dir), functools.cache(say)
        self.suites: dict[str, EvalConfig] = {}
        if self.trainer.benchmark_every:
            if self.trainer.benchmark_job and not (SCRIPT.exists() and shutil.which("sbatch")):
                raise ConfigError(f"trainer.benchmark_job=true: needs Slurm's sbatch, and {SCRIPT}")
            loaded = each(self._load, self.trainer.benchmarks)
            self.suites = dict(zip(self.trainer.benchmarks, loaded, strict=True))

    def attach(self, model: Transformer, tokenizer: Tokenizer, saver: CheckpointSaver, metrics: Metrics | None, mark):
        """Set what is there only when training starts; `mark(doing)` is called at every forward pass."""
        self.model, self.tokenizer, self.saver, self.metrics, self.mark = model, tokenizer, saver, metrics, mark

    def keep(self, policy: Callable[[list[dict]], set[int]]) -> Callable[[list[dict]], set[int]]:
        """Return a policy of checkpoints that also keeps those which submitted jobs have yet to read."""

        def wanted(manifests: list[dict]) -> set[int]:
            waiting = {int(path.stem.rpartition("_step_")[2]) for path in inbox_of(self.run_dir).glob("*.pending")}
            return policy(manifests) | waiting & {manifest["step"] for manifest in manifests}

        return wanted

    def due(self, step: int) -> bool:
        """Return whether benchmarks follow this step, whose checkpoint must be saved; they always follow the last."""
        return bool(self.suites) and (step % self.trainer.benchmark_every == 0 or step == self.trainer.horizon)

    def before_loop(self, start_step: int) -> None:
        """Run the benchmarks of the step from which the run resumes, if it was interrupted before they ended."""
        is_due = start_step and self.due(start_step) and not self.trainer.benchmark_job
        if is_due and not from_main(lambda: self._logged(start_step)):
            self._run(start_step)

    def after_step(self, step: int, is_preempted: bool = False) -> None:
        """Run or submit the benchmarks that are due after a step that has been saved, or is being saved.

        A run that is pre-empted submits jobs, and runs its own benchmarks when it resumes.
        """
        if not self.due(step):
            return
        if not self.trainer.benchmark_job:
            if not is_preempted:
                self._run(step)
        elif self.saver.finish() and self.runtime.is_main:  # a job reads the checkpoint
            self._submit(step)

    def collect(self) -> None:
        """Log what evaluations of this run have left since, at the steps that they belong to; rank 0 calls this."""
        collect(self.run_dir, self.metrics.log, self.warn_once)

    def _logged(self, step: int) -> bool:
        """Return whether metrics.jsonl has results at this step."""
        lines = read_lines(self.run_dir / "metrics.jsonl")
        return any(key.startswith("eval/") for line in lines if line.get("step") == step for key in line)

    def _arguments(self, suite: str) -> list[str]:
        """Return the arguments of `python -m eval.run`."""
        sizes = [f"limit={shown(self.trainer.benchmark_limit)}", f"batch_size={self.trainer.micro_batch_size}"]
        return [verbatim(f"run={self.run_dir}"), f"suite={suite}", *sizes, *self.trainer.benchmark_overrides]

    def _load(self, name: str) -> EvalConfig:
        """Return what a benchmark evaluates. ConfigError, before training, for data and tasks that are missing, and for
        what an evaluation takes and a benchmark does not."""
        options = configured(EvalConfig, self._arguments(name))
        given = flatten(to_dict(options))
        plain = flatten(to_dict(EvalConfig(suite=options.suite, run=str(self.run_dir))))
        fixed = FIXED if self.trainer.benchmark_job else FIXED + FIXED_IN_JOB
        wrong = [f"{key}={shown(given[key])}" for key in fixed if given[key] != plain[key]]
        if not options.suite.needs_run:
            wrong.append("suite.prefetch=true")
        if wrong:
            raise ConfigError(
                f"trainer.benchmark_overrides: {', '.join(wrong)}: benchmarks take the model as it is trained, at "
                "their step; evaluate it otherwise with python -m eval.run"
            )
        if self.runtime.is_main and not self.trainer.benchmark_job:
            options.suite.check()
        return options

    def _run(self, step: int) -> None:
        """Run the suites on the model as it stands, and log their results.

        Nothing random of training's is touched. A suite that fails costs its results, not the run.
        """
        model, tokens, in_lockstep = self.model, step * self.trainer.tokens_per_step, self.config.deepspeed.stage == 3
        run = LoadedRun(self.run_dir, self.config, step, tokens, model, self.tokenizer, self.runtime, in_lockstep)
        found: dict[str, float] = {}
        hook = model.embedding.register_forward_pre_hook(lambda *_: self.mark(f"step {step}, benchmarks"))
        model.eval()
        for name, options in self.suites.items():
            suite = options.suite
            try:
                with torch.compiler.set_stance("force_eager"):  # a compiled model would be compiled for every length
                    outcome = suite.run(run, options)
                if self.runtime.is_main:
                    save(run, suite.name + question(options), suite.name, outcome, options.limit)
                    scores = outcome.metrics(suite.name)
                    found |= scores
                    first = [f"{key.removeprefix('eval/')} {value:.4f}" for key, value in list(scores.items())[:4]]
                    self.say(f"step {step}, {name}: {', '.join(first)}{', ...' if len(scores) > 4 else ''}")
            except Exception as error:
                self.say(f"step {step}: the benchmark {name} failed, training continues: {error}")
        hook.remove()
        model.train()
        if found:
            self.metrics.log(step, run.tokens, found)

    def _submit(self, step: int) -> None:
        """Submit the suites as jobs on the checkpoint of `step`, which stays until they are done."""
        inbox_of(self.run_dir).mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(OWN_VARIABLES)}
        environment = kept | {"T6_CODE": str(ROOT), "T6_RUN": str(self.run_dir.absolute())}
        for name, options in self.suites.items():
            sbatch = ["sbatch", "--parsable", *self.trainer.benchmark_sbatch, str(SCRIPT)]
            command = [*sbatch, *self._arguments(name), f"step={step}"]
            mark = pending(self.run_dir, options.suite.name, step)
            mark.touch()
            try:
                done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
            except (OSError, subprocess.SubprocessError) as error:
                mark.unlink()
                reason = (getattr(error, "stderr", None) or str(error)).strip()
                self.say(f"step {step}: the benchmark {name} could not be submitted, training continues: {reason}")
            else:
                self.say(f"step {step}: the benchmark {name} is Slurm job {done.stdout.strip()}")
