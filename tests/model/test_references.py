"""Each mechanism against its formulas written out in fp64, outputs and gradients."""

import math

import pytest
import torch

from model.attention.base import Dense, unit_rms
from model.attention.latent import LatentAttention
from model.attention.multi_head import MultiHeadAttention, MultiHeadConfig
from model.attention.tensor_product import Factors, TensorProductAttention, TensorProductConfig
from model.cores.full import Full
from model.mask import AttentionMask
from model.rope import apply_rope, rope_tables
from model.transformer import Transformer
from tests.model.helpers import PACKAGED, from_multi_head, small_network, wake_up

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
    if c.qk_norm:
        q, k = (part / torch.sqrt((part**2).mean(-1, keepdim=True) + 1e-6) for part in (q, k))
    return slow_attention(slow_partial_rope(q, c), slow_partial_rope(k, c), v, c.head_dim**-0.5)


def slow_tensor_product(attention, x):
    """The formulas by einsum, factor by factor; RoPE on the product: on every D_b features in third order."""
    c = attention.config
    weights = dict(zip(attention.projected, attention.factor_weights(), strict=True))

    def factor(name):
        m, n = c.factor_shapes()[name]
        if name in weights:
            return torch.einsum("btm,fm->btf", x, weights[name]).reshape(*x.shape[:2], m, n)
        return getattr(attention, name).expand(*x.shape[:2], m, n)

    made = {"q": factor("b_q")} if c.dense_q else {}
    for part, rank in c.ranks.items():
        source = "k" if part == "v" and c.shared_b else part
        a, b = factor(f"a_{part}"), factor(f"b_{source}")
        if c.a_activation == "sigmoid":
            a = 1 / (1 + torch.exp(-a))
        elif c.a_activation == "softmax":
            a = torch.exp(a) / torch.exp(a).sum(2, keepdim=True)
        if c.c_dim is None:
            made[part] = torch.einsum("bthr,btrd->bthd", a, b) / rank
        else:  # feature (j, i) of a head is the sum over r of a_r c_r[j] b_r[i] / R, i fastest
            outer = torch.einsum("bthr,btrj,btri->bthji", a, factor(f"c_{source}"), b)
            made[part] = outer.flatten(-2) / rank
    if c.qk_norm:
        for part in "qk":
            made[part] = made[part] / torch.sqrt((made[part] ** 2).mean(-1, keepdim=True) + 1e-6)
    q, k = (slow_partial_rope(made[part].unflatten(-1, (c.c_dim or 1, -1)).flatten(2, 3), c) for part in "qk")
    q, k = (turned.unflatten(2, (c.n_heads, -1)).flatten(-2) for turned in (q, k))
    return slow_attention(q, k, made["v"], c.head_dim**-0.5)


def slow_partial_rope(x, config):
    turned, rest = x[..., : config.rope_dim], x[..., config.rope_dim :]
    return torch.cat((slow_rope(turned) if config.rope_dim else turned, rest), dim=-1)


def slow_latent(attention, x):
    """DeepSeek-V2's equations 9 to 19, token by token if they differ from MHA."""
    c = attention.config
    down_q, down_kv, down_rope = attention.down_proj.weight.split([c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim])

    def norm(z, weight):
        return z / torch.sqrt((z**2).mean(-1, keepdim=True) + 1e-6) * weight

    c_q, c_kv = norm(x @ down_q.T, attention.q_norm.weight), norm(x @ down_kv.T, attention.kv_norm.weight)
    up_nope, up_rope = attention.q_up_proj.weight.split([c.n_heads * c.head_dim, c.n_heads * c.qk_rope_head_dim])
    up_k, up_v = attention.kv_up_proj.weight.split(c.n_heads * c.head_dim)

    def heads(z, width):
        return z.view(*x.shape[:2], -1, width)

    q_rope = slow_partial_rope(heads(c_q @ up_rope.T, c.qk_rope_head_dim), c)
    k_rope = slow_partial_rope(heads(x @ down_rope.T, c.qk_rope_head_dim), c).expand_as(q_rope)
    q = torch.cat((heads(c_q @ up_nope.T, c.head_dim), q_rope), dim=-1)
    k = torch.cat((heads(c_kv @ up_k.T, c.head_dim), k_rope), dim=-1)
    if c.qk_norm:
        q, k = norm(q, 1.0), norm(k, 1.0)
    return slow_attention(q, k, heads(c_kv @ up_v.T, c.head_dim), (c.head_dim + c.qk_rope_head_dim) ** -0.5)


def slow(attention, x):
    made = {
        MultiHeadAttention: slow_multi_head,
        TensorProductAttention: slow_tensor_product,
        LatentAttention: slow_latent,
    }
    attended = made[type(attention)](attention, x).flatten(-2)
    if attention.gate_proj is not None:
        attended = attended / (1 + torch.exp(-(x @ attention.gate_proj.weight.T)))
    return attended @ attention.out_proj.weight.T


OPTIONS = {
    "plain": (),
    "qk_norm": ("model.qk_norm=true",),
    "gate": ("model.output_gate=true",),
    "half_rope": ("model.rope_fraction=0.5",),
    "no_rope": ("model.rope_fraction=0",),
    "all": ("model.qk_norm=true", "model.output_gate=true", "model.rope_fraction=0.5"),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", PACKAGED)
def test_output_and_gradients_equal_the_formulas(model, options):
    torch.manual_seed(0)
    attention = wake_up(Transformer(small_network(model, *OPTIONS[options]))).double().blocks[0].attention
    x = torch.randn(2, T, 48, dtype=torch.float64, requires_grad=True)
    fast, expected = attention(x, torch.arange(T)[None], AttentionMask()), slow(attention, x)
    assert torch.allclose(fast, expected, atol=1e-5)
    probe = torch.randn_like(fast)
    inputs = [x, *attention.parameters()]
    for ours, theirs in zip(torch.autograd.grad(fast, inputs, probe, retain_graph=True),
                            torch.autograd.grad(expected, inputs, probe), strict=True):  # fmt: skip
        assert torch.allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("model", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("options", OPTIONS)
def test_multi_head_attention_is_tpa_with_fixed_head_factors(model, options):
    """The unification (section 3.3): outputs, and the gradients of the input and of every shared weight."""
    torch.manual_seed(0)
    theirs = wake_up(Transformer(small_network(model, *OPTIONS[options]))).blocks[0].attention
    ours = from_multi_head(theirs)
    assert ours.config.ranks == {"q": theirs.config.n_heads, "k": theirs.config.kv_heads, "v": theirs.config.kv_heads}
    x = torch.randn(2, T, 48, requires_grad=True)
    positions, probe = torch.arange(T)[None], torch.randn(2, T, 48)
    gradients = []
    for attention in (ours, theirs):
        out = attention(x, positions, AttentionMask())
        first = attention.factor_proj if attention is ours else attention.qkv_proj
        gate = [] if attention.gate_proj is None else [attention.gate_proj.weight]
        gradients.append((out, *torch.autograd.grad(out, [x, first.weight, attention.out_proj.weight, *gate], probe)))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert not any(p.requires_grad for name, p in ours.named_parameters() if name.startswith("a_"))


@pytest.mark.parametrize("c_dim", [None, 1, 3])
def test_rope_on_the_factors_equals_rope_on_the_product(c_dim):
    """Theorem 3.1, and C.1: with b turned, each of the D_c slices of D_b features of the product has turned."""
    torch.manual_seed(0)
    a, b = torch.randn(1, T, 5, 3).double(), torch.randn(1, T, 3, 8).double()
    c = None if c_dim is None else torch.randn(1, T, 3, c_dim).double()
    tables = rope_tables(torch.arange(T)[None], 8, 10000.0)
    turned_first = Factors(a, apply_rope(b, *tables), c).product()
    slices = Factors(a, b, c).product().unflatten(-1, (c_dim or 1, 8)).flatten(2, 3)
    turned_last = apply_rope(slices, *tables).unflatten(2, (5, -1)).flatten(-2)
    assert torch.allclose(turned_first, turned_last, atol=1e-6)
    assert torch.allclose(apply_rope(b, *tables), slow_rope(b), atol=1e-6)


@pytest.mark.parametrize(("d_qk", "d_v"), [(16, 16), (24, 16), (16, 24)])
@pytest.mark.parametrize("n_queries", [T, 3, 1])
def test_full_attention_equals_explicit_softmax(n_queries, d_qk, d_v):
    """Widths of values and keys may differ, and the queries may be the last few of the positions (a cache)."""
    torch.manual_seed(0)
    q, k = torch.randn(2, n_queries, 6, d_qk), torch.randn(2, T, 3, d_qk)
    v = torch.randn(2, T, 3, d_v)
    out = Full().attend([Dense(q, k, v)], AttentionMask(), 0.3)
    k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.3
    future = torch.arange(T)[None, :] > torch.arange(T - n_queries, T)[:, None]
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    assert torch.allclose(out, torch.einsum("bhts,bshe->bthe", weights, v), atol=1e-5)


@pytest.mark.parametrize("init", ["xavier", "reference"])
def test_factor_weights_start_within_their_bounds(init):
    torch.manual_seed(0)
    d_model, heads, width = 256, 9, 16
    config = TensorProductConfig(name="t6", head_dim=width, n_heads=heads, q_rank=6, k_rank=2, v_rank=3, init=init)
    attention = config.build(d_model, 0, Full())
    weights = dict(zip(attention.projected, attention.factor_weights(), strict=True))
    for part, rank in config.ranks.items():
        if init == "xavier":
            bounds = math.sqrt(6 / (d_model + rank * heads)), math.sqrt(6 / (d_model + rank * width))
        else:  # as the authors' code: on [d_model, H, R] and [d_model, R, D]
            bounds = math.sqrt(6 / ((d_model + heads) * rank)), math.sqrt(6 / ((d_model + rank) * width))
        for letter, bound in zip("ab", bounds, strict=True):
            assert 0.97 * bound < weights[f"{letter}_{part}"].abs().max() <= bound
    if init == "reference":
        view = torch.nn.init.xavier_uniform_(torch.empty(d_model, heads, 6))
        assert weights["a_q"].abs().max().item() == pytest.approx(view.abs().max().item(), rel=0.03)


def test_a_constant_factor_starts_with_the_spread_of_a_contextual_one():
    torch.manual_seed(0)
    x = unit_rms(torch.randn(1, 500, 256))
    for option, names in (("contextual_a", ("q", "k", "v")), ("contextual_b", ("q", "k", "v"))):
        made = {}
        for contextual in (True, False):
            config = TensorProductConfig(name="t6", head_dim=64, n_heads=40, **{option: contextual})
            factored = config.build(256, 0, Full()).project(x)
            letter = option[-1]
            made[contextual] = [getattr(getattr(factored, name), letter).std().item() for name in names]
        assert made[True] == pytest.approx(made[False], rel=0.2)


def test_blocks_start_as_the_identity_and_the_head_is_tied():
    net = Transformer(small_network("t6"))
    x = torch.randn(1, 5, 48)
    assert torch.equal(net.blocks[0](x, torch.arange(5)[None], AttentionMask()), x)
    assert net.head.weight is net.embedding.weight
    assert net.head.weight.abs().max() <= 48**-0.5


def test_grouped_heads_share_keys_in_order():
    """Query heads 0 and 1 use key head 0, heads 2 and 3 key head 1."""
    torch.manual_seed(0)
    attention = MultiHeadConfig(name="gqa", head_dim=8, n_heads=4, n_kv_heads=2).build(32, 0, Full())
    torch.nn.init.eye_(attention.out_proj.weight)
    x = torch.randn(1, 5, 32)
    before = attention(x, torch.arange(5)[None], AttentionMask()).view(5, 4, 8)
    with torch.no_grad():
        attention.qkv_proj.weight[4 * 8 + 8 : 4 * 8 + 16] += 0.5  # the second key head
    after = attention(x, torch.arange(5)[None], AttentionMask()).view(5, 4, 8)
    changed = (before != after).any(-1).any(0)
    assert changed.tolist() == [False, False, True, True]
