"""Attention over a folded sequence, after "attention tensorization" (Feng, Ying and Tassiulas, arXiv 2410.20926).

A sequence of T = n_1 n_2 ... n_m tokens is folded into a tensor, position t = i_1 + n_1 (i_2 + n_2 (i_3 + ...)), and
attention runs along one axis after the other, each hop updating the values: T (n_1 + ... + n_m) scores instead of T^2.
The bidirectional form is the paper's. The causal form is this project's own construction; the authors' code was not
available. It carries two tracks, with one softmax over scores s(i, j) = q(i) . k(j) scale along axis d (the other
coordinates equal), C_0 = O_0 = v:

    closed  C_d(i) = sum_j       softmax_j(s(i, j)) C_{d-1}(j)                       blocks that lie wholly in the past
    open    O_d(i) = sum_{j < i} w(i, j) C_{d-1}(j) + w(i, i) O_{d-1}(i)             w = softmax over j <= i

and the output is O_m. Every past token is reached within m hops: the query at (i_2, i_1) reads C_1(j_2, i_1), which
mixes all of block j_2, as that block's own query at the same offset decides.
"""

import os
from math import prod
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from configs.kinds import LONGEST_TEXT, Name
from model.attention.base import QKV, AttentionConfig, Dense
from model.cache import Shapes, pad_tokens
from model.cores.folding import Axis, FoldedCache, auto_fold, mix, open_hop
from model.cores.full import PartialCore
from model.cores.kernels import load_triton
from model.cores.kernels.sdpa import share_heads
from model.cores.kernels.two_tracks import two_tracks
from model.mask import AttentionMask

MOST_AXES = 32


class SequenceTensor(PartialCore):
    """`triton` computes both tracks in one pass on a GPU; `auto` is `sdpa`, flash attention track by track."""

    name: Name = "sequence_tensor"
    kernel: Literal["auto", "sdpa", "triton"] = "auto"
    # [n_1, ..., n_m], axis 1 inside a block; auto: two near-equal axes for trainer.seq_len. The inner axes never change
    # afterwards (another fold is another function); the last one grows with the input.
    fold: Any = "auto"
    rope: Literal["axis", "global"] = "axis"  # turn by the coordinate along a hop's axis, or by the whole position

    why_no_documents: ClassVar[str] = (
        "since a query reaches a past block through that block's token at its own offset, which may belong to "
        "another document, and so would lose tokens of its own"
    )

    @field_validator("fold")
    @classmethod
    def _sizes(cls, fold: Any) -> Any:
        if fold == "auto":
            return fold
        is_list = isinstance(fold, list | tuple) and 1 <= len(fold) <= MOST_AXES
        if not (is_list and all(type(size) is int and 1 <= size <= LONGEST_TEXT for size in fold)):
            raise ValueError(
                f"must be auto or a list of at most {MOST_AXES} sizes from 1 to {LONGEST_TEXT}, [n_1, ..., n_m]"
            )
        return list(fold)

    @property
    def axes(self) -> list[int]:
        """The fold. ValueError while it is auto."""
        if self.fold == "auto":
            raise ValueError("core.fold=auto is resolved from the training length: call resolved(seq_len) first")
        return self.fold

    def resolved(self, seq_len: int) -> "SequenceTensor":
        return self.replace(fold=auto_fold(seq_len)) if self.fold == "auto" else self

    def described(self, seq_len: int) -> str:
        return f"{self.name} {' x '.join(map(str, self.axes))}"

    def sizes(self, seq_len: int) -> list[int]:
        """Return the axes of a sequence of `seq_len`: those that it does not fill are cut, the last one grows."""
        sizes = []
        for size in self.axes[:-1]:
            sizes.append(min(size, -(-seq_len // prod(sizes))))
        return [*sizes, -(-seq_len // prod(sizes))]

    def check(self, attention: AttentionConfig, device: str, dtype: torch.dtype) -> None:
        if self.kernel == "triton":
            load_triton()
            if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":  # the interpreter is for tests
                raise ValueError("core.kernel=triton: needs a GPU; use core.kernel=sdpa")

    def check_decoding(self, dtype: torch.dtype | None, compiled: bool) -> None:
        if dtype == torch.int8:
            raise ValueError(f"core={self.name}: closed values are not quantised; use a float dtype for the cache")
        if compiled:
            raise ValueError(
                f"core={self.name}: folds blocks as they complete, which a compiled step of fixed shapes cannot; "
                "decode without compiling"
            )

    def hops(self, positions: Tensor) -> list[Tensor]:
        if self.rope == "global":
            return [positions for _ in self.axes]
        steps = [positions // prod(self.axes[:axis]) for axis in range(len(self.axes))]
        return [step % size for step, size in zip(steps[:-1], self.axes[:-1], strict=True)] + steps[-1:]

    def attend(self, views: list[QKV], mask: AttentionMask, scale: float) -> Tensor:
        views = [view.materialize() for view in views]
        batch, seq_len, n_heads = views[0].q.shape[:3]
        if mask.documents is not None:
            raise ValueError(f"core={self.name}: cannot mask documents, {self.why_no_documents}")
        if mask.starts is not None or views[0].k.size(1) != seq_len:
            raise ValueError(f"core={self.name}: must have as many keys as queries; decoding has a cache of its own")
        sizes = self.sizes(seq_len)
        padding = prod(sizes) - seq_len
        if padding and not mask.causal:
            raise ValueError(f"core={self.name}: {seq_len} tokens do not fill the fold {sizes}; only a causal one pads")
        hops = [axis for axis, size in enumerate(sizes) if size > 1] or [0]  # an axis of one has nothing to mix
        fused = self.kernel == "triton" and mask.causal and len(hops) > 1
        if not fused:  # the fused kernel needs no padding
            views = [Dense(*(pad_tokens(x, padding) for x in (view.q, view.k, view.v))) for view in views]
        opened = closed = views[0].v  # both tracks start from the values
        for hop in hops:
            q, k = views[hop].q, views[hop].k
            closing = hop != hops[-1] or not mask.causal
            inner = prod(sizes[:hop])
            if fused:
                opened, closed = two_tracks(q, k, closed, opened, scale, inner, sizes[hop], closing)
                continue
            axis, past = Axis(batch, prod(sizes[hop + 1 :]), sizes[hop], inner), closed
            if mask.causal and hop == hops[0]:  # where both tracks have the same values
                opened = mix(axis, q, k, past, scale, causal=True)
            elif mask.causal:
                opened = open_hop(axis, q, k, past, opened, scale)
            if closing:
                closed = mix(axis, q, k, past, scale)
        return share_heads(opened if mask.causal else closed, n_heads)[:, :seq_len]

    def cache(self, attention: AttentionConfig, batch: int, capacity: int, dtype: torch.dtype, device) -> FoldedCache:
        return FoldedCache(self, self.axes, batch, dtype, device)

    def cache_shapes(self, attention: AttentionConfig) -> Shapes:
        """Return a key in the mechanism's form and a value: closed, and so per query head, unless there is one axis."""
        with torch.device("meta"):
            qkv = attention.build(8, 0, self).project(torch.empty(1, 1, 8))
            kept = qkv.keys() | {"values": qkv.materialize().v}
        shapes = {name: tuple(part.shape[2:]) for name, part in kept.items()}
        return shapes if len(self.axes) == 1 else shapes | {"values": (attention.n_heads, attention.v_head_dim)}

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Return the operations of both tracks, 2 a multiply-add: O(n_1 + ... + n_m)."""
        sizes = [size for size in self.sizes(seq_len) if size > 1] or [1]
        keys = sum((size + 1) / 2 for size in sizes) + sum(sizes[:-1])  # of the open track and of the closed one
        return 2 * attention.n_heads * (attention.qk_head_dim + attention.v_head_dim) * keys

    def keys_read(self, seq_len: int) -> float:
        """Return how many keys a token decoded after `seq_len` others reads on average: O(n_1 + ... + n_m)."""
        *inner, last = self.sizes(seq_len)  # half of each unfinished block, once more when it is folded; past blocks
        return sum((size + 1) / 2 + 1 for size in inner) + last
