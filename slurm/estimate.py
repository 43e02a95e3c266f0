"""What a run will need: memory a GPU and hours, counted from the configuration, with everything that is assumed.

Memory is that of DeepSpeed's engine over fp32 parameters: 4 bytes a number for weights, gradients and each of AdamW's
two moments; from stage 1 on an fp32 copy of the rank's share and a buffer for the reduction; sharded as the ZeRO paper
(arXiv 1910.02054, section 5) has it.
"""

import dataclasses
from dataclasses import dataclass

from configs.schema import Config
from model import counting
from model.transformer import TransformerConfig

GIB = 2**30
BUCKET_NUMBERS = 5e8  # DeepSpeed's default reduce_bucket_size
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


def activation_bytes(network: TransformerConfig, tokens: int, recompute: bool, bytes_per_number: int) -> float:
    """What the backward pass of a micro-batch of so many tokens needs kept."""
    if not recompute:
        return tokens * counting.activation_bytes_per_token(network, bytes_per_number)
    one = counting.activation_bytes_per_token(dataclasses.replace(network, n_layers=1), bytes_per_number)
    return tokens * (network.n_layers * 4 * network.d_model + one)


def memory(config: Config, gpus: int) -> dict[str, float]:
    """Bytes a GPU. Activations count micro-batches of `trainer.micro_batch_size` sequences."""
    network, stage = TransformerConfig.from_config(config), config.deepspeed.stage
    zero = config.deepspeed.config.get("zero_optimization", {})
    params = counting.num_params(network)
    bytes_per_number = 4 if config.trainer.dtype == "fp32" or config.device == "cpu" else 2

    def share(from_stage: int) -> float:
        return 1 / gpus if stage >= from_stage else 1

    optimizer = 8 * params * share(1) + (4 * params / gpus if stage else 0)
    needs = {
        "weights": 0 if "offload_param" in zero else 4 * params * share(3),
        "gradients": 4 * params * share(2),
        "optimizer": 0 if "offload_optimizer" in zero else optimizer,
        "buffers": (4 * min(params, zero.get("reduce_bucket_size", BUCKET_NUMBERS)) if stage else 0)
        + (2 * params * share(3) if bytes_per_number == 2 else 0),
        "activations": activation_bytes(
            network,
            config.trainer.micro_batch_size * config.trainer.seq_len,
            config.trainer.activation_checkpointing,
            bytes_per_number,
        ),
    }
    return needs | {"rest": FRAGMENTATION * sum(needs.values()) + CONTEXT_BYTES}


def estimate(
    config: Config, gpus: int, gpu: str, peak: float, mfu: float, tokens_per_second: float | None = None
) -> Estimate:
    """Memory and hours of a run on so many GPUs, at a measured rate or at a share `mfu` of the GPUs' `peak` FLOP/s."""
    trainer, network = config.trainer, TransformerConfig.from_config(config)
    assumed = [f"{FRAGMENTATION:.0%} fragmentation, {CONTEXT_BYTES / GIB:.0f} GiB for CUDA"]
    if tokens_per_second is None:
        tokens_per_second = gpus * peak * mfu / counting.training_flops_per_token(network, trainer.seq_len)
        assumed.insert(0, f"{mfu:.0%} MFU of {gpus} x {gpu} ({peak / 1e12:,.0f} TFLOP/s each)")
    else:
        assumed.insert(0, f"{tokens_per_second:,.0f} tokens/s, as given")
    return Estimate(memory(config, gpus), trainer.horizon * trainer.tokens_per_step, tokens_per_second, assumed)
