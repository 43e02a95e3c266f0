"""One hop of attention over a folded sequence, both tracks in one pass: `model.cores.sequence_tensor` defines them.

A program has a block of queries of one line (an axis at fixed other coordinates) and one head, and reads tokens in
place, so that folding copies nothing. Both tracks have the same scores: the online softmax runs over the keys before
the block, branches at the diagonal for the open track, which ends there, and continues for the closed one.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.cores.kernels.gpu.common import autotuned, online_softmax, precision, strides, widths

KEY = ["bucket", "D", "E", "CLOSED"]  # what the best configuration depends on


@triton.jit
def find_line(n_blocks, n_heads, n_tokens, inner, outer, size):
    """Return (block, head, batch row, the line's first token, how many tokens it has), offsets in 64 bits."""
    program = tl.program_id(0).to(tl.int64)
    block = (program % n_blocks).to(tl.int32)
    head = (program // n_blocks % n_heads).to(tl.int32)
    line = program // n_blocks // n_heads
    group = line // inner
    start = group % outer * size * inner + line % inner
    count = tl.minimum((n_tokens - start + inner - 1) // inner, size).to(tl.int32)
    return block, head, group // outer, start, count


@triton.jit
def load_tile(base, step, i, there, N: tl.constexpr, BLOCK: tl.constexpr):
    """Return rows i of a line from `base`, `step` apart, [len(i), BLOCK], with 0 for what is not `there`."""
    n = tl.arange(0, BLOCK)
    rows = base + i[:, None].to(tl.int64) * step
    return tl.load(rows + n[None, :], mask=there[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def store_tile(base, step, i, there, tile, N: tl.constexpr, BLOCK: tl.constexpr):
    """Store what `load_tile` loads."""
    n = tl.arange(0, BLOCK)
    rows = base + i[:, None].to(tl.int64) * step
    tl.store(rows + n[None, :], tile.to(base.dtype.element_ty), mask=there[:, None] & (n < N)[None, :])


@triton.jit
def load_pair(
    k, values, first, n, count, inner, k_t, v_t, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return keys and values of a line from its step `first` on, [len(n), BLOCK_D] and [len(n), BLOCK_E]."""
    at, there = tl.cast(first, tl.int64) * inner, first + n < count
    k_tile = load_tile(k + at * k_t, inner * k_t, n, there, D, BLOCK_D)
    return k_tile, load_tile(values + at * v_t, inner * v_t, n, there, E, BLOCK_E)


@triton.jit
def stage_span(stage: tl.constexpr, first, BLOCK: tl.constexpr, count):
    """Return the range of a line's tokens before a block that starts at `first` (stage 0), in it (1), after it (2)."""
    if stage == 0:
        return 0, first
    if stage == 1:
        return first, first + BLOCK
    return first + BLOCK, count


@autotuned(
    "BLOCK_M BLOCK_N",
    *((32, 16, 4, 3), (16, 16, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (32, 32, 4, 1)),
    key=KEY,
)
@triton.jit
def forward_kernel(
    q, k, values, own, opened, closed, opened_lse, closed_lse,
    scale, n_heads, n_tokens, inner, outer, size, bucket,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, own_b, own_t, own_h,
    GROUP_K: tl.constexpr, GROUP_V: tl.constexpr, GROUP_OWN: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CLOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fill opened and closed [B, T, H, E], and the log-sum-exp to base 2 of their scores [B, T, H]."""
    block, head, row, start, count = find_line(tl.cdiv(size, BLOCK_M), n_heads, n_tokens, inner, outer, size)
    first = block * BLOCK_M
    if first >= count:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i = first + m
    there = i < count
    at = start + tl.cast(first, tl.int64) * inner  # the block's first token
    q_tile = load_tile(q + row * q_b + at * q_t + head * q_h, inner * q_t, m, there, D, BLOCK_D)
    k += row * k_b + start * k_t + head // GROUP_K * k_h
    values += row * v_b + start * v_t + head // GROUP_V * v_h

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    own_weight = tl.zeros((BLOCK_M,), tl.float32)
    for stage in tl.static_range(3 if CLOSED else 2):
        if stage == 1:
            open_top, open_norm, open_sums = top, norm, sums
        low, high = stage_span(stage, first, BLOCK_M, count)
        for begin in tl.range(low, high, BLOCK_N):
            j = begin + n
            k_tile, v_tile = load_pair(k, values, begin, n, count, inner, k_t, v_t, D, E, BLOCK_D, BLOCK_E)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
            if stage > 0:
                logits = tl.where((j < count)[None, :], logits, float("-inf"))
            if stage == 1:
                seen = tl.where(j[None, :] <= i[:, None], logits, float("-inf"))
                weights, correction, open_top, open_norm = online_softmax(seen, open_top, open_norm, 1)
                own_weight = own_weight * correction + tl.sum(tl.where(j[None, :] == i[:, None], weights, 0.0), 1)
                weights = tl.where(j[None, :] < i[:, None], weights, 0.0)
                open_sums = open_sums * correction[:, None]
                open_sums += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
            if stage == 0 or CLOSED:
                weights, correction, top, norm = online_softmax(logits, top, norm, 1)
                sums = sums * correction[:, None]
                sums += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)

    own_base = own + row * own_b + at * own_t + head // GROUP_OWN * own_h
    own_tile = load_tile(own_base, inner * own_t, m, there, E, BLOCK_E).to(tl.float32)
    places = (row * n_tokens + at + m * inner) * n_heads + head
    mixed = (open_sums + own_weight[:, None] * own_tile) / open_norm[:, None]
    store_tile(opened, E, places, there, mixed, E, BLOCK_E)
    tl.store(opened_lse + places, open_top + tl.log2(open_norm), mask=there)
    if CLOSED:
        store_tile(closed, E, places, there, sums / norm[:, None], E, BLOCK_E)
        tl.store(closed_lse + places, top + tl.log2(norm), mask=there)


def lines(q: Tensor, axis: list[int]) -> tuple[int, ...]:
    """Return heads, tokens, and the axis: `inner` positions inside of a step, the groups around it, its steps."""
    inner, size = axis
    return q.size(2), q.size(1), inner, triton.cdiv(q.size(1), inner * size), size


def grid(q: Tensor, axis: list[int], block: str):
    n_heads, _, inner, outer, size = lines(q, axis)
    return lambda meta: (triton.cdiv(size, meta[block]) * n_heads * inner * outer * q.size(0),)


def two_tracks(
    q: Tensor, k: Tensor, values: Tensor, own: Tensor, scale: float, axis: list[int], closing: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return opened and closed values and their log-sum-exps to base 2 [B, T, H]; the closed only if `closing`."""
    q, k, values, own = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, values, own))
    heads = q.size(2)
    shape = (*q.shape[:3], values.size(-1))
    opened, opened_lse = q.new_empty(shape), q.new_empty(shape[:3], dtype=torch.float32)
    closed, closed_lse = (torch.empty_like(x) if closing else x.new_empty(0) for x in (opened, opened_lse))
    forward_kernel[grid(q, axis, "BLOCK_M")](
        q, k, values, own, opened, closed, opened_lse, closed_lse,
        scale * math.log2(math.e), *lines(q, axis), axis[1].bit_length(), *strides(q, k, values, own),
        GROUP_K=heads // k.size(2), GROUP_V=heads // values.size(2), GROUP_OWN=heads // own.size(2),
        **widths(q.size(-1), values.size(-1)), CLOSED=closing, PRECISION=precision(q.dtype),
    )  # fmt: skip
    return opened, closed, opened_lse, closed_lse
