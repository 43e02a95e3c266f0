"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split pairs: feature i turns with feature i + D/2."""

import torch
from torch import Tensor


def rope_tables(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., dim/2] in fp32 for `positions` [...]; computed on use, so no length limit."""
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions[..., None].float() * base**-exponent
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each vector x [B, T, N, D] by its position's angles, cos and sin [B or 1, T, P/2], in fp32.

    The first P features turn; those after them, under partial RoPE, stay.
    """
    turned, rest = x.split((2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)), dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = turned.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned
