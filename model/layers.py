"""The parts of the LLaMA block (Touvron et al., arXiv 2302.13971) that no attention mechanism changes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.base import Attention
from model.cache import LayerCache
from model.cores.base import AttentionMask


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis; no learned weight unless `affine`, as in the TPA authors' code."""

    def __init__(self, width: int, eps: float = 1e-6, affine: bool = False):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            x = x.to(self.weight.dtype)  # under autocast x may be bf16, and the fused kernel wants one dtype
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202); gate and up are one product, down starts at zero."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, attention: Attention, d_model: int, d_ff: int, norm_eps: float):
        super().__init__()
        self.attention_norm = RMSNorm(d_model, norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(d_model, norm_eps)
        self.mlp = SwiGLU(d_model, d_ff)

    def forward(self, x: Tensor, positions: Tensor, mask: AttentionMask, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, mask, cache)
        return x + self.mlp(self.mlp_norm(x))
