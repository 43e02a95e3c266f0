"""Full attention through PyTorch's scaled_dot_product_attention (flash kernels where they apply)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.base import AttentionConfig
from model.cores.base import AttentionCore, AttentionMask


@dataclass
class SDPA(AttentionCore):
    name: str = "sdpa"
    masks_documents: ClassVar[bool] = True

    def __call__(self, qkv, rotate, positions: Tensor, mask: AttentionMask, scale: float) -> Tensor:
        dense = rotate(qkv, positions).materialize()
        q, k, v = (x.transpose(1, 2) for x in (dense.q, dense.k, dense.v))
        width = v.size(-1)
        by_row = mask.starts is not None and q.is_cpu and not torch.compiler.is_compiling()
        out = (attend_by_row if by_row else attend)(q, k, v, mask, scale)
        return out[..., :width].transpose(1, 2)

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Scores and weighted values, 2 operations a multiply-add; a query sees (T + 1)/2 keys on average."""
        width = attention.n_heads * (attention.qk_head_dim + attention.v_head_dim)
        return 2 * width * AttentionMask().mean_keys(seq_len)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """q [B, H, T, D], k [B, G, S, D] and v [B, G, S, E] to [B, H, T, E], or wider than E."""
    n_heads, n_queries, n_groups, n_keys = *q.shape[1:3], *k.shape[1:3]
    if v.size(-1) < q.size(-1):  # flash kernels want one width; padding is cheaper than the plain path
        v = F.pad(v, (0, q.size(-1) - v.size(-1)))
    options = {"scale": scale}
    if n_queries == 1:  # the heads of a group are queries of one key head: no key is copied for them
        q = q.reshape(q.size(0), n_groups, n_heads // n_groups, -1)
    elif n_heads != n_groups:
        options["enable_gqa"] = True
    plain = mask.documents is None and mask.starts is None and mask.window is None
    if plain and mask.causal and n_queries == n_keys > 1:
        options["is_causal"] = True  # aligned to the top left, where a cache's queries are at the bottom right
    elif not plain or (mask.causal and n_queries > 1):
        options["attn_mask"] = mask.allowed(n_queries, n_keys, q.device)
    out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.reshape(out.size(0), n_heads, n_queries, -1)


def attend_by_row(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """`attend` for rows of different lengths, each over its own keys: no copy of them, and no mask for one query."""
    rows = []
    for row, start in enumerate(mask.starts.tolist()):
        here, end = slice(row, row + 1), start + q.size(2)
        documents = None if mask.documents is None else mask.documents[here, :end]
        own = AttentionMask(mask.causal, documents, window=mask.window)
        rows.append(attend(q[here], k[here, :, :end], v[here, :, :end], own, scale))
    return torch.cat(rows)
