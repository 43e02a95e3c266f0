"""MLA as DeepSeek-V3 of transformers has it, with a plain feed-forward in every layer.

Its class turns neighbouring features, (0, 1), (2, 3) ..., and ours i with i + P/2, so the rows that make rotated
features are put in another order. Rows that are ours by kind (k of all heads, then v of all heads) are theirs by head.
"""

from typing import Any

import torch
from torch import Tensor

from model.attention.latent import LatentConfig
from model.cores.full import Full
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

NAMES = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")


def why_not(network: TransformerConfig) -> str | None:
    if type(network.attention) is not LatentConfig:
        return f"model={network.attention.name} makes queries, keys and values in another way"
    if type(network.core) is not Full:
        return f"core={network.core.name}"
    return why_not_plain(network)


def config(network: TransformerConfig) -> dict[str, Any]:
    attention, found = network.attention, common_config(network)
    if found["rope_scaling"] and found["rope_scaling"]["rope_type"] == "yarn":
        # YaRN sharpens all logits, and not only the part of a head that turns.
        found["rope_scaling"] |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **found,
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.head_dim,
        "rope_interleave": True,
        "first_k_dense_replace": network.n_layers,
        "num_nextn_predict_layers": 0,
    }


def interleaved(x: Tensor) -> Tensor:
    """Return rows x [..., P, M] with i and i + P/2 next to each other."""
    return torch.stack(x.chunk(2, dim=-2), dim=-2).flatten(-3, -2)


def halved(x: Tensor) -> Tensor:
    """Undo `interleaved`."""
    return torch.cat((x[..., 0::2, :], x[..., 1::2, :]), dim=-2)


def to_theirs(state: State, network: TransformerConfig) -> State:
    attention, found = network.attention, to_common(state, network)
    heads, width, rope = attention.n_heads, attention.head_dim, attention.qk_rope_head_dim
    for layer in range(network.n_layers):
        ours, theirs = f"blocks.{layer}.attention", f"model.layers.{layer}.self_attn"
        down = [attention.q_lora_rank, attention.kv_lora_rank, rope]
        c_q, c_kv, k_rope = state[f"{ours}.down_proj.weight"].split(down)
        nope, turned = state[f"{ours}.q_up_proj.weight"].split([heads * width, heads * rope])
        q_up = torch.cat((nope.unflatten(0, (heads, width)), interleaved(turned.unflatten(0, (heads, rope)))), dim=1)
        k_up, v_up = (part.unflatten(0, (heads, width)) for part in state[f"{ours}.kv_up_proj.weight"].chunk(2))
        found |= {
            f"{theirs}.q_a_proj.weight": c_q,
            f"{theirs}.q_a_layernorm.weight": state[f"{ours}.q_norm.weight"],
            f"{theirs}.q_b_proj.weight": q_up.flatten(0, 1),
            f"{theirs}.kv_a_proj_with_mqa.weight": torch.cat((c_kv, interleaved(k_rope))),
            f"{theirs}.kv_a_layernorm.weight": state[f"{ours}.kv_norm.weight"],
            f"{theirs}.kv_b_proj.weight": torch.cat((k_up, v_up), dim=1).flatten(0, 1),
        }
    return whole(found)


def from_theirs(theirs: State, network: TransformerConfig) -> State:
    attention, found = network.attention, from_common(theirs, network)
    heads, width, rope = attention.n_heads, attention.head_dim, attention.qk_rope_head_dim
    for layer in range(network.n_layers):
        ours, prefix = f"blocks.{layer}.attention", f"model.layers.{layer}"
        named = {name: theirs[f"{prefix}.self_attn.{name}.weight"] for name in NAMES}
        c_kv, k_rope = named["kv_a_proj_with_mqa"].split([attention.kv_lora_rank, rope])
        down = torch.cat((named["q_a_proj"], c_kv, halved(k_rope)))
        nope, turned = named["q_b_proj"].unflatten(0, (heads, -1)).split([width, rope], dim=1)
        k_up, v_up = named["kv_b_proj"].unflatten(0, (heads, -1)).chunk(2, dim=1)
        found |= {
            f"{ours}.down_proj.weight": down * theirs[f"{prefix}.input_layernorm.weight"],
            f"{ours}.q_norm.weight": named["q_a_layernorm"],
            f"{ours}.q_up_proj.weight": torch.cat((nope.flatten(0, 1), halved(turned).flatten(0, 1))),
            f"{ours}.kv_norm.weight": named["kv_a_layernorm"],
            f"{ours}.kv_up_proj.weight": torch.cat((k_up.flatten(0, 1), v_up.flatten(0, 1))),
        }
    return found


DEEPSEEK = Dialect(("deepseek_v3",), why_not, config, to_theirs, from_theirs)
