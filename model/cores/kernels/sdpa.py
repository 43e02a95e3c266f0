"""Attention through PyTorch's scaled_dot_product_attention, with flash kernels if they apply, and over packed rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.base import Dense
from model.mask import AttentionMask


def attend(dense: Dense, mask: AttentionMask, scale: float) -> Tensor:
    """Return softmax(q k^T scale) v [B, T, H, E] of what the mask lets each query see."""
    if mask.packs(dense.q.size(1)) and (dense.q.is_cpu or has_flash(dense.q, dense.v)):
        return attend_documents(dense, mask, scale)
    q, k, v = (x.transpose(1, 2) for x in (dense.q, dense.k, dense.v))
    by_row = mask.starts is not None and q.is_cpu and not torch.compiler.is_compiling()
    out = (attend_by_row if by_row else attend_heads)(q, k, v, mask, scale)
    return out[..., : v.size(-1)].transpose(1, 2)


def has_flash(q: Tensor, v: Tensor) -> bool:
    """Return whether a GPU's flash kernels take these widths and dtypes; no others share heads or pack."""
    fits = q.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16) and v.size(-1) <= q.size(-1) <= 256
    return q.is_cuda and fits and torch.cuda.get_device_properties(q.device).major >= 8


def attend_heads(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Return [B, H, T, E], or wider than E, for q [B, H, T, D], k [B, G, S, D] and v [B, G, S, E]."""
    n_heads, n_queries, n_groups, n_keys = *q.shape[1:3], *k.shape[1:3]
    q, k, v = as_wide(q, k, v)
    options = {"scale": scale}
    plain = mask.documents is None and mask.starts is None and mask.window is None
    if plain and mask.causal and n_queries == n_keys > 1:
        options["is_causal"] = True  # aligned to the top left, but a cache's queries are at the bottom right
    elif not plain or (mask.causal and n_queries > 1):
        options["attn_mask"] = mask.allowed(n_queries, n_keys, q.device)
    if n_queries == 1:  # the heads of a group are queries of one key head: no key is copied for them
        q = q.reshape(q.size(0), n_groups, n_heads // n_groups, -1)
    elif n_heads != n_groups:  # a branch, since a compiled step may know these numbers as symbols only
        if q.is_cpu or (has_flash(q, v) and "attn_mask" not in options):
            options["enable_gqa"] = True
        else:  # a GPU would fall back to the path that forms all scores
            k, v = (x.repeat_interleave(n_heads // n_groups, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.reshape(out.size(0), n_heads, n_queries, -1)


def attend_by_row(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Return `attend_heads` for rows of different lengths, each over its own keys: no copies, no mask for one query."""
    rows = []
    for row, start in enumerate(mask.starts.tolist()):
        here, end = slice(row, row + 1), start + q.size(2)
        documents = None if mask.documents is None else mask.documents[here, :end]
        own = AttentionMask(mask.causal, documents, window=mask.window)
        rows.append(attend_heads(q[here], k[here, :, :end], v[here, :, :end], own, scale))
    return torch.cat(rows)


def as_wide(*qkv: Tensor) -> list[Tensor]:
    """Return q, k [..., D] and v [..., E] padded to one width, on a GPU a multiple of 8, as fused kernels want it."""
    width = qkv[0].size(-1) if qkv[0].is_cpu else -(-qkv[0].size(-1) // 8) * 8
    return [F.pad(x, (0, width - x.size(-1))) if x.size(-1) < width else x for x in qkv]


@torch._disable_dynamo  # its lengths are new in every batch; `torch.compiler.disable` takes a second to import
def attend_documents(dense: Dense, mask: AttentionMask, scale: float, window: int | None = None) -> Tensor:
    """Return `attend_packed` for whole rows of the mask's documents."""
    return attend_packed(dense, mask.document_lengths, mask.document_bounds, scale, window)


def attend_packed(dense: Dense, lengths: list[int], bounds: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Return [B, T, H, E] of sequences of `lengths`, one after the other in the rows of `dense`, each by itself.

    No mask is formed. A GPU's variable-length flash kernel, the only one that takes a `window`, reads the `bounds` of
    the sequences ([N + 1], int32) from its own memory.
    """
    q, k, v = (x.flatten(0, 1) for x in (dense.q, dense.k, dense.v))
    if q.is_cpu:
        sequences = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
        out = torch.cat([attend_heads(*sequence, AttentionMask(), scale) for sequence in sequences], dim=2)
        out = out[0].transpose(0, 1)
    else:
        from torch.nn.attention.varlen import varlen_attn  # importing it takes a second

        reach = (-1 if window is None else window - 1, 0)  # keys before a query, and after it
        options = {"scale": scale, "window_size": reach, "enable_gqa": q.size(1) != k.size(1)}
        out = varlen_attn(*as_wide(q, k, v), bounds, bounds, max(lengths), max(lengths), **options)
    return out[..., : v.size(-1)].unflatten(0, dense.q.shape[:2])


def share_heads(x: Tensor, n_heads: int) -> Tensor:
    """Return x [B, S, G, D] with each key head repeated for the H / G query heads that it serves, [B, S, H, D]."""
    return x if x.size(2) == n_heads else x.repeat_interleave(n_heads // x.size(2), dim=2)
