"""Full attention: a query meets every key that the mask lets it see."""

from typing import Literal

import torch
from torch import Tensor

from model.attention.base import QKV, AttentionConfig, AttentionCore
from model.attention.tensor_product import Factored, TensorProductConfig
from model.cores.kernels import factors, sdpa
from model.cores.kernels.available import load_triton
from model.mask import AttentionMask, mean_causal_keys


class Full(AttentionCore):
    """`factors` attends straight from TPA's factors when no gradient is needed: in decoding and evaluation."""

    name: str = "full"
    kernel: Literal["auto", "sdpa", "factors"] = "auto"  # auto: sdpa, PyTorch's scaled_dot_product_attention

    @property
    def masks_documents(self) -> bool:
        return self.kernel != "factors"

    @property
    def why_no_documents(self) -> str:
        return "" if self.masks_documents else "since core.kernel=factors has no mask for them (core.kernel=sdpa has)"

    def check(self, attention: AttentionConfig, device: str, dtype: torch.dtype) -> None:
        if self.kernel != "factors":
            return
        if not isinstance(attention, TensorProductConfig):
            raise ValueError(
                f"core.kernel=factors: model={attention.name} has no factors to attend from; use core.kernel=sdpa"
            )
        if device == "cuda":
            load_triton("core.kernel=sdpa")

    def attend(self, views: list[QKV], mask: AttentionMask, scale: float) -> Tensor:
        (qkv,) = views
        if self.kernel != "factors":
            return sdpa.attend(qkv.materialize(), mask, scale)
        if not isinstance(qkv, Factored):
            raise TypeError(f"core.kernel=factors attends to factors, and got {type(qkv).__name__}")
        if mask.documents is not None:
            raise ValueError("core.kernel=factors cannot mask documents; use core.kernel=sdpa")
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in qkv.tensors()):
            return sdpa.attend(qkv.materialize(), mask, scale)
        return factors.attend(qkv, mask, scale)

    def flops_per_token(self, attention: AttentionConfig, seq_len: int) -> float:
        """Return the operations of scores and weighted values, 2 a multiply-add; a query sees (T + 1)/2 keys."""
        width = attention.n_heads * (attention.qk_head_dim + attention.v_head_dim)
        return 2 * width * mean_causal_keys(seq_len)
