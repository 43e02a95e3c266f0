"""Attention in factor space in PyTorch: a plain reference, and a blocked path that a CPU runs fast.

With P[t,r,s,k] = <b_q[t,r], b_k[s,k]>, which all heads share, the logit of head h is

    sum_{r,k} a_q[t,h,r] a_k[s,h,k] P[t,r,s,k] * scale / (R_q R_k)

and its output is the softmax-weighted sum of a_v[s,h,u] b_v[s,u] / R_v (arXiv 2501.06425, sections 3 and A). Shapes as
in `model.attention.tensor_product.Factors`; B batch, T queries, S keys, H heads, R ranks, D and E widths of keys and
values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.tensor_product import Factored, Factors

DECODE_KEYS = 4096  # keys of one block while decoding: what is made of them stays in the cache of the processor
SPLIT_KEYS = 512  # keys of one product in such a block: the products of a block run on all cores
PREFILL_BLOCK = 1024  # queries and keys of one block of a prefill
FEW_ROWS = 512  # up to so many (query, head) pairs go the way of decoding


def key_counts(starts: Tensor | None, n_queries: int, n_keys: int, batch: int, device) -> Tensor:
    """How many keys each row has, [B]: those up to its last query."""
    if starts is None:
        return torch.full((batch,), n_keys, device=device)
    return starts + n_queries


def reference(factored: Factored, scale: float, causal: bool = True, starts: Tensor | None = None) -> Tensor:
    """The formulas above in fp32 (fp64 where the factors are), [B, T, H, E]; memory grows with T x H x S."""
    q, k, v = factored.q, factored.k, factored.v
    wide = torch.promote_types(q.b.dtype, torch.float32)
    b_q, b_k, b_v = (part.token_factor().to(wide) for part in (q, k, v))
    a_k, a_v = k.a.to(wide), v.a.to(wide)
    batch, n_queries, n_keys = b_q.size(0), b_q.size(1), b_k.size(1)
    heads = a_k.size(2)
    a_q = (
        q.a.to(wide)
        if q.a is not None
        else torch.eye(heads, dtype=wide, device=b_q.device).expand(*b_q.shape[:2], -1, -1)
    )
    rank_q = 1 if q.a is None else a_q.size(-1)

    counts = key_counts(starts, n_queries, n_keys, batch, b_q.device)
    keys = torch.arange(n_keys, device=b_q.device)
    held = (keys < counts[:, None])[..., None, None]  # what lies beyond may be anything, NaN included
    a_k, b_k, a_v, b_v = (x.where(held, 0) for x in (a_k, b_k, a_v, b_v))
    last = counts[:, None] - n_queries + torch.arange(n_queries, device=b_q.device) if causal else counts[:, None] - 1
    seen = keys <= last[..., None]  # [B, T, S]

    shared = torch.einsum("btrd,bskd->btrsk", b_q, b_k)
    logits = torch.einsum("bthr,bshk,btrsk->bths", a_q, a_k, shared) * (scale / (rank_q * a_k.size(-1)))
    weights = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    return torch.einsum("bths,bshu,bsue->bthe", weights, a_v, b_v) / a_v.size(-1)


def blocked(factored: Factored, scale: float, causal: bool = True, starts: Tensor | None = None) -> Tensor:
    """The same over blocks of keys, merged by their log-sum-exp: never a tensor of S x H x D, nor of T x S."""
    q, k, v = factored.q, factored.k, factored.v
    batch, n_queries, n_keys = q.b.size(0), q.b.size(1), k.b.size(1)
    heads, width = k.a.size(2), v.b.size(-1) * (1 if v.c is None else v.c.size(-1))
    out = q.b.new_empty(batch, n_queries, heads, width)
    counts = [n_keys] * batch if starts is None else (starts + n_queries).tolist()
    if n_queries * heads <= FEW_ROWS:
        for row, count in enumerate(counts):
            attend_few(*(each(part, lambda x: x[row]) for part in (q, k, v)), out[row], scale, causal, count)  # noqa: B023
    elif len(set(counts)) == 1:
        attend_many(q, k, v, out, scale, causal, counts[0])
    else:
        for row, count in enumerate(counts):
            one = slice(row, row + 1)
            attend_many(*(each(part, lambda x: x[one]) for part in (q, k, v)), out[one], scale, causal, count)  # noqa: B023
    return out


def each(factors: Factors, cut) -> Factors:
    """`cut` of the factors that there are."""
    return Factors(*(None if x is None else cut(x) for x in (factors.a, factors.b, factors.c)))


def form(factors: Factors, tokens: slice, dtype: torch.dtype) -> Tensor:
    """Queries, keys or values of some tokens of every row, [B, len(tokens), H, D]."""
    return each(factors, lambda x: x[:, tokens].to(dtype)).product()


def attend_few(q: Factors, k: Factors, v: Factors, out: Tensor, scale: float, causal: bool, n_keys: int) -> None:
    """A few queries of one sequence against many keys, as in decoding: fills `out` [T, H, E].

    The queries are formed (T x H x D, small); keys and values never are: a_k scales each rank's products with b_k.
    """
    n_queries, heads, width = out.shape
    wide = torch.promote_types(out.dtype, torch.float32)
    rows = n_queries * heads
    queries = each(q, lambda x: x.to(wide)).product().mul_(scale / k.a.size(-1)).view(rows, -1).T.contiguous()
    partial, tops, sums = [], [], []
    for first in range(0, n_keys, DECODE_KEYS):
        stop = min(first + DECODE_KEYS, n_keys)
        block_k, block_v = (each(part, lambda x: x[first:stop]) for part in (k, v))  # noqa: B023
        block_k = each(block_k, lambda x: x.to(wide))
        a_k, a_v, b_v = block_k.a, block_v.a.to(wide), block_v.token_factor()
        products = block_k.token_factor().reshape(-1, queries.size(0)) @ queries
        products = products.view(stop - first, -1, n_queries, heads)
        logits = products[:, 0] * a_k[:, None, :, 0]
        for rank in range(1, a_k.size(-1)):
            logits.addcmul_(products[:, rank], a_k[:, None, :, rank])
        if causal and stop > n_keys - n_queries + 1:
            last = torch.arange(n_keys - n_queries, n_keys)
            logits.masked_fill_((torch.arange(first, stop)[:, None] > last)[..., None], -torch.inf)
        top = logits.amax(0)
        weights = logits.sub_(top.clamp_min(torch.finfo(wide).min)).exp_()  # a query that sees none here has none
        weighted = weights.new_empty(stop - first, a_v.size(-1), n_queries, heads)
        torch.mul(weights[:, None], a_v.mT[:, :, None], out=weighted)
        weighted, b_v = (
            weighted.view(-1, rows).to(b_v.dtype),
            b_v.reshape(-1, width),
        )  # half precision: as flash kernels
        partial.append(long_product(weighted, b_v, SPLIT_KEYS * a_v.size(-1)))
        tops.append(top.view(rows))
        sums.append(weights.sum(0).view(rows))
    tops = torch.stack(tops)
    scales = (tops - tops.amax(0)).exp()
    total = (torch.stack(partial) * scales[..., None]).sum(0)
    norm = (torch.stack(sums) * scales).sum(0) * v.a.size(-1)
    out.copy_((total / norm[:, None]).view_as(out))


def long_product(x: Tensor, y: Tensor, length: int) -> Tensor:
    """x^T y for x [N, m] and y [N, n] with a long N: a batch of products of `length` rows, which all cores share."""
    n = x.size(0) // length
    if n < 2:
        return x.T @ y
    whole = n * length
    out = torch.bmm(x[:whole].view(n, length, -1).mT, y[:whole].view(n, length, -1))
    out = out.sum(0, dtype=torch.promote_types(y.dtype, torch.float32))
    return out + x[whole:].T @ y[whole:] if whole < x.size(0) else out


def attend_many(q: Factors, k: Factors, v: Factors, out: Tensor, scale: float, causal: bool, n_keys: int) -> None:
    """Many queries, as in a prefill, of rows with as many keys each: blocks of queries against blocks of keys, each
    formed for as long as it is used. Fills `out` [B, T, H, E]."""
    n_queries, dtype = out.size(1), out.dtype
    past = n_keys - n_queries  # keys before the first query
    for top in range(0, n_queries, PREFILL_BLOCK):
        queries = slice(top, min(top + PREFILL_BLOCK, n_queries))
        block_q = form(q, queries, dtype)
        wholly_seen = past + top if causal else n_keys
        spans = [(i, min(i + PREFILL_BLOCK, wholly_seen), False) for i in range(0, wholly_seen, PREFILL_BLOCK)]
        if causal:
            spans.append((past + top, past + queries.stop, True))
        merged = lse = None
        for first, stop, triangle in spans:
            keys = slice(first, stop)
            part, part_lse = attend_block(block_q, form(k, keys, dtype), form(v, keys, dtype), scale, triangle)
            if merged is None:
                merged, lse = part, part_lse
                continue
            both = torch.logaddexp(lse, part_lse)
            merged = merged * (lse - both).exp()[..., None] + part * (part_lse - both).exp()[..., None]
            lse = both
        out[:, queries] = merged


def attend_block(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention on a CPU, q [B, T, H, D], k [B, S, H, D] and v [B, S, H, E], with its log-sum-exp:
    ([B, T, H, E], [B, T, H])."""
    width = v.size(-1)
    wider = max(width, q.size(-1))  # it wants one width
    q, k, v = (F.pad(x, (0, wider - x.size(-1))).transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out[..., :width].transpose(1, 2), lse.transpose(1, 2)
