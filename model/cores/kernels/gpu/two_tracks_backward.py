"""The backward pass of `two_tracks.forward_kernel`.

With w the weights of the open track and p those of the closed one, p(i, j) = r(i) w(i, j) for j < i, where r = exp(lse
of the open scores - lse of the closed ones) <= 1. So both tracks together send w (g . C(j) - delta) back to the score
of such a pair, g = dO + r dC: as many products as full attention has, and not half as many again.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.cores.kernels.gpu.common import autotuned, precision, strides, widths
from model.cores.kernels.gpu.two_tracks import KEY, find_line, grid, lines, load_pair, load_tile, stage_span, store_tile

# Rows of the block that stays, rows of those that go by, warps, stages.
SIZES = (
    (32, 16, 4, 2), (16, 16, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 1)
)  # fmt: skip


@triton.jit
def rows_kernel(
    q, k, own, opened, closed, opened_lse, closed_lse, d_opened, d_closed,
    both, down, delta_both, delta_closed, diagonal,
    scale, n_heads, n_tokens, n_rows,
    q_b, q_t, q_h, k_b, k_t, k_h, own_b, own_t, own_h,
    GROUP_K: tl.constexpr, GROUP_OWN: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CLOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill what depends on a single query and head: g [B, T, H, E] (`both`), the gradient of `own`, the deltas
    [B, T, H], and what the diagonal's score gets from the open track."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = places < n_rows
    head, token, row = places % n_heads, places // n_heads % n_tokens, places // n_heads // n_tokens
    q_tile = load_tile(q, 1, row * q_b + token * q_t + head * q_h, there, D, BLOCK_D)
    k_tile = load_tile(k, 1, row * k_b + token * k_t + head // GROUP_K * k_h, there, D, BLOCK_D)
    own_rows = row * own_b + token * own_t + head // GROUP_OWN * own_h
    own_tile = load_tile(own, 1, own_rows, there, E, BLOCK_E).to(tl.float32)
    out = load_tile(opened, E, places, there, E, BLOCK_E).to(tl.float32)
    d_out = load_tile(d_opened, E, places, there, E, BLOCK_E).to(tl.float32)
    lse = tl.load(opened_lse + places, mask=there, other=0.0)
    weight = tl.exp2(tl.sum(q_tile.to(tl.float32) * k_tile.to(tl.float32), 1) * scale - lse)
    delta = tl.sum(d_out * out, 1)
    tl.store(diagonal + places, weight * (tl.sum(d_out * own_tile, 1) - delta), mask=there)
    store_tile(down, E, places, there, weight[:, None] * d_out, E, BLOCK_E)
    if CLOSED:
        out = load_tile(closed, E, places, there, E, BLOCK_E).to(tl.float32)
        d_past = load_tile(d_closed, E, places, there, E, BLOCK_E).to(tl.float32)
        ratio = tl.exp2(lse - tl.load(closed_lse + places, mask=there, other=0.0))
        delta_past = tl.sum(d_past * out, 1)
        tl.store(delta_closed + places, delta_past, mask=there)
        delta += ratio * delta_past
        store_tile(both, E, places, there, d_out + ratio[:, None] * d_past, E, BLOCK_E)
    tl.store(delta_both + places, delta, mask=there)


@triton.jit
def load_upstream(gradients, lse, delta, rows, step, i, there, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the gradients of some queries of a line from `rows` on, [len(i), BLOCK_E], their log-sum-exp and delta."""
    tile = load_tile(gradients + rows * E, step * E, i, there, E, BLOCK_E)
    sums = tl.load(lse + rows + i * step, mask=there, other=0.0)
    return tile, sums, tl.load(delta + rows + i * step, mask=there, other=0.0)


@triton.jit
def score_gradients(logits, lse, left, right, delta, seen, PRECISION: tl.constexpr):
    """Return the weights of a track and the gradient of its scores, 0 if not `seen`.

    They are [queries, keys] with upstream gradients on the left and values on the right, or [keys, queries] the other
    way round; `lse` and `delta` broadcast to that.
    """
    weights = tl.exp2(tl.where(seen, logits - lse, float("-inf")))
    return weights, weights * (tl.dot(left, tl.trans(right), input_precision=PRECISION) - delta)


@autotuned("BLOCK_M BLOCK_N", *SIZES, key=KEY)
@triton.jit
def queries_kernel(
    q, k, values, both, d_closed, opened_lse, closed_lse, delta_both, delta_closed, diagonal, d_q,
    scale, score_scale, n_heads, n_tokens, inner, outer, size, bucket,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    GROUP_K: tl.constexpr, GROUP_V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CLOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fill d_q [B, T, H, D]: a block of queries stays, the keys of its line go by."""
    block, head, row, start, count = find_line(tl.cdiv(size, BLOCK_M), n_heads, n_tokens, inner, outer, size)
    first = block * BLOCK_M
    if first >= count:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i = first + m
    there = i < count
    token = start + tl.cast(first, tl.int64) * inner
    q_tile = load_tile(q + row * q_b + token * q_t + head * q_h, inner * q_t, m, there, D, BLOCK_D)
    rows = (row * n_tokens + token) * n_heads + head
    step = inner * n_heads
    g, lse, delta = load_upstream(both, opened_lse, delta_both, rows, step, m, there, E, BLOCK_E)
    if CLOSED:
        past, past_lse, past_delta = load_upstream(d_closed, closed_lse, delta_closed, rows, step, m, there, E, BLOCK_E)
    k += row * k_b + start * k_t + head // GROUP_K * k_h
    values += row * v_b + start * v_t + head // GROUP_V * v_h
    gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    extra = tl.load(diagonal + rows + m * step, mask=there, other=0.0)
    # The keys before the block are the open track's, its own are both tracks', those after it are the closed track's.
    for stage in tl.static_range(3 if CLOSED else 2):
        low, high = stage_span(stage, first, BLOCK_M, count)
        for begin in tl.range(low, high, BLOCK_N):
            j = begin + n
            k_tile, v_tile = load_pair(k, values, begin, n, count, inner, k_t, v_t, D, E, BLOCK_D, BLOCK_E)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
            seen = (j < count)[None, :] & there[:, None]
            d_scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if stage < 2:
                before = seen & (j[None, :] < i[:, None]) if stage == 1 else seen
                _, d_scores = score_gradients(logits, lse[:, None], g, v_tile, delta[:, None], before, PRECISION)
            if stage == 1:
                d_scores += tl.where(j[None, :] == i[:, None], extra[:, None], 0.0)
            if CLOSED and stage > 0:
                after = seen & (j[None, :] >= i[:, None]) if stage == 1 else seen
                lse_2, delta_2 = past_lse[:, None], past_delta[:, None]
                _, more = score_gradients(logits, lse_2, past, v_tile, delta_2, after, PRECISION)
                d_scores += more
            gradient += tl.dot(d_scores.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    store_tile(d_q, D, rows + m * step, there, gradient * score_scale, D, BLOCK_D)


@autotuned("BLOCK_N BLOCK_M", *SIZES, key=KEY)
@triton.jit
def keys_kernel(
    q, k, values, both, d_closed, opened_lse, closed_lse, delta_both, delta_closed, diagonal, d_k, d_values,
    scale, score_scale, n_heads, n_tokens, inner, outer, size, bucket,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    GROUP_K: tl.constexpr, GROUP_V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, CLOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fill d_k [B, T, H, D] and d_values [B, T, H, E], by query head: a block of keys stays, the queries go by."""
    block, head, row, start, count = find_line(tl.cdiv(size, BLOCK_N), n_heads, n_tokens, inner, outer, size)
    begin = block * BLOCK_N
    if begin >= count:
        return
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    j = begin + n
    there = j < count
    token = start + tl.cast(begin, tl.int64) * inner
    k_tile = load_tile(k + row * k_b + token * k_t + head // GROUP_K * k_h, inner * k_t, n, there, D, BLOCK_D)
    v_tile = load_tile(values + row * v_b + token * v_t + head // GROUP_V * v_h, inner * v_t, n, there, E, BLOCK_E)
    q += row * q_b + start * q_t + head * q_h
    line = (row * n_tokens + start) * n_heads + head
    step = inner * n_heads
    for_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)

    # Scores are transposed here, [keys, queries], as both products want them.
    # Queries before the block are the closed track's, its own are both tracks', those after it are the open track's.
    for stage in tl.static_range(0 if CLOSED else 1, 3):
        low, high = stage_span(stage, begin, BLOCK_N, count)
        for first in tl.range(low, high, BLOCK_M):
            i = first + m
            at = tl.cast(first, tl.int64) * inner
            rows = line + at * n_heads
            q_tile = load_tile(q + at * q_t, inner * q_t, m, i < count, D, BLOCK_D)
            logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
            seen = (i < count)[None, :] & there[:, None]
            d_scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            if stage > 0:
                g, lse, delta = load_upstream(both, opened_lse, delta_both, rows, step, m, i < count, E, BLOCK_E)
                before = seen & (j[:, None] < i[None, :]) if stage == 1 else seen
                weights, d_scores = score_gradients(logits, lse[None, :], v_tile, g, delta[None, :], before, PRECISION)
                for_v += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
            if stage == 1:
                extra = tl.load(diagonal + rows + m * step, mask=i < count, other=0.0)
                d_scores += tl.where(j[:, None] == i[None, :], extra[None, :], 0.0)
            if CLOSED and stage < 2:
                g, lse, delta = load_upstream(d_closed, closed_lse, delta_closed, rows, step, m, i < count, E, BLOCK_E)
                after = seen & (j[:, None] >= i[None, :]) if stage == 1 else seen
                weights, more = score_gradients(logits, lse[None, :], v_tile, g, delta[None, :], after, PRECISION)
                for_v += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
                d_scores += more
            for_k += tl.dot(d_scores.to(q_tile.dtype), q_tile, input_precision=PRECISION)
    places = (row * n_tokens + token + n * inner) * n_heads + head
    store_tile(d_k, D, places, there, for_k * score_scale, D, BLOCK_D)
    store_tile(d_values, E, places, there, for_v, E, BLOCK_E)


def two_tracks_backward(
    q: Tensor, k: Tensor, values: Tensor, own: Tensor, results: list[Tensor], d_opened: Tensor, d_closed: Tensor | None,
    scale: float, axis: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, values and own, by query head [B, T, H, ...], given `two_tracks`' `results`."""
    opened, closed, opened_lse, closed_lse = results
    q, k, values, own = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, values, own))
    closing, heads = d_closed is not None, q.size(2)
    d_opened = d_opened.contiguous()
    d_closed = d_closed.contiguous() if closing else d_opened
    both = torch.empty_like(d_opened) if closing else d_opened
    (d_q, d_k), (d_values, down) = ([x.new_empty(x.shape) for _ in range(2)] for x in (q, opened))
    delta_both, delta_closed, diagonal = (torch.empty_like(opened_lse) for _ in range(3))
    groups = {"GROUP_K": heads // k.size(2), "GROUP_V": heads // values.size(2)}
    shape = widths(q.size(-1), values.size(-1)) | {"CLOSED": closing}
    scores = scale * math.log2(math.e)
    rows, block = opened_lse.numel(), 32
    rows_kernel[(triton.cdiv(rows, block),)](
        q, k, own, opened, closed, opened_lse, closed_lse, d_opened, d_closed,
        both, down, delta_both, delta_closed, diagonal,
        scores, heads, q.size(1), rows, *strides(q, k, own),
        GROUP_K=groups["GROUP_K"], GROUP_OWN=heads // own.size(2), **shape, BLOCK=block,
    )  # fmt: skip
    given = (q, k, values, both, d_closed, opened_lse, closed_lse, delta_both, delta_closed, diagonal)
    sizes = (scores, scale, *lines(q, axis), axis[1].bit_length(), *strides(q, k, values))
    constants = groups | shape | {"PRECISION": precision(q.dtype)}
    queries_kernel[grid(q, axis, "BLOCK_M")](*given, d_q, *sizes, **constants)
    keys_kernel[grid(q, axis, "BLOCK_N")](*given, d_k, d_values, *sizes, **constants)
    return d_q, d_k, d_values, down
