"""The memory and the hours that a run will need, with everything that is assumed."""

from dataclasses import dataclass

from model import counting
from model.counting.memory import training_bytes
from training.config import Config

GIB = 2**30
CUDA_BYTES = 1 * GIB  # CUDA's context and the workspaces of its libraries
FRAGMENTATION = 0.1


@dataclass
class Estimate:
    memory: dict[str, float]  # bytes of one GPU, by what needs them
    tokens: int  # of the whole run
    tokens_per_second: float
    assumptions: list[str]

    @property
    def gib(self) -> float:
        return sum(self.memory.values()) / GIB

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600


def estimate(
    config: Config, gpus: int, gpu: str, peak: float, mfu: float, tokens_per_second: float | None = None
) -> Estimate:
    """Return what a run needs on `gpus` GPUs, at a measured rate or at the share `mfu` of their `peak` FLOP/s."""
    trainer, deepspeed, network = config.trainer, config.deepspeed, config.network()
    memory = training_bytes(
        network,
        tokens=trainer.micro_batch_size * trainer.seq_len,
        recompute=trainer.activation_checkpointing,
        stage=deepspeed.stage,
        zero=deepspeed.config.get("zero_optimization", {}),
        world_size=gpus,
        stored_bytes=2 if deepspeed.bf16_engine else 4,
        bytes_per_number=4 if trainer.dtype == "fp32" or config.device == "cpu" else 2,
    )
    memory["rest"] = FRAGMENTATION * sum(memory.values()) + CUDA_BYTES
    if tokens_per_second is None:
        tokens_per_second = gpus * peak * mfu / counting.training_flops_per_token(network, trainer.seq_len)
        rate = f"{mfu:.0%} MFU of {gpus} x {gpu} ({peak / 1e12:,.0f} TFLOP/s each)"
    else:
        rate = f"{tokens_per_second:,.0f} tokens/s, as given"
    overhead = f"{FRAGMENTATION:.0%} fragmentation, {CUDA_BYTES / GIB:.0f} GiB for CUDA"
    return Estimate(memory, trainer.horizon * trainer.tokens_per_step, tokens_per_second, [rate, overhead])
