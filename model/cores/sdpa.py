"""Full attention through PyTorch's scaled_dot_product_attention (flash kernels where they apply)."""

from dataclasses import dataclass
from typing import ClassVar

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
        (n_heads, n_queries), (n_groups, n_keys), width = q.shape[1:3], k.shape[1:3], v.size(-1)
        if mask.starts is not None:  # a weight of 0 does not silence a NaN
            beyond = ~mask.written(n_queries, n_keys)[:, None, :, None]
            k, v = k.masked_fill(beyond, 0), v.masked_fill(beyond, 0)
        if width < q.size(-1):  # flash kernels want one width; padding is cheaper than the plain path
            v = F.pad(v, (0, q.size(-1) - width))
        if n_queries == 1:  # the heads of a group are queries of one key head: no key is copied for them
            q = q.reshape(q.size(0), n_groups, n_heads // n_groups, -1)
        # is_causal aligns to the top left, a cache to the bottom right; and it knows neither documents nor windows
        plain = mask.documents is None and mask.starts is None and mask.window is None
        is_causal = mask.causal and n_queries > 1
        allowed = None
        if not plain or (is_causal and n_queries != n_keys):
            allowed, is_causal = mask.allowed(n_queries, n_keys, q.device), False
        options = {"is_causal": is_causal, "scale": scale}
        if q.size(1) != n_groups:
            options["enable_gqa"] = True
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, **options)
        if n_queries == 1:
            out = out.reshape(out.size(0), n_heads, 1, -1)
        return out[..., :width].transpose(1, 2)

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Scores and weighted values, 2 operations a multiply-add; a query sees (T + 1)/2 keys on average."""
        width = attention.n_heads * (attention.qk_head_dim + attention.v_head_dim)
        return 2 * width * AttentionMask().mean_keys(seq_len)
