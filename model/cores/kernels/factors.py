"""FlashTPA: attention straight from TPA's factors, without forming keys and values (arXiv 2501.06425, section 3 and A).

With P[t,r,s,k] = <b_q[t,r], b_k[s,k]>, which all heads share, the logit of head h is

    sum_{r,k} a_q[t,h,r] a_k[s,h,k] P[t,r,s,k] * scale / (R_q R_k)

and its output is the softmax-weighted sum of a_v[s,h,u] b_v[s,u] / R_v. Shapes as in `tensor_product.Factors`; B batch,
T queries, S keys, H heads, R ranks, D and E widths of keys and values. Causal, and without a gradient: a CPU decodes by
the blocked path below and forms keys and values for a prefill, a GPU runs the Triton kernels.
"""

import torch
from torch import Tensor

from model.attention.tensor_product import Factored, Factors, each
from model.cores.kernels import load_triton, sdpa
from model.mask import AttentionMask

FEW_COLUMNS = 512  # up to this number of (query, head) pairs of a row it is decoding, above it a prefill
DECODE_KEYS = 4096  # keys of one block while decoding: what is made of them stays in the cache of the processor
SPLIT_KEYS = 512  # keys of one product in such a block: the products of a block run on all cores


def attend(factored: Factored, scale: float, starts: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T * scale) v [B, T, H, E] from factors whose b of q and k is rotated, without a gradient.

    `starts` is `AttentionMask.starts`; what lies beyond a row's last query may be anything, NaN included. On a GPU only
    shapes decide what runs, so a CUDA graph may hold it.
    """
    few = factored.q.b.size(1) * factored.k.a.size(2) <= FEW_COLUMNS
    if factored.q.b.is_cpu and not few:
        return sdpa.attend(factored.materialize(), AttentionMask(starts=starts), scale)
    return flash_tpa(*factored.tensors(), float(scale), starts, few)


@torch.library.custom_op("t6::flash_tpa", mutates_args=())
def flash_tpa(
    a_q: Tensor | None, b_q: Tensor, c_q: Tensor | None, a_k: Tensor, b_k: Tensor, c_k: Tensor | None,
    a_v: Tensor, b_v: Tensor, c_v: Tensor | None, scale: float, starts: Tensor | None, few: bool,
) -> Tensor:  # fmt: skip
    """`attend` as one operation, which torch.compile calls without tracing it."""
    factored = Factored(Factors(a_q, b_q, c_q), Factors(a_k, b_k, c_k), Factors(a_v, b_v, c_v))
    with torch.autocast(b_q.device.type, enabled=False):
        if b_q.is_cpu:
            return attend_rows(factored, scale, starts)
        kernels = load_triton()
        return (kernels.decode if few else kernels.prefill)(factored, scale, starts)


@flash_tpa.register_fake
def _(a_q, b_q, c_q, a_k, b_k, c_k, a_v, b_v, c_v, scale, starts, few):
    return b_q.new_empty(b_q.size(0), b_q.size(1), a_k.size(2), Factors(a_v, b_v, c_v).width)


def attend_rows(factored: Factored, scale: float, starts: Tensor | None) -> Tensor:
    """Return attention of a few queries of each row, without a tensor of S x H x D or of T x S."""
    parts, rows = (factored.q, factored.k, factored.v), []
    batch, n_queries, n_keys = factored.q.b.size(0), factored.q.b.size(1), factored.k.b.size(1)
    for row, count in enumerate([n_keys] * batch if starts is None else (starts + n_queries).tolist()):
        rows.append(attend_few(*(each(part, lambda x: x[row]) for part in parts), scale, count))  # noqa: B023
    return torch.stack(rows)


def attend_few(q: Factors, k: Factors, v: Factors, scale: float, n_keys: int) -> Tensor:
    """Return [T, H, E] for a few queries of one sequence, by blocks of keys that merge by their log-sum-exp.

    The queries are formed (T x H x D, small); keys and values never are: a_k scales each rank's products with b_k.
    """
    n_queries, heads, width = q.b.size(0), k.a.size(1), v.width
    wide = torch.promote_types(q.b.dtype, torch.float32)
    rows = n_queries * heads
    queries = (each(q, lambda x: x.to(wide)).product() * (scale / k.a.size(-1))).reshape(rows, -1).T.contiguous()
    partial, tops, sums = [], [], []
    for first in range(0, n_keys, DECODE_KEYS):
        keys = slice(first, min(first + DECODE_KEYS, n_keys))
        block_k, block_v = (each(part, lambda x: x[keys]) for part in (k, v))  # noqa: B023
        block_k = each(block_k, lambda x: x.to(wide))
        a_k, a_v, b_v = block_k.a, block_v.a.to(wide), block_v.token_factor()
        products = block_k.token_factor().reshape(-1, queries.size(0)) @ queries
        products = products.view(keys.stop - first, -1, n_queries, heads)
        logits = products[:, 0] * a_k[:, None, :, 0]
        for rank in range(1, a_k.size(-1)):
            logits.addcmul_(products[:, rank], a_k[:, None, :, rank])
        if keys.stop > n_keys - n_queries + 1:
            last = torch.arange(n_keys - n_queries, n_keys)
            logits.masked_fill_((torch.arange(first, keys.stop)[:, None] > last)[..., None], -torch.inf)
        top = logits.amax(0)
        weights = logits.sub_(top.clamp_min(torch.finfo(wide).min)).exp_()  # a query that sees none here has none
        weighted = weights.new_empty(keys.stop - first, a_v.size(-1), n_queries, heads)
        torch.mul(weights[:, None], a_v.mT[:, :, None], out=weighted)
        weighted = weighted.view(-1, rows).to(b_v.dtype)  # half precision, as in flash kernels
        partial.append(long_product(weighted, b_v.reshape(-1, width), SPLIT_KEYS * a_v.size(-1)))
        tops.append(top.view(rows))
        sums.append(weights.sum(0).view(rows))
    tops = torch.stack(tops)
    scales = (tops - tops.amax(0)).exp()
    total = (torch.stack(partial) * scales[..., None]).sum(0)
    norm = (torch.stack(sums) * scales).sum(0) * v.a.size(-1)
    return (total / norm[:, None]).view(n_queries, heads, width).to(q.b.dtype)


def long_product(x: Tensor, y: Tensor, length: int) -> Tensor:
    """Return x^T y for x [N, m] and y [N, n] with a long N, in products of `length` rows, which all cores share."""
    n = x.size(0) // length
    if n < 2:
        return x.T @ y
    whole = n * length
    out = torch.bmm(x[:whole].view(n, length, -1).mT, y[:whole].view(n, length, -1))
    out = out.sum(0, dtype=torch.promote_types(y.dtype, torch.float32))
    return out + x[whole:].T @ y[whole:] if whole < x.size(0) else out
