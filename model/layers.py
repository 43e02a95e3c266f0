"""The parts of the LLaMA block (Touvron et al., arXiv 2302.13971) that no attention mechanism changes."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) over the last axis; no learned weight unless `affine`, as in the TPA authors' code."""

    def __init__(self, width: int, eps: float = 1e-6, affine: bool = False):
        super().__init__(width, eps, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x may be bf16, and the fused kernel wants one dtype.
        return super().forward(x if self.weight is None else x.to(self.weight.dtype))


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
