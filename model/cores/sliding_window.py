"""Sliding-window attention: a query sees the last `window` tokens, its own included (Beltagy et al., arXiv 2004.05150).

The baseline for cores that reach further.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.base import AttentionConfig, Dense, unturned
from model.cores.base import AttentionMask, PartialCore, share_heads
from model.cores.sdpa import SDPA, attend_documents, attend_packed, has_flash

FULL = SDPA()


@dataclass
class SlidingWindow(PartialCore):
    name: str = "sliding_window"
    window: int = 128
    masks_documents: ClassVar[bool] = True

    def errors(self):
        yield from super().errors()
        if self.window < 1:
            yield f"core.window={self.window}: must be at least 1"

    def __call__(self, qkv, rotate, positions: Tensor, mask: AttentionMask, scale: float) -> Tensor:
        dense = rotate(qkv, positions).materialize()
        n_queries, n_keys, size = dense.q.size(1), dense.k.size(1), self.window
        if not mask.causal:
            raise ValueError(f"core={self.name}: is causal; use core=sdpa")
        if mask.starts is None and n_queries != n_keys:  # decoding reads no further back than the first window
            seen = slice(max(0, n_keys - n_queries - size + 1), n_keys)
            documents = mask.documents if mask.documents is None else mask.documents[:, seen]
            dense, mask = Dense(dense.q, dense.k[:, seen], dense.v[:, seen]), AttentionMask(documents=documents)
            n_keys = dense.k.size(1)
        if mask.starts is not None or n_queries != n_keys:
            return FULL(dense, unturned, positions, replace(mask, window=size), scale)
        if has_flash(dense.q, dense.v):
            if mask.documents is not None:
                return attend_documents(dense, mask, scale, size)
            rows = dense.q.size(0)
            bounds = torch.arange(0, (rows + 1) * n_keys, n_keys, dtype=torch.int32, device=dense.q.device)
            return attend_packed(dense, [n_keys] * rows, bounds, scale, size)
        if n_keys <= size:
            return FULL(dense, unturned, positions, mask, scale)
        # The first `size` queries see all that is before them; each further block of queries its own keys and the
        # block's before, under a mask of size x 2 size: time and memory grow with the length alone.
        first = Dense(*(x[:, :size] for x in (dense.q, dense.k, dense.v)))
        documents = mask.documents if mask.documents is None else mask.documents[:, :size]
        start = FULL(first, unturned, None, AttentionMask(documents=documents), scale)
        q, k, v = (self.blocks(share_heads(x, dense.q.size(2))) for x in (dense.q, dense.k, dense.v))
        if mask.documents is not None:
            documents = with_block_before(self.blocks(mask.documents)).flatten(0, 1)
        blocks = Dense(*(x.flatten(0, 1) for x in (q[:, 1:], with_block_before(k), with_block_before(v))))
        following = FULL(blocks, unturned, None, AttentionMask(documents=documents, window=size), scale)
        following = following.unflatten(0, (dense.q.size(0), -1)).flatten(1, 2)
        return torch.cat((start, following[:, : n_keys - size]), dim=1)

    def blocks(self, x: Tensor) -> Tensor:
        """x [B, T, ...] as [B, T / window, window, ...], padded at its end, which is the future."""
        padding = -x.size(1) % self.window
        return F.pad(x, [0, 0] * (x.ndim - 2) + [0, padding]).unflatten(1, (-1, self.window))

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Scores and weighted values, 2 operations a multiply-add, over the keys that a query sees on average."""
        size = min(self.window, seq_len)
        keys = size - size * (size - 1) / (2 * seq_len)
        return 2 * attention.n_heads * (attention.qk_head_dim + attention.v_head_dim) * keys


def with_block_before(blocks: Tensor) -> Tensor:
    """Every block but the first, the one before it put in front: [B, N, W, ...] to [B, N - 1, 2 W, ...]."""
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=2)
