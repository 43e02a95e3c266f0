"""TPA that equals MHA, GQA or MQA, by constant head factors that say whose keys a head reads.

Zhang et al., arXiv 2501.06425, section 3.3.
"""

from dataclasses import replace

import torch

from model.attention.base import AttentionConfig
from model.attention.multi_head import MultiHeadConfig
from model.attention.tensor_product import TensorProductConfig
from model.dialects.common import State
from model.transformer import TransformerConfig


def as_multi_head(network: TransformerConfig, groups: int) -> TransformerConfig:
    """Return a TPA network with MHA, GQA or MQA of `groups` key-value heads in its place; others stay as they are."""
    if not isinstance(network.attention, TensorProductConfig):
        return network
    common = {key: value for key, value in network.attention if key in AttentionConfig.model_fields}
    # Not validated: a number of groups that does not divide the heads is for the caller to report.
    return replace(network, attention=MultiHeadConfig(**common).replace(n_kv_heads=groups))


def why_no_factors(attention: TensorProductConfig, heads: int, groups: int) -> list[str]:
    """Return what of a TPA keeps it from equalling attention of `heads` with `groups` key-value heads, a line each."""
    wanted = {"contextual_a": False, "contextual_b": True, "shared_b": False, "a_activation": "none", "c_dim": None}
    lines = [
        f"model.{key}={str(getattr(attention, key)).lower()}: a TPA equals a Llama only with model.{key}="
        + ("null" if value is None else str(value).lower())
        for key, value in wanted.items()
        if getattr(attention, key) != value
    ]
    least = {"q": heads, "k": groups, "v": groups}
    lines += [
        f"model.{part}_rank={rank}: must be at least {least[part]} to equal its {heads} heads with {groups} for keys"
        for part, rank in attention.ranks.items()
        if rank < least[part]
    ]
    return lines


def to_factors(multi_head: State, own: State, attention: TensorProductConfig, groups: int) -> State:
    """Return the weights of the TPA that equals `multi_head`; `own` are its weights as drawn.

    Each head of queries, keys and values is a token factor of its own. Ranks beyond them keep the token factors that
    were drawn, with head factors of zero: they add nothing yet, and can learn.
    """
    heads, width = attention.n_heads, attention.head_dim
    reads = {"q": torch.eye(heads), "k": torch.eye(groups).repeat_interleave(heads // groups, dim=0)}
    reads["v"] = reads["k"]
    found = {name: weight for name, weight in multi_head.items() if not name.endswith("qkv_proj.weight")}
    for name, weight in multi_head.items():
        if not name.endswith("qkv_proj.weight"):
            continue
        prefix = name.removesuffix("qkv_proj.weight")
        rows = own[f"{prefix}factor_proj.weight"].clone()
        start = 0
        for part, made in zip("qkv", weight.split([heads * width, groups * width, groups * width]), strict=True):
            rows[start : start + made.size(0)] = made
            rank = attention.ranks.get(part)
            start += made.size(0) if rank is None else rank * width
            if rank is not None:
                factor = torch.zeros(heads, rank)
                factor[:, : reads[part].size(1)] = rank * reads[part]  # the product is divided by the rank
                found[f"{prefix}a_{part}"] = factor
        found[f"{prefix}factor_proj.weight"] = rows
    return found
