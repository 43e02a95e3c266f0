"""What the kernels share: how they read factors, and how they are launched."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.attention.tensor_product import Factors

INTERPRETED = bool(triton.knobs.runtime.interpret)
MANY_RANKS = 16  # of keys and values together
# Two calls that differ in these take other amounts of shared memory: what fits the factors as they are projected may
# not fit a cache, whose strides let loads be pipelined.
LAYOUT = ["ak_s", "bv_s", "PRECISION"]


@triton.jit
def load_rows(base, stride, s, held, c_base, c_stride, D: tl.constexpr, D_B: tl.constexpr, BLOCK: tl.constexpr):
    """The token factors of some tokens [len(s), BLOCK], 0 where not `held` and past D; in third order vec(b x c)."""
    d = tl.arange(0, BLOCK)
    if D_B == D:
        return tl.load(base + s[:, None] * stride + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0.0)
    inside = held[:, None] & (d < D)[None, :]
    b = tl.load(base + s[:, None] * stride + (d % D_B)[None, :], mask=inside, other=0.0)
    c = tl.load(c_base + s[:, None] * c_stride + (d // D_B)[None, :], mask=inside, other=0.0)
    return b * c


@triton.jit
def head_factor(pointers, inside, SIGMOID: tl.constexpr):
    """Head factors in fp32, 0 where not `inside`; `SIGMOID` where memory holds them before their sigmoid."""
    a = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if SIGMOID:
        a = tl.where(inside, 1 / (1 + tl.exp2(-1.4426950408889634 * a)), 0.0)
    return a


def operands(factors: Factors) -> tuple[list, list[int]]:
    """(a, b, c) as the kernels take them, and their strides: of a over batch, tokens, heads, ranks; of b and c over
    batch, tokens, ranks, with features next to each other. What a variant lacks is b again, and unused."""
    b = factors.b if factors.b.stride(-1) == 1 else factors.b.contiguous()
    a = b if factors.a is None else factors.a
    c = b if factors.c is None else factors.c if factors.c.stride(-1) == 1 else factors.c.contiguous()
    return [a, b, c], [*a.stride(), *b.stride()[:3], *c.stride()[:3]]


def sizes(q: Factors, k: Factors, v: Factors) -> dict[str, int | bool]:
    """The compile-time constants of the factors' shapes."""

    def width(factors: Factors) -> int:
        return factors.b.size(-1) * (1 if factors.c is None else factors.c.size(-1))

    def padded(n: int) -> int:
        return max(16, triton.next_power_of_2(n))  # tensor cores take no less

    shape = {"H": k.a.size(2), "R_Q": q.b.size(2), "R_K": k.b.size(2), "R_V": v.b.size(2), "DENSE_Q": q.a is None}
    shape |= {"D": width(k), "D_B": k.b.size(-1), "E": width(v), "E_B": v.b.size(-1)}
    return shape | {"BLOCK_D": padded(shape["D"]), "BLOCK_E": padded(shape["E"])}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def precision(dtype: torch.dtype) -> str:
    """fp32 products are exact unless PyTorch's are allowed to be TF32."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def worth_trying(configs: list, arguments: dict, **constants) -> list:
    """All configurations, but for high ranks the last, small one alone.

    Loops over ranks are unrolled, so that each would take up to minutes to compile, and few of them fit.
    """
    return configs[-1:] if constants.get("R_K", 0) + constants.get("R_V", 0) > MANY_RANKS else configs


def autotuned(configs: list[dict], key: list[str]):
    """`triton.autotune` over the configurations on a GPU; the first of them in the interpreter."""
    made = [
        triton.Config({k: v for k, v in c.items() if k.isupper()}, **{k: v for k, v in c.items() if not k.isupper()})
        for c in configs
    ]
    prune = {"early_config_prune": worth_trying}
    return triton.autotune(made[:1] if INTERPRETED else made, key=key, prune_configs_by=prune)


def like_output(q: Factors, v: Factors, heads: int, width: int) -> Tensor:
    return q.b.new_empty(*q.b.shape[:2], heads, width)
