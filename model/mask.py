"""Which keys a query sees."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Which of S keys each of T queries sees.

    With `starts` query t of row b is at index starts[b] + t. What lies beyond a row's last query must not reach the
    result, but is finite, so that a weight of 0 silences it. Without, the queries are the last T of the S positions.
    """

    causal: bool = True
    documents: Tensor | None = None  # [B, S]: the number of each position's document; a query sees keys of its own
    starts: Tensor | None = None  # [B]: the key index of each row's first query, if rows differ in length
    window: int | None = None  # how many of the most recent keys a query sees, its own included

    def allowed(self, n_queries: int, n_keys: int, device=None) -> Tensor:
        """Return true if a query sees a key: [T, S], or [B, 1, T, S] with documents or starts."""
        queries, keys = torch.arange(n_queries, device=device), torch.arange(n_keys, device=device)
        first = n_keys - n_queries if self.starts is None else self.starts[:, None]
        places = first + queries  # [T] or [B, T]
        last = places if self.causal else places[..., -1:]
        seen = (keys <= last[..., None]).expand(*places.shape, n_keys)
        if self.window is not None:
            seen = seen & (keys > places[..., None] - self.window)
        if self.documents is not None:
            own = self.documents.gather(1, places.expand(self.documents.size(0), n_queries))
            seen = seen & (own[:, :, None] == self.documents[:, None, :])
        return seen if seen.ndim == 2 else seen[:, None]

    def packs(self, n_queries: int) -> bool:
        """Return whether rows of `documents` are all there is to mask: causal queries, each with its key."""
        only_documents = self.documents is not None and self.starts is None and self.window is None
        return only_documents and self.causal and self.documents.size(1) == n_queries

    @cached_property
    def document_bounds(self) -> Tensor:
        """Where each of the `documents` starts, row by row, and where the last one ends: [N + 1], int32."""
        n_rows, length = self.documents.shape
        firsts = self.documents.diff(dim=1, prepend=self.documents.new_full((n_rows, 1), -1)) != 0
        return F.pad(firsts.flatten().nonzero().flatten(), (0, 1), value=n_rows * length).int()

    @cached_property
    def document_lengths(self) -> list[int]:
        """Tokens of each of the `documents`, row by row; computed once for all layers, since a GPU waits for it."""
        return self.document_bounds.diff().tolist()


def mean_causal_keys(seq_len: int, window: int | None = None) -> float:
    """Return how many keys a causal query sees, averaged over a sequence; at most the last `window` of them."""
    size = seq_len if window is None else min(window, seq_len)
    return size - size * (size - 1) / (2 * seq_len)
