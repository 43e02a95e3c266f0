"""Multi-head, grouped-query and multi-query attention: one class, told apart by `n_kv_heads`.

Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245; Shazeer, arXiv 1911.02150.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from model.attention.base import Attention, AttentionConfig, Dense, split_heads
from model.cores.base import AttentionCore
from model.rope import apply_rope, rope_tables


@dataclass
class MultiHeadConfig(AttentionConfig):
    n_kv_heads: int | None = None  # null: one for every query head (MHA); 1: MQA; between: GQA

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_multiple(self) -> int:
        return self.n_kv_heads or 1

    def errors(self):
        if self.n_kv_heads is not None and self.n_kv_heads < 1:
            yield f"model.n_kv_heads={self.n_kv_heads}: must be at least 1"
        else:
            yield from super().errors()

    def num_params(self, d_model: int) -> int:
        return 2 * d_model * self.head_dim * (self.n_heads + self.kv_heads)

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"k": (self.kv_heads, self.head_dim), "v": (self.kv_heads, self.head_dim)}

    def build(self, d_model: int, layer: int, core: AttentionCore) -> "MultiHeadAttention":
        return MultiHeadAttention(self, d_model, core)


class MultiHeadAttention(Attention):
    def __init__(self, config: MultiHeadConfig, d_model: int, core: AttentionCore):
        super().__init__(config, d_model, core)
        self.shapes = [(n, config.head_dim) for n in (config.n_heads, config.kv_heads, config.kv_heads)]
        self.qkv_proj = nn.Linear(d_model, sum(n * d for n, d in self.shapes), bias=False)

    def project(self, x: Tensor) -> Dense:
        return Dense(*split_heads(self.qkv_proj(x), *self.shapes))

    def rotate(self, qkv: Dense, positions: Tensor) -> Dense:
        tables = rope_tables(positions, self.config.rope_dim, self.config.rope_base)
        return Dense(apply_rope(qkv.q, *tables), apply_rope(qkv.k, *tables), qkv.v)
