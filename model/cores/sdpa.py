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
        width = v.size(-1)
        if width < q.size(-1):  # flash kernels want one width; padding is cheaper than the plain path
            v = F.pad(v, (0, q.size(-1) - width))
        grouped = q.size(1) != k.size(1)
        # is_causal aligns to the top left, a cache to the bottom right; and it knows no documents
        if mask.documents is not None or (mask.causal and q.size(2) != k.size(2)):
            allowed = mask.allowed(q.size(2), k.size(2), q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=grouped)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=mask.causal, scale=scale, enable_gqa=grouped)
        return out[..., :width].transpose(1, 2)

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Scores and weighted values, 2 operations a multiply-add; a query sees (T + 1)/2 keys on average."""
        width = attention.n_heads * (attention.qk_head_dim + attention.v_head_dim)
        return 2 * width * AttentionMask().mean_keys(seq_len)
