"""MHA, GQA and MQA as the Llama of transformers, or its Mistral.

Both turn feature i of a head with feature i + D/2, so weights are only cut and named. Mistral is the same network for
what Llama's class refuses: a width that the number of heads does not divide, and a sliding window.
"""

from typing import Any

import torch

from model.attention.multi_head import MultiHeadConfig
from model.cores.full import Full
from model.cores.sliding_window import SlidingWindow
from model.dialects.common import (
    Dialect,
    State,
    common_config,
    from_common,
    to_common,
    whole,
    why_not_plain,
)
from model.transformer import TransformerConfig


def why_not(network: TransformerConfig) -> str | None:
    core = network.core
    if type(network.attention) is not MultiHeadConfig:
        return f"model={network.attention.name} makes queries, keys and values in another way"
    if not (type(core) is Full or (type(core) is SlidingWindow and core.full_every is None)):
        return f"core={core.name}" + (" with core.full_every" if type(core) is SlidingWindow else "")
    return why_not_plain(network)


def config(network: TransformerConfig) -> dict[str, Any]:
    attention, core = network.attention, network.core
    window = core.window if type(core) is SlidingWindow else None
    is_llama = window is None and network.d_model % attention.n_heads == 0
    found = {
        "architectures": ["LlamaForCausalLM" if is_llama else "MistralForCausalLM"],
        "model_type": "llama" if is_llama else "mistral",
        **common_config(network),
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
    }
    return found if is_llama else found | {"sliding_window": window}


def to_theirs(state: State, network: TransformerConfig) -> State:
    found, width = to_common(state, network), network.attention.head_dim
    rows = [width * n for n in (network.attention.n_heads, network.attention.kv_heads, network.attention.kv_heads)]
    for layer in range(network.n_layers):
        for part, weight in zip("qkv", state[f"blocks.{layer}.attention.qkv_proj.weight"].split(rows), strict=True):
            found[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = weight
    return whole(found)


def from_theirs(theirs: State, network: TransformerConfig) -> State:
    found = from_common(theirs, network)
    for layer in range(network.n_layers):
        prefix = f"model.layers.{layer}"
        qkv = torch.cat([theirs[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"])
        found[f"blocks.{layer}.attention.qkv_proj.weight"] = qkv * theirs[f"{prefix}.input_layernorm.weight"]
    return found


LLAMA = Dialect(("llama", "mistral"), why_not, config, to_theirs, from_theirs)
