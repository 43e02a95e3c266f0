"""What decoding keeps of the tokens so far: one contract for every mechanism.

A mechanism says what a token leaves behind. Here is the storage: preallocated, growing by blocks, with rows of
different lengths, in any float dtype or as int8. A token of a row lies at the index that is its position in the row;
what lies beyond a row's length is garbage, which `AttentionMask.starts` hides.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.mask import AttentionMask

BLOCK = 256  # tokens by which a cache grows
CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
SCALE_DTYPE = torch.bfloat16  # of int8's scales: one for each token and part

Shapes = dict[str, tuple[int, ...]]  # of one token's numbers in a layer, by the name of the part


def bytes_per_token(shapes: Shapes, dtype: torch.dtype) -> int:
    """Return the bytes of a token in one layer, int8's scales included."""
    scales = len(shapes) * SCALE_DTYPE.itemsize if dtype == torch.int8 else 0
    return sum(map(prod, shapes.values())) * dtype.itemsize + scales


class Part:
    """One named tensor of a layer, [B, capacity, *shape]; as int8 with a scale [B, capacity, 1, ...] for each token."""

    def __init__(self, batch: int, capacity: int, shape: tuple[int, ...], dtype: torch.dtype, device):
        self.values = torch.zeros(batch, capacity, *shape, dtype=dtype, device=device)
        self.scales = None
        if dtype == torch.int8:
            self.scales = torch.zeros(batch, capacity, *[1] * len(shape), dtype=SCALE_DTYPE, device=device)

    def write(self, new: Tensor, positions: Tensor) -> None:
        """Store `new` [B, T, *shape] at `positions` [B or 1, T]."""
        if self.scales is not None:
            # The scale is rounded before it divides, so its rounding costs no precision.
            scales = (new.abs().amax(tuple(range(2, new.ndim)), keepdim=True).float() / 127).to(SCALE_DTYPE)
            store(self.scales, scales, positions)
            new = (new / scales.float().clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
        store(self.values, new, positions)

    def read(self, n_keys: int | None, dtype: torch.dtype) -> Tensor:
        """Return the first `n_keys` tokens, or the whole capacity if None: [B, S, *shape]."""
        values = self.values[:, :n_keys].to(dtype)
        return values if self.scales is None else values * self.scales[:, :n_keys].to(dtype)

    def tensors(self) -> list[Tensor]:
        return [self.values] if self.scales is None else [self.values, self.scales]

    def select(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` is."""
        self.values = self.values[rows]
        self.scales = None if self.scales is None else self.scales[rows]

    def grow(self, capacity: int) -> None:
        added = capacity - self.values.size(1)
        self.values = pad_tokens(self.values, added)
        self.scales = None if self.scales is None else pad_tokens(self.scales, added)


def store(buffer: Tensor, new: Tensor, positions: Tensor) -> None:
    """Write `new` [B, T, ...] into `buffer` [B, S, ...] at `positions` [B or 1, T], in place."""
    new = new.to(buffer.dtype)
    if positions.size(0) == 1:
        buffer.index_copy_(1, positions[0], new)
    else:
        buffer[torch.arange(buffer.size(0), device=buffer.device)[:, None], positions] = new


def pad_tokens(x: Tensor, padding: int) -> Tensor:
    """Return x [B, T, ...] with `padding` zero tokens at its end, which is the future."""
    return F.pad(x, [0, 0] * (x.ndim - 2) + [0, padding]) if padding else x


class LayerCache:
    """One layer's parts, by the names of the mechanism's `cache_shapes`. The `KVCache` it is handed to is its owner."""

    attends: ClassVar[bool] = False  # true for a layer that attends to its tokens itself, by an `attend` of its own
    owner: "KVCache"

    def __init__(self, shapes: Shapes, batch: int, capacity: int, dtype: torch.dtype, device):
        self.parts = {name: Part(batch, capacity, shape, dtype, device) for name, shape in shapes.items()}

    def append(self, new: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
        """Store what new tokens leave behind, [B, T, *shape] a part, and return that of all tokens, [B, S, *shape]."""
        for name, part in self.parts.items():
            part.write(new[name], positions)
        return {name: part.read(self.owner.n_keys, new[name].dtype) for name, part in self.parts.items()}

    def places(self) -> Tensor:
        """Return the positions [1, S] of the tokens that `append` returns."""
        return torch.arange(self.owner.n_keys or self.owner.capacity, device=self.owner.lengths.device)[None]

    def select(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` is."""
        for part in self.parts.values():
            part.select(rows)

    def fix_shapes(self) -> None:
        """Prepare for steps that never change a shape. ValueError if this layer cannot."""


class KVCache:
    """The cache of `batch` rows with room for `capacity` tokens each, which grows as needed.

    The host knows the `lengths` [B] of the rows too: what is attended to is cut to the longest, and rows of one length
    need no mask. From `fix_shapes` on every shape is the same from one token to the next, for a compiled step or a
    CUDA graph: attention is over the whole capacity, and there is no more room.
    """

    def __init__(self, layers: Sequence[LayerCache], batch: int, capacity: int, device, documents: bool = False):
        self.layers, self.batch, self.capacity = layers, batch, capacity
        for layer in layers:
            layer.owner = self
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        # The number of each token's document and, at a row's length, of its next token's.
        self.documents = torch.zeros(batch, capacity + 1, dtype=torch.int32, device=device) if documents else None
        self.n_keys: int | None = 0  # how many keys a layer attends to; None: the whole capacity
        self.counts: list[int] | None = None  # how many of the tokens of `begin` are each row's own; None: all
        self._ends = [0] * batch  # `lengths`, on the host

    def fix_shapes(self) -> None:
        """Never change a shape from here on. ValueError if a layer cannot do so."""
        for layer in self.layers:
            layer.fix_shapes()
        self.n_keys = None

    def parts(self) -> Iterator[Part]:
        return (part for layer in self.layers for part in layer.parts.values())

    def tensors(self) -> list[Tensor]:
        """Return everything that a step writes to."""
        own = [self.lengths] if self.documents is None else [self.lengths, self.documents]
        return own + [tensor for part in self.parts() for tensor in part.tensors()]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(tensor.nbytes for part in self.parts() for tensor in part.tensors())

    def set_lengths(self, lengths: int | Sequence[int]) -> None:
        """Forget what lies beyond `lengths`, or take what lies there as tokens. ValueError beyond the capacity."""
        ends = [lengths] * self.batch if isinstance(lengths, int) else list(lengths)
        if len(ends) != self.batch or not 0 <= min(ends) <= max(ends) <= self.capacity:
            raise ValueError(f"lengths {ends}: must be {self.batch} numbers of at most {self.capacity} tokens")
        self._ends = ends
        self.lengths.copy_(torch.tensor(ends))

    def select(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` is, as in a beam search; there may be more or fewer rows than before."""
        rows = rows.to(self.lengths.device)
        for layer in self.layers:
            layer.select(rows)
        self.batch, self.lengths = rows.numel(), self.lengths[rows]
        self.documents = None if self.documents is None else self.documents[rows]
        self._ends = [self._ends[row] for row in rows.tolist()]

    def reserve(self, n_tokens: int) -> None:
        """Make room for `n_tokens` more in every row, by whole blocks and at least an eighth of the capacity."""
        needed = max(self._ends) + n_tokens
        if needed > self.capacity:
            blocks = -(-max(needed, self.capacity + self.capacity // 8) // BLOCK)
            self.capacity = blocks * BLOCK
            for part in self.parts():
                part.grow(self.capacity)
            if self.documents is not None:
                self.documents = pad_tokens(self.documents, self.capacity + 1 - self.documents.size(1))

    def begin(
        self, tokens: Tensor, document_end: int | None = None, counts: Tensor | None = None
    ) -> tuple[Tensor, AttentionMask]:
        """Return positions [B or 1, T] for `tokens` [B, T], which follow what each row has, and their mask."""
        batch, n_tokens = tokens.shape
        if batch != self.batch:
            raise ValueError(f"{batch} rows of tokens for a cache of {self.batch}")
        new = torch.arange(n_tokens, device=tokens.device)
        static = self.n_keys is None
        self.counts = None if counts is None or static else counts.tolist()
        positions, starts = self.lengths[:, None] + new, self.lengths
        if not static:
            self.reserve(n_tokens)
            self.n_keys = max(self._ends) + n_tokens
            if min(self._ends) == max(self._ends):
                positions, starts = (new + self._ends[0])[None], None
        if self.documents is None:
            return positions, AttentionMask(starts=starts)
        current = self.documents.gather(1, self.lengths[:, None])
        store(self.documents, current + (tokens == document_end).cumsum(dim=1), positions + 1)
        return positions, AttentionMask(documents=self.documents[:, :-1][:, : self.n_keys], starts=starts)

    def advance(self, n_tokens: int, counts: Tensor | None = None) -> None:
        """Count the tokens of `begin` as kept: all of them, or only the first `counts` [B] of each row."""
        self.lengths += n_tokens if counts is None else counts
        if self.n_keys is not None:
            added = [n_tokens] * self.batch if counts is None else counts.tolist()
            self._ends = [end + more for end, more in zip(self._ends, added, strict=True)]
