"""Many queries at once, as in a prefill: flash attention whose tiles of q, k and v are formed from factors on the chip.

A program has a block of queries of one head. It reads b_k and b_v, which all heads share (so mostly from the L2 cache),
and a few numbers of a_k and a_v a token; keys and values never reach memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.attention.tensor_product import Factored
from model.cores.kernels.gpu.common import LAYOUT, autotuned, load_rows, online_softmax, operands


@triton.jit
def form(
    a, b, c, a_t, a_h, a_r, b_t, b_r, c_t, c_r, t, h, inside,
    R: tl.constexpr, DENSE: tl.constexpr, D: tl.constexpr, D_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return R times the queries, keys or values of head h of some tokens, [len(t), BLOCK] in fp32."""
    made = tl.zeros((t.shape[0], BLOCK), tl.float32)
    for r in tl.static_range(1 if DENSE else R):
        rank = h if DENSE else r
        rows = load_rows(b + rank * b_r, b_t, t, inside, c + rank * c_r, c_t, D, D_B, BLOCK).to(tl.float32)
        if not DENSE:
            rows *= tl.load(a + t * a_t + h * a_h + r * a_r, mask=inside, other=0.0).to(tl.float32)[:, None]
        made += rows
    return made


@autotuned(
    "BLOCK_T BLOCK_S",
    (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (32, 32, 4, 1),
    key=["H", "R_Q", "R_K", "R_V", "D", "D_B", "E", "bucket", *LAYOUT],
)  # fmt: skip
@triton.jit(do_not_specialize=["n_queries", "n_keys", "bucket"])  # they change from chunk to chunk
def prefill_kernel(
    a_q, b_q, c_q, a_k, b_k, c_k, a_v, b_v, c_v, starts, out,
    scale, n_queries, n_keys, bucket,
    aq_b, aq_t, aq_h, aq_r, bq_b, bq_t, bq_r, cq_b, cq_t, cq_r,
    ak_b, ak_s, ak_h, ak_r, bk_b, bk_s, bk_r, ck_b, ck_s, ck_r,
    av_b, av_s, av_h, av_r, bv_b, bv_s, bv_r, cv_b, cv_s, cv_r,
    H: tl.constexpr, R_Q: tl.constexpr, R_K: tl.constexpr, R_V: tl.constexpr, DENSE_Q: tl.constexpr,
    D: tl.constexpr, D_B: tl.constexpr, E: tl.constexpr, E_B: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    h, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < n_queries
    count = n_keys
    if RAGGED:
        count = tl.load(starts + row).to(tl.int32) + n_queries
    last = count - n_queries + t
    stop = tl.minimum(count, count - n_queries + (block + 1) * BLOCK_T)

    dtype = b_k.dtype.element_ty
    q = form(
        a_q + row * aq_b, b_q + row * bq_b, c_q + row * cq_b, aq_t, aq_h, aq_r, bq_t, bq_r, cq_t, cq_r, t, h, inside,
        R_Q, DENSE_Q, D, D_B, BLOCK_D,
    )  # fmt: skip
    q = (q * scale).to(dtype)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_T,), tl.float32)
    values = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    s = tl.arange(0, BLOCK_S)
    for begin in tl.range(0, stop, BLOCK_S):
        at = tl.cast(begin, tl.int64)  # a cache may have more than 2^31 numbers
        held = begin + s < count
        k = form(
            a_k + row * ak_b + at * ak_s, b_k + row * bk_b + at * bk_s, c_k + row * ck_b + at * ck_s,
            ak_s, ak_h, ak_r, bk_s, bk_r, ck_s, ck_r, s, h, held, R_K, False, D, D_B, BLOCK_D,
        ).to(dtype)  # fmt: skip
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = tl.where(held[None, :] & (begin + s[None, :] <= last[:, None]), logits, float("-inf"))
        weights, correction, top, norm = online_softmax(logits, top, norm, 1)
        v = form(
            a_v + row * av_b + at * av_s, b_v + row * bv_b + at * bv_s, c_v + row * cv_b + at * cv_s,
            av_s, av_h, av_r, bv_s, bv_r, cv_s, cv_r, s, h, held, R_V, False, E, E_B, BLOCK_E,
        ).to(dtype)  # fmt: skip
        values = values * correction[:, None] + tl.dot(weights.to(dtype), v, input_precision=PRECISION)
    e = tl.arange(0, BLOCK_E)
    values = values / (norm * R_V)[:, None]
    place = ((row * n_queries + t) * H + h)[:, None] * E + e[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


def prefill(factored: Factored, scale: float, starts: Tensor | None) -> Tensor:
    """Return the attended values [B, T, H, E] of many queries."""
    q, k = factored.q, factored.k
    tensors, logit_scale, strides, constants = operands(factored, scale, starts)
    batch, n_queries, n_keys, heads = q.b.size(0), q.b.size(1), k.b.size(1), constants["H"]
    out = q.b.new_empty(batch, n_queries, heads, constants["E"])
    prefill_kernel[lambda meta: (triton.cdiv(n_queries, meta["BLOCK_T"]), heads, batch)](
        *tensors, out, logit_scale, n_queries, n_keys, triton.next_power_of_2(n_queries).bit_length(), *strides,
        **constants,
    )  # fmt: skip
    return out
