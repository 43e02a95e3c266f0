"""The contract of an attention mechanism: how queries, keys and values are made, turned by position, and cached.

A mechanism is one file here and one YAML in configs/model/ that names its `AttentionConfig`. How the queries then
attend is a core's business (model/cores).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import LayerCache
from model.cores.base import AttentionCore, AttentionMask
from model.rope import SCALINGS, RopeScaling, apply_rope, rope_tables


class QKV(ABC):
    """Queries, keys and values in the form in which a mechanism makes them."""

    @abstractmethod
    def materialize(self) -> "Dense":
        """The same as explicit queries, keys and values."""

    def keys(self) -> dict[str, Tensor]:
        """The keys alone, [B, S, ...] by name, in as few numbers as this form has for them."""
        return {"k": self.materialize().k}

    @staticmethod
    def make_keys(kept: dict[str, Tensor]) -> Tensor:
        """Explicit keys [B, S, G, D] from what `keys` gave."""
        return kept["k"]


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
    """What every mechanism has.

    A key that is null takes `by_size`'s value for the size; an `n_heads` left null is matched to MHA's budget.
    """

    name: str
    head_dim: int
    n_heads: int | None = None
    rope_base: float = 10000.0
    rope_fraction: float = 1.0  # the share of the features that RoPE turns; 0: no position at all
    rope_scaling: str = "none"  # linear | ntk | yarn: training goes on at `rope_factor` times the length it began at
    rope_factor: float = 1.0
    rope_original_length: int | None = None  # null: trainer.seq_len / rope_factor
    qk_norm: bool = False  # RMS-normalise each query and key head, without a learned weight
    output_gate: bool = False  # multiply the attended values by sigmoid(W x), arXiv 2505.06708
    by_size: dict[str, dict[str, Any]] = field(default_factory=dict)  # size name -> values for the keys left null

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head, the rotated part included."""
        return self.head_dim

    @property
    def v_head_dim(self) -> int:
        return self.head_dim

    @property
    def rope_width(self) -> int:
        """Features that may turn; `rope_fraction` of them do."""
        return self.head_dim

    @property
    def rope_dim(self) -> int:
        return round(self.rope_width * self.rope_fraction)

    @property
    def scale(self) -> float:
        """What multiplies the logits before the softmax."""
        return self.qk_head_dim**-0.5 * (self.scaling.logit_factor if self.scaling else 1.0)

    @property
    def scaling(self) -> RopeScaling | None:
        if self.rope_scaling == "none" or self.rope_factor == 1:
            return None
        return RopeScaling(self.rope_scaling, self.rope_factor, self.rope_original_length)

    @property
    def head_multiple(self) -> int:
        """`n_heads` must be a multiple of this."""
        return 1

    @property
    def cache_knobs(self) -> tuple[str, ...]:
        """The keys that set the cache's size beside `n_heads`: what `size.match=kv_bytes` turns, all alike."""
        return ()

    @abstractmethod
    def build(self, d_model: int, layer: int, core: AttentionCore) -> "Attention":
        """The attention of layer number `layer`, counted from 0."""

    @abstractmethod
    def projection_params(self, d_model: int) -> int:
        """Parameters of what makes queries, keys and values."""

    @abstractmethod
    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What decoding keeps per token and layer: the shape of each part by its name."""

    def output_params(self, d_model: int) -> int:
        """Parameters of the output projection and the gate."""
        return d_model * self.n_heads * self.v_head_dim * (2 if self.output_gate else 1)

    def num_params(self, d_model: int) -> int:
        """Parameters of one layer's attention; equals the built module's count."""
        return self.projection_params(d_model) + self.output_params(d_model)

    def flops_per_token(self, d_model: int) -> float:
        """Forward operations of the projections for one token; the core counts what comes in between."""
        return 2 * self.num_params(d_model)

    def activation_numbers(self, d_model: int) -> int:
        """Numbers a token that the backward pass needs kept of what lies between the block's norm and the core."""
        return 2 * self.n_heads * self.qk_head_dim + self.n_heads * self.v_head_dim

    def resolved(self, seq_len: int) -> "AttentionConfig":
        """With everything filled in that the training length decides."""
        if self.rope_scaling == "none" or self.rope_original_length:
            return self
        return replace(self, rope_original_length=round(seq_len / self.rope_factor))

    def errors(self):
        """Mistakes in the mechanism's keys, one message each."""
        for key in ("head_dim", "n_heads"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield f"model.{key}={value}: must be at least 1"
        if self.n_heads and self.n_heads % self.head_multiple:
            yield f"model.n_heads={self.n_heads}: must be a multiple of model.n_kv_heads={self.head_multiple}"
        if not 0 <= self.rope_fraction <= 1:
            yield f"model.rope_fraction={self.rope_fraction}: must lie in [0, 1]"
        elif self.rope_dim % 2:
            share = f" x model.rope_fraction={self.rope_fraction} = {self.rope_dim}" if self.rope_fraction < 1 else ""
            yield f"{self._rope_key()}={self.rope_width}{share}: RoPE turns pairs of features, so it must be even"
        if not self.rope_base > 1:
            yield f"model.rope_base={self.rope_base}: must be greater than 1"
        if self.rope_scaling not in SCALINGS:
            yield f"model.rope_scaling={self.rope_scaling!r}: must be one of {', '.join(SCALINGS)}"
        if not 1 <= self.rope_factor < math.inf:
            yield f"model.rope_factor={self.rope_factor}: must be a number of at least 1"
        elif (self.rope_scaling == "none") != (self.rope_factor == 1):
            yield "model.rope_scaling and model.rope_factor go together, as in rope_scaling=yarn, rope_factor=4"
        if self.rope_original_length is not None and self.rope_original_length < 1:
            default = "trainer.seq_len / model.rope_factor where it is not given"
            yield f"model.rope_original_length={self.rope_original_length}: must be at least 1; it is {default}"

    def _rope_key(self) -> str:
        return "model.head_dim"


class Attention(nn.Module, ABC):
    """One layer's attention: project, attend through the core, project back.

    A mechanism defines `project` and `rotate`, and `keep` and `recall` where it caches something else than rotated keys
    and values. `out_proj` [d_model, H * E] starts at zero, as in the TPA authors' code, so that every block starts as
    the identity.
    """

    def __init__(self, config: AttentionConfig, d_model: int, core: AttentionCore):
        super().__init__()
        self.config = config
        self.core = core
        width = config.n_heads * config.v_head_dim
        self.out_proj = nn.Linear(width, d_model, bias=False)
        nn.init.zeros_(self.out_proj.weight)
        self.gate_proj = nn.Linear(d_model, width, bias=False) if config.output_gate else None

    @abstractmethod
    def project(self, x: Tensor) -> QKV:
        """Queries, keys and values of x [B, T, M], not yet rotated."""

    @abstractmethod
    def rotate(self, qkv: QKV, positions: Tensor) -> QKV:
        """Apply RoPE at `positions` [B or 1, T]."""

    def forward(self, x: Tensor, positions: Tensor, mask: AttentionMask, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, M] -> [B, T, M]; with a cache the T tokens follow what it holds, and attend to that too."""
        if cache is None:
            attended = self.core(self.project(x), self.rotate, positions, mask, self.config.scale)
        else:
            attended = self.core.attend_cached(self, x, positions, mask, cache)
        attended = attended.flatten(-2)
        if self.gate_proj is not None:
            attended = attended * torch.sigmoid(self.gate_proj(x))
        return self.out_proj(attended)

    def attend_cached(self, x: Tensor, positions: Tensor, mask: AttentionMask, cache: LayerCache) -> Tensor:
        """The attended values [B, T, H, E] of x, whose tokens join the cache at `positions`."""
        qkv = self.rotate(self.project(x), positions)
        kept = cache.append(self.keep(qkv), positions)
        return self.core(self.recall(qkv, kept, cache.places()), unturned, positions, mask, self.config.scale)

    def keep(self, qkv: QKV) -> dict[str, Tensor]:
        """What the cache keeps of rotated `qkv`, [B, T, *shape] by the names of `cache_shapes`.

        Here the fields of those names: `k` and `v` of `Dense`.
        """
        return {name: getattr(qkv, name) for name in self.config.cache_shapes()}

    def recall(self, qkv: QKV, kept: dict[str, Tensor], places: Tensor) -> QKV:
        """The queries of rotated `qkv` with the rotated keys, and the values, of all S tokens that left `kept`.

        `kept` has what `keep` gave, [B, S, *shape]; token s has position `places[0, s]`.
        """
        return replace(qkv, **kept)

    def turn(self, positions: Tensor, *vectors: Tensor) -> list[Tensor]:
        """RoPE on each of `vectors` [B, T, N, D] at `positions`."""
        if self.config.rope_dim == 0:
            return list(vectors)
        tables = rope_tables(positions, self.config.rope_dim, self.config.rope_base, self.config.scaling)
        return [apply_rope(x, *tables) for x in vectors]


def unturned(qkv: QKV, positions: Tensor) -> QKV:
    """The `rotate` of what is rotated already."""
    return qkv


def unit_rms(x: Tensor) -> Tensor:
    """QK-norm: x over its root mean square along the last axis, in fp32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


def split_heads(x: Tensor, *shapes: tuple[int, int]) -> list[Tensor]:
    """Cut the features of x [B, T, F] into pieces [B, T, n, d], one for each (n, d) of `shapes`."""
    pieces = torch.split(x, [n * d for n, d in shapes], dim=-1)
    return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True)]
