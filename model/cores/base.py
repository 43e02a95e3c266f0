"""The contract of an attention core: how queries attend to keys, whatever mechanism made them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.attention.base import QKV, AttentionConfig


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query sees. Queries are the last T of the S positions.

    `documents` [B, S] numbers the document of each position: a query sees keys of its own only.
    """

    causal: bool = True
    documents: Tensor | None = None

    def allowed(self, n_queries: int, n_keys: int, device=None) -> Tensor:
        """The mask spelt out: [T, S] booleans, true where the query sees the key; [B, 1, T, S] with documents."""
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
        seen = seen.tril(n_keys - n_queries) if self.causal else seen
        if self.documents is None:
            return seen
        same = self.documents[:, -n_queries:, None] == self.documents[:, None, :]
        return (seen & same)[:, None]

    def mean_keys(self, seq_len: int) -> float:
        """Keys a query sees, averaged over a sequence."""
        return (seq_len + 1) / 2 if self.causal else seq_len


@dataclass
class AttentionCore(ABC):
    """A core is its own configuration: a dataclass that a YAML in configs/core/ names.

    A core gets q, k, v not yet rotated and the mechanism's way of rotating them: it says which positions to rotate by.
    """

    name: str
    masks_documents: ClassVar[bool] = False  # whether it honours AttentionMask.documents; others are refused with them

    def errors(self):
        """Mistakes in the core's own keys, one message each."""
        return ()

    def check(self, attention: "AttentionConfig", device: str, dtype: torch.dtype) -> None:
        """Raise a ValueError that names what this core cannot do; never fall back silently."""

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

    @abstractmethod
    def flops_per_token(self, attention: "AttentionConfig", seq_len: int) -> float:
        """Floating-point operations of one layer's forward pass for one token of a sequence of `seq_len`."""
