"""What attention over a folded sequence and its cache share: the coordinates of a fold, and attention along one axis.

A fold [n_1, ..., n_m] gives position t the coordinates i_1, ..., i_m with t = i_1 + n_1 (i_2 + n_2 (i_3 + ...)). The
inner axes are as the fold says; the last one grows with the sequence.
"""

from dataclasses import dataclass
from math import isqrt, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.base import Dense
from model.cores.kernels import sdpa
from model.cores.kernels.sdpa import share_heads
from model.mask import AttentionMask

MULTIPLE = 16  # of the inner axis that `auto_fold` chooses: tensor cores like it


def auto_fold(seq_len: int) -> list[int]:
    """Return two near-equal axes [n_1, n_2] for `seq_len`: the least n_1 + n_2 with n_1 a multiple of 16.

    Of equals it is the one that pads less, then the one with the shorter blocks, whose hop runs on both tracks.
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
        """Return x [B, T, N, D] with the axis as its sequence: [B outer, size, inner N, D]."""
        return x.reshape(self.batch * self.outer, self.size, -1, x.size(-1))

    def unfold(self, x: Tensor) -> Tensor:
        """Return what `fold` gave as [B, T, N, D] again."""
        return x.reshape(self.batch, self.outer * self.size * self.inner, -1, x.size(-1))


def mix(axis: Axis, q: Tensor, k: Tensor, values: Tensor, scale: float, causal: bool = False) -> Tensor:
    """Return softmax(q k^T scale) values along one axis, [B, T, H, E]."""
    if axis.inner > 1 or k.size(2) != values.size(2):  # heads and offsets share a dimension
        k, values = share_heads(k, q.size(2)), share_heads(values, q.size(2))
    dense = Dense(axis.fold(q), axis.fold(k), axis.fold(values))
    return axis.unfold(sdpa.attend(dense, AttentionMask(causal=causal), scale))


def open_hop(axis: Axis, q: Tensor, k: Tensor, closed: Tensor, own: Tensor, scale: float) -> Tensor:
    """Return sum_{j < i} w(i, j) closed(j) + w(i, i) own(i) along one axis, w = softmax over j <= i: [B, T, H, E].

    One causal flash attention, which differentiates itself: the keys move up by one, so that query i sees those before
    it, and the key put first stands for i itself. Two features carry the score q(i) . k(i) to it (as a sum, so that
    bf16 loses none of it), and a column that is 1 only in its value brings back the weight w(i, i). Correcting the
    diagonal afterwards instead, w C - diag C + diag O, would let rounding leak the future.
    """
    n_heads, qk_dim, width = q.size(2), q.size(-1), own.size(-1)
    q, k, closed, own = (axis.fold(share_heads(x, n_heads)) for x in (q, k, closed, own))
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
    mixed = sdpa.attend(Dense(q, k, values), AttentionMask(), scale)
    past, weight, _ = mixed.split((width, 1, total - width - 1), dim=-1)
    return axis.unfold(past + weight * own)
