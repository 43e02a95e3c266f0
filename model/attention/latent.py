"""Multi-head latent attention (MLA) as DeepSeek-V2 has it, arXiv 2405.04434, section 2.1.

Keys and values are up-projected from a small latent c_kv; position enters through a separate rotated part of each query
and one rotated key that all heads share. Cached: the normalised c_kv and the rotated key.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.attention.base import QKV, Attention, AttentionConfig, Dense, split_heads, unit_rms
from model.cores.base import AttentionCore
from model.layers import RMSNorm


@dataclass
class Latent(QKV):
    """q_nope [B, T, H, D], q_rope [B, T, H, P], k_nope [B, S, H, D], k_rope [B, S, 1, P] and v [B, S, H, E].

    `normalize` is QK-norm, over both parts of a head: turning the rotated part does not change it.
    """

    q_nope: Tensor
    q_rope: Tensor
    k_nope: Tensor
    k_rope: Tensor
    v: Tensor
    normalize: bool = False

    def materialize(self) -> Dense:
        q = torch.cat((self.q_nope, self.q_rope), dim=-1)
        k = torch.cat((self.k_nope, self.k_rope.expand(*self.k_nope.shape[:-1], -1)), dim=-1)
        return Dense(unit_rms(q), unit_rms(k), self.v) if self.normalize else Dense(q, k, self.v)


@dataclass
class LatentConfig(AttentionConfig):
    """`head_dim` is DeepSeek's qk_nope_head_dim and v_head_dim."""

    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None

    def errors(self):
        unset = [key for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim") if getattr(self, key) is None]
        yield from (f"model.{key} is null, and model.by_size has no value for this size: set it" for key in unset)
        if unset:
            return
        yield from super().errors()
        for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"):
            if getattr(self, key) < 1:
                yield f"model.{key}={getattr(self, key)}: must be at least 1"

    @property
    def qk_head_dim(self) -> int:
        return self.head_dim + self.qk_rope_head_dim

    @property
    def rope_width(self) -> int:
        return self.qk_rope_head_dim

    def _rope_key(self) -> str:
        return "model.qk_rope_head_dim"

    @property
    def cache_knobs(self) -> tuple[str, ...]:
        return ("kv_lora_rank",)

    def projection_params(self, d_model: int) -> int:
        down = d_model * (self.q_lora_rank + self.kv_lora_rank + self.qk_rope_head_dim)
        norms = self.q_lora_rank + self.kv_lora_rank
        up_q = self.q_lora_rank * self.n_heads * self.qk_head_dim
        up_kv = self.kv_lora_rank * self.n_heads * 2 * self.head_dim
        return down + norms + up_q + up_kv

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {"c_kv": (self.kv_lora_rank,), "k_rope": (self.qk_rope_head_dim,)}
        if self.qk_norm:  # a key's norm differs from head to head, and absorbed decoding never sees the key
            shapes["k_norm"] = (self.n_heads,)
        return shapes

    def build(self, d_model: int, layer: int, core: AttentionCore) -> "LatentAttention":
        return LatentAttention(self, d_model, core)


class LatentAttention(Attention):
    def __init__(self, config: LatentConfig, d_model: int, core: AttentionCore):
        super().__init__(config, d_model, core)
        heads, width, rope = config.n_heads, config.head_dim, config.qk_rope_head_dim
        self.down_widths = [config.q_lora_rank, config.kv_lora_rank, rope]
        self.down_proj = nn.Linear(d_model, sum(self.down_widths), bias=False)  # c_q, c_kv and the shared rotated key
        self.q_norm = RMSNorm(config.q_lora_rank, affine=True)
        self.kv_norm = RMSNorm(config.kv_lora_rank, affine=True)
        self.q_up_proj = nn.Linear(config.q_lora_rank, heads * (width + rope), bias=False)
        self.kv_up_proj = nn.Linear(config.kv_lora_rank, heads * 2 * width, bias=False)

    def project(self, x: Tensor) -> Latent:
        c_q, c_kv, k_rope = self.down_proj(x).split(self.down_widths, dim=-1)
        heads, width, rope = self.config.n_heads, self.config.head_dim, self.config.qk_rope_head_dim
        q_nope, q_rope = split_heads(self.q_up_proj(self.q_norm(c_q)), (heads, width), (heads, rope))
        k_nope, v = split_heads(self.kv_up_proj(self.kv_norm(c_kv)), (heads, width), (heads, width))
        return Latent(q_nope, q_rope, k_nope, k_rope.unsqueeze(2), v, self.config.qk_norm)

    def rotate(self, qkv: Latent, positions: Tensor) -> Latent:
        q_rope, k_rope = self.turn(positions, qkv.q_rope, qkv.k_rope)
        return Latent(qkv.q_nope, q_rope, qkv.k_nope, k_rope, qkv.v, qkv.normalize)
