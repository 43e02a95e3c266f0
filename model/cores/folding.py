"""What attention over a folded sequence is made of: attention along one axis, and what decoding keeps.

The cache has a level for each axis d. The last keeps, for every token, its key and its closed value C_{m-1}; the others
keep queries, keys and values of their unfinished block of n_1 ... n_d tokens, and are written over when it completes:
then the block is folded once, along axis d, into the closed values (of each query head) of the next level.
"""

from dataclasses import dataclass
from itertools import accumulate
from math import isqrt, prod
from operator import mul
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.base import QKV, AttentionCore, Dense
from model.cache import LayerCache, Part
from model.cores.kernels import sdpa
from model.cores.kernels.sdpa import share_heads
from model.mask import AttentionMask

MULTIPLE = 16  # of the inner axis that `auto_fold` chooses: tensor cores like it


def auto_fold(seq_len: int) -> list[int]:
    """Return two near-equal axes [n_1, n_2] for `seq_len`: least n_1 + n_2, then least padding, then least n_1."""
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


class UnfinishedBlock(Part):
    """A part that holds one unfinished block and never grows."""

    def grow(self, capacity: int) -> None:
        pass


class FoldedCache(LayerCache):
    """One layer's levels: `parts` by name, allocated when the first tokens show their shapes."""

    attends: ClassVar[bool] = True

    def __init__(self, core: AttentionCore, fold: list[int], batch: int, dtype: torch.dtype, device):
        core.check_decoding(dtype, compiled=False)
        super().__init__({}, batch, 0, dtype, device)
        self.core, self.fold, self.batch, self.dtype, self.device = core, fold, batch, dtype, device
        self.spans = list(accumulate(fold[:-1], mul, initial=1))  # positions inside of a step: 1, n_1, n_1 n_2 ...
        self.last = len(fold) - 1
        self.ends = [0] * batch

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.batch, self.ends = rows.numel(), [self.ends[row] for row in rows.tolist()]

    def fix_shapes(self) -> None:
        self.core.check_decoding(self.dtype, compiled=True)

    def attend(self, views: list[QKV], positions: Tensor, scale: float) -> Tensor:
        """Return the attended values [B, T, H, E] of tokens at `positions` [B or 1, T], which join the cache.

        Rows that stand at different positions attend one after the other. ValueError if they went back.
        """
        keys, dense = views[-1].keys(), [view.materialize() for view in views]
        values = dense[0].v
        batch, n_tokens, n_heads = dense[0].q.shape[:3]
        starts = positions[:, 0].tolist() * (batch // positions.size(0))
        counts = self.owner.counts or [n_tokens] * batch
        if any(start not in (0, end) for start, end in zip(starts, self.ends, strict=True)):
            raise ValueError(f"core=sequence_tensor: its cache cannot go back, from {self.ends} to {starts} tokens")
        out = values.new_zeros(batch, n_tokens, n_heads, values.size(-1))
        groups = list(zip(starts, counts, strict=True))
        for start, count in sorted(set(groups)):
            members = [row for row, group in enumerate(groups) if group == (start, count)]
            rows = slice(None) if len(members) == batch else members
            done = 0
            while done < count:
                room = count if self.last == 0 else self.fold[0] - (start + done) % self.fold[0]
                piece = slice(done, min(done + room, count))
                cut = [Dense(view.q[rows, piece], view.k[rows, piece], view.v[rows, piece]) for view in dense]
                own = {name: part[rows, piece] for name, part in keys.items()}
                out[rows, piece] = self.attend_piece(rows, start + done, cut, own, views[-1], scale)
                done = piece.stop
        self.ends = [start + count for start, count in zip(starts, counts, strict=True)]
        return out

    def attend_piece(
        self, rows, start: int, views: list[Dense], keys: dict[str, Tensor], form: QKV, scale: float
    ) -> Tensor:
        """Return the attended values of tokens from position `start` on, all of one innermost block.

        `keys` are those of the last view in the mechanism's `form`, in which the last level keeps them.
        """
        opened = views[0].v
        size, n_heads = opened.size(1), views[0].q.size(2)
        for axis, span in enumerate(self.spans):
            q, step, offset = views[axis].q, start // span, start % span
            kept, make_keys = keys, form.make_keys
            if axis != self.last:
                step %= self.fold[axis]
                kept, make_keys = {"k": views[axis].k}, Dense.make_keys
                self.write(rows, axis, start, q=q)
            self.write(rows, axis, start, **kept)
            if axis == 0:
                self.write(rows, axis, start, values=opened)
                past = {name: self.read(rows, axis, name, slice(step + size), q) for name in (*kept, "values")}
                values = past.pop("values")
                opened = sdpa.attend(Dense(q, make_keys(past), values), AttentionMask(), scale)
            elif step > 0:
                # A query each for lines of `step` past blocks, at its own offset in them, and itself at the end.
                line = {name: self.line(rows, axis, name, step, span, offset, new) for name, new in kept.items()}
                opened = share_heads(opened, n_heads)
                values = self.line(rows, axis, "values", step, span, offset, opened)
                lines = Dense(q.flatten(0, 1)[:, None], share_heads(make_keys(line), n_heads), values)
                opened = sdpa.attend(lines, AttentionMask(causal=False), scale).view_as(opened)
        self.complete(rows, start + size, views[0].q, scale)
        return share_heads(opened, n_heads)

    def complete(self, rows, end: int, like: Tensor, scale: float) -> None:
        """Fold the blocks that end at position `end` into closed values of the level above."""
        for axis, (size, span) in enumerate(zip(self.fold[:-1], self.spans, strict=False)):
            block = size * span
            if end % block:
                return
            q, k, values = (self.read(rows, axis, name, slice(block), like) for name in ("q", "k", "values"))
            closed = mix(Axis(q.size(0), 1, size, span), q, k, values, scale)
            self.write(rows, axis + 1, end - block, values=closed)

    def line(self, rows, axis: int, name: str, steps: int, span: int, offset: int, own: Tensor) -> Tensor:
        """Return what `steps` past blocks have at `offset`, and `own` [b, T, ...] after it: [b T, steps + 1, ...]."""
        blocks = self.parts[f"{name}_{axis + 1}"].values[:, : steps * span].unflatten(1, (steps, span))
        past = blocks[:, :, offset : offset + own.size(1)][rows].to(own.dtype)
        return torch.cat((past, own[:, None]), dim=1).transpose(1, 2).flatten(0, 1)

    def read(self, rows, axis: int, name: str, where: slice, like: Tensor) -> Tensor:
        return self.parts[f"{name}_{axis + 1}"].values[:, where][rows].to(like.dtype)

    def write(self, rows, axis: int, start: int, **new: Tensor) -> None:
        """Store tensors [b, T, ...] at the positions from `start` on in the level of `axis`."""
        block = None if axis == self.last else self.fold[axis] * self.spans[axis]
        for name, tensor in new.items():
            key = f"{name}_{axis + 1}"
            if key not in self.parts:
                kind = UnfinishedBlock if block else Part
                shape = tuple(tensor.shape[2:])
                self.parts[key] = kind(self.batch, block or self.owner.capacity, shape, self.dtype, self.device)
            place = start % block if block else start
            self.parts[key].values[rows, place : place + tensor.size(1)] = tensor.to(self.dtype)
