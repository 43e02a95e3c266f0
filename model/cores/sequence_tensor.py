"""Attention over a folded sequence, after "attention tensorization" (Feng, Ying and Tassiulas, arXiv 2410.20926).

A sequence of T = n_1 n_2 ... n_m tokens is folded into a tensor, position t = i_1 + n_1 (i_2 + n_2 (i_3 + ...)), and
attention runs along one axis after the other, each hop updating the values: T (n_1 + ... + n_m) scores instead of T^2.
The bidirectional form is the paper's. The causal form is this project's own construction; the authors' code was not
available. It carries two tracks, with one softmax over scores s(i, j) = q(i) . k(j) scale along axis d (the other
coordinates equal), C_0 = O_0 = v:

    closed  C_d(i) = sum_j       softmax_j(s(i, j)) C_{d-1}(j)                       blocks that lie wholly in the past
    open    O_d(i) = sum_{j < i} w(i, j) C_{d-1}(j) + w(i, i) O_{d-1}(i)             w = softmax over j <= i

and the output is O_m. Every past token is reached within m hops: the query at (i_2, i_1) reads C_1(j_2, i_1), which
mixes all of block j_2. The limit of the method: how a past block is mixed is decided by that block's own query at the
same offset, q(j_2, i_1), not by the query that reads it.
"""

import os
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.base import AttentionConfig, Dense, unturned
from model.cores.base import AttentionMask, PartialCore, load_kernels, share_heads
from model.cores.folded_cache import FoldedCache
from model.cores.sdpa import SDPA
from model.cores.two_tracks import two_tracks

FULL = SDPA()
MULTIPLE = 16  # of the inner axis that `fold: auto` chooses: what tensor cores like


@dataclass
class SequenceTensor(PartialCore):
    """`fold` [n_1, ..., n_m], axis 1 inside a block; `auto` becomes two axes when the training length is known.

    The inner axes never change afterwards (another fold is another function); the last one grows with the input.
    """

    name: str = "sequence_tensor"
    fold: Any = "auto"
    scores: str = "per_slice"  # or `shared`: one n_d x n_d matrix a head for all slices, bidirectional alone
    rope: str = "axis"  # a hop turns by the coordinate along its own axis; `global`: by the position in the sequence
    kernel: str = "sdpa"  # how a GPU trains: flash attention, hop by hop and track by track, or `triton`, both in one
    why_no_documents: ClassVar[str] = (
        "since a query reaches a past block through that block's token at its own offset, which may belong to "
        "another document, and so would lose tokens of its own"
    )

    def errors(self):
        yield from super().errors()
        sizes = self.fold if isinstance(self.fold, list | tuple) else [self.fold]
        whole = sizes and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes)
        if self.fold != "auto" and not (whole and isinstance(self.fold, list | tuple)):
            yield f"core.fold={self.fold}: must be auto or a list of sizes of at least 1, [n_1, ..., n_m]"
        if self.scores not in ("per_slice", "shared"):
            yield f"core.scores={self.scores!r}: must be per_slice or shared"
        if self.rope not in ("axis", "global"):
            yield f"core.rope={self.rope!r}: must be axis or global"
        if self.kernel not in ("sdpa", "triton"):
            yield f"core.kernel={self.kernel!r}: must be sdpa or triton"

    def check(self, attention: AttentionConfig, device: str, dtype: torch.dtype) -> None:
        if self.kernel == "triton":
            load_kernels("core.kernel=sdpa")
            if not runs_kernels(device):
                raise ValueError("core.kernel=triton: runs on a GPU alone; use core.kernel=sdpa")
        if self.scores == "shared":
            raise ValueError(
                "core.scores=shared mixes the scores of all slices, future tokens included, so a language model cannot "
                "be trained with it; use core.scores=per_slice"
            )

    def resolved(self, seq_len: int) -> "SequenceTensor":
        return replace(self, fold=auto_fold(seq_len) if self.fold == "auto" else list(self.fold))

    def sizes(self, seq_len: int) -> list[int]:
        """The axes of a sequence of `seq_len`: as folded, the last as long as it must be.

        Axes that a short sequence does not fill are cut: nothing reads what would lie there.
        """
        if self.fold == "auto":
            raise ValueError("core.fold=auto is resolved from the training length: call resolved(seq_len) first")
        sizes, inner = [], 1
        for axis, size in enumerate(self.fold):
            needed = -(-seq_len // inner)
            sizes.append(needed if axis == len(self.fold) - 1 else min(size, needed))
            inner *= sizes[-1]
        return sizes

    def __call__(self, qkv, rotate, positions: Tensor, mask: AttentionMask, scale: float) -> Tensor:
        seq_len, sizes = positions.size(1), self.sizes(positions.size(1))
        padding = prod(sizes) - seq_len
        if mask.documents is not None:
            raise ValueError(f"core={self.name}: cannot mask documents, {self.why_no_documents}")
        if mask.causal and self.scores == "shared":
            raise ValueError(
                f"core={self.name}: scores=shared mixes future tokens into every score; per_slice does not"
            )
        if padding and not mask.causal:
            raise ValueError(f"core={self.name}: {seq_len} tokens do not fill the fold {sizes}; only a causal one pads")
        places = positions if self.rope == "global" else torch.arange(seq_len, device=positions.device)[None]
        hops = [axis for axis, size in enumerate(sizes) if size > 1] or [0]  # an axis of one has nothing to mix
        fused = self.kernel == "triton" and mask.causal and len(hops) > 1 and runs_kernels(positions.device.type)
        opened = closed = None
        for axis in hops:
            turned = rotate(qkv, self.coordinate(places, axis)).materialize()
            if mask.starts is not None or turned.k.size(1) != seq_len:
                raise ValueError(
                    f"core={self.name}: must have as many keys as queries; decoding has a cache of its own"
                )
            inner, size, closing = prod(sizes[:axis]), sizes[axis], axis != hops[-1] or not mask.causal
            if fused:  # it needs no padding
                past, own = (turned.v, turned.v) if opened is None else (closed, opened)
                opened, closed = two_tracks(turned.q, turned.k, past, own, scale, inner, size, closing)
                continue
            q, k, v = (pad_tokens(x, padding) for x in (turned.q, turned.k, turned.v))
            fold = Axis(q.size(0), prod(sizes[axis + 1 :]), size, inner)
            past = v if closed is None else closed  # both tracks start from v
            if mask.causal:
                whole = opened is None
                opened = (
                    mix(fold, q, k, past, scale, causal=True) if whole else open_hop(fold, q, k, past, opened, scale)
                )
            if closing:
                closed = (shared_hop if self.scores == "shared" else mix)(fold, q, k, past, scale)
        return share_heads(opened if mask.causal else closed, turned.q.size(2))[:, :seq_len]

    def coordinate(self, positions: Tensor, axis: int) -> Tensor:
        """What the hop along `axis` turns tokens at `positions` by: the coordinate, or `positions` (`rope: global`)."""
        if self.rope == "global":
            return positions
        steps = positions // prod(self.fold[:axis])
        return steps if axis == len(self.fold) - 1 else steps % self.fold[axis]

    def layer_cache(self, owner, shapes, dtype: torch.dtype, device) -> FoldedCache:
        return FoldedCache(owner, self, dtype, device)

    def cache_shapes(self, attention: AttentionConfig) -> dict[str, tuple[int, ...]]:
        """A key in the mechanism's form and a value: closed, and so per query head, unless there is but one axis.

        Beside these a fold keeps queries, keys and values of one unfinished block a level.
        """
        with torch.device("meta"):
            qkv = attention.build(8, 0, self).project(torch.empty(1, 1, 8))
            shapes = {name: tuple(part.shape[2:]) for name, part in qkv.keys().items()}
            value = tuple(qkv.materialize().v.shape[2:])
        return shapes | {"values": value if len(self.fold) == 1 else (attention.n_heads, attention.v_head_dim)}

    def check_decoding(self, dtype: torch.dtype | None, compiled: bool) -> None:
        if dtype == torch.int8:
            raise ValueError(f"core={self.name}: closed values are not quantised; use a float dtype for the cache")
        if compiled:
            raise ValueError(
                f"core={self.name}: folds blocks as they complete, which a compiled step of fixed shapes cannot; "
                "decode without compiling"
            )

    def attend_cached(self, attention, x: Tensor, positions: Tensor, mask: AttentionMask, cache: FoldedCache) -> Tensor:
        return cache.attend(attention.project(x), attention.rotate, positions, attention.config.scale)

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Scores and weighted values of both tracks, 2 operations a multiply-add: O(n_1 + ... + n_m)."""
        sizes = [size for size in self.sizes(seq_len) if size > 1] or [1]
        open_keys = sum((size + 1) / 2 for size in sizes)
        closed_keys = sum(sizes[:-1])
        return 2 * attention.n_heads * (attention.qk_head_dim + attention.v_head_dim) * (open_keys + closed_keys)

    def keys_read(self, seq_len: int) -> float:
        """What a token decoded after `seq_len` others reads, on average: O(n_1 + ... + n_m).

        Half of each unfinished block, once more the token's share of folding it, and the past blocks.
        """
        *inner, last = self.sizes(seq_len)
        return sum((size + 1) / 2 + 1 for size in inner) + last


def runs_kernels(device: str) -> bool:
    """On a GPU; on a CPU in Triton's interpreter, which tests use."""
    return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def auto_fold(seq_len: int) -> list[int]:
    """Two near-equal axes [n_1, n_2] for `seq_len`: the least n_1 + n_2 with n_1 a multiple of 16.

    Of equals the one that pads less, then the one with the shorter blocks, whose hop runs on both tracks.
    """
    candidates = range(MULTIPLE, max(isqrt(seq_len) * 2, MULTIPLE) + 1, MULTIPLE)
    folds = [[size, -(-seq_len // size)] for size in candidates]
    return min(folds, key=lambda fold: (sum(fold), prod(fold), fold[0]))


@dataclass(frozen=True)
class Axis:
    """One axis of a folded batch: `size` steps with `inner` positions inside of each and `outer` groups around them."""

    batch: int
    outer: int
    size: int
    inner: int

    def fold(self, x: Tensor) -> Tensor:
        """x [B, T, N, D] with the axis as its sequence, [B outer, size, inner N, D]; a view where x is contiguous."""
        return x.reshape(self.batch * self.outer, self.size, -1, x.size(-1))

    def unfold(self, x: Tensor) -> Tensor:
        """Back to [B, T, N, D]."""
        return x.reshape(self.batch, self.outer * self.size * self.inner, -1, x.size(-1))


def pad_tokens(x: Tensor, padding: int) -> Tensor:
    """x [B, T, N, D] with `padding` zero tokens at its end, which is the future."""
    return F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x


def mix(fold: Axis, q: Tensor, k: Tensor, values: Tensor, scale: float, causal: bool = False) -> Tensor:
    """softmax(q k^T scale) values along one axis: [B, T, H, E]."""
    if fold.inner > 1 or k.size(2) != values.size(2):  # heads and offsets share a dimension
        k, values = share_heads(k, q.size(2)), share_heads(values, q.size(2))
    dense = Dense(fold.fold(q), fold.fold(k), fold.fold(values))
    return fold.unfold(FULL(dense, unturned, None, AttentionMask(causal=causal), scale))


def open_hop(fold: Axis, q: Tensor, k: Tensor, closed: Tensor, own: Tensor, scale: float) -> Tensor:
    """sum_{j < i} w(i, j) closed(j) + w(i, i) own(i) along one axis, w = softmax over j <= i: [B, T, H, E].

    One causal flash attention, which differentiates itself: the keys move up by one, so that query i sees those before
    it, and the key put first stands for i itself. Two features carry the score q(i) . k(i) to it (as a sum, so that
    bf16 loses none of it), and a column that is 1 in its value alone brings back the weight w(i, i). Correcting the
    diagonal afterwards instead, w C - diag C + diag O, would let rounding leak the future.
    """
    n_heads, qk_dim, width = q.size(2), q.size(-1), own.size(-1)
    q, k, closed, own = (fold.fold(share_heads(x, n_heads)) for x in (q, k, closed, own))
    total = -(-max(qk_dim + 2, width + 1) // 8) * 8  # flash kernels want equal widths, multiples of 8
    with torch.autocast(q.device.type, enabled=False):
        score = (q.to(torch.promote_types(q.dtype, torch.float32)) * k).sum(-1, keepdim=True)
    coarse = score.to(q.dtype)
    rest = (score - coarse).to(q.dtype)
    q = torch.cat((q, coarse, rest, q.new_zeros(*q.shape[:-1], total - qk_dim - 2)), dim=-1)
    k = F.pad(k, (0, total - qk_dim, 0, 0, 1, -1))  # one place up, and wider
    values = F.pad(closed, (0, total - width, 0, 0, 1, -1))
    with torch.no_grad():  # constants
        k[:, 0, :, qk_dim : qk_dim + 2] = 1
        values[:, 0, :, width] = 1
    mixed = FULL(Dense(q, k, values), unturned, None, AttentionMask(), scale)
    past, weight, _ = mixed.split((width, 1, total - width - 1), dim=-1)
    return fold.unfold(past + weight * own)


def shared_hop(fold: Axis, q: Tensor, k: Tensor, values: Tensor, scale: float) -> Tensor:
    """values x_d softmax(Q_d K_d^T): Q_d and K_d are the unfoldings along the axis, all other axes as features.

    The paper scales by the square root of the features' number; `scale`, for one vector, takes the others on.
    """
    k, values = share_heads(k, q.size(2)), share_heads(values, q.size(2))
    q, k, values = (x.unflatten(1, (fold.outer, fold.size, fold.inner)) for x in (q, k, values))
    scores = torch.einsum("boixhd,bojxhd->bhij", q, k) * (scale / (fold.outer * fold.inner) ** 0.5)
    return torch.einsum("bhij,bojxhe->boixhe", scores.softmax(-1), values).flatten(1, 3)
