"""What a model costs: parameters, operations, cache bytes, activations, and the memory that training it takes.

`python -m eval.budgets` prints the table for every mechanism and size; `model.counting.match` picks head counts.
"""

from dataclasses import replace
from math import prod

import torch

from model.attention.base import AttentionConfig, AttentionCore
from model.attention.multi_head import MultiHeadConfig
from model.transformer import LOSS_CHUNK, TransformerConfig

BUCKET_NUMBERS = 5e8  # DeepSpeed's default reduce_bucket_size


def mha_of(d_model: int, head_dim: int) -> MultiHeadConfig:
    """Return the MHA whose heads fill d_model, 4 d_model^2 parameters a layer: every mechanism is matched to it."""
    return MultiHeadConfig(name="mha", head_dim=head_dim, n_heads=max(1, round(d_model / head_dim)))


def params_by_part(config: TransformerConfig) -> dict[str, int]:
    """Return the parameters of the whole model; the embedding counts once, as it is tied to the head."""
    return {
        "embedding": config.vocab_size * config.d_model,
        "attention projections": config.n_layers * config.attention.projection_params(config.d_model),
        "attention output": config.n_layers * config.attention.output_params(config.d_model),
        "feed-forward": config.n_layers * 3 * config.d_model * config.d_ff,
    }


def num_params(config: TransformerConfig) -> int:
    return sum(params_by_part(config).values())


def attention_flops_per_token(attention: AttentionConfig, core: AttentionCore, d_model: int, seq_len: int) -> float:
    """Return the forward operations of one layer's attention for one token."""
    return attention.flops_per_token(d_model) + core.flops_per_token(attention, seq_len)


def training_flops_per_token(config: TransformerConfig, seq_len: int) -> float:
    """Return forward and backward operations a token: three times the forward pass, nothing recomputed."""
    d_model = config.d_model
    attentions = sum(attention_flops_per_token(config.attention, core, d_model, seq_len) for core in config.cores)
    return 3 * (attentions + config.n_layers * 2 * 3 * d_model * config.d_ff + 2 * config.vocab_size * d_model)


def kv_numbers_per_token(attention: AttentionConfig) -> int:
    """Return how many numbers decoding keeps per token and layer."""
    return sum(prod(shape) for shape in attention.cache_shapes().values())


def kv_bytes_per_token(config: TransformerConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the KV-cache bytes a token over all layers, int8's scales included, as `KVCache` allocates them."""
    return sum(core.bytes_per_token(config.attention, dtype) for core in config.cores)


def activation_bytes_per_token(config: TransformerConfig, bytes_per_number: int = 2) -> int:
    """Estimate what the backward pass needs kept for a token, in bytes, with nothing recomputed.

    The residual stream, its norms and the logits are fp32; what matrix products read has `bytes_per_number`.
    """
    attention, d_model = config.attention, config.d_model
    core = attention.n_heads * (2 * attention.v_head_dim + 1)  # attended values, as made and laid out to project; lse
    layer_numbers = attention.activation_numbers(d_model) + core + 4 * config.d_ff + 2 * d_model
    layer = 4 * 2 * d_model + bytes_per_number * layer_numbers
    return config.n_layers * layer + 4 * 2 * d_model + 4 * config.vocab_size + bytes_per_number * config.vocab_size


def activation_bytes(network: TransformerConfig, tokens: int, recompute: bool, bytes_per_number: int) -> float:
    """Return what the backward pass of a micro-batch of this number of tokens needs kept, in bytes."""
    if not recompute:
        return tokens * activation_bytes_per_token(network, bytes_per_number)
    # Each layer's input, and at a time one layer's activations and a chunk of the logits.
    one = replace(network, n_layers=1, vocab_size=0)
    logits = activation_bytes_per_token(replace(network, n_layers=0), bytes_per_number)
    kept = network.n_layers * 4 * network.d_model + activation_bytes_per_token(one, bytes_per_number)
    return tokens * kept + min(tokens, LOSS_CHUNK) * logits


def training_bytes(
    network: TransformerConfig, tokens: int, recompute: bool, stage: int, zero: dict, world_size: int,
    stored_bytes: int, bytes_per_number: int,
) -> dict[str, float]:  # fmt: skip
    """Return the bytes a device needs, by what needs them, for a micro-batch of this number of tokens.

    `zero` is DeepSpeed's `zero_optimization`; `stored_bytes` are of a weight, `bytes_per_number` of what matrix
    products read. DeepSpeed's engine over fp32 parameters keeps 4 bytes a number for weights, gradients and each of
    AdamW's two moments; from stage 1 on also an fp32 copy of the rank's share and a buffer for the reduction; sharded
    as the ZeRO paper (arXiv 1910.02054, section 5) has it.
    """
    params = num_params(network)

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
    return 12 * num_params(network)


def longest_context(config: TransformerConfig, memory_bytes: float, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the tokens of one sequence whose cache fits next to bf16 weights; 0 if the weights don't fit."""
    left = memory_bytes - 2 * num_params(config)
    return max(0, int(left // kv_bytes_per_token(config, dtype)))


def over_mha(config: TransformerConfig, seq_len: int) -> dict[str, float]:
    """Return the attention's parameters and operations relative to MHA's of this width under the same patterns, and the
    bytes that it keeps relative to those that MHA keeps in full attention."""
    mha = mha_of(config.d_model, config.attention.head_dim)

    def flops(attention: AttentionConfig) -> float:
        return sum(attention_flops_per_token(attention, core, config.d_model, seq_len) for core in config.cores)

    kept_by_mha = config.n_layers * kv_numbers_per_token(mha) * torch.bfloat16.itemsize
    return {
        "params": config.attention.num_params(config.d_model) / (4 * config.d_model**2),
        "flops": flops(config.attention) / flops(mha),
        "kv_bytes": kv_bytes_per_token(config) / kept_by_mha,
    }


def summary(config: TransformerConfig, seq_len: int) -> dict[str, int | float]:
    """Return the counts that belong next to a run's results."""
    ratios = over_mha(config, seq_len)
    return {
        "params": num_params(config),
        "n_heads": config.attention.n_heads,
        "training_flops_per_token": training_flops_per_token(config, seq_len),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        **{f"attention_{key}_over_mha": ratio for key, ratio in ratios.items()},
    }
