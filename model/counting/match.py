"""Budgets: the head count (or rank) with which a mechanism costs what MHA costs at the same width.

params     n_heads, so that a layer's attention has MHA's parameters, 4 d_model^2 (the paper's way; its own counts
           hold at its sizes)
flops      n_heads, so that a layer's attention takes MHA's operations a token at the training length
kv_bytes   the mechanism's `cache_knobs` (TPA's key and value ranks, GQA's groups, MLA's latent), so that the cache is
           MHA's, with n_heads matched by parameters at each candidate: equal in both
"""

import dataclasses
from collections.abc import Callable

from model.attention.base import AttentionConfig
from model.cores.base import AttentionCore
from model.counting import attention_flops_per_token, kv_numbers_per_token, mha_of

PAPER_TOLERANCE = 0.05  # the paper's own head counts lie within 3% of MHA's attention parameters


def fill_by_size(attention: AttentionConfig, size_name: str) -> AttentionConfig:
    """`attention` with the keys that are null, but for `n_heads`, taken from its `by_size` for this size."""
    values = attention.by_size.get(size_name, attention.by_size.get("default", {}))
    empty = {f.name for f in dataclasses.fields(attention) if getattr(attention, f.name) is None} - {"n_heads"}
    return dataclasses.replace(attention, **{key: values[key] for key in empty & values.keys()})


def fill_heads(attention: AttentionConfig, core: AttentionCore, size, seq_len: int) -> AttentionConfig:
    """`attention` with what is open decided as `size.match` (of a SizeConfig) says; an `n_heads` stands."""
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
    if paper is not None:
        chosen = dataclasses.replace(attention, n_heads=paper)
        if abs(chosen.num_params(d_model) / (4 * d_model**2) - 1) <= PAPER_TOLERANCE:
            return chosen
    return match_params(attention, d_model)


def match_params(attention: AttentionConfig, d_model: int) -> AttentionConfig:
    return match_heads(attention, 4 * d_model**2, lambda a: a.num_params(d_model))


def match_heads(attention: AttentionConfig, target: float, cost: Callable[[AttentionConfig], float]) -> AttentionConfig:
    """The head count whose cost, which grows with it, comes closest to the target."""
    heads = best = attention.head_multiple
    while True:
        candidate = dataclasses.replace(attention, n_heads=heads)
        if abs(cost(candidate) - target) <= abs(cost(dataclasses.replace(attention, n_heads=best)) - target):
            best = heads
        if cost(candidate) > target:
            return dataclasses.replace(attention, n_heads=best)
        heads += attention.head_multiple


def match_cache(attention: AttentionConfig, d_model: int) -> AttentionConfig:
    """The value of the mechanism's cache knobs whose cache comes closest to MHA's."""
    target = kv_numbers_per_token(mha_of(d_model, attention.head_dim))

    def with_knobs(value: int) -> AttentionConfig:
        turned = dataclasses.replace(attention, **dict.fromkeys(attention.cache_knobs, value))
        return turned if turned.n_heads is not None else match_params(turned, d_model)

    if not attention.cache_knobs:
        return with_knobs(0)
    best = with_knobs(1)
    for value in range(2, target + 1):
        candidate = with_knobs(value)
        numbers = kv_numbers_per_token(candidate)
        if abs(numbers - target) < abs(kv_numbers_per_token(best) - target):
            best = candidate
        if numbers > target or candidate.num_params(d_model) > 2 * 4 * d_model**2:
            break
    return best
