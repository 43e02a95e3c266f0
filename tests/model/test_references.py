"""Each mechanism against its formulas written out in fp64, outputs and gradients."""

import math

import pytest
import torch

from model.attention.multi_head import MultiHeadConfig
from model.attention.tensor_product import TensorProductConfig
from model.cores.base import AttentionMask
from model.cores.sdpa import SDPA
from model.rope import apply_rope, rope_tables
from model.transformer import Transformer
from tests.model.helpers import small_network, wake_up

T = 7  # odd on purpose


def slow_rope(x, base=10000.0):
    """x [B, T, N, D]: the pair (i, i + D/2) as a complex number, turned by t * base^(-2i/D)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def slow_attention(q, k, v, scale):
    """Causal softmax attention one head and query at a time; q [B, T, H, D], k and v with G heads."""
    heads, groups = q.shape[2], k.shape[2]
    out = []
    for h in range(heads):
        g = h * groups // heads
        rows = []
        for t in range(q.shape[1]):
            weights = torch.softmax(torch.einsum("bd,bsd->bs", q[:, t, h], k[:, : t + 1, g]) * scale, dim=-1)
            rows.append(torch.einsum("bs,bse->be", weights, v[:, : t + 1, g]))
        out.append(torch.stack(rows, dim=1))
    return torch.stack(out, dim=2)


def slow_multi_head(attention, x):
    c = attention.config
    q, k, v = attention.qkv_proj(x).split([n * c.head_dim for n in (c.n_heads, c.kv_heads, c.kv_heads)], dim=-1)
    q, k, v = (part.view(*x.shape[:2], -1, c.head_dim) for part in (q, k, v))
    return slow_attention(slow_rope(q), slow_rope(k), v, c.head_dim**-0.5)


def slow_tensor_product(attention, x):
    """Sums over ranks of outer products of head and token factors; RoPE on the product, not on the factors."""
    c = attention.config
    weights = attention.factor_proj.weight.split([m * n for m, n in attention.shapes])
    made = []
    for i, rank in enumerate(c.ranks):
        a = (x @ weights[2 * i].T).view(*x.shape[:2], c.n_heads, rank)
        b = (x @ weights[2 * i + 1].T).view(*x.shape[:2], rank, c.head_dim)
        made.append(sum(a[..., r, None] * b[..., None, r, :] for r in range(rank)) / rank)
    q, k, v = made
    return slow_attention(slow_rope(q), slow_rope(k), v, c.head_dim**-0.5)


def slow_latent(attention, x):
    """DeepSeek-V2's equations 9 to 19, token by token where they differ from MHA."""
    c = attention.config
    down_q, down_kv, down_rope = attention.down_proj.weight.split([c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim])

    def norm(z, weight):
        return z / torch.sqrt((z**2).mean(-1, keepdim=True) + 1e-6) * weight

    c_q, c_kv = norm(x @ down_q.T, attention.q_norm.weight), norm(x @ down_kv.T, attention.kv_norm.weight)
    up_nope, up_rope = attention.q_up_proj.weight.split([c.n_heads * c.head_dim, c.n_heads * c.qk_rope_head_dim])
    up_k, up_v = attention.kv_up_proj.weight.split(c.n_heads * c.head_dim)

    def heads(z, width):
        return z.view(*x.shape[:2], -1, width)

    q_rope = slow_rope(heads(c_q @ up_rope.T, c.qk_rope_head_dim))
    k_rope = slow_rope(heads(x @ down_rope.T, c.qk_rope_head_dim)).expand_as(q_rope)
    q = torch.cat((heads(c_q @ up_nope.T, c.head_dim), q_rope), dim=-1)
    k = torch.cat((heads(c_kv @ up_k.T, c.head_dim), k_rope), dim=-1)
    return slow_attention(q, k, heads(c_kv @ up_v.T, c.head_dim), (c.head_dim + c.qk_rope_head_dim) ** -0.5)


SLOW = {
    "mha": slow_multi_head,
    "mqa": slow_multi_head,
    "gqa": slow_multi_head,
    "t6": slow_tensor_product,
    "mla": slow_latent,
}


@pytest.mark.parametrize("model", SLOW)
def test_output_and_gradients_equal_the_formulas(model):
    torch.manual_seed(0)
    attention = wake_up(Transformer(small_network(model))).double().blocks[0].attention
    x = torch.randn(2, T, 48, dtype=torch.float64, requires_grad=True)
    fast = attention(x, torch.arange(T)[None], AttentionMask())
    slow = attention.out_proj(SLOW[model](attention, x).flatten(-2))
    assert torch.allclose(fast, slow, atol=1e-6)
    probe = torch.randn_like(fast)
    inputs = [x, *attention.parameters()]
    for ours, theirs in zip(torch.autograd.grad(fast, inputs, probe, retain_graph=True),
                            torch.autograd.grad(slow, inputs, probe), strict=True):  # fmt: skip
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_rope_on_the_factors_equals_rope_on_the_product():
    torch.manual_seed(0)
    a, b = torch.randn(1, T, 5, 3).double(), torch.randn(1, T, 3, 8).double()
    tables = rope_tables(torch.arange(T)[None], 8, 10000.0)
    assert torch.allclose(a @ apply_rope(b, *tables), apply_rope(a @ b, *tables), atol=1e-6)
    assert torch.allclose(apply_rope(b, *tables), slow_rope(b), atol=1e-6)


@pytest.mark.parametrize(("d_qk", "d_v"), [(16, 16), (24, 16), (16, 24)])
@pytest.mark.parametrize("n_queries", [T, 3, 1])
def test_sdpa_core_equals_explicit_softmax(n_queries, d_qk, d_v):
    """Widths of values and keys may differ, and the queries may be the last few of the positions (a cache)."""
    from model.attention.base import Dense

    torch.manual_seed(0)
    q, k = torch.randn(2, n_queries, 6, d_qk), torch.randn(2, T, 3, d_qk)
    v = torch.randn(2, T, 3, d_v)
    out = SDPA()(Dense(q, k, v), lambda qkv, positions: qkv, torch.arange(n_queries)[None], AttentionMask(), 0.3)
    k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.3
    future = torch.arange(T)[None, :] > torch.arange(T - n_queries, T)[:, None]
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    assert torch.allclose(out, torch.einsum("bhts,bshe->bthe", weights, v), atol=1e-5)


@pytest.mark.parametrize("init", ["xavier", "reference"])
def test_factor_weights_start_within_their_bounds(init):
    torch.manual_seed(0)
    d_model, heads, width = 256, 9, 16
    config = TensorProductConfig("t6", width, heads, q_rank=6, k_rank=2, v_rank=3, init=init)
    attention = config.build(d_model, 0, SDPA())
    weights = attention.factor_proj.weight.split([m * n for m, n in attention.shapes])
    for i, rank in enumerate(config.ranks):
        if init == "xavier":
            bounds = math.sqrt(6 / (d_model + rank * heads)), math.sqrt(6 / (d_model + rank * width))
        else:  # as tensor_product_attention's authors' code: on [d_model, H, R] and [d_model, R, D]
            bounds = math.sqrt(6 / ((d_model + heads) * rank)), math.sqrt(6 / ((d_model + rank) * width))
        for weight, bound in zip(weights[2 * i : 2 * i + 2], bounds, strict=True):
            assert 0.97 * bound < weight.abs().max() <= bound
    reference = torch.empty(d_model, heads, 6)
    torch.nn.init.xavier_uniform_(reference)
    if init == "reference":
        assert weights[0].abs().max().item() == pytest.approx(reference.abs().max().item(), rel=0.03)


def test_blocks_start_as_the_identity_and_the_head_is_tied():
    net = Transformer(small_network("t6"))
    x = torch.randn(1, 5, 48)
    assert torch.equal(net.blocks[0](x, torch.arange(5)[None], AttentionMask()), x)
    assert net.head.weight is net.embedding.weight
    assert net.head.weight.abs().max() <= 48**-0.5


def test_grouped_heads_share_keys_in_order():
    """Query heads 0 and 1 use key head 0, heads 2 and 3 key head 1."""
    torch.manual_seed(0)
    attention = MultiHeadConfig("gqa", 8, n_heads=4, n_kv_heads=2).build(32, 0, SDPA())
    torch.nn.init.eye_(attention.out_proj.weight)
    x = torch.randn(1, 5, 32)
    before = attention(x, torch.arange(5)[None], AttentionMask()).view(5, 4, 8)
    with torch.no_grad():
        attention.qkv_proj.weight[4 * 8 + 8 : 4 * 8 + 16] += 0.5  # the second key head
    after = attention(x, torch.arange(5)[None], AttentionMask()).view(5, 4, 8)
    changed = (before != after).any(-1).any(0)
    assert changed.tolist() == [False, False, True, True]
