"""Tensor Product Attention (TPA), Zhang et al., arXiv 2501.06425: low-rank factors of queries, keys and values.

A token's queries, a matrix over heads and features, are a sum of R rank-one terms (and so are its keys and values):

    Q = A B / R        A [H, R]: head factor        B [R, D]: token factor

with A and B linear in the token (contextual) or learned constants. In third order (Appendix C) each row of B is itself
vec(b x c). RoPE turns the rows of B, or b alone: that equals turning Q (Theorems 3.1 and C.1), since the rotation acts
on features only. One class has every variant of the paper; `factor_shapes` says which factors a variant has.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from model.attention.base import QKV, Attention, AttentionConfig, Dense, unit_rms
from model.attention.multi_head import MultiHeadAttention
from model.cores.base import AttentionCore

ACTIVATIONS = ("none", "sigmoid", "softmax")


@dataclass
class Factors:
    """The factors of queries, keys or values: a [B, T, H, R] and b [B, T, R, D].

    In third order c is [B, T, R, D_c] and b [B, T, R, D_b], D = D_b D_c. Without a (a dense query) b is the product
    itself, [B, T, H, D].
    """

    a: Tensor | None
    b: Tensor
    c: Tensor | None = None

    def token_factor(self) -> Tensor:
        """B [B, T, R, D]: in third order vec(b x c), running over b fastest."""
        return self.b if self.c is None else (self.c[..., :, None] * self.b[..., None, :]).flatten(-2)

    def product(self) -> Tensor:
        """A B / R, [B, T, H, D]."""
        b = self.token_factor()
        return b if self.a is None else (self.a / self.a.size(-1)) @ b

    def unit_rms(self) -> "Factors":
        """The same with each head's product at RMS 1: a row of A scales a head, so the factors stay factors."""
        if self.a is None:
            return replace(self, b=unit_rms(self.b))
        b, a = self.token_factor().float(), self.a.float() / self.a.size(-1)
        square = ((a @ (b @ b.mT)) * a).sum(-1, keepdim=True) / b.size(-1)  # |a B|^2 / D through R x R products
        return replace(self, a=(self.a * torch.rsqrt(square + 1e-6)).to(self.a.dtype))


@dataclass
class Factored(QKV):
    """Queries, keys and values as factors; `b` of q and k is what RoPE turns."""

    q: Factors
    k: Factors
    v: Factors

    def materialize(self) -> Dense:
        return Dense(self.q.product(), self.k.product(), self.v.product())

    def keys(self) -> dict[str, Tensor]:
        return {name: factor for name, factor in vars(self.k).items() if factor is not None}

    @staticmethod
    def make_keys(kept: dict[str, Tensor]) -> Tensor:
        return Factors(**kept).product()


@dataclass
class TensorProductConfig(AttentionConfig):
    q_rank: int = 6
    k_rank: int = 2
    v_rank: int = 2
    dense_q: bool = False  # queries by a full projection M -> H D (TPA-KVonly)
    contextual_a: bool = True  # false: the head factors are learned constants
    contextual_b: bool = True  # false: the token factors are; RoPE still turns those of q and k
    shared_b: bool = False  # values use the keys' token factor, before it is turned
    a_activation: str = "none"  # of the head factors: none, sigmoid, or softmax over heads
    c_dim: int | None = None  # third order: the width D_c of c; b has head_dim / c_dim features
    init: str = "reference"  # the authors' code's; `xavier` is the paper's text

    def errors(self):
        for key in ("q_rank", "k_rank", "v_rank", "c_dim"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield f"model.{key}={value}: must be at least 1"
        if self.init not in ("xavier", "reference"):
            yield f"model.init={self.init!r}: must be xavier or reference"
        if self.a_activation not in ACTIVATIONS:
            yield f"model.a_activation={self.a_activation!r}: must be none, sigmoid or softmax"
        if self.shared_b and self.k_rank != self.v_rank:
            yield f"model.v_rank={self.v_rank}: must equal model.k_rank={self.k_rank}, since model.shared_b=true"
        if self.c_dim is not None and self.c_dim >= 1 and self.head_dim % self.c_dim:
            yield f"model.c_dim={self.c_dim}: must divide model.head_dim={self.head_dim}"
        elif self.c_dim is None or self.c_dim >= 1:
            yield from super().errors()

    @property
    def ranks(self) -> dict[str, int]:
        return {"q": self.q_rank, "k": self.k_rank, "v": self.v_rank}

    @property
    def rope_width(self) -> int:
        return self.head_dim // (self.c_dim or 1)

    def _rope_key(self) -> str:
        return "model.head_dim" if self.c_dim is None else "model.head_dim / model.c_dim"

    @property
    def cache_knobs(self) -> tuple[str, ...]:
        return ("k_rank", "v_rank")

    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """Every factor of a token by name (a_q, b_q, ..., c_v) and its shape, without those that a variant lacks."""
        shapes = {}
        for part, rank in self.ranks.items():
            if part == "q" and self.dense_q:
                shapes["b_q"] = (self.n_heads, self.head_dim)
                continue
            shapes[f"a_{part}"] = (self.n_heads, rank)
            if part == "v" and self.shared_b:
                continue
            shapes[f"b_{part}"] = (rank, self.rope_width)
            if self.c_dim is not None:
                shapes[f"c_{part}"] = (rank, self.c_dim)
        return shapes

    def is_constant(self, factor: str) -> bool:
        if factor == "b_q" and self.dense_q:
            return False
        return not (self.contextual_a if factor[0] == "a" else self.contextual_b)

    def projection_params(self, d_model: int) -> int:
        return sum(m * n * (1 if self.is_constant(f) else d_model) for f, (m, n) in self.factor_shapes().items())

    def flops_per_token(self, d_model: int) -> float:
        """The projections, and making q, k and v of their factors, but for third order's b x c, which is little."""
        projected = sum(m * n for f, (m, n) in self.factor_shapes().items() if not self.is_constant(f))
        factored = [rank for part, rank in self.ranks.items() if not (part == "q" and self.dense_q)]
        products = sum(factored) * self.n_heads * self.head_dim
        return 2 * (d_model * projected + products + self.output_params(d_model))

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """The contextual factors of keys and values: constants need no cache.

        Head factors lie with their heads next to each other, [R, H]: so a core reads them side by side, rank by rank.
        """
        shapes = self.factor_shapes().items()
        kept = {f: shape for f, shape in shapes if f[-1] != "q" and not self.is_constant(f)}
        return {f: shape[::-1] if f[0] == "a" else shape for f, shape in kept.items()}

    def build(self, d_model: int, layer: int, core: AttentionCore) -> "TensorProductAttention":
        return TensorProductAttention(self, d_model, core)


class TensorProductAttention(Attention):
    def __init__(self, config: TensorProductConfig, d_model: int, core: AttentionCore):
        super().__init__(config, d_model, core)
        shapes = config.factor_shapes()
        self.projected = {f: shape for f, shape in shapes.items() if not config.is_constant(f)}
        self.widths = [m * n for m, n in self.projected.values()]
        self.factor_proj = nn.Linear(d_model, sum(self.widths), bias=False)  # all contextual factors: one product
        for factor in shapes.keys() - self.projected.keys():
            self.register_parameter(factor, nn.Parameter(torch.empty(shapes[factor])))
        self.reset_factors()

    @torch.no_grad()
    def reset_factors(self) -> None:
        """Xavier-uniform for each factor's weight.

        A constant starts with the spread that its contextual counterpart has on a normalised token.
        """
        d_model = self.factor_proj.in_features
        for (factor, shape), weight in zip(self.projected.items(), self.factor_weights(), strict=True):
            bound = self.xavier_bound(factor, shape, d_model)
            weight.uniform_(-bound, bound)
        for factor, shape in self.config.factor_shapes().items():
            if factor not in self.projected:
                bound = self.xavier_bound(factor, shape, d_model) * d_model**0.5
                getattr(self, factor).uniform_(-bound, bound)

    def xavier_bound(self, factor: str, shape: tuple[int, int], d_model: int) -> float:
        """sqrt(6 / (fan_in + fan_out)), with fans d_model and m n for a factor of shape [m, n] (the paper).

        The authors' code applies Xavier to a weight viewed as [d_model, m, n], where PyTorch takes fan_in from the
        second axis and fan_out from the first, each times the last; a dense query is plain in both.
        """
        m, n = shape
        plain = self.config.init == "xavier" or (factor == "b_q" and self.config.dense_q)
        return (6 / (d_model + m * n if plain else (d_model + m) * n)) ** 0.5

    def factor_weights(self) -> tuple[Tensor, ...]:
        """The rows of `factor_proj` by factor, each [m n, d_model], in the order of `projected`."""
        return self.factor_proj.weight.split(self.widths)

    def project(self, x: Tensor) -> Factored:
        pieces = self.factor_proj(x).split(self.widths, dim=-1)
        made = {f: piece.unflatten(-1, shape) for (f, shape), piece in zip(self.projected.items(), pieces, strict=True)}
        for factor, shape in self.config.factor_shapes().items():
            if factor not in made:
                made[factor] = getattr(self, factor).to(x.dtype).expand(*x.shape[:-1], *shape)
        if self.config.shared_b:
            made |= {f"{letter}_v": made[f"{letter}_k"] for letter in "bc" if f"{letter}_k" in made}
        q, k, v = (
            Factors(self.activate(made.get(f"a_{part}")), made[f"b_{part}"], made.get(f"c_{part}")) for part in "qkv"
        )
        return Factored(q.unit_rms(), k.unit_rms(), v) if self.config.qk_norm else Factored(q, k, v)

    def activate(self, a: Tensor | None) -> Tensor | None:
        if a is None or self.config.a_activation == "none":
            return a
        # A GPU's autocast makes softmax fp32, and a cache would be read as that at every step.
        return a.sigmoid() if self.config.a_activation == "sigmoid" else a.softmax(dim=-2).to(a.dtype)

    def rotate(self, qkv: Factored, positions: Tensor) -> Factored:
        b_q, b_k = self.turn(positions, qkv.q.b, qkv.k.b)
        return Factored(replace(qkv.q, b=b_q), replace(qkv.k, b=b_k), qkv.v)

    def keep(self, qkv: Factored) -> dict[str, Tensor]:
        """The factors of keys and values that differ from token to token, b_k turned unless the values share it."""
        kept = {f"{letter}_{part}": getattr(getattr(qkv, part), letter) for part in "kv" for letter in "abc"}
        if self.config.shared_b:
            kept["b_k"] = qkv.v.b
        return {name: kept[name].mT if name[0] == "a" else kept[name] for name in self.config.cache_shapes()}

    def recall(self, qkv: Factored, kept: dict[str, Tensor], places: Tensor) -> Factored:
        made = {factor: x.mT if factor[0] == "a" else x for factor, x in kept.items()}
        for factor, shape in self.config.factor_shapes().items():
            if factor[-1] != "q" and factor not in made:  # constants: [1, S, ...] until they are turned
                constant = getattr(self, factor).to(qkv.q.b.dtype).expand(1, places.size(1), *shape)
                made[factor] = self.activate(constant) if factor[0] == "a" else constant
        if self.config.shared_b:
            made |= {f"{letter}_v": made[f"{letter}_k"] for letter in "bc" if f"{letter}_k" in made}
        if self.config.shared_b or "b_k" not in kept:
            (made["b_k"],) = self.turn(places, made["b_k"])
        rows = qkv.q.b.size(0)
        made = {factor: tensor.expand(rows, *tensor.shape[1:]) for factor, tensor in made.items()}
        k, v = (Factors(made[f"a_{part}"], made[f"b_{part}"], made.get(f"c_{part}")) for part in "kv")
        if self.config.qk_norm and "a_k" not in kept:  # the norms, which went into a_k, are those of b_k, turned or not
            k = k.unit_rms()
        return Factored(qkv.q, k, v)


@torch.no_grad()
def from_multi_head(attention: MultiHeadAttention) -> TensorProductAttention:
    """The TPA that equals an MHA, GQA or MQA module: fixed head factors, its weights as token factors (section 3.3).

    A_q = H I with R_q = H. For keys and values R = G: MHA has A = H I (G = H), MQA a column of ones (G = 1), GQA
    G times the mask of each group's heads.
    """
    given = attention.config
    heads, groups = given.n_heads, given.kv_heads
    shared = [field.name for field in fields(AttentionConfig)]
    options = {key: getattr(given, key) for key in shared}
    config = TensorProductConfig(**options, q_rank=heads, k_rank=groups, v_rank=groups, contextual_a=False)
    d_model = attention.qkv_proj.in_features
    made = TensorProductAttention(config, d_model, attention.core).to(attention.qkv_proj.weight)
    made.factor_proj.weight.copy_(attention.qkv_proj.weight)  # q, k, v by head: the token factors of rank H, G, G
    made.out_proj.weight.copy_(attention.out_proj.weight)
    if made.gate_proj is not None:
        made.gate_proj.weight.copy_(attention.gate_proj.weight)
    groups_of_heads = torch.eye(groups).repeat_interleave(heads // groups, dim=0)  # [H, G]: whose keys a head reads
    for name, fixed in (
        ("a_q", heads * torch.eye(heads)),
        ("a_k", groups * groups_of_heads),
        ("a_v", groups * groups_of_heads),
    ):
        getattr(made, name).copy_(fixed).requires_grad_(False)
    return made
