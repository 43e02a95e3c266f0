"""The memory and the hours that a run will need, with everything that is assumed."""

from dataclasses import dataclass

from model import counting
from slurm.options import Options
from training.config import Config
from training.device import PEAK_BF16_FLOPS, Runtime
from training.preflight import needed_memory

GIB = 2**30
CUDA_BYTES = 1 * GIB  # CUDA's context and the workspaces of its libraries
FRAGMENTATION = 0.1


@dataclass
class Estimate:
    memory: dict[str, float]  # bytes of one GPU, by what needs them
    tokens: int  # of the whole run
    tokens_per_second: float
    assumed: str

    @property
    def gib(self) -> float:
        return sum(self.memory.values()) / GIB

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600


def estimate(config: Config, runtime: Runtime, options: Options) -> Estimate:
    """Return what a run needs at the measured rate of `options`, or at their share of their GPUs' peak FLOP/s."""
    trainer, network = config.trainer, config.network()
    memory = needed_memory(config, runtime, network)
    memory["rest"] = FRAGMENTATION * sum(memory.values()) + CUDA_BYTES
    rate, source = options.tokens_per_second, "as given"
    if rate is None:
        peak = PEAK_BF16_FLOPS[options.gpu] / (2 if trainer.dtype == "fp32" else 1)
        rate = options.tasks * peak * options.mfu / counting.training_flops_per_token(network, trainer.seq_len)
        source = f"{options.mfu:.0%} MFU of {options.tasks} x {options.gpu} ({peak / 1e12:,.0f} TFLOP/s each)"
    overhead = f"{FRAGMENTATION:.0%} fragmentation, {CUDA_BYTES / GIB:.0f} GiB for CUDA"
    tokens = trainer.horizon * trainer.tokens_per_step
    return Estimate(memory, tokens, rate, f"{rate:,.0f} tokens/s, {source}; {overhead}")
