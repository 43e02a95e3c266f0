"""Full attention: a query meets every key that the mask lets it see. Cores that see less can mix layers of it in."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from configs.kinds import Name
from model.attention.base import QKV, AttentionConfig, AttentionCore
from model.attention.tensor_product import Factored, TensorProductConfig
from model.cores.kernels import factors, load_triton, sdpa
from model.mask import AttentionMask, mean_causal_keys


class Full(AttentionCore):
    """`factors` attends straight from TPA's factors when no gradient is needed: in decoding and evaluation."""

    name: Name = "full"
    kernel: Literal["auto", "sdpa", "factors"] = "auto"  # auto: sdpa, PyTorch's scaled_dot_product_attention

    why_no_documents: ClassVar[str] = "since core.kernel=factors has no mask for them (core.kernel=sdpa has)"

    @property
    def masks_documents(self) -> bool:
        return self.kernel != "factors"

    def check(self, attention: AttentionConfig, device: str, dtype: torch.dtype) -> None:
        if self.kernel == "factors" and not isinstance(attention, TensorProductConfig):
            raise ValueError(
                f"core.kernel=factors: model={attention.name} has no factors to attend from; use core.kernel=sdpa"
            )
        if self.kernel == "factors" and device == "cuda":
            load_triton()

    def attend(self, views: list[QKV], mask: AttentionMask, scale: float) -> Tensor:
        (qkv,) = views
        if self.kernel == "factors":
            if not isinstance(qkv, Factored):
                raise TypeError(f"core.kernel=factors attends to factors, and got {type(qkv).__name__}")
            if mask.documents is not None or not mask.causal:
                raise ValueError("core.kernel=factors is causal and cannot mask documents; use core.kernel=sdpa")
            if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in qkv.tensors())):
                return factors.attend(qkv, scale, mask.starts)
        return sdpa.attend(qkv.materialize(), mask, scale)

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Return the operations of scores and weighted values, 2 a multiply-add; a query sees (T + 1)/2 keys."""
        width = attention.n_heads * (attention.qk_head_dim + attention.v_head_dim)
        return 2 * width * mean_causal_keys(seq_len)


class PartialCore(AttentionCore):
    """A core that does not let every query meet every key, which `full_every` mixes with full attention."""

    full_every: int | None = Field(None, ge=1, le=10_000)  # 4: every fourth layer attends in full

    def for_layer(self, layer: int) -> AttentionCore:
        return Full() if self.full_every and (layer + 1) % self.full_every == 0 else self
