"""Multi-head, grouped-query and multi-query attention: one class, told apart by `n_kv_heads`.

Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245; Shazeer, arXiv 1911.02150.
"""

from pydantic import Field
from torch import Tensor, nn

from configs.kinds import WIDEST
from model.attention.base import Attention, AttentionConfig, AttentionCore, Dense, split_heads, unit_rms
from model.cache import Shapes


class MultiHeadConfig(AttentionConfig):
    n_kv_heads: int | None = Field(None, ge=1, le=WIDEST)  # null: one for every query head (MHA); 1: MQA; between: GQA

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_multiple(self) -> int:
        return self.n_kv_heads or 1

    @property
    def cache_knobs(self) -> tuple[str, ...]:
        return ("n_kv_heads",) if self.n_kv_heads else ()

    def mistakes(self):
        if self.n_heads and self.n_heads % self.head_multiple:
            yield f"n_heads={self.n_heads}: must be a multiple of model.n_kv_heads={self.n_kv_heads}"
        yield from super().mistakes()

    def projection_params(self, d_model: int) -> int:
        return d_model * self.head_dim * (self.n_heads + 2 * self.kv_heads)

    def cache_shapes(self) -> Shapes:
        return {"k": (self.kv_heads, self.head_dim), "v": (self.kv_heads, self.head_dim)}

    def build(self, d_model: int, layer: int, core: AttentionCore) -> "MultiHeadAttention":
        return MultiHeadAttention(self, d_model, core)


class MultiHeadAttention(Attention):
    def __init__(self, config: MultiHeadConfig, d_model: int, core: AttentionCore):
        super().__init__(config, d_model, core)
        self.shapes = [(n, config.head_dim) for n in (config.n_heads, config.kv_heads, config.kv_heads)]
        self.qkv_proj = nn.Linear(d_model, sum(n * d for n, d in self.shapes), bias=False)

    def project(self, x: Tensor) -> Dense:
        q, k, v = split_heads(self.qkv_proj(x), *self.shapes)
        return Dense(unit_rms(q), unit_rms(k), v) if self.config.qk_norm else Dense(q, k, v)

    def rotate(self, qkv: Dense, positions: Tensor) -> Dense:
        return Dense(*self.turn(positions, qkv.q, qkv.k), qkv.v)
