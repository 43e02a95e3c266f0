"""What a model costs: parameters, operations, cache bytes, activations, and the longest context that fits in a memory.

`python -m model.counting` prints the table for every mechanism and size; `model.counting.match` picks head counts.
"""

from math import prod

import torch

from model.attention.base import AttentionConfig
from model.attention.multi_head import MultiHeadConfig
from model.cache import bytes_per_token
from model.transformer import TransformerConfig


def mha_of(d_model: int, head_dim: int) -> MultiHeadConfig:
    """The MHA whose heads fill d_model: what every mechanism is matched to. Its parameters are 4 d_model^2 a layer."""
    return MultiHeadConfig("mha", head_dim, n_heads=max(1, round(d_model / head_dim)))


def params_by_part(config: TransformerConfig) -> dict[str, int]:
    """Parameters of the whole model; the embedding counts once, as it is tied to the head."""
    projection = config.attention.projection_params(config.d_model)
    return {
        "embedding": config.vocab_size * config.d_model,
        "attention projections": config.n_layers * projection,
        "attention output": config.n_layers * config.attention.output_params(config.d_model),
        "feed-forward": config.n_layers * 3 * config.d_model * config.d_ff,
    }


def num_params(config: TransformerConfig) -> int:
    return sum(params_by_part(config).values())


def attention_flops_per_token(attention: AttentionConfig, core, d_model: int, seq_len: int) -> float:
    """Forward operations of one layer's attention for one token."""
    return attention.flops_per_token(d_model) + core.flops_per_token(attention, seq_len)


def training_flops_per_token(config: TransformerConfig, seq_len: int) -> float:
    """Forward and backward operations a token at this length: three times the forward pass, nothing recomputed.

    Causal attention counts the keys a query sees, (T + 1)/2 on average; PaLM's convention (6N + 12LHDT) counts all T.
    """
    attention, cores = config.attention, [config.core.for_layer(layer) for layer in range(config.n_layers)]
    attentions = sum(attention_flops_per_token(attention, core, config.d_model, seq_len) for core in cores)
    feed_forward = config.n_layers * 2 * 3 * config.d_model * config.d_ff
    return 3 * (attentions + feed_forward + 2 * config.vocab_size * config.d_model)


def kv_numbers_per_token(attention: AttentionConfig) -> int:
    """Numbers that decoding keeps per token and layer."""
    return sum(prod(shape) for shape in attention.cache_shapes().values())


def kv_bytes_per_token(config: TransformerConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """KV-cache bytes a token over all layers, int8's scales included; `KVCache` allocates so many."""
    cores = (config.core.for_layer(layer) for layer in range(config.n_layers))
    return sum(bytes_per_token(core.cache_shapes(config.attention), dtype) for core in cores)


def activation_bytes_per_token(config: TransformerConfig, bytes_per_number: int = 2) -> int:
    """An estimate of what the backward pass needs kept for a token, nothing recomputed.

    The residual stream, its norms and the logits are fp32 (4 bytes); what matrix products read is `bytes_per_number`
    (2 under bf16 autocast). With `trainer.activation_checkpointing`: `model.counting.memory.activation_bytes`.
    """
    attention, d_model = config.attention, config.d_model
    core = attention.n_heads * (2 * attention.v_head_dim + 1)  # attended values, as made and laid out to project; lse
    layer_numbers = attention.activation_numbers(d_model) + core + 4 * config.d_ff + 2 * d_model
    layer = 4 * 2 * d_model + bytes_per_number * layer_numbers
    return config.n_layers * layer + 4 * 2 * d_model + 4 * config.vocab_size + bytes_per_number * config.vocab_size


def longest_context(config: TransformerConfig, memory_bytes: float, dtype: torch.dtype = torch.bfloat16) -> int:
    """Tokens of one sequence whose cache fits into `memory_bytes` beside bf16 weights; 0 where the weights don't."""
    left = memory_bytes - 2 * num_params(config)
    return max(0, int(left // kv_bytes_per_token(config, dtype)))


def over_mha(attention: AttentionConfig, core, d_model: int, seq_len: int) -> dict[str, float]:
    """One layer's parameters, forward operations and cache relative to MHA's at this width: what matching left over."""
    mha = mha_of(d_model, attention.head_dim)
    flops = (attention_flops_per_token(a, core, d_model, seq_len) for a in (attention, mha))
    return {
        "params": attention.num_params(d_model) / (4 * d_model**2),
        "flops": next(flops) / next(flops),
        "kv_bytes": kv_numbers_per_token(attention) / kv_numbers_per_token(mha),
    }


def summary(config: TransformerConfig, seq_len: int) -> dict[str, int | float]:
    """The counts that belong beside a run's results."""
    ratios = over_mha(config.attention, config.core, config.d_model, seq_len)
    return {
        "params": num_params(config),
        "n_heads": config.attention.n_heads,
        "training_flops_per_token": training_flops_per_token(config, seq_len),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        **{f"attention_{key}_over_mha": ratio for key, ratio in ratios.items()},
    }
