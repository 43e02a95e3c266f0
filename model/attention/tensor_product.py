"""Tensor Product Attention (TPA), Zhang et al., arXiv 2501.06425: contextual low-rank factors of q, k and v.

For each of q, k, v a token's matrix over heads and features is a sum of R rank-one terms (equation 3.1 and following):

    Q = A_q(x)^T B_q(x) / R_q        A: head factors [H, R]     B: token factors [R, D]

with A and B linear in x. RoPE turns the rows of B_q and B_k, which equals turning Q and K (Theorem 3.1): the rotation
acts on D alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.attention.base import QKV, Attention, AttentionConfig, Dense, split_heads
from model.cores.base import AttentionCore
from model.rope import apply_rope, rope_tables


@dataclass
class Factored(QKV):
    """Head factors a_* [B, T, H, R] and token factors b_* [B, T, R, D] of queries, keys and values."""

    a_q: Tensor
    b_q: Tensor
    a_k: Tensor
    b_k: Tensor
    a_v: Tensor
    b_v: Tensor

    def materialize(self) -> Dense:
        pairs = ((self.a_q, self.b_q), (self.a_k, self.b_k), (self.a_v, self.b_v))
        return Dense(*((a / a.size(-1)) @ b for a, b in pairs))


@dataclass
class TensorProductConfig(AttentionConfig):
    q_rank: int = 6
    k_rank: int = 2
    v_rank: int = 2
    init: str = "xavier"  # the paper's; `reference` is the authors' code's

    def errors(self):
        yield from super().errors()
        for key in ("q_rank", "k_rank", "v_rank"):
            if getattr(self, key) < 1:
                yield f"model.{key}={getattr(self, key)}: must be at least 1"
        if self.init not in ("xavier", "reference"):
            yield f"model.init={self.init!r}: must be xavier or reference"

    @property
    def ranks(self) -> tuple[int, int, int]:
        return self.q_rank, self.k_rank, self.v_rank

    def num_params(self, d_model: int) -> int:
        factors = sum(self.ranks) * (self.n_heads + self.head_dim)
        return d_model * (factors + self.n_heads * self.head_dim)

    def flops_per_token(self, d_model: int) -> float:
        """The projections, and making q, k and v out of their factors."""
        return super().flops_per_token(d_model) + 2 * sum(self.ranks) * self.n_heads * self.head_dim

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "a_k": (self.n_heads, self.k_rank),
            "b_k": (self.k_rank, self.head_dim),
            "a_v": (self.n_heads, self.v_rank),
            "b_v": (self.v_rank, self.head_dim),
        }

    def build(self, d_model: int, layer: int, core: AttentionCore) -> "TensorProductAttention":
        return TensorProductAttention(self, d_model, core)


class TensorProductAttention(Attention):
    def __init__(self, config: TensorProductConfig, d_model: int, core: AttentionCore):
        super().__init__(config, d_model, core)
        # a_q, b_q, a_k, b_k, a_v, b_v: six projections, one matrix product.
        self.shapes = [shape for r in config.ranks for shape in ((config.n_heads, r), (r, config.head_dim))]
        self.factor_proj = nn.Linear(d_model, sum(m * n for m, n in self.shapes), bias=False)
        self.reset_factors()

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Xavier-uniform for each factor's own weight, with fan_in d_model and fan_out R*H or R*D (the paper).

        The authors' code (`init: reference`) applies Xavier to a weight viewed as [d_model, H, R] or [d_model, R, D],
        where PyTorch takes fan_in from the second axis and fan_out from the first, each times the last.
        """
        d_model = self.factor_proj.in_features
        weights = self.factor_proj.weight.split([m * n for m, n in self.shapes])
        for weight, (m, n) in zip(weights, self.shapes, strict=True):
            fans = d_model + m * n if self.config.init == "xavier" else (d_model + m) * n
            bound = (6 / fans) ** 0.5
            weight.uniform_(-bound, bound)

    def project(self, x: Tensor) -> Factored:
        return Factored(*split_heads(self.factor_proj(x), *self.shapes))

    def rotate(self, qkv: Factored, positions: Tensor) -> Factored:
        tables = rope_tables(positions, self.config.rope_dim, self.config.rope_base)
        b_q, b_k = apply_rope(qkv.b_q, *tables), apply_rope(qkv.b_k, *tables)
        return Factored(qkv.a_q, b_q, qkv.a_k, b_k, qkv.a_v, qkv.b_v)
