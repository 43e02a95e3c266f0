"""What a model costs: parameters, operations, cache bytes; and head counts matched to MHA's parameters.

`python -m model.counting [overrides]` prints the table for every mechanism and size.
"""

import dataclasses
from math import prod

from model.attention.base import AttentionConfig
from model.transformer import TransformerConfig

PAPER_TOLERANCE = 0.05  # the paper's own head counts lie within 3% of MHA's attention parameters


def attention_budget(d_model: int) -> int:
    """The attention parameters a layer of an MHA whose heads fill d_model: what every mechanism is matched to."""
    return 4 * d_model**2


def fill_by_size(attention: AttentionConfig, size_name: str) -> AttentionConfig:
    """`attention` with the keys that are null, but for `n_heads`, taken from its `by_size` for this size."""
    values = attention.by_size.get(size_name, attention.by_size.get("default", {}))
    empty = {f.name for f in dataclasses.fields(attention) if getattr(attention, f.name) is None} - {"n_heads"}
    return dataclasses.replace(attention, **{key: values[key] for key in empty & values.keys()})


def fill_heads(attention: AttentionConfig, size_name: str, d_model: int) -> AttentionConfig:
    """`attention` with a head count: its own, else the paper's for this size while that one is matched to MHA's
    parameters (another width, rank or head_dim may undo that), else the closest match."""
    if attention.n_heads is not None:
        return attention
    paper = attention.by_size.get(size_name, {}).get("n_heads")
    if paper is not None:
        chosen = dataclasses.replace(attention, n_heads=paper)
        if abs(chosen.num_params(d_model) / attention_budget(d_model) - 1) <= PAPER_TOLERANCE:
            return chosen
    return dataclasses.replace(attention, n_heads=matched_heads(attention, d_model))


def matched_heads(attention: AttentionConfig, d_model: int) -> int:
    """The head count whose attention parameters come closest to MHA's at this width."""
    budget, step = attention_budget(d_model), attention.head_multiple
    best, best_error = step, float("inf")
    for n_heads in range(step, budget, step):
        params = dataclasses.replace(attention, n_heads=n_heads).num_params(d_model)
        if abs(params - budget) < best_error:
            best, best_error = n_heads, abs(params - budget)
        if params > budget:
            break
    return best


def num_params(config: TransformerConfig) -> int:
    """Parameters of the whole model; the embedding counts once, as it is tied to the head."""
    layer = config.attention.num_params(config.d_model) + 3 * config.d_model * config.d_ff
    return config.vocab_size * config.d_model + config.n_layers * layer


def training_flops_per_token(config: TransformerConfig, seq_len: int) -> float:
    """Forward and backward operations a token at this length: three times the forward pass, nothing recomputed.

    Causal attention counts the keys a query sees, (T + 1)/2 on average; PaLM's convention (6N + 12LHDT) counts all T.
    """
    attention = config.attention.flops_per_token(config.d_model) + config.core.flops_per_token(
        config.attention, seq_len
    )
    layer = attention + 2 * 3 * config.d_model * config.d_ff
    return 3 * (config.n_layers * layer + 2 * config.vocab_size * config.d_model)


def kv_numbers_per_token(attention: AttentionConfig) -> int:
    """Numbers that decoding keeps per token and layer."""
    return sum(prod(shape) for shape in attention.cache_shapes().values())


def kv_bytes_per_token(config: TransformerConfig, bytes_per_number: int = 2) -> int:
    """KV-cache bytes a token over all layers; bf16 unless told otherwise."""
    return config.n_layers * kv_numbers_per_token(config.attention) * bytes_per_number


def summary(config: TransformerConfig, seq_len: int) -> dict[str, int | float]:
    """The counts that belong beside a run's results."""
    return {
        "params": num_params(config),
        "attention_params_per_layer": config.attention.num_params(config.d_model),
        "attention_params_over_mha": config.attention.num_params(config.d_model) / attention_budget(config.d_model),
        "n_heads": config.attention.n_heads,
        "training_flops_per_token": training_flops_per_token(config, seq_len),
        "kv_bytes_per_token": kv_bytes_per_token(config),
    }
