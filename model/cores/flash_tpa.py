"""FlashTPA: attention straight from TPA's factors, without forming keys and values (arXiv 2501.06425, section 3 and A).

Decoding and prefill run the blocked path of `model.cores.factor_space` on a CPU and the Triton kernels of
`model.cores.kernels` on a GPU. With gradients a cost model decides between factor space and the materialised path.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.base import AttentionConfig, unturned
from model.attention.tensor_product import Factored, Factors, TensorProductConfig
from model.cores.base import AttentionCore, AttentionMask, load_kernels
from model.cores.factor_space import blocked
from model.cores.factor_training import FactorSpaceAttention
from model.cores.sdpa import SDPA

FEW_COLUMNS = 512  # up to so many (query, head) pairs of a row go through the decoding kernel
# How many multiply-adds of a matrix product take as long as one pass over one logit of a block: measured on a CPU; on
# a GPU, where such a block lies in memory, an H100's data sheet: 8 bytes at 3.35 TB/s, 495 T multiply-adds a second.
PASS_COST = {"cpu": 17, "cuda": 1200}
FUSED_PASS_COST = 4  # of a flash kernel, whose blocks stay in registers


def flash_tpa(factored: Factored, scale: float, causal: bool = True, starts: Tensor | None = None) -> Tensor:
    """softmax(q k^T * scale) v from factors whose b of q and k is rotated: [B, T, H, E], without a gradient.

    Query t of row b sees the keys up to starts[b] + t ([B]; by default the queries are the last T of the S positions),
    or all the row's keys without `causal`. What lies from starts[b] + T on may be anything, NaN included; that is at
    most S. On a GPU the shapes alone decide what runs, so a CUDA graph may hold it.
    """
    parts = (factored.q, factored.k, factored.v)
    return attend(*(x for part in parts for x in (part.a, part.b, part.c)), float(scale), causal, starts)


@torch.library.custom_op("t6::flash_tpa", mutates_args=())
def attend(
    a_q: Tensor | None, b_q: Tensor, c_q: Tensor | None, a_k: Tensor, b_k: Tensor, c_k: Tensor | None,
    a_v: Tensor, b_v: Tensor, c_v: Tensor | None, scale: float, causal: bool, starts: Tensor | None,
) -> Tensor:  # fmt: skip
    """`flash_tpa` as one operation, which torch.compile calls and does not look into."""
    factored = Factored(Factors(a_q, b_q, c_q), Factors(a_k, b_k, c_k), Factors(a_v, b_v, c_v))
    with torch.autocast(b_q.device.type, enabled=False):
        if b_q.device.type == "cpu":
            return blocked(factored, scale, causal, starts)
        few = b_q.size(1) * a_k.size(2) <= FEW_COLUMNS
        kernels = load_kernels()
        kernel = kernels.decode if few else kernels.prefill
        return kernel(factored, scale, causal, starts)


@attend.register_fake
def _(a_q, b_q, c_q, a_k, b_k, c_k, a_v, b_v, c_v, scale, causal, starts):
    width = b_v.size(-1) * (1 if c_v is None else c_v.size(-1))
    return b_q.new_empty(b_q.size(0), b_q.size(1), a_k.size(2), width)


@dataclass
class Plan:
    """What one query, head by head, costs against one key with gradients, in multiply-adds; a pass over a logit counts
    `PASS_COST` of them, or `FUSED_PASS_COST` in a flash kernel."""

    factors: float
    materialized: float
    factors_forward: float  # multiply-adds alone, of the forward pass, all heads
    materialized_forward: float

    @property
    def choice(self) -> str:
        return "factors" if self.factors < self.materialized else "materialized"


def plan(attention: TensorProductConfig, device: str) -> Plan:
    """The cost model of training: the multiply-adds of the paper's A.4, five such products of the backward pass, and
    the passes over the logits that the path of `model.cores.factor_training` makes through memory."""
    heads, width = attention.n_heads, attention.head_dim
    rank_q = heads if attention.dense_q else attention.q_rank
    ranks = rank_q * attention.k_rank
    shared, by_head, values = ranks * width, heads * ranks, heads * attention.v_rank * width
    forward = shared + by_head + values
    backward = forward - values + 2 * values + 2 * by_head + 2 * shared  # the logits again, then every gradient
    passes = heads * (4 + attention.k_rank + attention.v_rank + 7 + 3 * attention.k_rank + 4 * attention.v_rank)
    explicit = 2 * heads * width
    return Plan(
        (forward + backward + passes * PASS_COST[device]) / heads,
        (explicit + 2.5 * explicit + heads * 8 * FUSED_PASS_COST) / heads,
        forward,
        explicit,
    )


@dataclass
class FlashTPA(AttentionCore):
    name: str = "flash_tpa"
    training: str = "auto"  # how gradients are computed: by the cheaper of `factors` and `materialized`, or one of them

    def errors(self):
        if self.training not in ("auto", "factors", "materialized"):
            yield f"core.training={self.training!r}: must be auto, factors or materialized"

    def check(self, attention: AttentionConfig, device: str, dtype: torch.dtype) -> None:
        if not isinstance(attention, TensorProductConfig):
            raise ValueError(f"model={attention.name}: has no factors to attend from; use core=sdpa")
        if device == "cuda":
            load_kernels()

    def trains_on(self, attention: TensorProductConfig, device: str) -> str:
        """`factors` or `materialized`."""
        return self.training if self.training != "auto" else plan(attention, device).choice

    def training_note(self, attention: TensorProductConfig, device: str) -> str:
        costs = plan(attention, device)
        way = (
            "in factor space" if self.trains_on(attention, device) == "factors" else "through explicit keys and values"
        )
        return (
            f"flash_tpa trains {way} (core.training={self.training}): a head, query and key cost {costs.factors:,.0f} "
            f"multiply-adds in factor space, {costs.materialized:,.0f} explicitly"
        )

    def __call__(self, qkv, rotate, positions: Tensor, mask: AttentionMask, scale: float) -> Tensor:
        if not isinstance(qkv, Factored):
            raise TypeError(f"core=flash_tpa attends to factors, and got {type(qkv).__name__}; use core=sdpa")
        if mask.documents is not None:
            raise ValueError("core=flash_tpa cannot mask documents (data.document_mask); use core=sdpa")
        turned = rotate(qkv, positions)
        factors = (x for part in (turned.q, turned.k, turned.v) for x in (part.a, part.b, part.c) if x is not None)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in factors)):
            return flash_tpa(turned, scale, mask.causal, mask.starts)
        if mask.starts is not None:
            raise ValueError("core=flash_tpa has no gradient through a cache")
        if self.trains_on(config_of(turned), turned.q.b.device.type) == "materialized":
            return SDPA()(turned, unturned, positions, mask, scale)
        return attend_with_gradient(turned, scale, mask.causal)

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Operations of the way that is taken with gradients; a query sees (T + 1)/2 keys on average."""
        if not isinstance(attention, TensorProductConfig):  # what it is compared with
            return SDPA().flops_per_token(attention, seq_len)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        costs = plan(attention, device)
        taken = costs.factors_forward if self.trains_on(attention, device) == "factors" else costs.materialized_forward
        return 2 * taken * AttentionMask().mean_keys(seq_len)


def attend_with_gradient(turned: Factored, scale: float, causal: bool) -> Tensor:
    """`flash_tpa` over T = S positions with a gradient for every factor."""
    q, k, v = turned.q, turned.k, turned.v
    dtype = q.b.dtype
    a_q = q.a
    if a_q is None:  # a dense query: one rank a head
        a_q = torch.eye(k.a.size(2), dtype=dtype, device=q.b.device).expand(*q.b.shape[:2], -1, -1)
    rank_q = 1 if q.a is None else a_q.size(-1)
    with torch.autocast(q.b.device.type, enabled=False):
        wide = torch.promote_types(dtype, torch.float32)
        tensors = (a_q, q.token_factor(), k.a, k.token_factor(), v.a, v.token_factor())
        out = FactorSpaceAttention.apply(*(x.to(wide) for x in tensors), scale / (rank_q * k.a.size(-1)), causal)
    return out.to(dtype)


def config_of(factored: Factored) -> TensorProductConfig:
    """The shapes of factors as the configuration that the cost model reads."""
    q, k, v = factored.q, factored.k, factored.v
    return TensorProductConfig(
        "", q.token_factor().size(-1) if q.c is None else q.b.size(-1) * q.c.size(-1), k.a.size(2),
        q_rank=q.b.size(2), k_rank=k.a.size(-1), v_rank=v.a.size(-1), dense_q=q.a is None,
    )  # fmt: skip
