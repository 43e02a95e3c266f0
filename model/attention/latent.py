"""Multi-head latent attention (MLA) as DeepSeek-V2 has it, arXiv 2405.04434, section 2.1.

Keys and values are up-projected from a small latent c_kv; position enters through a separate rotated part of each query
and one rotated key that all heads share. Cached: the normalised c_kv and the rotated key, next to each other. Decoding
absorbs the up-projections into the query and the output (section 2.1.2): what is cached is one key for all heads.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from configs.kinds import WIDEST
from model.attention.base import QKV, Attention, AttentionConfig, AttentionCore, Dense, split_heads, unit_rms
from model.cache import LayerCache, Shapes
from model.mask import AttentionMask


@dataclass
class Latent(QKV):
    """q_nope [B, T, H, D], q_rope [B, T, H, P], k_nope [B, S, H, D], k_rope [B, S, 1, P] and v [B, S, H, E]."""

    q_nope: Tensor
    q_rope: Tensor
    k_nope: Tensor
    k_rope: Tensor
    v: Tensor
    normalize: bool = False  # QK-norm, over both parts of a head: turning the rotated part does not change it

    def materialize(self) -> Dense:
        q = torch.cat((self.q_nope, self.q_rope), dim=-1)
        k = torch.cat((self.k_nope, self.k_rope.expand(*self.k_nope.shape[:-1], -1)), dim=-1)
        return Dense(unit_rms(q), unit_rms(k), self.v) if self.normalize else Dense(q, k, self.v)


@dataclass
class Absorbed(QKV):
    """Queries through the keys' up-projection, and the latent: each head's key and, in L of its features, value."""

    q: Tensor  # [B, T, H, L + P]
    latent: Tensor  # [B, S, L + P]
    k_norm: Tensor | None = None  # [B, S, H]: what QK-norm multiplies each head's key by

    def materialize(self) -> Dense:
        shared = self.latent.unsqueeze(2)
        if self.k_norm is None:
            return Dense(self.q, shared, shared)
        return Dense(self.q, shared * self.k_norm.unsqueeze(-1), shared.expand(-1, -1, self.q.size(2), -1))


class LatentConfig(AttentionConfig):
    """`head_dim` is DeepSeek's qk_nope_head_dim and v_head_dim."""

    q_lora_rank: int | None = Field(None, ge=1, le=WIDEST)
    kv_lora_rank: int | None = Field(None, ge=1, le=WIDEST)
    qk_rope_head_dim: int | None = Field(None, ge=1, le=WIDEST)

    needed: ClassVar[tuple[str, ...]] = ("head_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim")
    rope_key: ClassVar[str] = "qk_rope_head_dim"
    cache_knobs: ClassVar[tuple[str, ...]] = ("kv_lora_rank",)

    @property
    def qk_head_dim(self) -> int:
        return self.head_dim + self.qk_rope_head_dim

    @property
    def rope_width(self) -> int:
        return self.qk_rope_head_dim

    def projection_params(self, d_model: int) -> int:
        norms = self.q_lora_rank + self.kv_lora_rank
        up = self.n_heads * (self.q_lora_rank * self.qk_head_dim + self.kv_lora_rank * 2 * self.head_dim)
        return d_model * (norms + self.qk_rope_head_dim) + norms + up

    def cache_shapes(self) -> Shapes:
        # A key's norm differs from head to head, and absorbed decoding never sees the key.
        norm = {"k_norm": (self.n_heads,)} if self.qk_norm else {}
        return {"latent": (self.kv_lora_rank + self.qk_rope_head_dim,), **norm}

    def build(self, d_model: int, layer: int, core: AttentionCore) -> "LatentAttention":
        return LatentAttention(self, d_model, core)


class UpProjection(nn.Linear):
    """Turn c_kv [B, S, L] into k_nope and v [B, S, H, D], or absorb that; by calls, on which ZeRO gathers weights."""

    def __init__(self, rank: int, n_heads: int, width: int):
        super().__init__(rank, n_heads * 2 * width, bias=False)
        self.shapes = [(n_heads, width)] * 2

    def forward(self, x: Tensor, absorb: str = "") -> Tensor | list[Tensor]:
        """Return k_nope and v of c_kv; of q_nope what meets c_kv (absorb="k"); of attended c_kv the values ("v")."""
        if not absorb:
            return split_heads(super().forward(x), *self.shapes)
        up_k, up_v = self.weight.unflatten(0, (2, *self.shapes[0]))
        if absorb == "k":
            return torch.einsum("bthd,hdl->bthl", x, up_k)
        return torch.einsum("bthl,hdl->bthd", x, up_v)


class LatentAttention(Attention):
    def __init__(self, config: LatentConfig, d_model: int, core: AttentionCore):
        super().__init__(config, d_model, core)
        heads, width, rope = config.n_heads, config.head_dim, config.qk_rope_head_dim
        self.down_widths = [config.q_lora_rank, config.kv_lora_rank, rope]
        self.down_proj = nn.Linear(d_model, sum(self.down_widths), bias=False)  # c_q, c_kv and the shared rotated key
        self.q_norm = nn.RMSNorm(config.q_lora_rank, eps=1e-6)
        self.kv_norm = nn.RMSNorm(config.kv_lora_rank, eps=1e-6)
        self.q_up_proj = nn.Linear(config.q_lora_rank, heads * (width + rope), bias=False)
        self.kv_up_proj = UpProjection(config.kv_lora_rank, heads, width)

    def project(self, x: Tensor) -> Latent:
        return self.expanded(*self.compress(x))

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q_nope [B, T, H, D], q_rope [B, T, H, P], normalised c_kv [B, T, L] and the one key [B, T, 1, P]."""
        c_q, c_kv, k_rope = self.down_proj(x).split(self.down_widths, dim=-1)
        # Under autocast these are bf16, and the fused norm wants its weight's dtype.
        c_q, c_kv = (norm(c.to(norm.weight.dtype)) for norm, c in ((self.q_norm, c_q), (self.kv_norm, c_kv)))
        heads, width, rope = self.config.n_heads, self.config.head_dim, self.config.qk_rope_head_dim
        q_nope, q_rope = split_heads(self.q_up_proj(c_q), (heads, width), (heads, rope))
        return q_nope, q_rope, c_kv, k_rope.unsqueeze(2)

    def expanded(self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor) -> Latent:
        """Return `compress`ed queries with the keys and values that c_kv is projected up to."""
        k_nope, v = self.kv_up_proj(c_kv)
        return Latent(q_nope, q_rope, k_nope, k_rope, v, self.config.qk_norm)

    def rotate(self, qkv: Latent, positions: Tensor) -> Latent:
        q_rope, k_rope = self.turn(positions, qkv.q_rope, qkv.k_rope)
        return replace(qkv, q_rope=q_rope, k_rope=k_rope)

    def attend_cached(self, x: Tensor, positions: Tensor, mask: AttentionMask, cache: LayerCache) -> Tensor:
        q_nope, q_rope, c_kv, k_rope = self.compress(x)
        q_rope, k_rope = self.turn(positions, q_rope, k_rope)
        kept = cache.append(self.keep_latent(c_kv, k_rope), positions)
        rank, width, rope = self.config.kv_lora_rank, self.config.head_dim, self.config.qk_rope_head_dim
        scale = self.config.scale
        if x.size(1) * (rank - width) > rank * width:  # for a long chunk scores on expanded keys cost less
            c_kv, k_rope = kept["latent"].split((rank, rope), dim=-1)
            return self.core.attend([self.expanded(q_nope, q_rope, c_kv, k_rope.unsqueeze(2))], mask, scale)
        if self.config.qk_norm:
            q_nope, q_rope = unit_rms(torch.cat((q_nope, q_rope), dim=-1)).split((width, rope), dim=-1)
        q = torch.cat((self.kv_up_proj(q_nope, absorb="k"), q_rope), dim=-1)
        attended = self.core.attend([Absorbed(q, kept["latent"], kept.get("k_norm"))], mask, scale)
        return self.kv_up_proj(attended[..., :rank], absorb="v")

    def keep_latent(self, c_kv: Tensor, k_rope: Tensor) -> dict[str, Tensor]:
        """Return what the cache keeps of c_kv [B, T, L] and the rotated key [B, T, 1, P]."""
        # Under autocast c_kv comes out of its norm in fp32, and reading would copy the whole cache to that.
        kept = {"latent": torch.cat((c_kv.to(k_rope.dtype), k_rope.squeeze(2)), dim=-1)}
        if self.config.qk_norm:
            k_nope, _ = self.kv_up_proj(c_kv)
            square = k_nope.float().square().sum(-1) + k_rope.float().square().sum(-1)
            kept["k_norm"] = torch.rsqrt(square / self.config.qk_head_dim + 1e-6).to(kept["latent"].dtype)
        return kept
