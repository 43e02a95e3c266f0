"""The two contracts of attention: how queries, keys and values are made, and how the queries then attend.

A mechanism (`AttentionConfig`, `Attention`) is one file in this folder and one YAML in configs/model/ that names its
configuration. A core (`AttentionCore`) is one file in model/cores/ and one YAML in configs/core/.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from configs.block import Choice
from configs.errors import Mistakes, did_you_mean
from configs.kinds import LONGEST_TEXT, WIDEST, Name
from model.cache import LayerCache, Shapes, bytes_per_token
from model.mask import AttentionMask
from model.rope import RopeScaling, Scaling, apply_rope, rope_tables


class QKV(ABC):
    """Queries, keys and values in the form in which a mechanism makes them."""

    @abstractmethod
    def materialize(self) -> "Dense":
        """Return the same as explicit queries, keys and values."""

    def keys(self) -> dict[str, Tensor]:
        """Return only the keys, [B, S, ...] by name, in as few numbers as this form has for them."""
        return {"k": self.materialize().k}

    @staticmethod
    def make_keys(kept: dict[str, Tensor]) -> Tensor:
        """Return explicit keys [B, S, G, D] of what `keys` gave."""
        return kept["k"]


@dataclass
class Dense(QKV):
    """Explicit q [B, T, H, D], k [B, S, G, D] and v [B, S, G, E]; G divides H, each key head serves H/G query heads."""

    q: Tensor
    k: Tensor
    v: Tensor

    def materialize(self) -> "Dense":
        return self


class AttentionCore(Choice):
    """What is attended to: a pattern of queries and keys. `kernel` is how that is computed."""

    name: Name
    kernel: Literal["auto"] = "auto"  # no part of a run's identity: it may change between starts

    masks_documents: ClassVar[bool] = False  # whether it honours AttentionMask.documents; others are refused with them
    why_no_documents: ClassVar[str] = ""  # the reason, if there is one to give: "since ..."

    def check(self, attention: "AttentionConfig", device: str, dtype: torch.dtype) -> None:
        """Raise a ValueError that names the key and the remedy for what this core cannot do; never fall back."""

    def check_decoding(self, dtype: torch.dtype | None, compiled: bool) -> None:
        """Raise a ValueError for a cache that this core cannot have; `dtype` None: that of the forward pass."""

    def resolved(self, seq_len: int) -> "AttentionCore":
        """Return the core with what follows from the training length filled in, as a run's configuration keeps it."""
        return self

    def described(self, seq_len: int) -> str:
        """Return the pattern in words, with what is unusual in it at this training length."""
        return self.name

    def for_layer(self, layer: int) -> "AttentionCore":
        """Return what layer number `layer`, counted from 0, attends with."""
        return self

    def hops(self, positions: Tensor) -> list[Tensor]:
        """Return the coordinates [B or 1, T] by which RoPE turns queries and keys, for each hop over the sequence."""
        return [positions]

    @abstractmethod
    def attend(self, views: list[QKV], mask: AttentionMask, scale: float) -> Tensor:
        """Return softmax(q k^T scale) v [B, T, H, E]; `views` are the same q, k and v as each hop turns them."""

    def cache_shapes(self, attention: "AttentionConfig") -> Shapes:
        """Return what a layer's cache keeps for every token: what the mechanism says, unless a core needs more."""
        return attention.cache_shapes()

    def bytes_per_token(self, attention: "AttentionConfig", dtype: torch.dtype) -> int:
        """Return the bytes of a token in a layer's cache."""
        return bytes_per_token(self.cache_shapes(attention), dtype)

    def cache(self, attention: "AttentionConfig", batch: int, capacity: int, dtype: torch.dtype, device) -> LayerCache:
        """Return a layer's empty cache of `batch` rows with room for `capacity` tokens."""
        return LayerCache(self.cache_shapes(attention), batch, capacity, dtype, device)

    @abstractmethod
    def flops_per_token(self, attention: "AttentionConfig", seq_len: int) -> float:
        """Return the operations of one layer's forward pass for one token of a sequence of `seq_len`."""


class AttentionConfig(Choice):
    """The keys of every mechanism. A null `n_heads` is matched to MHA's budget, other null keys are `by_size`'s."""

    name: Name
    head_dim: int | None = Field(None, ge=1, le=WIDEST)  # null: size.head_dim
    n_heads: int | None = Field(None, ge=1, le=WIDEST)
    rope_base: float = Field(10000.0, gt=1, le=1e12)
    rope_fraction: float = Field(1.0, ge=0, le=1)  # the share of the features that RoPE turns; 0: no position at all
    rope_scaling: Scaling = "none"  # for sequences `rope_factor` times as long
    rope_factor: float = Field(1.0, ge=1, le=1e6)
    rope_original_length: int | None = Field(None, ge=1, le=LONGEST_TEXT)  # null: trainer.seq_len / rope_factor
    qk_norm: bool = False  # RMS-normalise each query and key head, without a learned weight
    output_gate: bool = False  # multiply the attended values by sigmoid(W x), arXiv 2505.06708
    by_size: dict[str, dict[str, Any]] = Field(default_factory=dict)  # size name, or `default` -> values of null keys

    needed: ClassVar[tuple[str, ...]] = ("head_dim",)  # keys that by_size or the size must have filled
    rope_key: ClassVar[str] = "head_dim"  # the key that sets `rope_width`
    # Keys that set the size of the cache next to `n_heads`: `size.match=kv_bytes` sets all of them alike.
    cache_knobs: ClassVar[tuple[str, ...]] = ()
    head_multiple: ClassVar[int] = 1  # `n_heads` must be a multiple of this

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head, the rotated part included."""
        return self.head_dim

    @property
    def v_head_dim(self) -> int:
        return self.head_dim

    @property
    def rope_width(self) -> int:
        """Number of features that may turn, of which `rope_fraction` do."""
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
        plain = self.rope_scaling == "none" or self.rope_factor == 1
        return None if plain else RopeScaling(self.rope_scaling, self.rope_factor, self.rope_original_length)

    @abstractmethod
    def build(self, d_model: int, layer: int, core: AttentionCore) -> "Attention":
        """Return the attention of layer number `layer`, counted from 0."""

    @abstractmethod
    def projection_params(self, d_model: int) -> int:
        """Return the number of parameters that make queries, keys and values."""

    @abstractmethod
    def cache_shapes(self) -> Shapes:
        """Return what decoding keeps per token and layer: the shape of each part by its name."""

    def output_params(self, d_model: int) -> int:
        """Return the number of parameters of the output projection and the gate."""
        return d_model * self.n_heads * self.v_head_dim * (2 if self.output_gate else 1)

    def num_params(self, d_model: int) -> int:
        """Return the number of parameters of one layer's attention, which equals the built module's."""
        return self.projection_params(d_model) + self.output_params(d_model)

    def flops_per_token(self, d_model: int) -> float:
        """Return the forward operations of the projections for one token; the core counts what is between them."""
        return 2 * self.num_params(d_model)

    def activation_numbers(self, d_model: int) -> int:
        """Return how many numbers a token the backward pass keeps between the block's norm and the core."""
        return 2 * self.n_heads * self.qk_head_dim + self.n_heads * self.v_head_dim

    def mistakes(self) -> Iterator[str]:
        """Yield what is wrong between the keys, a line each. Keys in `needed` may still be null."""
        for size, values in self.by_size.items():
            for key in sorted(values.keys() - type(self).model_fields.keys()):
                yield f"by_size.{size}.{key}: unknown key; {did_you_mean(key, type(self).model_fields)}"
        if (self.rope_scaling == "none") != (self.rope_factor == 1):
            yield "rope_scaling and model.rope_factor go together, as in rope_scaling=yarn, rope_factor=4"
        if all(getattr(self, key) for key in self.needed) and self.rope_dim % 2:
            width = getattr(self, self.rope_key)
            if self.rope_dim == width:
                yield f"{self.rope_key}={width}: RoPE turns pairs of features, so it must be even"
            else:
                below, above = (f"{n / self.rope_width:.8g} ({n})" for n in (self.rope_dim - 1, self.rope_dim + 1))
                turning = f"{self.rope_dim} of the {self.rope_width} features"
                yield f"rope_fraction={self.rope_fraction}: RoPE turns pairs, and not {turning}; use {below} or {above}"

    @model_validator(mode="after")
    def _check(self):
        if mistakes := list(self.mistakes()):
            raise Mistakes(*mistakes)
        return self


class Attention(nn.Module, ABC):
    """One layer's attention: project, rotate, attend through the core, project back.

    A mechanism defines `project` and `rotate`, also `keep` and `recall` if it caches something else than rotated keys
    and values, and `after_core` if it does something with the heads before they are projected. `out_proj` starts at
    zero, as in the TPA authors' code: every block starts as the identity.
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
        """Return queries, keys and values of x [B, T, M], not yet rotated."""

    @abstractmethod
    def rotate(self, qkv: QKV, positions: Tensor) -> QKV:
        """Return `qkv` with RoPE applied at `positions` [B or 1, T]."""

    def forward(self, x: Tensor, positions: Tensor, mask: AttentionMask, cache: LayerCache | None = None) -> Tensor:
        """Return [B, T, M] for x [B, T, M]; with a cache the T tokens join it and attend to all that it holds."""
        if cache is not None and not cache.attends:
            attended = self.attend_cached(x, positions, mask, cache)
        else:
            qkv = self.project(x)
            views = [self.rotate(qkv, places) for places in self.core.hops(positions)]
            scale = self.config.scale
            attended = cache.attend(views, positions, scale) if cache else self.core.attend(views, mask, scale)
        return self.out_proj(self.after_core(attended, x))

    def after_core(self, attended: Tensor, x: Tensor) -> Tensor:
        """Return what the output projection reads [B, T, F]; `attended` are values [B, T, H, E], `x` the layer's input.

        A mechanism that normalises, mixes or subtracts heads does so here.
        """
        attended = attended.flatten(-2)
        return attended if self.gate_proj is None else attended * torch.sigmoid(self.gate_proj(x))

    def attend_cached(self, x: Tensor, positions: Tensor, mask: AttentionMask, cache: LayerCache) -> Tensor:
        """Return the attended values [B, T, H, E] of x, whose tokens join the cache at `positions`."""
        qkv = self.rotate(self.project(x), positions)
        kept = cache.append(self.keep(qkv), positions)
        return self.core.attend([self.recall(qkv, kept, cache.places())], mask, self.config.scale)

    def keep(self, qkv: QKV) -> dict[str, Tensor]:
        """Return what the cache keeps of rotated `qkv`, [B, T, *shape] by the names of `cache_shapes`: its fields."""
        return {name: getattr(qkv, name) for name in self.config.cache_shapes()}

    def recall(self, qkv: QKV, kept: dict[str, Tensor], places: Tensor) -> QKV:
        """Return the queries of rotated `qkv` with the rotated keys and the values of all S tokens in the cache.

        `kept` has what `keep` gave, [B, S, *shape]; token s has position `places[0, s]`.
        """
        return replace(qkv, **kept)

    def turn(self, positions: Tensor, *vectors: Tensor) -> list[Tensor]:
        """Return each of `vectors` [B, T, N, D] with RoPE applied at `positions`."""
        if self.config.rope_dim == 0:
            return list(vectors)
        tables = rope_tables(positions, self.config.rope_dim, self.config.rope_base, self.config.scaling)
        return [apply_rope(x, *tables) for x in vectors]


def unit_rms(x: Tensor) -> Tensor:
    """Return x over its root mean square along the last axis, computed in fp32: QK-norm."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


def split_heads(x: Tensor, *shapes: tuple[int, int]) -> list[Tensor]:
    """Return the features of x [B, T, F] cut into pieces [B, T, n, d], one for each (n, d) of `shapes`."""
    pieces = torch.split(x, [n * d for n, d in shapes], dim=-1)
    return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True)]
