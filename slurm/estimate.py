"""What a run will need, memory a GPU and hours, with everything that is assumed."""

from dataclasses import dataclass

from configs.schema import Config
from model import counting
from model.counting.memory import training_bytes
from model.transformer import TransformerConfig

GIB = 2**30
CONTEXT_BYTES = 1 * GIB  # CUDA's context and the libraries' workspaces
FRAGMENTATION = 0.1


@dataclass
class Estimate:
    memory: dict[str, float]  # bytes a GPU by what needs them
    tokens: int  # of the whole run
    tokens_per_second: float
    assumed: list[str]

    @property
    def gib(self) -> float:
        return sum(self.memory.values()) / GIB

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600


def estimate(
    config: Config, gpus: int, gpu: str, peak: float, mfu: float, tokens_per_second: float | None = None
) -> Estimate:
    """Memory and hours of a run on so many GPUs, at a measured rate or at a share `mfu` of the GPUs' `peak` FLOP/s."""
    trainer, network = config.trainer, TransformerConfig.from_config(config)
    memory = training_bytes(config, gpus, 4 if trainer.dtype == "fp32" or config.device == "cpu" else 2)
    memory["rest"] = FRAGMENTATION * sum(memory.values()) + CONTEXT_BYTES
    assumed = [f"{FRAGMENTATION:.0%} fragmentation, {CONTEXT_BYTES / GIB:.0f} GiB for CUDA"]
    if tokens_per_second is None:
        tokens_per_second = gpus * peak * mfu / counting.training_flops_per_token(network, trainer.seq_len)
        assumed.insert(0, f"{mfu:.0%} MFU of {gpus} x {gpu} ({peak / 1e12:,.0f} TFLOP/s each)")
    else:
        assumed.insert(0, f"{tokens_per_second:,.0f} tokens/s, as given")
    return Estimate(memory, trainer.horizon * trainer.tokens_per_step, tokens_per_second, assumed)
