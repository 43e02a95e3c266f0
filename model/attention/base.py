"""The contract of an attention mechanism: how queries, keys and values are made, turned by position, and cached.

A mechanism is one file here and one YAML in configs/model/ that names its `AttentionConfig`. How the queries then
attend is a core's business (model/cores).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.cores.base import AttentionCore, AttentionMask


class QKV(ABC):
    """Queries, keys and values in the form in which a mechanism makes them."""

    @abstractmethod
    def materialize(self) -> "Dense":
        """The same as explicit queries, keys and values."""


@dataclass
class Dense(QKV):
    """Explicit q [B, T, H, D], k [B, S, G, D] and v [B, S, G, E]; G divides H, each key head serves H/G query heads."""

    q: Tensor
    k: Tensor
    v: Tensor

    def materialize(self) -> "Dense":
        return self


@dataclass
class AttentionConfig(ABC):
    """What every mechanism has. `n_heads: null` means `by_size`'s, else the count matched to MHA's parameters."""

    name: str
    head_dim: int
    n_heads: int | None = None
    rope_base: float = 10000.0
    by_size: dict[str, dict[str, Any]] = field(default_factory=dict)  # size name -> values for the keys left null

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head, the rotated part included."""
        return self.head_dim

    @property
    def v_head_dim(self) -> int:
        return self.head_dim

    @property
    def rope_dim(self) -> int:
        """Features of a head that RoPE turns."""
        return self.head_dim

    @property
    def scale(self) -> float:
        """What multiplies the logits before the softmax."""
        return self.qk_head_dim**-0.5

    @property
    def head_multiple(self) -> int:
        """`n_heads` must be a multiple of this."""
        return 1

    @abstractmethod
    def build(self, d_model: int, layer: int, core: AttentionCore) -> "Attention":
        """The attention of layer number `layer`, counted from 0."""

    @abstractmethod
    def num_params(self, d_model: int) -> int:
        """Parameters of one layer's attention; equals the built module's count."""

    def flops_per_token(self, d_model: int) -> float:
        """Forward operations of the projections for one token; the core counts what comes after."""
        return 2 * self.num_params(d_model)

    @abstractmethod
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What decoding keeps per token and layer."""

    def errors(self):
        """Mistakes in the mechanism's keys, one message each."""
        for key in ("head_dim", "n_heads"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield f"model.{key}={value}: must be at least 1"
        if self.n_heads and self.n_heads % self.head_multiple:
            yield f"model.n_heads={self.n_heads}: must be a multiple of model.n_kv_heads={self.head_multiple}"
        if self.rope_dim % 2:
            yield f"{self._rope_key()}={self.rope_dim}: RoPE turns pairs of features, so it must be even"
        if not self.rope_base > 1:
            yield f"model.rope_base={self.rope_base}: must be greater than 1"

    def _rope_key(self) -> str:
        return "model.head_dim"


class Attention(nn.Module, ABC):
    """One layer's attention: project, attend through the core, project back.

    A mechanism defines `project` and `rotate`; `out_proj` [d_model, H * E] starts at zero, as in the TPA authors' code,
    so that every block starts as the identity.
    """

    def __init__(self, config: AttentionConfig, d_model: int, core: AttentionCore):
        super().__init__()
        self.config = config
        self.core = core
        self.out_proj = nn.Linear(config.n_heads * config.v_head_dim, d_model, bias=False)
        nn.init.zeros_(self.out_proj.weight)

    @abstractmethod
    def project(self, x: Tensor) -> QKV:
        """Queries, keys and values of x [B, T, M], not yet rotated."""

    @abstractmethod
    def rotate(self, qkv: QKV, positions: Tensor) -> QKV:
        """Apply RoPE at `positions` [B or 1, T]."""

    def forward(self, x: Tensor, positions: Tensor, mask: AttentionMask) -> Tensor:
        """x [B, T, M] -> [B, T, M]."""
        attended = self.core(self.project(x), self.rotate, positions, mask, self.config.scale)
        return self.out_proj(attended.flatten(-2))


def split_heads(x: Tensor, *shapes: tuple[int, int]) -> list[Tensor]:
    """Cut the features of x [B, T, F] into pieces [B, T, n, d], one for each (n, d) of `shapes`."""
    pieces = torch.split(x, [n * d for n, d in shapes], dim=-1)
    return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True)]
