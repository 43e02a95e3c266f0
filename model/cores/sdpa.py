"""Full attention through PyTorch's scaled_dot_product_attention (flash kernels where they apply)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from model.attention.base import AttentionConfig, Dense
from model.cores.base import AttentionCore, AttentionMask


@dataclass
class SDPA(AttentionCore):
    name: str = "sdpa"
    masks_documents: ClassVar[bool] = True

    def __call__(self, qkv, rotate, positions: Tensor, mask: AttentionMask, scale: float) -> Tensor:
        dense = rotate(qkv, positions).materialize()
        width, packs = dense.v.size(-1), dense.q.is_cpu or has_flash(dense.q, dense.v)
        if packs and mask.documents is not None and mask.square(dense.q.size(1)):
            return attend_documents(dense, mask, scale)
        q, k, v = (x.transpose(1, 2) for x in (dense.q, dense.k, dense.v))
        by_row = mask.starts is not None and q.is_cpu and not torch.compiler.is_compiling()
        out = (attend_by_row if by_row else attend)(q, k, v, mask, scale)
        return out[..., :width].transpose(1, 2)

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Scores and weighted values, 2 operations a multiply-add; a query sees (T + 1)/2 keys on average."""
        width = attention.n_heads * (attention.qk_head_dim + attention.v_head_dim)
        return 2 * width * AttentionMask().mean_keys(seq_len)


def has_flash(q: Tensor, v: Tensor) -> bool:
    """Whether a GPU's flash kernels take queries [..., D] and values [..., E]: they alone share heads, and pack."""
    return (
        q.is_cuda
        and q.dtype == v.dtype
        and q.dtype in (torch.float16, torch.bfloat16)
        and v.size(-1) <= q.size(-1) <= 256
        and torch.cuda.get_device_properties(q.device).major >= 8
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """q [B, H, T, D], k [B, G, S, D] and v [B, G, S, E] to [B, H, T, E], or wider than E."""
    n_heads, n_queries, n_groups, n_keys = *q.shape[1:3], *k.shape[1:3]
    q, k, v = as_wide(q, k, v)
    options = {"scale": scale}
    plain = mask.documents is None and mask.starts is None and mask.window is None
    if plain and mask.causal and n_queries == n_keys > 1:
        options["is_causal"] = True  # aligned to the top left, where a cache's queries are at the bottom right
    elif not plain or (mask.causal and n_queries > 1):
        options["attn_mask"] = mask.allowed(n_queries, n_keys, q.device)
    if n_queries == 1:  # the heads of a group are queries of one key head: no key is copied for them
        q = q.reshape(q.size(0), n_groups, n_heads // n_groups, -1)
    elif n_heads != n_groups:
        if q.is_cpu or (has_flash(q, v) and "attn_mask" not in options):
            options["enable_gqa"] = True
        else:  # a GPU would fall back to the path that forms all scores
            k, v = (x.repeat_interleave(n_heads // n_groups, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.reshape(out.size(0), n_heads, n_queries, -1)


def as_wide(*qkv: Tensor) -> list[Tensor]:
    """Queries, keys [..., D] and values [..., E] padded to the width of queries, on a GPU to a multiple of 8: fused
    kernels want one such width, and padding costs less than doing without them."""
    width = qkv[0].size(-1) if qkv[0].is_cpu else -(-qkv[0].size(-1) // 8) * 8
    return [F.pad(x, (0, width - x.size(-1))) if x.size(-1) < width else x for x in qkv]


@torch.compiler.disable  # the number of documents, and their lengths, are new in every batch
def attend_documents(dense: Dense, mask: AttentionMask, scale: float, window: int | None = None) -> Tensor:
    """`attend_packed` for whole rows of the mask's documents."""
    return attend_packed(dense, mask.document_lengths, mask.document_bounds, scale, window)


def attend_packed(dense: Dense, lengths: list[int], bounds: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Sequences of `lengths`, one behind the other in the rows of `dense`, each attending to itself: [B, T, H, E].

    No mask is formed, nor a score that it would hide. On a GPU by the variable-length flash kernel, which alone takes
    a `window`, and reads the `bounds` of the sequences ([N + 1], int32) from its own memory.
    """
    q, k, v = (x.flatten(0, 1) for x in (dense.q, dense.k, dense.v))
    if q.is_cpu:
        sequences = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
        out = torch.cat([attend(*sequence, AttentionMask(), scale) for sequence in sequences], dim=2)
        out = out[0].transpose(0, 1)
    else:
        reach = (-1 if window is None else window - 1, 0)  # keys before a query, and after it
        options = {"scale": scale, "window_size": reach, "enable_gqa": q.size(1) != k.size(1)}
        out = varlen_attn(*as_wide(q, k, v), bounds, bounds, max(lengths), max(lengths), **options)
    return out[..., : v.size(-1)].unflatten(0, dense.q.shape[:2])


def attend_by_row(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """`attend` for rows of different lengths, each over its own keys: no copy of them, and no mask for one query."""
    rows = []
    for row, start in enumerate(mask.starts.tolist()):
        here, end = slice(row, row + 1), start + q.size(2)
        documents = None if mask.documents is None else mask.documents[here, :end]
        own = AttentionMask(mask.causal, documents, window=mask.window)
        rows.append(attend(q[here], k[here, :, :end], v[here, :, :end], own, scale))
    return torch.cat(rows)
