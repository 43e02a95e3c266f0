"""Decoding from the factor cache: a few queries against a long cache, FlashTPA's Algorithm 2 (arXiv 2501.06425).

One pass over the cache. A program has a range of keys (a split) and a block of columns, each a (query, head) pair; it
forms its queries q [D, columns] from their factors, and with them tensor cores make b_k q for each rank, which a_k
scales to logits. The softmax runs online; values are accumulated as b_v^T (weights x a_v). A second kernel merges the
splits by their log-sum-exp. Lengths are read on the device and the grid depends only on the cache's capacity, so that
CUDA graphs hold it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.attention.tensor_product import Factored
from model.cores.kernels.gpu.common import LAYOUT, autotuned, load_rows, online_softmax, operands

MAX_SPLITS = 128
SPLIT_KEYS = 256  # the least number of keys of a split


@autotuned(
    "BLOCK_S",
    *((64, 4, 3), (32, 4, 4), (64, 4, 2), (128, 4, 2), (128, 8, 2), (128, 8, 3), (64, 8, 3), (256, 8, 2), (32, 4, 1)),
    key=["H", "R_Q", "R_K", "R_V", "D", "D_B", "E", "BLOCK_C", "bucket", *LAYOUT],
)
@triton.jit(do_not_specialize=["n_keys", "n_splits", "bucket"])  # they change from token to token
def split_kernel(
    a_q, b_q, c_q, a_k, b_k, c_k, a_v, b_v, c_v, starts, partial, lse,
    scale, n_queries, n_keys, n_splits, bucket,
    aq_b, aq_t, aq_h, aq_r, bq_b, bq_t, bq_r, cq_b, cq_t, cq_r,
    ak_b, ak_s, ak_h, ak_r, bk_b, bk_s, bk_r, ck_b, ck_s, ck_r,
    av_b, av_s, av_h, av_r, bv_b, bv_s, bv_r, cv_b, cv_s, cv_r,
    H: tl.constexpr, R_Q: tl.constexpr, R_K: tl.constexpr, R_V: tl.constexpr, DENSE_Q: tl.constexpr,
    D: tl.constexpr, D_B: tl.constexpr, E: tl.constexpr, E_B: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Fill partial [B, splits, T H, E], normalised within the split, and lse [B, splits, T H] to base 2."""
    split, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < n_queries * H
    t, h = columns // H, columns % H
    count = n_keys
    if RAGGED:
        count = tl.load(starts + row).to(tl.int32) + n_queries
    last = tl.where(inside, count - n_queries + t, count)

    # The queries, transposed and scaled: [D, columns].
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    loaded = (d < D)[:, None] & inside[None, :]
    for r in tl.static_range(1 if DENSE_Q else R_Q):
        rank = h if DENSE_Q else r
        rows = b_q + row * bq_b + (t * bq_t + rank * bq_r)[None, :]
        factor = tl.load(rows + (d % D_B)[:, None], mask=loaded, other=0.0).to(tl.float32)
        if D_B != D:
            rows = c_q + row * cq_b + (t * cq_t + rank * cq_r)[None, :]
            factor *= tl.load(rows + (d // D_B)[:, None], mask=loaded, other=0.0)
        if not DENSE_Q:
            heads = a_q + row * aq_b + t * aq_t + h * aq_h + r * aq_r
            factor *= tl.load(heads, mask=inside, other=0.0).to(tl.float32)[None, :]
        q += factor
    q = (q * scale).to(b_k.dtype.element_ty)

    length = tl.cdiv(tl.cdiv(count, n_splits), BLOCK_S) * BLOCK_S
    first = split * length
    stop = tl.minimum(first + length, count)
    top = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_C,), tl.float32)
    values = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    s = tl.arange(0, BLOCK_S)
    for begin in tl.range(first, stop, BLOCK_S):
        at = tl.cast(begin, tl.int64)  # a cache may have more than 2^31 numbers
        held = begin + s < stop
        both = held[:, None] & inside[None, :]
        logits = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
        for r in tl.static_range(R_K):
            b = load_rows(
                b_k + row * bk_b + at * bk_s + r * bk_r, bk_s, s, held,
                c_k + row * ck_b + at * ck_s + r * ck_r, ck_s, D, D_B, BLOCK_D,
            )  # fmt: skip
            a_rows = a_k + row * ak_b + at * ak_s + r * ak_r + s[:, None] * ak_s + h[None, :] * ak_h
            a = tl.load(a_rows, mask=both, other=0.0).to(tl.float32)
            logits += a * tl.dot(b, q, input_precision=PRECISION)
        logits = tl.where(held[:, None] & (begin + s[:, None] <= last[None, :]), logits, float("-inf"))
        weights, correction, top, norm = online_softmax(logits, top, norm, 0)
        values *= correction[None, :]
        for r in tl.static_range(R_V):
            b = load_rows(
                b_v + row * bv_b + at * bv_s + r * bv_r, bv_s, s, held,
                c_v + row * cv_b + at * cv_s + r * cv_r, cv_s, E, E_B, BLOCK_E,
            )  # fmt: skip
            a_rows = a_v + row * av_b + at * av_s + r * av_r + s[:, None] * av_s + h[None, :] * av_h
            a = tl.load(a_rows, mask=both, other=0.0).to(tl.float32)
            values += tl.dot(tl.trans(b), (weights * a).to(b.dtype), input_precision=PRECISION)

    place = (row * n_splits + split) * n_queries * H + columns
    empty = norm == 0
    values = values / tl.where(empty, 1.0, norm)[None, :]
    tl.store(partial + place[None, :] * E + e[:, None], values, mask=(e < E)[:, None] & inside[None, :])
    tl.store(lse + place, tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, norm))), mask=inside)


@triton.jit
def merge_kernel(partial, lse, out, n_splits, n_columns, R_V: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
                 BLOCK_SPLITS: tl.constexpr):  # fmt: skip
    """Fill out [B, T H, E]: the splits' values weighted by their shares of the softmax, over R_V."""
    column, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, e = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_E)
    place = (row * n_splits + i) * n_columns + column
    logs = tl.load(lse + place, mask=i < n_splits, other=float("-inf"))
    shares = tl.exp2(logs - tl.max(logs, 0))
    shares = shares / (tl.sum(shares, 0) * R_V)
    values = tl.load(
        partial + place[:, None] * E + e[None, :], mask=(i < n_splits)[:, None] & (e < E)[None, :], other=0.0
    )
    merged = tl.sum(values * shares[:, None], 0)
    tl.store(out + (row * n_columns + column) * E + e, merged.to(out.dtype.element_ty), mask=e < E)


def decode(factored: Factored, scale: float, starts: Tensor | None, n_splits: int | None = None) -> Tensor:
    """Return the attended values [B, T, H, E] of few queries and S keys in a cache."""
    q, k = factored.q, factored.k
    tensors, logit_scale, strides, constants = operands(factored, scale, starts)
    batch, n_queries, n_keys, heads, width = q.b.size(0), q.b.size(1), k.b.size(1), constants["H"], constants["E"]
    columns = n_queries * heads
    block = min(64, max(16, triton.next_power_of_2(columns)))
    column_blocks = triton.cdiv(columns, block)
    if n_splits is None:  # enough for two programs a multiprocessor: only shapes decide, so a CUDA graph keeps it
        processors = torch.cuda.get_device_properties(q.b.device).multi_processor_count if q.b.is_cuda else 2
        wanted = -(-2 * processors // (batch * column_blocks))
        n_splits = max(1, min(wanted, -(-n_keys // SPLIT_KEYS), MAX_SPLITS))
    partial = q.b.new_empty(batch, n_splits, columns, width, dtype=torch.float32)
    lse = q.b.new_empty(batch, n_splits, columns, dtype=torch.float32)
    out = q.b.new_empty(batch, n_queries, heads, width)
    split_kernel[(n_splits, column_blocks, batch)](
        *tensors, partial, lse, logit_scale, n_queries, n_keys, n_splits,
        triton.next_power_of_2(max(1, batch * n_keys)).bit_length(), *strides, **constants, BLOCK_C=block,
    )  # fmt: skip
    merge_kernel[(columns, batch)](
        partial, lse, out, n_splits, columns, constants["R_V"], width, constants["BLOCK_E"],
        BLOCK_SPLITS=triton.next_power_of_2(n_splits),
    )  # fmt: skip
    return out
