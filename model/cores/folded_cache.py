"""What decoding keeps for attention over a folded sequence, and how new tokens attend to it.

A level for each axis d. The last keeps, for every token, its key and its closed value C_{m-1}; the others keep queries,
keys and values of their unfinished block of n_1 ... n_d tokens, and are written over when it completes: then the block
is folded once, along axis d, into the closed values of the next level. A token costs O(n_1 + ... + n_m) amortised, with
a peak where blocks complete. Closed values are per query head: this core saves operations, not memory, and does away
with the small cache of GQA, MLA and TPA (except that TPA's keys stay factors).
"""

from itertools import accumulate
from operator import mul
from typing import ClassVar

import torch
from torch import Tensor

from model.attention.base import QKV, AttentionCore, Dense
from model.cache import LayerCache, Part
from model.cores.folding import Axis, mix
from model.cores.kernels import sdpa
from model.cores.kernels.sdpa import share_heads
from model.mask import AttentionMask


class UnfinishedBlock(Part):
    """A part that holds one unfinished block and never grows."""

    def grow(self, capacity: int) -> None:
        pass


class FoldedCache(LayerCache):
    """One layer's levels: `parts` by name, allocated when the first tokens show their shapes.

    ValueError for int8, for steps of fixed shapes, and if rows were shortened in between.
    """

    attends: ClassVar[bool] = True

    def __init__(self, core: AttentionCore, fold: list[int], batch: int, dtype: torch.dtype, device):
        core.check_decoding(dtype, compiled=False)
        super().__init__({}, batch, 0, dtype, device)
        self.core, self.fold, self.batch, self.dtype, self.device = core, fold, batch, dtype, device
        self.spans = list(accumulate(fold[:-1], mul, initial=1))  # positions inside of a step: 1, n_1, n_1 n_2 ...
        self.last = len(fold) - 1
        self.ends = [0] * batch

    def fix_shapes(self) -> None:
        self.core.check_decoding(self.dtype, compiled=True)

    def attend(self, views: list[QKV], positions: Tensor, scale: float) -> Tensor:
        """Return the attended values [B, T, H, E] of tokens at `positions` [B or 1, T], which join the cache.

        Rows that stand at different positions are attended one after the other.
        """
        keys, dense = views[-1].keys(), [view.materialize() for view in views]
        values = dense[0].v
        batch, n_tokens, n_heads = dense[0].q.shape[:3]
        starts = positions[:, 0].tolist() * (batch // positions.size(0))
        counts = self.owner.counts or [n_tokens] * batch
        if any(start not in (0, end) for start, end in zip(starts, self.ends, strict=True)):
            raise ValueError(f"core=sequence_tensor: its cache cannot go back, from {self.ends} to {starts} tokens")
        out = values.new_zeros(batch, n_tokens, n_heads, values.size(-1))
        groups: dict[tuple[int, int], list[int]] = {}
        for row, group in enumerate(zip(starts, counts, strict=True)):
            groups.setdefault(group, []).append(row)
        for (start, count), members in groups.items():
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
            q, is_last = views[axis].q, axis == self.last
            step, offset = start // span, start % span
            kept = keys if is_last else {"k": views[axis].k}
            make_keys = form.make_keys if is_last else Dense.make_keys
            if not is_last:
                step %= self.fold[axis]
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
            shape = tuple(tensor.shape[2:])
            part = self.parts.get(f"{name}_{axis + 1}")
            if part is None and block:
                part = UnfinishedBlock(self.batch, block, shape, self.dtype, self.device)
            elif part is None:
                part = Part(self.batch, self.owner.capacity, shape, self.dtype, self.device)
            self.parts[f"{name}_{axis + 1}"] = part
            place = start % block if block else start
            part.values[rows, place : place + tensor.size(1)] = tensor.to(self.dtype)
