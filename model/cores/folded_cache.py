"""What decoding keeps for attention over a folded sequence, and how new tokens attend to it.

A level for each axis d. The last keeps, for every token, its key and its closed value C_{m-1}; the others keep queries,
keys and values of their unfinished block of n_1 ... n_d tokens, and are written over when it completes: then the block
is folded once, along axis d, into the closed values of the next level. A token costs O(n_1 + ... + n_m) amortised, with
a peak where blocks complete. Closed values are per query head: this core saves operations, not memory, and does away
with the small cache of GQA, MLA and TPA (TPA's keys do stay factors).
"""

from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.attention.base import QKV, Dense, unturned
from model.cache import KVCache, Part
from model.cores.base import AttentionMask, share_heads
from model.cores.sdpa import SDPA

if TYPE_CHECKING:
    from model.cores.sequence_tensor import SequenceTensor

FULL = SDPA()


class Block(Part):
    """A part that holds one unfinished block and never grows."""

    def grow(self, capacity: int) -> None:
        pass


class FoldedCache:
    """One layer's levels: `parts` by name, allocated when the first tokens show their shapes.

    ValueError for int8, for steps of fixed shapes (`KVCache.static`), and where rows were shortened in between.
    """

    def __init__(self, owner: KVCache, core: "SequenceTensor", dtype: torch.dtype, device):
        core.check_decoding(dtype, compiled=False)
        self.owner, self.core, self.dtype, self.device = owner, core, dtype, device
        self.fold = core.fold
        self.spans = list(accumulate(self.fold[:-1], mul, initial=1))  # positions inside of a step: 1, n_1, n_1 n_2 ...
        self.last = len(self.fold) - 1
        self.parts: dict[str, Part] = {}
        self.ends = [0] * owner.batch

    def fix_shapes(self) -> None:
        self.core.check_decoding(self.dtype, compiled=True)

    def attend(self, qkv: QKV, rotate: Callable, positions: Tensor, scale: float) -> Tensor:
        """The attended values [B, T, H, E] of tokens at `positions` [B or 1, T], which join the cache.

        Rows that stand at different positions are attended one after the other.
        """
        whole = qkv.materialize()
        batch, n_tokens, n_heads = whole.q.shape[:3]
        starts = positions[:, 0].tolist() * (batch // positions.size(0))
        counts = self.owner.counts or [n_tokens] * batch
        if any(start not in (0, end) for start, end in zip(starts, self.ends, strict=True)):
            raise ValueError(f"core={self.core.name}: its cache cannot go back, from {self.ends} to {starts} tokens")
        turned = [rotate(qkv, self.core.coordinate(positions, axis)) for axis in range(len(self.fold))]
        keys = turned[-1].keys()
        dense = [each.materialize() for each in turned]
        out = whole.v.new_zeros(batch, n_tokens, n_heads, whole.v.size(-1))
        groups: dict[tuple[int, int], list[int]] = {}
        for row, group in enumerate(zip(starts, counts, strict=True)):
            groups.setdefault(group, []).append(row)
        for (start, count), members in groups.items():
            rows = slice(None) if len(members) == batch else members
            done = 0
            while done < count:
                room = count if self.last == 0 else self.fold[0] - (start + done) % self.fold[0]
                piece = slice(done, min(done + room, count))
                q, k = [each.q[rows, piece] for each in dense], [each.k[rows, piece] for each in dense]
                own = {name: part[rows, piece] for name, part in keys.items()}
                out[rows, piece] = self.attend_piece(rows, start + done, q, k, own, whole.v[rows, piece], qkv, scale)
                done = piece.stop
        self.ends = [start + count for start, count in zip(starts, counts, strict=True)]
        return out

    def attend_piece(
        self, rows, start: int, q: list[Tensor], k: list[Tensor], keys: dict[str, Tensor], v: Tensor, form: QKV, scale
    ) -> Tensor:
        """Tokens from position `start` on, all of one innermost block; q and k by axis, of the last its `keys`."""
        size, opened = v.size(1), v
        for axis, span in enumerate(self.spans):
            step, offset = start // span, start % span
            kept = keys if axis == self.last else {"k": k[axis]}
            if axis < self.last:
                step %= self.fold[axis]
                self.write(rows, axis, start, q=q[axis])
            self.write(rows, axis, start, **kept)
            make_keys = form.make_keys if axis == self.last else Dense.make_keys
            if axis == 0:
                self.write(rows, axis, start, values=v)
                past = {name: self.read(rows, axis, name, slice(step + size), q[0]) for name in (*kept, "values")}
                values = past.pop("values")
                opened = FULL(Dense(q[0], make_keys(past), values), unturned, None, AttentionMask(), scale)
                continue
            if step == 0:
                continue
            # A query each for lines of `step` past blocks, at its own offset in them, and itself at the end.
            line = {name: self.line(rows, axis, name, step, span, offset, new) for name, new in kept.items()}
            opened = share_heads(opened, q[axis].size(2))
            values = self.line(rows, axis, "values", step, span, offset, opened)
            lines = Dense(q[axis].flatten(0, 1)[:, None], share_heads(make_keys(line), opened.size(2)), values)
            opened = FULL(lines, unturned, None, AttentionMask(causal=False), scale).view_as(opened)
        self.complete(rows, start + size, q[0], scale)
        return share_heads(opened, q[0].size(2))

    def complete(self, rows, end: int, like: Tensor, scale: float) -> None:
        """Fold the blocks that end at position `end` into closed values of the level above."""
        from model.cores.sequence_tensor import Axis, mix

        for axis, (size, span) in enumerate(zip(self.fold[:-1], self.spans, strict=False)):
            block = size * span
            if end % block:
                return
            q, k, values = (self.read(rows, axis, name, slice(block), like) for name in ("q", "k", "values"))
            closed = mix(Axis(q.size(0), 1, size, span), q, k, values, scale, causal=False)
            self.write(rows, axis + 1, end - block, values=closed)

    def line(self, rows, axis: int, name: str, steps: int, span: int, offset: int, own: Tensor) -> Tensor:
        """What `steps` past blocks have where `own` [b, T, ...] stands in its, then `own`, [b T, steps + 1, ...]."""
        blocks = self.parts[f"{name}_{axis + 1}"].values[:, : steps * span].unflatten(1, (steps, span))
        past = blocks[:, :, offset : offset + own.size(1)][rows].to(own.dtype)
        return torch.cat((past, own[:, None]), dim=1).transpose(1, 2).flatten(0, 1)

    def read(self, rows, axis: int, name: str, where: slice, like: Tensor) -> Tensor:
        return self.parts[f"{name}_{axis + 1}"].values[:, where][rows].to(like.dtype)

    def write(self, rows, axis: int, start: int, **new: Tensor) -> None:
        """Put tensors [b, T, ...] where the level of `axis` keeps the positions from `start` on."""
        if axis < self.last:
            start %= self.fold[axis] * self.spans[axis]
        for name, tensor in new.items():
            part = self.parts.get(f"{name}_{axis + 1}")
            if part is None:
                batch, shape = self.owner.batch, tuple(tensor.shape[2:])
                if axis < self.last:
                    part = Block(batch, self.fold[axis] * self.spans[axis], shape, self.dtype, self.device)
                else:
                    part = Part(batch, self.owner.capacity, shape, self.dtype, self.device)
                self.parts[f"{name}_{axis + 1}"] = part
            part.values[rows, start : start + tensor.size(1)] = tensor.to(self.dtype)
