"""The typed configuration, and every check that needs nothing but the configuration.

Hydra composes YAML files into one tree, and `configs.load` merges each block of it onto its dataclass here.
"""

import dataclasses
import difflib
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError, at_least
from configs.schema_data import DataConfig, TokenizerConfig
from model.attention.base import AttentionConfig
from model.cores.base import AttentionCore

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
    "bfloat16": "deepspeed.config.bf16, its name of today, or trainer.dtype",
    "torch_autocast": "trainer.dtype",
}

# DeepSpeed says nothing of a key that it does not know, so `zero_optimisation` would train at stage 0.
DEEPSPEED_KEYS = (
    "activation_checkpointing", "aio", "bf16", "comms_logger", "communication_data_type", "compression_training",
    "curriculum_learning", "data_efficiency", "data_types", "dump_state", "elasticity", "flops_profiler",
    "gradient_predivide_factor", "memory_breakdown", "prescale_gradients", "sparse_gradients", "steps_per_print",
    "tensorboard", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)  # fmt: skip

SUITES = Path(__file__).parent / "suite"


CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


@dataclass
class RunConfig:
    name: str | None = None  # default: {model}_{size}_{8 hex digits of the identity}
    dir: str | None = None  # default: runs/<run.name>
    seed: int = 0

    def errors(self):
        if self.name is not None and (not self.name or "/" in self.name):
            yield f"run.name={self.name!r}: must be a plain folder name (use run.dir for a path)"
        if not 0 <= self.seed < 2**32:
            yield f"run.seed={self.seed}: must be between 0 and 2^32 - 1"


@dataclass
class SizeConfig:
    """The transformer around the attention: `n_layers` blocks of width `d_model`, feed-forward width `d_ff`."""

    name: str
    n_layers: int
    d_model: int
    head_dim: int
    d_ff: int | None = None  # default: floor(8/3 d_model), as the TPA paper has it
    norm_eps: float = 1e-6
    match: str = "params"  # params, flops or kv_bytes: what an open head count or rank makes equal to MHA's
    match_tolerance: float = 0.05  # beyond it a run says that it is not matched

    def errors(self):
        yield from at_least(1, "size", self, "n_layers", "d_model", "head_dim", "d_ff")
        if self.match not in ("params", "flops", "kv_bytes"):
            yield f"size.match={self.match!r}: must be params, flops or kv_bytes"
        if not self.match_tolerance >= 0:
            yield f"size.match_tolerance={self.match_tolerance}: must be zero or a positive number"
        if not 0 <= self.norm_eps < 1:
            yield f"size.norm_eps={self.norm_eps}: must lie in [0, 1)"


@dataclass
class OptimConfig:
    name: str
    lr: float  # the peak of the schedule
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0  # on the norm of the mean gradient; 0 turns clipping off
    decay_all: bool = False  # decay 1-D parameters too, as the TPA authors' code does

    def errors(self):
        if self.name != "adamw":
            yield f"optim.name={self.name!r}: must be adamw"
        if not (math.isfinite(self.lr) and self.lr > 0):
            yield f"optim.lr={self.lr}: must be a positive number"
        for key in ("weight_decay", "grad_clip"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                yield f"optim.{key}={value}: must be zero or a positive number"
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                yield f"optim.{key}={getattr(self, key)}: must lie in [0, 1)"
        if not (math.isfinite(self.eps) and self.eps > 0):
            yield f"optim.eps={self.eps}: must be a positive number"


@dataclass
class ScheduleConfig:
    """The learning rate over a run: warm-up, then `cosine` or `wsd` (warm-up, stable, decay)."""

    name: str
    warmup_steps: int
    min_lr_ratio: float = 0.1  # the last learning rate over the peak
    decay_fraction: float = 0.2  # wsd: the share of the run that decays

    def errors(self):
        if self.name not in ("cosine", "wsd"):
            yield f"schedule.name={self.name!r}: must be cosine or wsd"
        yield from at_least(0, "schedule", self, "warmup_steps")
        if not 0 <= self.min_lr_ratio <= 1:
            yield f"schedule.min_lr_ratio={self.min_lr_ratio}: must lie in [0, 1]"
        if not 0 <= self.decay_fraction <= 1:
            yield f"schedule.decay_fraction={self.decay_fraction}: must lie in [0, 1]"


@dataclass
class DeepSpeedConfig:
    """`config` is DeepSpeed's own; any key of it can be set with `++deepspeed.config.KEY=`."""

    name: str
    config: dict[str, Any]

    @property
    def stage(self) -> int:
        return self.config.get("zero_optimization", {}).get("stage", 0)

    @property
    def bf16_engine(self) -> bool:
        """Whether DeepSpeed keeps the parameters in bf16 (beside fp32 master weights), and not only computes in it."""
        return bool((self.config.get("bf16") or {}).get("enabled"))

    def errors(self):
        for key in self.config:
            if key in REFUSED_DEEPSPEED_KEYS:
                yield f"deepspeed.config.{key}: set {REFUSED_DEEPSPEED_KEYS[key]} instead"
            elif key not in DEEPSPEED_KEYS and (near := difflib.get_close_matches(key, DEEPSPEED_KEYS, 1, 0.85)):
                yield f"deepspeed.config.{key}: unknown key; did you mean {near[0]}?"
        if self.stage not in (0, 1, 2, 3):
            yield f"deepspeed.config.zero_optimization.stage={self.stage!r}: must be 0, 1, 2 or 3"
        if self.bf16_engine and self.stage == 0:
            yield (
                "deepspeed.config.bf16.enabled=true: DeepSpeed's bf16 engine is wrong at ZeRO stage 0, where it steps "
                "once before the first step; use deepspeed=zero1 or higher, or trainer.dtype=bf16 alone"
            )


@dataclass
class WandbConfig:
    mode: str = "auto"  # auto: online where somebody is logged in, else offline
    project: str = "t6"
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def errors(self):
        if self.mode not in ("auto", "online", "offline", "disabled"):
            yield f"wandb.mode={self.mode!r}: must be auto, online, offline or disabled"


@dataclass
class TrainerConfig:
    """Batch sizes count sequences; `*_every` count steps, and null or 0 means never (the last step always counts)."""

    max_steps: int | None
    seq_len: int
    micro_batch_size: int
    global_batch_size: int
    max_tokens: int | None = None  # whichever of max_steps and max_tokens comes first ends the run
    eval_every: int | None = None
    eval_batches: int | None = 8  # global batches of validation data; null: all of it
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2  # the newest so many stay
    keep_every: int | None = None  # and those whose step is a multiple of this
    keep_best: bool = False  # and the one with the lowest validation loss
    log_every: int = 10
    max_bad_steps: int = 10  # steps in a row with a non-finite loss or gradient before the run goes back
    max_loss_spike: float | None = 3.0  # nats over the mean of the last 32 steps that send it back; null: any is fine
    max_rollbacks: int = 3  # times in a row that it goes back to the same checkpoint before it gives up
    rank_timeout: float = 600.0  # seconds without a sign of life of a rank, or progress of any, that end the job
    background_saving: bool = True  # write checkpoints while the next steps run
    resume: str = "auto"  # auto: go on where the run folder stopped; never: refuse a folder that holds a run
    init_from: str | None = None  # a run folder or a checkpoint whose weights this run starts from
    compile: bool = False
    dtype: str = "auto"  # auto: bf16 on a GPU, fp32 on a CPU. bf16 is autocast over fp32 master weights
    activation_checkpointing: bool = False
    samples: int = 3  # texts sampled at the end of the run
    benchmark_every: int | None = None  # each of `benchmarks` at so many steps, and at the last one
    benchmarks: list[str] = field(default_factory=lambda: ["builtin_cloze"])  # suites: names in configs/suite
    benchmark_limit: int | None = None  # questions of each task, or windows
    benchmark_overrides: list[str] = field(default_factory=list)  # of `python -m eval.run`, as suite.data_dir=...
    benchmark_job: bool = False  # as a Slurm job of its own, which reads the checkpoint; false: inside the training job
    benchmark_sbatch: list[str] = field(default_factory=list)  # options of sbatch for it, as --time=1:00:00

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    @property
    def horizon(self) -> int:
        """The run's last step, and the schedule's."""
        by_tokens = None if self.max_tokens is None else -(-self.max_tokens // self.tokens_per_step)
        return min(steps for steps in (self.max_steps, by_tokens) if steps is not None)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches a rank adds up for one step. ConfigError where the batch sizes don't multiply out."""
        micro, total = self.micro_batch_size, self.global_batch_size
        if total % (micro * world_size):
            fits = [n for n in range(1, total + 1) if total % (n * world_size) == 0 and n <= micro]
            remedy = (
                f"trainer.micro_batch_size={fits[-1]} fits"
                if fits
                else (f"trainer.global_batch_size must be a multiple of the {world_size} processes")
            )
            raise ConfigError(
                f"trainer.global_batch_size={total} is not a multiple of trainer.micro_batch_size={micro} x "
                f"{world_size} process{'es' * (world_size > 1)}: {remedy}"
            )
        return total // (micro * world_size)

    def errors(self):
        sizes = ("seq_len", "micro_batch_size", "global_batch_size")
        yield from at_least(1, "trainer", self, "max_steps", "max_tokens", *sizes, "eval_batches", "log_every")
        yield from at_least(
            0, "trainer", self, "eval_every", "checkpoint_every", "keep_every", "samples", "benchmark_every"
        )
        yield from at_least(1, "trainer", self, "keep_checkpoints", "max_bad_steps", "benchmark_limit")
        yield from at_least(0, "trainer", self, "max_rollbacks")
        if self.max_loss_spike is not None and not self.max_loss_spike > 0:
            yield f"trainer.max_loss_spike={self.max_loss_spike}: must be a positive number of nats, or null"
        if not self.rank_timeout >= 5:
            yield f"trainer.rank_timeout={self.rank_timeout}: must be at least 5 seconds"
        suites = sorted(path.stem for path in SUITES.glob("*.yaml"))
        for name in self.benchmarks:
            if name not in suites:
                yield f"trainer.benchmarks: there is no configs/suite/{name}.yaml; there are {', '.join(suites)}"
        if self.max_steps is None and self.max_tokens is None:
            yield "trainer.max_steps and trainer.max_tokens are both null: set one, it ends the run"
        if self.resume not in ("auto", "never"):
            yield f"trainer.resume={self.resume!r}: must be auto or never"
        if self.dtype not in ("auto", "fp32", "bf16"):
            yield f"trainer.dtype={self.dtype!r}: must be auto, fp32 or bf16"


ROPE_SCALING = ("rope_scaling", "rope_factor", "rope_original_length")


@dataclass
class Config:
    run: RunConfig
    model: AttentionConfig
    size: SizeConfig
    core: AttentionCore
    data: DataConfig
    tokenizer: TokenizerConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    deepspeed: DeepSpeedConfig
    wandb: WandbConfig
    trainer: TrainerConfig
    device: str = "auto"

    def identity(self) -> dict[str, Any]:
        """What makes a run that run, as flat `key: value` pairs: the rest may change between starts."""
        tree = to_dict(self)
        ours = ("files", "path", "subset", "split", "revision", "mixture", "column", "val_fraction", "document_mask")
        tree["data"] = {key: tree["data"][key] for key in ("name", "source", *ours)}
        tree["model"].pop("by_size")  # what it gave is in the other keys
        if tree["model"]["rope_scaling"] == "none":  # as in runs from before there was one
            tree["model"] = {key: value for key, value in tree["model"].items() if key not in ROPE_SCALING}
        tree["core"].pop("kernel", None)  # how, and not what
        blocks = ("model", "size", "core", "data", "tokenizer", "optim", "schedule")
        trainer = {key: tree["trainer"][key] for key in ("seq_len", "global_batch_size")}
        trainer["horizon"] = self.trainer.horizon
        return flatten({key: tree[key] for key in blocks} | {"run.seed": self.run.seed, "trainer": trainer})


@dataclass
class CountingConfig:
    """`python -m model.counting`."""

    tokenizer: TokenizerConfig
    models: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    seq_len: int = 1024
    match: str = "params"
    tolerance: float = 0.05
    memory: str | None = None
    cache_dtype: str = "bf16"
    detail: bool = False
    overrides: list[str] = field(default_factory=list)

    def errors(self):
        yield from at_least(1, "", self, "seq_len")
        if self.match not in ("params", "flops", "kv_bytes"):
            yield f"match={self.match!r}: must be params, flops or kv_bytes"
        if self.cache_dtype not in CACHE_DTYPES:
            yield f"cache_dtype={self.cache_dtype}: must be {', '.join(CACHE_DTYPES)}"
        if self.memory is not None:
            try:
                parse_bytes(self.memory)
            except ValueError as error:
                yield f"memory={self.memory}: {error}"


def parse_bytes(text: str) -> float:
    """A memory size such as 24GiB, 80GB or 512MiB in bytes. ValueError for anything else."""
    units = {f"{prefix}{suffix}": base**power for power, prefix in enumerate("KMGT", 1)
             for suffix, base in (("B", 1000), ("iB", 1024))}  # fmt: skip
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if text.strip().endswith(unit)), None)
    try:
        value = float(text.strip().removesuffix(unit or "?"))
        if unit is None or not 0 < value < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError("must be a size such as 24GiB or 80GB") from None
    return value * units[unit]


def check_machine(config):
    """Mistakes in a device and a precision that a command was asked for."""
    if config.device not in ("auto", "cpu", "cuda"):
        yield f"device={config.device}: must be auto, cpu or cuda"
    elif config.device == "cuda" and not torch.cuda.is_available():
        yield "device=cuda: PyTorch sees no CUDA GPU here; use device=cpu or device=auto"
    dtype = getattr(config, "dtype", "auto")
    if dtype not in ("auto", "fp32", "bf16"):
        yield f"dtype={dtype}: must be auto, fp32 or bf16"


def name_run(config: Config) -> Config:
    """Give the run the name and the folder that it has not been given."""
    digest = hashlib.sha256(json.dumps(config.identity(), sort_keys=True).encode()).hexdigest()
    config.run.name = config.run.name or f"{config.model.name}_{config.size.name}_{digest[:8]}"
    config.run.dir = config.run.dir or str(Path("runs") / config.run.name)
    return config


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def to_dict(config) -> dict[str, Any]:
    """The configuration as plain values, from which `load` makes it again (`_target_` names the chosen classes)."""
    tree = dataclasses.asdict(config)
    for key in ("model", "core", "suite"):
        if key in tree:
            cls = type(getattr(config, key))
            tree[key] = {"_target_": f"{cls.__module__}.{cls.__qualname__}"} | tree[key]
    return tree
