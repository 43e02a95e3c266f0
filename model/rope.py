"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split pairs: feature i turns with feature i + D/2."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scaling = Literal["none", "linear", "ntk", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How a model trained at `original_length` reads texts `factor` times as long, without further training.

    linear: positions are divided by the factor (Chen et al., arXiv 2306.15595). ntk: the base grows, so that the
    slowest pair turns `factor` times as slowly and the fastest as before. yarn: pairs that turn less than once over the
    original length are divided by the factor, those that turn more than 32 times stay, and the logits are sharpened
    (Peng et al., arXiv 2309.00071).
    """

    kind: str
    factor: float
    original_length: int

    @property
    def logit_factor(self) -> float:
        """What multiplies the attention logits: YaRN's 1/t = (0.1 ln(factor) + 1)^2."""
        return (0.1 * math.log(self.factor) + 1) ** 2 if self.kind == "yarn" and self.factor > 1 else 1.0

    def frequencies(self, dim: int, base: float, device=None) -> Tensor:
        """Return the radians a position [dim/2] of each pair, in fp32."""
        if self.kind == "ntk" and dim > 2:
            return rope_frequencies(dim, base * self.factor ** (dim / (dim - 2)), device)
        plain = rope_frequencies(dim, base, device)
        if self.kind != "yarn":
            return plain / self.factor
        pairs = [dim * math.log(self.original_length / (n * 2 * math.pi)) / (2 * math.log(base)) for n in (32, 1)]
        first, last = max(math.floor(pairs[0]), 0), min(math.ceil(pairs[1]), dim - 1)
        numbers = torch.arange(dim // 2, dtype=torch.float32, device=device)
        # 1 for pairs that stay, 0 for those divided by the factor, and linear values between them.
        kept = 1 - ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)
        return plain * kept + plain / self.factor * (1 - kept)


def rope_frequencies(dim: int, base: float, device=None) -> Tensor:
    """Return the radians a position [dim/2] of each pair of features, in fp32."""
    return base ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def rope_tables(positions: Tensor, dim: int, base: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [..., dim/2] in fp32 for `positions` [...]; computed on use, so no length limit."""
    frequencies = (scaling.frequencies if scaling else rope_frequencies)(dim, base, device=positions.device)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, N, D], its first P features turned in fp32 by their position's cos and sin [B or 1, T, P/2]."""
    turned, rest = x.split((2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)), dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = turned.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned
