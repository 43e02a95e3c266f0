"""The configuration of a training run: its own blocks, the whole, and what of it makes a run that run."""

import difflib
import hashlib
import json
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from configs.app import choices
from configs.block import Block, to_dict
from configs.errors import ConfigError, Mistakes, did_you_mean, each
from configs.kinds import (
    LONGEST_PART,
    LONGEST_TEXT,
    MOST_SEQUENCES,
    MOST_STEPS,
    Name,
    OptionalFolder,
    OptionalPath,
    has_controls,
    plain_name,
)
from configs.load import Command, flatten, shown, without
from data.config import DataConfig, TokenizerConfig, check_vocabulary, fill_data_dir
from data.sources.base import source_of
from model.attention.base import AttentionConfig, AttentionCore
from model.counting.match import decide
from model.transformer import SizeConfig, TransformerConfig
from training.device import Device, Dtype, Runtime, find_runtime
from training.optim import WHOLE_MATRICES, OptimConfig, ScheduleConfig
from training.stored import last_step

# DeepSpeed's keys that would contradict a key of ours, and ours.
REFUSED_DEEPSPEED_KEYS = {
    "train_batch_size": "trainer.global_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_size",
    "gradient_accumulation_steps": "trainer.global_batch_size (the accumulation steps follow from the batch sizes)",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "schedule",
    "fp16": "trainer.dtype",
    "amp": "trainer.dtype",
    "bfloat16": "deepspeed.config.bf16, its present name, or trainer.dtype",
    "torch_autocast": "trainer.dtype",
}

# DeepSpeed ignores a key that it does not know, so `zero_optimisation` would train at stage 0; and what it knows it may
# read only in the middle of a run.
DEEPSPEED_KINDS = {
    "a mapping": (
        "activation_checkpointing", "aio", "bf16", "comms_logger", "compression_training", "curriculum_learning",
        "data_efficiency", "data_types", "elasticity", "flops_profiler", "tensorboard", "zero_optimization",
    ),
    "true or false": (
        "dump_state", "memory_breakdown", "prescale_gradients", "sparse_gradients", "wall_clock_breakdown",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    ),
    "a positive number": ("gradient_predivide_factor", "steps_per_print"),
    "fp32, fp16 or bf16": ("communication_data_type",),
}  # fmt: skip
DEEPSPEED_KEYS = {key: kind for kind, keys in DEEPSPEED_KINDS.items() for key in keys}
IS_OF_KIND = {
    "a mapping": lambda value: isinstance(value, dict),
    "true or false": lambda value: isinstance(value, bool),
    "a positive number": lambda value: type(value) in (int, float) and 0 < value < math.inf,
    "fp32, fp16 or bf16": lambda value: value in ("fp32", "fp16", "bf16"),
}

# Of older run folders: keys that are no more, and cores, when how full attention is computed was not yet its kernel.
REMOVED_KEYS = {"core.training", "core.scores", "trainer.background_saving"}
OLD_CORES = {
    "model.cores.sdpa.SDPA": {"_target_": "model.cores.full.Full", "name": "full"},
    "model.cores.flash_tpa.FlashTPA": {"_target_": "model.cores.full.Full", "name": "full", "kernel": "factors"},
}


def run_name(text: str | None) -> str | None:
    try:
        return text if text is None else plain_name(text, LONGEST_PART)
    except ValueError as error:
        raise ValueError(f"{error}; run.dir takes a path") from None


class RunConfig(Block):
    # default: that of run.dir, or {model}_{size}_{8 hex digits of the identity}
    name: Annotated[str | None, AfterValidator(run_name)] = None
    dir: OptionalFolder = None  # default: runs/<run.name>
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("dir")
    @classmethod
    def _is_one_line(cls, path: str | None) -> str | None:
        if path is not None and has_controls(path):
            raise ValueError("must be a path without line breaks and other control characters")
        return path


class DeepSpeedConfig(Block):
    """`config` is DeepSpeed's own; any key of it can be set with `++deepspeed.config.KEY=`."""

    name: Name
    config: dict[str, Any]

    @property
    def zero(self) -> dict[str, Any]:
        return self.config.get("zero_optimization", {})

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)

    @property
    def bf16_engine(self) -> bool:
        """Whether DeepSpeed keeps the parameters in bf16 (next to fp32 master weights), and not only computes in it."""
        return bool((self.config.get("bf16") or {}).get("enabled"))

    @field_validator("config")
    @classmethod
    def _are_of_their_kind(cls, config: dict[str, Any]) -> dict[str, Any]:
        lines = [
            f"{key}={shown(config[key])}: must be {kind}"
            for key, kind in DEEPSPEED_KEYS.items()
            if key in config and not IS_OF_KIND[kind](config[key])
        ]
        if lines:
            raise Mistakes(*lines)
        return config

    @model_validator(mode="after")
    def _check_keys(self):
        refused = [key for key in self.config if key in REFUSED_DEEPSPEED_KEYS]
        lines = [f"config.{key}: set {REFUSED_DEEPSPEED_KEYS[key]} instead" for key in refused]
        for key in sorted(self.config.keys() - {*refused, *DEEPSPEED_KEYS}):
            if near := difflib.get_close_matches(key, DEEPSPEED_KEYS, 1, 0.85):
                lines.append(f"config.{key}: unknown key; did you mean {near[0]}?")
        if isinstance(self.stage, bool) or self.stage not in (0, 1, 2, 3):
            lines.append(f"config.zero_optimization.stage={self.stage}: must be 0, 1, 2 or 3")
        if self.bf16_engine and self.stage == 0:
            lines.append(
                "config.bf16.enabled=true: DeepSpeed's bf16 engine is wrong at ZeRO stage 0, where it steps "
                "once before the first step; use deepspeed=zero1 or higher, or trainer.dtype=bf16 alone"
            )
        if lines:
            raise Mistakes(*lines)
        return self


def wandb_name(text: str | None) -> str | None:
    """Return the name of a project or an entity. ValueError if W&B would refuse it."""
    if text is not None and (not re.fullmatch(r"[^/\\#?%:]{1,128}", text) or not text.strip()):
        raise ValueError("must have 1 to 128 characters, none of them / \\ # ? % or :, as W&B demands")
    return text


class WandbConfig(Block):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online if somebody is logged in
    project: Annotated[str, AfterValidator(wandb_name)] = "t6"
    group: str | None = Field(None, min_length=1, max_length=128)  # default: the folder of the sweep
    tags: list[str] = Field(default_factory=list)

    @field_validator("tags")
    @classmethod
    def _are_accepted(cls, tags: list[str]) -> list[str]:
        if not all(0 < len(tag) <= 64 for tag in tags):
            raise ValueError("each must have 1 to 64 characters, as W&B demands")
        return tags


class TrainerConfig(Block):
    """Batch sizes count sequences; `*_every` count steps, and null or 0 means never (the last step always counts)."""

    max_steps: int | None = Field(500, ge=1, le=MOST_STEPS)
    # whichever of max_steps and max_tokens comes first ends the run
    max_tokens: int | None = Field(None, ge=1, le=10**15)
    seq_len: int = Field(256, ge=2, le=LONGEST_TEXT)
    micro_batch_size: int = Field(4, ge=1, le=MOST_SEQUENCES)
    global_batch_size: int = Field(8, ge=1, le=10**7)
    eval_every: int | None = Field(50, ge=0, le=MOST_STEPS)
    eval_batches: int | None = Field(8, ge=1, le=MOST_STEPS)  # global batches of validation data; null: all of it
    checkpoint_every: int | None = Field(100, ge=0, le=MOST_STEPS)
    keep_checkpoints: int = Field(2, ge=1, le=MOST_STEPS)  # the most recent ones that stay
    keep_every: int | None = Field(None, ge=0, le=MOST_STEPS)  # and those whose step is a multiple of this
    keep_best: bool = False  # and the one with the lowest validation loss
    log_every: int = Field(10, ge=1, le=MOST_STEPS)
    # steps in a row with a non-finite loss or gradient before the run goes back
    max_bad_steps: int = Field(10, ge=1, le=MOST_STEPS)
    max_loss_spike: float | None = Field(3.0, gt=0, le=1e6)  # nats over the mean of the last 32 steps that send it back
    # times in a row that it goes back to the same checkpoint before it gives up
    max_rollbacks: int = Field(3, ge=0, le=MOST_STEPS)
    rank_timeout: float = Field(600.0, ge=5, le=1e6)  # seconds without a sign of life of a rank, or progress of any
    resume: Literal["auto", "never"] = "auto"  # auto: resume what the run folder holds; never: refuse to
    init_from: OptionalPath = None  # the weights to start from: a run folder, a checkpoint or a Hugging Face folder
    fork_from: OptionalPath = None  # a run or checkpoint to continue, optimizer and data included, by other schedules
    compile: bool = False
    dtype: Dtype = "auto"
    activation_checkpointing: bool = False
    samples: int = Field(3, ge=0, le=1000)  # texts sampled at the end of the run
    benchmark_every: int | None = Field(None, ge=0, le=MOST_STEPS)  # steps between runs of each of `benchmarks`
    benchmarks: list[str] = Field(default_factory=lambda: ["builtin_cloze"])  # suites: names in configs/suite
    benchmark_limit: int | None = Field(None, ge=1, le=MOST_STEPS)  # questions of each task, or windows
    benchmark_overrides: list[str] = Field(default_factory=list)  # of `python -m eval.run`, as suite.data_dir=...
    benchmark_job: bool = False  # as a Slurm job of its own, which reads the checkpoint; false: in the training job
    benchmark_sbatch: list[str] = Field(default_factory=list)  # options of sbatch for it, as --time=1:00:00

    @field_validator("benchmarks")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        suites = choices("suite")
        if unknown := [name for name in names if name not in suites]:
            raise ValueError(f"there is no configs/suite/{unknown[0]}.yaml; {did_you_mean(unknown[0], suites)}")
        return names

    @model_validator(mode="after")
    def _ends(self):
        if self.max_steps is None and self.max_tokens is None:
            raise Mistakes("max_steps=null and trainer.max_tokens=null: set one, it ends the run")
        if self.init_from and self.fork_from:
            raise Mistakes("fork_from: trainer.init_from is set too, and a run starts from one of them; leave one out")
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def horizon(self) -> int:
        """The run's last step, and the schedule's."""
        return last_step(self.max_steps, self.max_tokens, self.tokens_per_step)

    def accumulation_steps(self, world_size: int) -> int:
        """Return the micro-batches that a rank adds up for one step. ConfigError if the batch sizes do not fit."""
        micro, total = self.micro_batch_size, self.global_batch_size
        if total % (micro * world_size) == 0:
            return total // (micro * world_size)
        remedy = f"trainer.global_batch_size must be a multiple of the {world_size} processes"
        if fits := [n for n in range(1, micro + 1) if total % (n * world_size) == 0]:
            remedy = f"trainer.micro_batch_size={fits[-1]} fits"
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        raise ConfigError(
            f"trainer.global_batch_size={total}: is not a multiple of trainer.micro_batch_size={micro} x "
            f"{processes}; {remedy}"
        )


# Keys that older runs do not have, and the value that stands for how those runs were: no part of an identity with it.
LATER_KEYS = {"schedule.first_step": 1, "data.validation": "documents", "data.separator": None}


class Config(Command):
    """A run. Validation decides what is left open: widths, head counts, the fold, folders and the run's name."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: AttentionConfig
    size: SizeConfig
    core: AttentionCore
    data: DataConfig
    tokenizer: TokenizerConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    deepspeed: DeepSpeedConfig
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    device: Device = "auto"

    @model_validator(mode="after")
    def _decide(self, info: ValidationInfo):
        lines: list[str] = []
        self.core = self.core.resolved(self.trainer.seq_len)
        self.data = fill_data_dir(self.data, self.tokenizer)
        world_size = (info.context or {}).get("world_size") or int(os.environ.get("WORLD_SIZE", 1))
        steps = (
            self._fill_model,
            lambda: check_vocabulary(self.data, self.tokenizer),
            lambda: self.trainer.accumulation_steps(world_size),
        )
        try:
            each(lambda step: step(), steps)
        except ConfigError as error:
            lines += error.errors
        if self.data.document_mask and not self.core.masks_documents:
            why = f", {self.core.why_no_documents}" if self.core.why_no_documents else ""
            lines.append(f"data.document_mask=true: core={self.core.name} cannot mask documents{why}; use core=full")
        if self.deepspeed.bf16_engine and self.trainer.dtype == "fp32":
            lines.append("trainer.dtype=fp32: deepspeed.config.bf16.enabled=true keeps the parameters in bf16")
        if self.optim.name in WHOLE_MATRICES and self.deepspeed.stage:
            lines.append(
                f"optim.name={self.optim.name}: updates whole matrices, and deepspeed={self.deepspeed.name} gives each "
                "process a flat share of them; use deepspeed=zero0"
            )
        if lines:
            raise Mistakes(*lines)
        if self.run.dir and not self.run.name:
            with suppress(ValidationError):  # a folder may have a name that no run can have
                self.run.name = RunConfig(name=Path(self.run.dir).name).name
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        self.run.name = self.run.name or f"{self.model.name}_{self.size.name}_{digest[:8]}"
        self.run.dir = self.run.dir or str(Path("runs") / self.run.name)
        return self

    def _fill_model(self) -> None:
        self.model = decide(self.model, self.core, self.size, self.trainer.seq_len)

    def runtime(self) -> Runtime:
        """Return where this process trains. ConfigError if it has no GPU of its own."""
        return find_runtime(self.device, self.trainer.dtype, self.deepspeed.bf16_engine)

    def network(self, end_of_text: int | None = None) -> TransformerConfig:
        """Return what defines the network; `end_of_text` is the tokenizer's, for `data.document_mask`."""
        document_end = end_of_text if self.data.document_mask else None
        vocab_size = self.tokenizer.padded_vocab_size
        return TransformerConfig.of(self.model, self.core, self.size, vocab_size, document_end=document_end)

    def identity(self) -> dict[str, Any]:
        """Return what makes a run that run, as flat `key: value` pairs: the rest may change between starts."""
        tree = to_dict(self)
        tree["data"] = {key: tree["data"][key] for key in source_of(self.data).identity_keys}
        gone = {"core.kernel", "model.by_size"}  # how, and not what; what it gave is in the other keys
        if self.model.rope_scaling == "none":
            gone |= {"model.rope_scaling", "model.rope_factor", "model.rope_original_length"}
        blocks = ("model", "size", "core", "data", "tokenizer", "optim", "schedule")
        trainer = {key: getattr(self.trainer, key) for key in ("seq_len", "global_batch_size", "horizon")}
        whole = {key: tree[key] for key in blocks} | {"run.seed": self.run.seed, "trainer": trainer}
        found = flatten(without(whole, gone))
        return {key: value for key, value in found.items() if LATER_KEYS.get(key) != value}


def upgrade(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of an older run folder under today's keys."""
    tree = without(tree, REMOVED_KEYS)
    if isinstance(core := tree.get("core"), dict):
        core |= OLD_CORES.get(core.get("_target_"), {})
    return tree


def upgrade_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """Return a stored identity under today's keys."""
    core = {f"core.{key}": value for key, value in OLD_CORES.get(identity.get("core._target_"), {}).items()}
    gone = {*REMOVED_KEYS, "core.kernel"}
    return {key: value for key, value in (identity | core).items() if key not in gone}
