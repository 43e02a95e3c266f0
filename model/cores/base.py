"""The contract of an attention core: how queries attend to keys, whatever mechanism made them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from model.attention.base import QKV, Attention, AttentionConfig
    from model.cache import KVCache


@dataclass(frozen=True)
class AttentionMask:
    """Which of S keys each of T queries sees.

    `starts` [B] is the key index of each row's first query, where the rows of a cache differ in length: query t of row
    b is at index starts[b] + t. What lies beyond a row's last query is garbage that must not reach the result, but
    finite, so that a weight of 0 silences it. Without `starts` the queries are the last T of the S positions.
    `documents` [B, S] numbers the document of each position: a query sees keys of its own only. `window` limits a query
    to so many keys before it, its own included.
    """

    causal: bool = True
    documents: Tensor | None = None
    starts: Tensor | None = None
    window: int | None = None

    def allowed(self, n_queries: int, n_keys: int, device=None) -> Tensor:
        """The mask spelt out, true where the query sees the key: [T, S], or [B, 1, T, S] with documents or starts."""
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

    def square(self, n_queries: int) -> bool:
        """Whether `documents` are all there is to it: `n_queries` causal queries, and as many keys."""
        return self.causal and self.starts is None and self.window is None and self.documents.size(1) == n_queries

    @cached_property
    def document_bounds(self) -> Tensor:
        """Where each of the `documents` starts, row by row, and the last one ends: [N + 1], int32."""
        n_rows, length = self.documents.shape
        firsts = self.documents.diff(dim=1, prepend=self.documents.new_full((n_rows, 1), -1)) != 0
        return F.pad(firsts.flatten().nonzero().flatten(), (0, 1), value=n_rows * length).int()

    @cached_property
    def document_lengths(self) -> list[int]:
        """Tokens of each of the `documents`, row by row: computed once for all layers, since a GPU waits for it."""
        return self.document_bounds.diff().tolist()

    def mean_keys(self, seq_len: int) -> float:
        """Keys a query sees, averaged over a sequence."""
        return (seq_len + 1) / 2 if self.causal else seq_len


def share_heads(x: Tensor, n_heads: int) -> Tensor:
    """x [B, S, G, D] with each key head repeated for the H / G query heads that it serves, [B, S, H, D]."""
    return x if x.size(2) == n_heads else x.repeat_interleave(n_heads // x.size(2), dim=2)


def load_kernels(instead: str = "core=sdpa"):
    """The Triton kernels. ValueError where Triton is missing, which names `instead`."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ValueError(
            f"needs Triton on a GPU, and it is not installed: pip install triton, or use {instead}"
        ) from None
    from model.cores import kernels

    return kernels


@dataclass
class AttentionCore(ABC):
    """A core is its own configuration: a dataclass that a YAML in configs/core/ names.

    A core gets q, k, v not yet rotated and the mechanism's way of rotating them: it says which positions to rotate by.
    """

    name: str
    masks_documents: ClassVar[bool] = False  # whether it honours AttentionMask.documents; others are refused with them
    why_no_documents: ClassVar[str] = ""  # the reason, where there is one to give

    def errors(self):
        """Mistakes in the core's own keys, one message each."""
        return ()

    def check(self, attention: "AttentionConfig", device: str, dtype: torch.dtype) -> None:
        """Raise a ValueError that names what this core cannot do; never fall back silently."""

    def training_note(self, attention: "AttentionConfig", device: str) -> str:
        """How this core will compute gradients, where it has decided that; a line of the preflight table."""
        return ""

    def resolved(self, seq_len: int) -> "AttentionCore":
        """The core with what it takes from the training length decided, as the run's configuration keeps it."""
        return self

    def for_layer(self, layer: int) -> "AttentionCore":
        """What layer number `layer`, counted from 0, attends with."""
        return self

    @abstractmethod
    def __call__(
        self,
        qkv: "QKV",
        rotate: Callable[["QKV", Tensor], "QKV"],
        positions: Tensor,
        mask: AttentionMask,
        scale: float,
    ) -> Tensor:
        """The attended values [B, T, H, E] for positions [B or 1, T] and softmax(q k^T * scale)."""

    def layer_cache(self, owner: "KVCache", shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device):
        """What a layer keeps of the tokens so far: the mechanism's `shapes`, unless a core needs something else."""
        from model.cache import LayerCache

        return LayerCache(owner, shapes, dtype, device)

    def cache_shapes(self, attention: "AttentionConfig") -> dict[str, tuple[int, ...]]:
        """What `layer_cache` keeps for every token: the shape of each part by its name."""
        return attention.cache_shapes()

    def check_decoding(self, dtype: torch.dtype | None, compiled: bool) -> None:
        """Raise a ValueError that names what this core's cache cannot be; `dtype` None: that of the forward pass."""

    def attend_cached(self, attention: "Attention", x: Tensor, positions: Tensor, mask: AttentionMask, cache) -> Tensor:
        """The attended values [B, T, H, E] of x [B, T, M], whose tokens join the layer's cache."""
        return attention.attend_cached(x, positions, mask, cache)

    @abstractmethod
    def flops_per_token(self, attention: "AttentionConfig", seq_len: int) -> float:
        """Floating-point operations of one layer's forward pass for one token of a sequence of `seq_len`."""


@dataclass
class PartialCore(AttentionCore):
    """A core that does not let every query meet every key; `full_every` mixes it with full attention."""

    full_every: int | None = None  # every so many layers, the last of each such group attends in full (core=sdpa)

    def errors(self):
        if self.full_every is not None and self.full_every < 1:
            yield f"core.full_every={self.full_every}: must be at least 1, or null"

    def for_layer(self, layer: int) -> AttentionCore:
        from model.cores.sdpa import SDPA

        return SDPA() if self.full_every and (layer + 1) % self.full_every == 0 else self
