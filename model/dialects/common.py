"""What transformers' Llama and its relatives share: the block around the attention, norms with weights, RoPE's keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.transformer import TransformerConfig

State = dict[str, Tensor]


@dataclass(frozen=True)
class Dialect:
    """A family of transformers' classes that expresses some of our networks exactly.

    Its last norm has a weight, which must be ones in `from_theirs`: the head behind it is tied to the embedding.
    """

    model_types: tuple[str, ...]
    why_not: Callable[[TransformerConfig], str | None]  # what of a network it does not have, None if nothing
    config: Callable[[TransformerConfig], dict[str, Any]]  # config.json of a network that it has
    to_theirs: Callable[[State, TransformerConfig], State]  # weights under its names
    from_theirs: Callable[[State, TransformerConfig], State]  # and back, the norms' weights folded in


def why_not_plain(network: TransformerConfig) -> str | None:
    """Return what of a network no dialect has, whatever its mechanism."""
    attention = network.attention
    if attention.qk_norm or attention.output_gate:
        return f"model.{'qk_norm' if attention.qk_norm else 'output_gate'}=true"
    if attention.rope_dim != attention.rope_width:
        return f"model.rope_fraction={attention.rope_fraction}"
    if attention.rope_dim == 2 and attention.rope_scaling == "ntk":
        return "model.rope_scaling=ntk with a single pair of features"
    return None if network.document_end is None else "data.document_mask=true"


def common_config(network: TransformerConfig) -> dict[str, Any]:
    """Return the keys of config.json that all dialects have; NTK's scaling is another base."""
    attention, scaling = network.attention, network.attention.scaling
    base, rope = attention.rope_base, None
    if scaling is not None and scaling.kind == "ntk":
        dim = attention.rope_dim
        base *= scaling.factor ** (dim / (dim - 2))
    elif scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "yarn":
            rope["original_max_position_embeddings"] = scaling.original_length
    return {
        "vocab_size": network.vocab_size,
        "hidden_size": network.d_model,
        "intermediate_size": network.d_ff,
        "num_hidden_layers": network.n_layers,
        "num_attention_heads": attention.n_heads,
        "hidden_act": "silu",
        "rms_norm_eps": network.norm_eps,
        "tie_word_embeddings": True,
        "rope_theta": base,
        "rope_scaling": rope,
    }


def to_common(state: State, network: TransformerConfig) -> State:
    """Return what is around the attention under their names, with ones as the weights of norms."""
    ones = torch.ones_like(state["embedding.weight"][0])
    found = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": ones}
    for layer in range(network.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        gate, up = state[f"{ours}.mlp.gate_up_proj.weight"].chunk(2)
        found |= {
            f"{theirs}.self_attn.o_proj.weight": state[f"{ours}.attention.out_proj.weight"],
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": state[f"{ours}.mlp.down_proj.weight"],
            f"{theirs}.input_layernorm.weight": ones,
            f"{theirs}.post_attention_layernorm.weight": ones,
        }
    return found


def whole(state: State) -> State:
    """Return tensors that share no memory, as safetensors wants them."""
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def from_common(theirs: State, network: TransformerConfig) -> State:
    """Return what is around the attention under our names; the weight of a norm goes into the matrix after it."""
    found = {"embedding.weight": theirs["model.embed_tokens.weight"]}
    for layer in range(network.n_layers):
        ours, prefix = f"blocks.{layer}", f"model.layers.{layer}"
        gate_up = torch.cat([theirs[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
        found |= {
            f"{ours}.attention.out_proj.weight": theirs[f"{prefix}.self_attn.o_proj.weight"],
            f"{ours}.mlp.gate_up_proj.weight": gate_up * theirs[f"{prefix}.post_attention_layernorm.weight"],
            f"{ours}.mlp.down_proj.weight": theirs[f"{prefix}.mlp.down_proj.weight"],
        }
    return found
