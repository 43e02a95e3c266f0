"""Budgets: the head count (or rank) with which a mechanism costs what MHA costs at the same width.

params     n_heads, so that a layer's attention has MHA's parameters, 4 d_model^2 (the paper's way)
flops      n_heads, so that a layer's attention takes MHA's operations a token at the training length
kv_bytes   the mechanism's `cache_knobs` (TPA's key and value ranks, GQA's groups, MLA's latent), so that the cache is
           MHA's, with n_heads matched by parameters at each candidate: equal in both
"""

from bisect import bisect_right
from collections.abc import Callable

from configs.errors import ConfigError, Mistakes
from configs.load import load
from model.attention.base import AttentionConfig, AttentionCore
from model.counting import attention_flops_per_token, kv_numbers_per_token, mha_of
from model.transformer import SizeConfig

PAPER_TOLERANCE = 0.05  # the paper's own head counts lie within 3% of MHA's attention parameters


def decide(attention: AttentionConfig, core: AttentionCore, size: SizeConfig, seq_len: int) -> AttentionConfig:
    """Return `attention` with every null key decided by `size` and the training length; Mistakes if one stays null."""
    by_size = attention.by_size
    values = {"head_dim": size.head_dim} | by_size.get("default", {}) | by_size.get(size.name, {})
    empty = {key for key, value in attention if value is None} - {"n_heads"}
    attention = attention.replace(**{key: values[key] for key in empty & values.keys()})
    if attention.rope_scaling != "none" and attention.rope_original_length is None:
        attention = attention.replace(rope_original_length=round(seq_len / attention.rope_factor))
    if missing := [key for key in attention.needed if getattr(attention, key) is None]:
        raise Mistakes(*(f"model.{k} is null, and model.by_size has no value for this size: set it" for k in missing))
    try:
        attention = load(dict(attention), type(attention))
    except ConfigError as error:
        raise Mistakes(*(f"model.{line}" for line in error.errors)) from None
    return fill_heads(attention, core, size, seq_len)


def fill_heads(attention: AttentionConfig, core: AttentionCore, size: SizeConfig, seq_len: int) -> AttentionConfig:
    """Return `attention` with what is open decided as `size.match` says; an `n_heads` that is set stays."""
    d_model = size.d_model
    if size.match == "kv_bytes":
        return match_cache(attention, d_model)
    if attention.n_heads is not None:
        return attention
    if size.match == "flops":
        target = attention_flops_per_token(mha_of(d_model, attention.head_dim), core, d_model, seq_len)
        return match_heads(attention, target, lambda a: attention_flops_per_token(a, core, d_model, seq_len))
    # The paper's count, while it is matched: another width, rank or head_dim may undo that.
    paper = attention.by_size.get(size.name, {}).get("n_heads")
    if paper is not None and paper % attention.head_multiple == 0:
        chosen = attention.replace(n_heads=paper)
        if abs(chosen.num_params(d_model) / (4 * d_model**2) - 1) <= PAPER_TOLERANCE:
            return chosen
    return match_params(attention, d_model)


def match_params(attention: AttentionConfig, d_model: int) -> AttentionConfig:
    return match_heads(attention, 4 * d_model**2, lambda a: a.num_params(d_model))


def match_heads(attention: AttentionConfig, target: float, cost: Callable[[AttentionConfig], float]) -> AttentionConfig:
    """Return `attention` with the head count whose cost, which grows with it, comes closest to the target."""

    def with_heads(multiples: int) -> AttentionConfig:
        return attention.replace(n_heads=multiples * attention.head_multiple)

    most = 1
    while cost(with_heads(most)) <= target:
        most *= 2
    within = bisect_right(range(1, most), target, key=lambda multiples: cost(with_heads(multiples)))
    candidates = [with_heads(multiples) for multiples in (within + 1, within) if multiples]
    return min(candidates, key=lambda candidate: abs(cost(candidate) - target))


def match_cache(attention: AttentionConfig, d_model: int) -> AttentionConfig:
    """Return `attention` with the value of its cache knobs whose cache comes closest to MHA's."""
    target = kv_numbers_per_token(mha_of(d_model, attention.head_dim))
    candidates = []
    for value in range(1, target + 1 if attention.cache_knobs else 2):
        candidate = attention.replace(**dict.fromkeys(attention.cache_knobs, value))
        candidates.append(candidate if candidate.n_heads is not None else match_params(candidate, d_model))
        if kv_numbers_per_token(candidates[-1]) > target or candidates[-1].num_params(d_model) > 2 * 4 * d_model**2:
            break
    return min(candidates, key=lambda candidate: abs(kv_numbers_per_token(candidate) - target))
