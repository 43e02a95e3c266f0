"""What the kernels share: how they read factors and sum a softmax, and how they are launched."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.attention.tensor_product import Factored

INTERPRETED = bool(triton.knobs.runtime.interpret)
MANY_RANKS = 16  # of keys and values together
# Two calls that differ in these take other amounts of shared memory: what fits the factors as they are projected may
# not fit a cache, whose strides let loads be pipelined.
LAYOUT = ["ak_s", "bv_s", "PRECISION"]


@triton.jit
def load_rows(base, stride, s, held, c_base, c_stride, D: tl.constexpr, D_B: tl.constexpr, BLOCK: tl.constexpr):
    """Return some tokens' B [len(s), BLOCK], 0 if not `held` and past D; in third order it is vec(b x c)."""
    d = tl.arange(0, BLOCK)
    if D_B == D:
        return tl.load(base + s[:, None] * stride + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0.0)
    inside = held[:, None] & (d < D)[None, :]
    b = tl.load(base + s[:, None] * stride + (d % D_B)[None, :], mask=inside, other=0.0)
    c = tl.load(c_base + s[:, None] * c_stride + (d // D_B)[None, :], mask=inside, other=0.0)
    return b * c


@triton.jit
def online_softmax(logits, top, norm, AXIS: tl.constexpr):
    """Return (weights of one more tile, the factor of earlier sums, the new top and norm), to base 2, along an axis."""
    higher = tl.maximum(top, tl.max(logits, AXIS))
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(logits - tl.expand_dims(finite, AXIS))
    correction = tl.exp2(top - finite)
    return weights, correction, higher, norm * correction + tl.sum(weights, AXIS)


def strides(*tensors: Tensor) -> list[int]:
    """Return the strides of the first three axes; features lie next to each other."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def widths(D: int, E: int) -> dict[str, int]:
    """Return the widths of keys and values as compile-time constants, and of tiles, no less than tensor cores take."""
    BLOCK_D, BLOCK_E = (max(16, triton.next_power_of_2(width)) for width in (D, E))
    return {"D": D, "E": E, "BLOCK_D": BLOCK_D, "BLOCK_E": BLOCK_E}


def operands(factored: Factored, scale: float, starts: Tensor | None) -> tuple[list, float, list[int], dict]:
    """Return what the kernels take: tensors, the scale of logits to base 2, strides and compile-time constants.

    Tensors are a, b, c of q, k and v, and `starts`; what a variant lacks is b again, and unused. Strides of a are over
    batch, tokens, heads and ranks; of b and c over batch, tokens and ranks, with features next to each other.
    """
    q, k, v = factored.q, factored.k, factored.v
    tensors, all_strides = [], []
    for part in (q, k, v):
        b, c = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (part.b, part.c))
        a, c = (b if x is None else x for x in (part.a, c))
        tensors += [a, b, c]
        all_strides += [*a.stride(), *strides(b, c)]
    tensors.append(q.b if starts is None else starts.contiguous())
    constants = {"H": k.a.size(2), "R_Q": q.b.size(2), "R_K": k.b.size(2), "R_V": v.b.size(2), "DENSE_Q": q.a is None}
    constants |= {"D_B": k.b.size(-1), "E_B": v.b.size(-1), **widths(k.width, v.width)}
    constants |= {"RAGGED": starts is not None, "PRECISION": precision(k.b.dtype)}
    ranks = k.a.size(-1) * (1 if q.a is None else q.a.size(-1))
    return tensors, scale * math.log2(math.e) / ranks, all_strides, constants


def precision(dtype: torch.dtype) -> str:
    """Return how products are computed: those of fp32 are exact unless PyTorch's may be TF32."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def worth_trying(configs: list, arguments: dict, **constants) -> list:
    """Return all configurations, but for high ranks, whose unrolled loops compile slowly, only the last, small one."""
    return configs[-1:] if constants.get("R_K", 0) + constants.get("R_V", 0) > MANY_RANKS else configs


def autotuned(blocks: str, *rows: tuple[int, ...], key: list[str]):
    """Return `triton.autotune` over rows of (sizes of the named blocks, warps, stages); the interpreter gets the first.

    The last row is small, with one stage, which keeps no tiles waiting in shared memory: it fits where high ranks or
    wide heads rule out the others.
    """
    configs = [
        triton.Config(dict(zip(blocks.split(), sizes, strict=True)), num_warps=warps, num_stages=stages)
        for *sizes, warps, stages in rows
    ]
    prune = {"early_config_prune": worth_trying}
    return triton.autotune(configs[:1] if INTERPRETED else configs, key=key, prune_configs_by=prune)
