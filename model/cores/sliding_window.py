"""Sliding-window attention (Beltagy et al., arXiv 2004.05150), the baseline for cores that reach further."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from configs.kinds import LONGEST_TEXT, Name
from model.attention.base import QKV, AttentionConfig, Dense
from model.cache import pad_tokens
from model.cores.full import PartialCore
from model.cores.kernels import sdpa
from model.mask import AttentionMask, mean_causal_keys


class SlidingWindow(PartialCore):
    name: Name = "sliding_window"
    kernel: Literal["auto", "sdpa"] = "auto"
    window: int = Field(128, ge=1, le=LONGEST_TEXT)  # how many tokens a query sees, its own included

    masks_documents: ClassVar[bool] = True

    def described(self, seq_len: int) -> str:
        unusual = f": at least the {seq_len} tokens of training, so this is full attention"
        return f"{self.name} of {self.window} tokens" + (unusual if self.window >= seq_len else "")

    def attend(self, views: list[QKV], mask: AttentionMask, scale: float) -> Tensor:
        dense = views[0].materialize()
        n_queries, n_keys, window = dense.q.size(1), dense.k.size(1), self.window
        if not mask.causal:
            raise ValueError(f"core={self.name}: is causal; use core=full")
        if mask.starts is not None:
            return sdpa.attend(dense, replace(mask, window=window), scale)
        if n_queries != n_keys:  # decoding reads no further back than the first query's window
            seen = slice(max(0, n_keys - n_queries - window + 1), n_keys)
            documents = None if mask.documents is None else mask.documents[:, seen]
            dense = Dense(dense.q, dense.k[:, seen], dense.v[:, seen])
            return sdpa.attend(dense, AttentionMask(documents=documents, window=window), scale)
        if sdpa.has_flash(dense.q, dense.v):
            if mask.documents is not None:
                return sdpa.attend_documents(dense, mask, scale, window)
            rows = dense.q.size(0)
            bounds = torch.arange(0, (rows + 1) * n_keys, n_keys, dtype=torch.int32, device=dense.q.device)
            return sdpa.attend_packed(dense, [n_keys] * rows, bounds, scale, window)
        if n_keys <= window:
            return sdpa.attend(dense, mask, scale)
        return self.attend_blocks(dense, mask.documents, scale)

    def attend_blocks(self, dense: Dense, documents: Tensor | None, scale: float) -> Tensor:
        """Return [B, T, H, E] in time and memory that grow linearly with the length.

        The first `window` queries see all before them; each further block its own keys and those of the block before.
        """
        window, seq_len, n_heads = self.window, dense.q.size(1), dense.q.size(2)
        first = Dense(*(x[:, :window] for x in (dense.q, dense.k, dense.v)))
        start = sdpa.attend(first, AttentionMask(documents=None if documents is None else documents[:, :window]), scale)
        q, k, v = (self.blocks(sdpa.share_heads(x, n_heads)) for x in (dense.q, dense.k, dense.v))
        if documents is not None:
            documents = with_block_before(self.blocks(documents)).flatten(0, 1)
        blocks = Dense(*(x.flatten(0, 1) for x in (q[:, 1:], with_block_before(k), with_block_before(v))))
        following = sdpa.attend(blocks, AttentionMask(documents=documents, window=window), scale)
        following = following.unflatten(0, (dense.q.size(0), -1)).flatten(1, 2)
        return torch.cat((start, following[:, : seq_len - window]), dim=1)

    def blocks(self, x: Tensor) -> Tensor:
        """Return x [B, T, ...] as [B, T / window, window, ...], padded at its end, which is the future."""
        return pad_tokens(x, -x.size(1) % self.window).unflatten(1, (-1, self.window))

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Return the operations of scores and weighted values, 2 a multiply-add, over the keys a query sees."""
        width = attention.n_heads * (attention.qk_head_dim + attention.v_head_dim)
        return 2 * width * mean_causal_keys(seq_len, self.window)


def with_block_before(blocks: Tensor) -> Tensor:
    """Return every block except the first with the one before it in front: [B, N, W, ...] to [B, N - 1, 2 W, ...]."""
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=2)
