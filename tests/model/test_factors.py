"""Attention from factors against its formulas: the blocked path, and the kernel in a model."""

import sys

import pytest
import torch

import train
from configs.app import configured
from model.attention.base import Dense
from model.attention.tensor_product import Factored, Factors
from model.cores.full import Full
from model.cores.kernels import factors
from model.mask import AttentionMask
from model.transformer import Transformer
from tests.model.helpers import FACTORED, small_config, small_network, wake_up
from tests.model.references import factor_attention
from training.config import Config
from training.jsonl import read_lines


def random_factors(batch, n_queries, n_keys, heads, ranks, width, v_width, c=None, dtype=torch.float32, times=1.0):
    """`ranks` (q, k, v), 0 for a dense query; c: the third order's D_c."""

    def part(tokens, rank, width):
        a = torch.randn(batch, tokens, heads, rank) if rank else None
        b = times * torch.randn(batch, tokens, rank or heads, width)
        return Factors(*(None if x is None else x.to(dtype) for x in (
            a, b, None if c is None else torch.randn(batch, tokens, rank, c)
        )))  # fmt: skip

    return Factored(part(n_queries, ranks[0], width), part(n_keys, ranks[1], width), part(n_keys, ranks[2], v_width))


def spoil(factored: Factored, starts) -> None:
    """NaN beyond each row's last query."""
    for part in (factored.k, factored.v):
        for x in (part.a, part.b, part.c):
            for row, start in enumerate([] if x is None else starts.tolist()):
                x[row, start + factored.q.b.size(1) :] = torch.nan


def plain(factored: Factored, scale: float) -> torch.Tensor:
    """Causal softmax attention over explicit q, k and v."""
    dense = factored.materialize()
    logits = torch.einsum("bthd,bshd->bhts", dense.q, dense.k) * scale
    logits += torch.full(logits.shape[-2:], -torch.inf).triu(1 + logits.size(-1) - logits.size(-2))
    return torch.einsum("bhts,bshe->bthe", logits.softmax(-1), dense.v)


# name: n_queries, n_keys, heads, ranks, D, E, D_c, times
SHAPES = {
    "decode": (1, 37, 5, (6, 2, 2), 16, 16, None, 1.0),
    "decode_1_1": (1, 37, 3, (4, 1, 1), 8, 8, None, 1.0),
    "one_token": (1, 1, 3, (2, 1, 1), 8, 8, None, 1.0),
    "large_logits": (2, 37, 3, (3, 2, 2), 16, 16, None, 12.0),
    "odd": (7, 37, 5, (3, 2, 3), 10, 7, None, 1.0),
    "wide_values": (7, 37, 5, (3, 3, 1), 6, 9, None, 1.0),
    "dense_q": (7, 37, 5, (0, 2, 2), 10, 10, None, 1.0),
    "third_order": (7, 37, 5, (2, 2, 2), 4, 4, 3, 1.0),
    "prefill": (37, 37, 2, (3, 2, 2), 8, 8, None, 1.0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_equals_attention_over_explicit_keys_and_values(shape):
    torch.manual_seed(0)
    n_queries, n_keys, heads, ranks, *rest = SHAPES[shape]
    factored = random_factors(2, n_queries, n_keys, heads, ranks, *rest[:3], times=rest[3])
    ours, wanted = factor_attention(factored, 0.2), plain(factored, 0.2)
    assert torch.allclose(ours, wanted, atol=1e-5 * rest[3] ** 2)


@pytest.mark.parametrize("few", [0, 512])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_blocked_path_equals_the_reference(monkeypatch, shape, ragged, few):
    """Over blocks smaller than the shapes, next to NaN beyond the rows' ends, and with a row of one key."""
    torch.manual_seed(0)
    for name, value in (("DECODE_KEYS", 8), ("SPLIT_KEYS", 3), ("FEW_COLUMNS", few)):
        monkeypatch.setattr(factors, name, value)
    n_queries, n_keys, heads, ranks, *rest = SHAPES[shape]
    factored = random_factors(3, n_queries, n_keys, heads, ranks, *rest[:3], times=rest[3])
    past = n_keys - n_queries
    starts = torch.tensor([past, past // 2, 0]) if ragged else None
    if ragged:
        spoil(factored, starts)
    expected = factor_attention(factored, 0.2, starts)
    assert expected.isfinite().all()
    ours = factors.attend(factored, 0.2, starts)
    assert torch.allclose(ours, expected, atol=2e-5 * rest[3] ** 2)


def test_half_precision_comes_close():
    torch.manual_seed(0)
    for n_queries in (1, 300):
        factored = random_factors(2, n_queries, 300, 4, (6, 2, 2), 16, 16, dtype=torch.bfloat16)
        out = factors.attend(factored, 0.25)
        assert out.dtype == torch.bfloat16
        assert (out - factor_attention(factored, 0.25)).norm() < 0.01 * out.norm()


OPTIONS = [("model.qk_norm=true", "model.output_gate=true", "model.rope_fraction=0.5"), ("model.rope_fraction=0",), ()]


@pytest.mark.parametrize("options", OPTIONS, ids=["options", "no rope", "plain"])
@pytest.mark.parametrize("model", FACTORED)
def test_a_model_has_the_logits_that_it_has_through_explicit_keys(model, options):
    """And, where gradients go through explicit keys with either kernel, the same gradients to the bit."""
    torch.manual_seed(0)
    net = wake_up(Transformer(small_network(model, *options)))
    tokens = torch.randint(0, 300, (2, 11))
    logits, gradients = [], []
    for core in (Full(), Full(kernel="factors")):
        for block in net.blocks:
            block.attention.core = core
        net.zero_grad()
        net(tokens, tokens).backward()
        gradients.append([p.grad for p in net.parameters()])
        with torch.no_grad():
            logits.append(net.logits(tokens))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(*logits) and all(map(torch.equal, *gradients))


def test_whatever_is_trained_gets_its_gradient():
    """Also if the queries are frozen."""
    torch.manual_seed(0)
    factored = random_factors(2, 9, 9, 3, (2, 2, 2), 8, 8)
    trained = factored.v.a.requires_grad_()
    out = Full(kernel="factors").attend([factored], AttentionMask(), 0.3)
    (ours,) = torch.autograd.grad(out.square().sum(), trained)
    (expected,) = torch.autograd.grad(factor_attention(factored, 0.3).square().sum(), trained)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_the_operation_is_one_that_torch_compile_can_call():
    factored = random_factors(2, 1, 9, 3, (2, 2, 1), 8, 6)
    torch.library.opcheck(factors.flash_tpa, (*factored.tensors(), 0.3, torch.tensor([8, 3]), True))


def test_what_it_cannot_do_is_refused_by_name(monkeypatch):
    core, factored = Full(kernel="factors"), random_factors(1, 4, 4, 2, (1, 1, 1), 8, 8)
    with pytest.raises(ValueError, match="core.kernel=factors: model=mha has no factors to attend from; use"):
        core.check(small_config("mha").model, "cpu", torch.float32)
    with pytest.raises(TypeError, match="got Dense"):
        core.attend([Dense(*torch.randn(3, 1, 4, 2, 8))], AttentionMask(), 0.3)
    for mask in (AttentionMask(documents=torch.zeros(1, 4)), AttentionMask(causal=False)):
        with pytest.raises(ValueError, match="is causal and cannot mask documents; use core.kernel=sdpa"):
            core.attend([factored], mask, 0.3)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="pip install triton, or use core.kernel=sdpa"):
        core.check(small_config("t6").model, "cuda", torch.float32)


def test_a_run_trains_with_it(small_run, tmp_path):
    losses = {}
    for kernel in ("sdpa", "factors"):
        overrides = [*small_run, f"core.kernel={kernel}", f"run.dir={tmp_path}/{kernel}", "trainer.max_steps=2"]
        assert train.main(configured(Config, overrides)) == 0
        lines = read_lines(tmp_path / kernel / "metrics.jsonl")
        losses[kernel] = [[line[key] for line in lines if key in line] for key in ("train/loss", "val/loss")]
    (train_loss, val_loss), (by_factors, val_by_factors) = losses.values()
    assert len(train_loss) == 2 and by_factors == train_loss
    assert val_by_factors == pytest.approx(val_loss, abs=1e-4)
