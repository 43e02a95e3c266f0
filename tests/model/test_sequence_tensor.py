"""Attention over a folded sequence: the properties that its definition promises, against the formulas' loops."""

from math import prod

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.attention.base import Dense
from model.attention.multi_head import MultiHeadConfig
from model.cores.folding import Axis, auto_fold
from model.cores.full import Full
from model.cores.sequence_tensor import SequenceTensor
from model.mask import AttentionMask
from model.rope import apply_rope, rope_tables
from tests.model.references import folded_attention, kronecker_attention, shared_hop

HEADS, WIDTH, SCALE = 2, 4, 0.6
FOLDS = [
    ([7], 7),
    ([3, 4], 12),
    ([3, 4], 10),
    ([3, 4], 17),
    ([4, 1], 11),
    ([2, 3, 2], 12),
    ([2, 3, 2], 11),
    ([2, 2, 1], 9),
]


def rotate(dense: Dense, positions) -> Dense:
    tables = rope_tables(positions, WIDTH, 100.0)
    return Dense(*(apply_rope(x, *tables) for x in (dense.q, dense.k)), dense.v)


def turn(x, coordinate: int):
    return apply_rope(x[None, None], *rope_tables(torch.tensor([[coordinate]]), WIDTH, 100.0))[0, 0]


def random_qkv(seq_len: int, rows: int = 2, dtype=torch.float64, groups: int = HEADS) -> Dense:
    torch.manual_seed(seq_len)
    shapes = ((HEADS, WIDTH), (groups, WIDTH), (groups, WIDTH))
    return Dense(*(torch.randn(rows, seq_len, *shape, dtype=dtype).requires_grad_() for shape in shapes))


def attend(core, dense: Dense, causal: bool = True):
    views = [rotate(dense, places) for places in core.hops(torch.arange(dense.q.size(1))[None])]
    return core.attend(views, AttentionMask(causal=causal), SCALE)


def inputs(dense: Dense):
    return dense.q, dense.k, dense.v


def compare(ours, theirs, dense: Dense, **tolerance):
    """Outputs, and gradients of everything that went in."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), inputs(dense)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(("fold", "seq_len"), FOLDS)
def test_the_causal_form_equals_the_loops(fold, seq_len):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        dense = random_qkv(seq_len, dtype=dtype)
        # the last axis grows: more positions on it, if that is what the length asks for
        grown = [*fold[:-1], max(fold[-1], seq_len)]
        slow = torch.stack([folded_attention(*row, grown, SCALE, turn) for row in zip(*inputs(dense), strict=True)])
        compare(attend(SequenceTensor(fold=fold), dense), slow, dense, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("fold", [[6], [3, 4], [4, 3], [2, 3, 2]])
def test_shared_scores_are_the_kronecker_product(fold):
    """The paper's form: hops whose slices share one matrix are attention by the matrices' Kronecker product."""
    dense = random_qkv(prod(fold), rows=1)
    values = dense.v
    for d, places in enumerate(SequenceTensor(fold=fold).hops(torch.arange(prod(fold))[None])):
        turned, axis = rotate(dense, places), Axis(1, prod(fold[d + 1 :]), fold[d], prod(fold[:d]))
        values = shared_hop(axis, turned.q, turned.k, values, SCALE)
    slow = kronecker_attention(dense.q[0], dense.k[0], dense.v[0], fold, SCALE, turn)[None]
    compare(values, slow, dense, atol=1e-6, rtol=1e-5)


def test_each_slice_of_a_bidirectional_fold_has_scores_of_its_own():
    dense, core = random_qkv(12, rows=1), SequenceTensor(fold=[3, 4])
    blocks = [Dense(*(x[:, i : i + 3] for x in inputs(dense))) for i in range(0, 12, 3)]
    closed = torch.cat([attend(Full(), block, causal=False) for block in blocks], dim=1)
    slices = [Dense(dense.q[:, i::3], dense.k[:, i::3], closed[:, i::3]) for i in range(3)]
    wanted = torch.stack([attend(Full(), s, causal=False) for s in slices], dim=2).flatten(1, 2)
    torch.testing.assert_close(attend(core, dense, causal=False), wanted)


@pytest.mark.parametrize(("fold", "seq_len"), [*FOLDS, ([3, 2, 3, 2], 31)])
def test_nothing_leaks_and_everything_past_is_reached(fold, seq_len):
    core, dense = SequenceTensor(fold=fold), random_qkv(seq_len, rows=1, dtype=torch.float32)
    with torch.no_grad():
        before = attend(core, dense)
        for t in range(seq_len):
            for name in ("q", "k", "v"):
                kept = getattr(dense, name)[:, t].clone()
                getattr(dense, name)[:, t] += torch.randn_like(kept)
                changed = (attend(core, dense) != before).flatten(2).any(-1)[0]
                getattr(dense, name)[:, t] = kept
                assert not changed[:t].any(), (name, t)
                assert name == "q" or changed[t + 1 :].all(), (name, t)


@pytest.mark.parametrize(("fold", "seq_len"), [([7], 7), ([3, 4], 11), ([2, 3, 2], 13)])
def test_gradients_reach_everything_past_and_nothing_else(fold, seq_len):
    core, dense = SequenceTensor(fold=fold), random_qkv(seq_len, rows=1)
    out = attend(core, dense)
    for t in range(seq_len):
        q, k, v = torch.autograd.grad(out[:, t].sum(), inputs(dense), retain_graph=True)
        for name, gradient in (("q", q), ("k", k), ("v", v)):
            reached = (gradient != 0).flatten(2).any(-1)[0]
            assert not reached[t + 1 :].any(), (name, t)
            assert name == "q" or t == 0 or reached[:t].all(), (name, t)


@pytest.mark.parametrize("groups", [1, HEADS])
def test_a_fold_of_one_axis_is_full_attention_to_the_bit(groups):
    for seq_len in (1, 2, 13):
        dense = random_qkv(seq_len, dtype=torch.float32, groups=groups)
        for fold in ([seq_len], [seq_len, 1], [64, 4]):
            compare(attend(SequenceTensor(fold=fold), dense), attend(Full(), dense), dense, atol=0, rtol=0)
        other = attend(SequenceTensor(fold=[1, seq_len]), dense)
        compare(other, attend(Full(), dense), dense, atol=1e-5, rtol=1e-5)


def test_key_heads_are_shared():
    dense = random_qkv(11, groups=1)
    spread = Dense(dense.q, *(x.repeat_interleave(HEADS, dim=2) for x in (dense.k, dense.v)))
    core = SequenceTensor(fold=[3, 4])
    compare(attend(core, dense), attend(core, spread), dense, atol=1e-6, rtol=1e-5)


def test_global_positions_turn_by_the_place_in_the_sequence():
    dense, core = random_qkv(10), SequenceTensor(fold=[3, 4], rope="global")
    turned = rotate(dense, torch.arange(10)[None])
    torch.testing.assert_close(attend(core, dense), core.attend([turned, turned], AttentionMask(), SCALE))
    assert not torch.allclose(attend(core, dense), attend(SequenceTensor(fold=[3, 4]), dense))


def test_bf16_stays_close_to_fp32_where_scores_are_large():
    """The score that carries the diagonal must not be rounded to bf16: at 40 that would be an error of 0.1."""
    dense = random_qkv(12, dtype=torch.float32)
    rough = Dense(*((x * 3).bfloat16() for x in inputs(dense)))
    exact = Dense(*(x.float() for x in inputs(rough)))
    core, whole, mask = SequenceTensor(fold=[1, 12]), Full(), AttentionMask()
    wanted = whole.attend([exact], mask, 1.0)
    ours = (core.attend([rough, rough], mask, 1.0).float() - wanted).abs().max()
    sdpa = (whole.attend([rough], mask, 1.0).float() - wanted).abs().max()
    assert ours < 2 * sdpa + 0.01


@pytest.mark.parametrize("fold", [[8], [4, 8], [8, 8], [2, 4, 8]])
def test_multiply_adds_grow_with_the_sum_of_the_axes(fold):
    """As PyTorch counts them for the plain path, which computes what a mask hides too."""
    seq_len = prod(fold)
    dense, core = random_qkv(seq_len, rows=1, dtype=torch.float32), SequenceTensor(fold=fold)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        attend(core, dense)
    carrying = sum(fold[1:])  # hops with the diagonal's two features: 8 wide instead of 4
    plain = fold[0] + sum(fold[:-1])  # the first open hop, and the closed ones
    assert counter.get_total_flops() / seq_len == 2 * HEADS * (2 * WIDTH * plain + 2 * 8 * carrying)
    config = MultiHeadConfig(name="mha", head_dim=WIDTH, n_heads=HEADS)
    keys = sum((n + 1) / 2 for n in fold) + sum(fold[:-1])
    assert core.flops_per_token(config, seq_len) == 2 * HEADS * 2 * WIDTH * keys


def test_auto_folds():
    assert [auto_fold(n) for n in (256, 512, 1000, 4096, 65536, 131072)] == [
        [16, 16], [16, 32], [32, 32], [64, 64], [256, 256], [352, 373],
    ]  # fmt: skip
    assert auto_fold(5) == [16, 1]
