"""What training needs of a device's memory, counted from the configuration.

DeepSpeed's engine over fp32 parameters keeps 4 bytes a number for weights, gradients and each of AdamW's two moments;
from stage 1 on also an fp32 copy of the rank's share and a buffer for the reduction; sharded as the ZeRO paper
(arXiv 1910.02054, section 5) has it.
"""

from dataclasses import replace

from model import counting
from model.transformer import LOSS_CHUNK, TransformerConfig

BUCKET_NUMBERS = 5e8  # DeepSpeed's default reduce_bucket_size


def activation_bytes(network: TransformerConfig, tokens: int, recompute: bool, bytes_per_number: int) -> float:
    """Return what the backward pass of a micro-batch of this number of tokens needs kept, in bytes.

    With `recompute` that is each layer's input, and at a time one layer's activations and a chunk of the logits.
    """
    if not recompute:
        return tokens * counting.activation_bytes_per_token(network, bytes_per_number)
    one = replace(network, n_layers=1, vocab_size=0)
    logits = counting.activation_bytes_per_token(replace(network, n_layers=0), bytes_per_number)
    kept = network.n_layers * 4 * network.d_model + counting.activation_bytes_per_token(one, bytes_per_number)
    return tokens * kept + min(tokens, LOSS_CHUNK) * logits


def training_bytes(
    network: TransformerConfig, tokens: int, recompute: bool, stage: int, zero: dict, world_size: int,
    stored_bytes: int, bytes_per_number: int,
) -> dict[str, float]:  # fmt: skip
    """Return the bytes a device needs, by what needs them.

    tokens: of a micro-batch. recompute: `trainer.activation_checkpointing`. stage, zero: ZeRO's stage, and its
    configuration (DeepSpeed's `zero_optimization`). stored_bytes: of a weight, 4, or 2 under DeepSpeed's bf16 engine.
    bytes_per_number: of what matrix products read.
    """
    params = counting.num_params(network)

    def share(from_stage: int) -> float:
        return 1 / world_size if stage >= from_stage else 1

    optimizer = 8 * params * share(1) + (4 * params / world_size if stage else 0)
    bucket = 4 * min(params, zero.get("reduce_bucket_size", BUCKET_NUMBERS)) if stage else 0
    cast = 2 * params * share(3) if bytes_per_number == 2 and stored_bytes == 4 else 0  # autocast's copies of weights
    return {
        "weights": 0 if "offload_param" in zero else stored_bytes * params * share(3),
        "gradients": stored_bytes * params * share(2),
        "optimizer": 0 if "offload_optimizer" in zero else optimizer,
        "buffers": bucket + cast,
        "activations": activation_bytes(network, tokens, recompute, bytes_per_number),
    }


def checkpoint_bytes(network: TransformerConfig) -> int:
    """Return a checkpoint's size in bytes: fp32 weights and two moments."""
    return 12 * counting.num_params(network)
