"""Tensor Product Attention (TPA), Zhang et al., arXiv 2501.06425: low-rank factors of queries, keys and values.

A token's queries, a matrix over heads and features, are a sum of R rank-one terms (and so are its keys and values):

    Q = A B / R        A [H, R]: head factor        B [R, D]: token factor

with A and B linear in the token (contextual) or learned constants. In third order (Appendix C) each row of B is itself
vec(b x c). RoPE turns the rows of B, or only b: that equals turning Q (Theorems 3.1 and C.1), since the rotation acts
on features only. One class has every variant of the paper; `factor_shapes` says which factors a variant has.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from configs.kinds import WIDEST
from model.attention.base import QKV, Attention, AttentionConfig, AttentionCore, Dense, unit_rms
from model.cache import Shapes


@dataclass
class Factors:
    """The factors of queries, keys or values; D = D_b D_c, and D_c is 1 except in third order."""

    a: Tensor | None  # [B, T, H, R]; None for a dense query
    b: Tensor  # [B, T, R, D_b]; of a dense query the product itself, [B, T, H, D]
    c: Tensor | None = None  # [B, T, R, D_c], in third order

    @property
    def width(self) -> int:
        """Features of the product, D."""
        return self.b.size(-1) * (1 if self.c is None else self.c.size(-1))

    def token_factor(self) -> Tensor:
        """Return B [B, T, R, D]: in third order vec(b x c), running over b fastest."""
        return self.b if self.c is None else (self.c[..., :, None] * self.b[..., None, :]).flatten(-2)

    def product(self) -> Tensor:
        """Return A B / R, [B, T, H, D]."""
        b = self.token_factor()
        return b if self.a is None else (self.a / self.a.size(-1)) @ b

    def unit_rms(self) -> "Factors":
        """Return the same with each head's product at RMS 1: a row of A scales a head, so the factors stay factors."""
        if self.a is None:
            return replace(self, b=unit_rms(self.b))
        b, a = self.token_factor().float(), self.a.float() / self.a.size(-1)
        square = ((a @ (b @ b.mT)) * a).sum(-1, keepdim=True) / b.size(-1)  # |a B|^2 / D through R x R products
        return replace(self, a=(self.a * torch.rsqrt(square + 1e-6)).to(self.a.dtype))


def each(factors: Factors, change: Callable[[Tensor], Tensor]) -> Factors:
    """Return the factors with `change` applied to each that is there."""
    return Factors(*(None if x is None else change(x) for x in (factors.a, factors.b, factors.c)))


@dataclass
class Factored(QKV):
    """Queries, keys and values as factors; `b` of q and k is what RoPE turns."""

    q: Factors
    k: Factors
    v: Factors

    def tensors(self) -> list[Tensor | None]:
        """Return a, b and c of q, k and v."""
        return [x for part in (self.q, self.k, self.v) for x in (part.a, part.b, part.c)]

    def materialize(self) -> Dense:
        return Dense(self.q.product(), self.k.product(), self.v.product())

    def keys(self) -> dict[str, Tensor]:
        return {name: factor for name, factor in vars(self.k).items() if factor is not None}

    @staticmethod
    def make_keys(kept: dict[str, Tensor]) -> Tensor:
        return Factors(**kept).product()


class TensorProductConfig(AttentionConfig):
    q_rank: int = Field(6, ge=1, le=WIDEST)
    k_rank: int = Field(2, ge=1, le=WIDEST)
    v_rank: int = Field(2, ge=1, le=WIDEST)
    dense_q: bool = False  # queries by a full projection M -> H D (TPA-KVonly)
    contextual_a: bool = True  # false: the head factors are learned constants
    contextual_b: bool = True  # false: the token factors are; RoPE still turns those of q and k
    shared_b: bool = False  # values use the keys' token factor, before it is turned
    a_activation: Literal["none", "sigmoid", "softmax"] = "none"  # of the head factors; softmax is over heads
    c_dim: int | None = Field(None, ge=1, le=WIDEST)  # third order: the width D_c of c; b has head_dim / c_dim features
    init: Literal["reference", "xavier"] = "reference"  # the authors' code's; `xavier` is the paper's text

    cache_knobs: ClassVar[tuple[str, ...]] = ("k_rank", "v_rank")

    def mistakes(self):
        if self.shared_b and self.k_rank != self.v_rank:
            yield f"v_rank={self.v_rank}: must equal model.k_rank={self.k_rank}, since model.shared_b=true"
        if self.c_dim and self.head_dim and self.head_dim % self.c_dim:
            yield f"c_dim={self.c_dim}: must divide model.head_dim={self.head_dim}"
        else:
            yield from super().mistakes()

    @property
    def ranks(self) -> dict[str, int]:
        return ({} if self.dense_q else {"q": self.q_rank}) | {"k": self.k_rank, "v": self.v_rank}

    @property
    def rope_width(self) -> int:
        return self.head_dim // (self.c_dim or 1)

    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape of every factor of a token by name (a_q, b_q, ..., c_v), except those a variant lacks."""
        shapes = {"b_q": (self.n_heads, self.head_dim)} if self.dense_q else {}
        for part, rank in self.ranks.items():
            shapes[f"a_{part}"] = (self.n_heads, rank)
            if part == "v" and self.shared_b:
                continue
            shapes[f"b_{part}"] = (rank, self.rope_width)
            if self.c_dim is not None:
                shapes[f"c_{part}"] = (rank, self.c_dim)
        return shapes

    def is_constant(self, factor: str) -> bool:
        contextual = self.contextual_a if factor[0] == "a" else self.contextual_b
        return not (contextual or (factor == "b_q" and self.dense_q))

    def projection_params(self, d_model: int) -> int:
        return sum(m * n * (1 if self.is_constant(f) else d_model) for f, (m, n) in self.factor_shapes().items())

    def flops_per_token(self, d_model: int) -> float:
        """Return the operations of the projections and of the products of factors, except third order's b x c."""
        projected = sum(m * n for f, (m, n) in self.factor_shapes().items() if not self.is_constant(f))
        products = sum(self.ranks.values()) * self.n_heads * self.head_dim
        return 2 * (d_model * projected + products + self.output_params(d_model))

    def cache_shapes(self) -> Shapes:
        """Return the shapes of contextual factors of keys and values, head factors as [R, H], as a core reads them."""
        kept = {f: s for f, s in self.factor_shapes().items() if f[-1] != "q" and not self.is_constant(f)}
        return {f: shape[::-1] if f[0] == "a" else shape for f, shape in kept.items()}

    def build(self, d_model: int, layer: int, core: AttentionCore) -> "TensorProductAttention":
        return TensorProductAttention(self, d_model, core)


class TensorProductAttention(Attention):
    def __init__(self, config: TensorProductConfig, d_model: int, core: AttentionCore):
        super().__init__(config, d_model, core)
        shapes = config.factor_shapes()
        self.projected = {f: shape for f, shape in shapes.items() if not config.is_constant(f)}
        self.widths = [m * n for m, n in self.projected.values()]
        self.factor_proj = nn.Linear(d_model, sum(self.widths), bias=False)  # all contextual factors in one product
        self.constants = {f: shape for f, shape in shapes.items() if config.is_constant(f)}
        for factor, shape in self.constants.items():
            self.register_parameter(factor, nn.Parameter(torch.empty(shape)))
        self.reset_factors()

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Draw each weight by Xavier's uniform rule; a constant gets the spread of a contextual factor's values."""
        for (factor, shape), weight in zip(self.projected.items(), self.factor_weights(), strict=True):
            bound = self.xavier_bound(factor, *shape)
            weight.uniform_(-bound, bound)
        for factor, shape in self.constants.items():
            bound = self.xavier_bound(factor, *shape) * self.factor_proj.in_features**0.5
            getattr(self, factor).uniform_(-bound, bound)

    def xavier_bound(self, factor: str, m: int, n: int) -> float:
        """Return sqrt(6 / (fan_in + fan_out)), with fans d_model and m n for a factor of shape [m, n] (the paper).

        The authors' code applies Xavier to a weight viewed as [d_model, m, n], where PyTorch takes fan_in from the
        second axis and fan_out from the first, each times the last; a dense query is plain in both.
        """
        d_model = self.factor_proj.in_features
        plain = self.config.init == "xavier" or (factor == "b_q" and self.config.dense_q)
        return (6 / (d_model + m * n if plain else (d_model + m) * n)) ** 0.5

    def factor_weights(self) -> tuple[Tensor, ...]:
        """Return the rows of `factor_proj` by factor, each [m n, d_model], in the order of `projected`."""
        return self.factor_proj.weight.split(self.widths)

    def project(self, x: Tensor) -> Factored:
        pieces = self.factor_proj(x).split(self.widths, dim=-1)
        made = {f: piece.unflatten(-1, shape) for (f, shape), piece in zip(self.projected.items(), pieces, strict=True)}
        for factor, shape in self.constants.items():
            made[factor] = getattr(self, factor).to(x.dtype).expand(*x.shape[:-1], *shape)
        made |= {factor: self.activate(a) for factor, a in made.items() if factor[0] == "a"}
        q, k, v = self.assemble("qkv", made)
        return Factored(q.unit_rms(), k.unit_rms(), v) if self.config.qk_norm else Factored(q, k, v)

    def assemble(self, parts: str, made: dict[str, Tensor]) -> list[Factors]:
        """Return the factors of queries, keys or values from those `made`, by name."""
        if self.config.shared_b:
            made = made | {f"{letter}_v": made[f"{letter}_k"] for letter in "bc" if f"{letter}_k" in made}
        return [Factors(made.get(f"a_{part}"), made[f"b_{part}"], made.get(f"c_{part}")) for part in parts]

    def activate(self, a: Tensor) -> Tensor:
        if self.config.a_activation == "softmax":
            # A GPU's autocast makes softmax fp32, and a cache would be read as that at every step.
            return a.softmax(dim=-2).to(a.dtype)
        return a.sigmoid() if self.config.a_activation == "sigmoid" else a

    def rotate(self, qkv: Factored, positions: Tensor) -> Factored:
        b_q, b_k = self.turn(positions, qkv.q.b, qkv.k.b)
        return Factored(replace(qkv.q, b=b_q), replace(qkv.k, b=b_k), qkv.v)

    def keep(self, qkv: Factored) -> dict[str, Tensor]:
        """Return the contextual factors of keys and values; b_k is turned unless the values share it."""
        kept = {f"{letter}_{part}": getattr(getattr(qkv, part), letter) for part in "kv" for letter in "abc"}
        if self.config.shared_b:
            kept["b_k"] = qkv.v.b
        return {name: kept[name].mT if name[0] == "a" else kept[name] for name in self.config.cache_shapes()}

    def recall(self, qkv: Factored, kept: dict[str, Tensor], places: Tensor) -> Factored:
        made = {factor: x.mT if factor[0] == "a" else x for factor, x in kept.items()}
        for factor, shape in self.constants.items():  # [1, S, ...] until they are turned
            if factor[-1] != "q":
                constant = getattr(self, factor).to(qkv.q.b.dtype).expand(1, places.size(1), *shape)
                made[factor] = self.activate(constant) if factor[0] == "a" else constant
        k, v = self.assemble("kv", made)
        if self.config.shared_b or "b_k" not in kept:
            k = replace(k, b=self.turn(places, k.b)[0])
        rows = qkv.q.b.size(0)
        k, v = (each(part, lambda x: x.expand(rows, *x.shape[1:])) for part in (k, v))
        if self.config.qk_norm and "a_k" not in kept:  # the norms, which went into a_k, are those of b_k, turned or not
            k = k.unit_rms()
        return Factored(qkv.q, k, v)
