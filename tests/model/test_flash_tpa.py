"""Factor-space attention against its formulas: the blocked path, the gradients, the core in a model."""

import sys

import pytest
import torch

import train
from configs.app import compose
from configs.load import load
from model.attention.base import Dense, unturned
from model.attention.tensor_product import Factored, Factors, TensorProductConfig
from model.cores import factor_space, factor_training
from model.cores.base import AttentionMask
from model.cores.factor_space import reference
from model.cores.factor_training import FactorSpaceAttention
from model.cores.flash_tpa import FlashTPA, attend, flash_tpa, load_kernels, plan
from model.cores.sdpa import SDPA
from model.transformer import Transformer
from tests.model.helpers import PACKAGED, small_config, small_network, wake_up
from training.metrics import read_metrics

FACTORED = [model for model in PACKAGED if model.startswith("t6")]


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
    for factors in (factored.k, factored.v):
        for x in (factors.a, factors.b, factors.c):
            for row, start in enumerate([] if x is None else starts.tolist()):
                x[row, start + factored.q.b.size(1) :] = torch.nan


def plain(factored: Factored, scale: float, causal: bool) -> torch.Tensor:
    """Softmax attention over explicit q, k and v."""
    dense = factored.materialize()
    logits = torch.einsum("bthd,bshd->bhts", dense.q, dense.k) * scale
    if causal:
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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_equals_attention_over_explicit_keys_and_values(shape, causal):
    torch.manual_seed(0)
    n_queries, n_keys, heads, ranks, *rest = SHAPES[shape]
    factored = random_factors(2, n_queries, n_keys, heads, ranks, *rest[:3], times=rest[3])
    assert torch.allclose(reference(factored, 0.2, causal), plain(factored, 0.2, causal), atol=1e-5 * rest[3] ** 2)


@pytest.mark.parametrize("few_rows", [0, 512])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_blocked_path_equals_the_reference(monkeypatch, shape, causal, ragged, few_rows):
    """Over blocks smaller than the shapes, beside NaN beyond the rows' ends, and with a row of one key."""
    torch.manual_seed(0)
    for name, value in (("DECODE_KEYS", 8), ("SPLIT_KEYS", 3), ("PREFILL_BLOCK", 8), ("FEW_ROWS", few_rows)):
        monkeypatch.setattr(factor_space, name, value)
    n_queries, n_keys, heads, ranks, *rest = SHAPES[shape]
    factored = random_factors(3, n_queries, n_keys, heads, ranks, *rest[:3], times=rest[3])
    past = n_keys - n_queries
    starts = torch.tensor([past, past // 2, 0]) if ragged else None
    if ragged:
        spoil(factored, starts)
    expected = reference(factored, 0.2, causal, starts)
    assert expected.isfinite().all()
    assert torch.allclose(flash_tpa(factored, 0.2, causal, starts), expected, atol=2e-5 * rest[3] ** 2)


def test_half_precision_comes_close():
    torch.manual_seed(0)
    for n_queries in (1, 300):
        factored = random_factors(2, n_queries, 300, 4, (6, 2, 2), 16, 16, dtype=torch.bfloat16)
        out = flash_tpa(factored, 0.25)
        assert out.dtype == torch.bfloat16
        assert (out - reference(factored, 0.25)).norm() < 0.01 * out.norm()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ranks", [(6, 1, 1), (3, 2, 3)])
@pytest.mark.parametrize("n_queries", [1, 5, 13])
def test_gradients_of_every_factor_equal_the_references(monkeypatch, n_queries, ranks, causal):
    torch.manual_seed(0)
    monkeypatch.setattr(factor_training, "BLOCK_NUMBERS", 200)
    factored = random_factors(2, n_queries, 13, 5, ranks, 10, 6, dtype=torch.float64)
    tensors = [x.requires_grad_() for part in (factored.q, factored.k, factored.v) for x in (part.a, part.b)]
    expected = reference(factored, 0.3, causal)
    out = FactorSpaceAttention.apply(*tensors, 0.3 / (ranks[0] * ranks[1]), causal)
    assert torch.allclose(out, expected)
    probe = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, tensors, probe), torch.autograd.grad(expected, tensors, probe),
                            strict=True):  # fmt: skip
        assert torch.allclose(ours, theirs)


OPTIONS = [("model.qk_norm=true", "model.output_gate=true", "model.rope_fraction=0.5"), ()]


@pytest.mark.parametrize("training", ["factors", "materialized"])
@pytest.mark.parametrize("options", OPTIONS, ids=["options", "plain"])
@pytest.mark.parametrize("model", FACTORED)
def test_a_model_has_the_logits_and_gradients_that_it_has_through_sdpa(model, options, training):
    torch.manual_seed(0)
    net = wake_up(Transformer(small_network(model, *options)))
    tokens = torch.randint(0, 300, (2, 11))
    results = []
    for core in (net.config.core, FlashTPA(training=training)):
        for block in net.blocks:
            block.attention.core = core
        net.zero_grad()
        loss = net(tokens, tokens)
        loss.backward()
        with torch.no_grad():
            results.append((net(tokens), loss, *(p.grad for p in net.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", ["factors", "materialized"])
def test_whatever_is_trained_gets_its_gradient(training):
    """Also where the queries are frozen."""
    torch.manual_seed(0)
    factored = random_factors(2, 9, 9, 3, (2, 2, 2), 8, 8)
    trained = factored.v.a.requires_grad_()
    out = FlashTPA(training=training)(factored, unturned, None, AttentionMask(), 0.3)
    (ours,) = torch.autograd.grad(out.square().sum(), trained)
    (expected,) = torch.autograd.grad(reference(factored, 0.3).square().sum(), trained)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_a_few_steps_of_training_give_the_losses_of_sdpa():
    losses = []
    for core in (["core=sdpa"], ["core=flash_tpa"], ["core=flash_tpa", "core.training=factors"]):
        torch.manual_seed(0)
        net = Transformer(small_network("t6", *core))
        tokens = torch.randint(0, 300, (4, 33))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(6):
            loss = net(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[2] == pytest.approx(losses[0], abs=1e-4)


def test_autocast_trains_in_factor_space_too():
    torch.manual_seed(0)
    net = wake_up(Transformer(small_network("t6_softmax_a", "core=flash_tpa", "core.training=factors")))
    tokens = torch.randint(0, 300, (2, 16))
    exact = net(tokens, tokens) / tokens.numel()
    net.autocast_dtype = torch.bfloat16
    rough = net(tokens, tokens) / tokens.numel()
    rough.backward()
    assert abs(exact - rough) < 0.02 * exact
    with torch.no_grad():
        assert abs(net(tokens, tokens) / tokens.numel() - exact) < 0.02 * exact


def test_the_operation_is_one_that_torch_compile_can_call():
    factored = random_factors(2, 1, 9, 3, (2, 2, 1), 8, 6)
    arguments = [x for part in (factored.q, factored.k, factored.v) for x in (part.a, part.b, part.c)]
    torch.library.opcheck(attend, (*arguments, 0.3, True, torch.tensor([8, 3])))


def config(width, heads, *ranks) -> TensorProductConfig:
    return TensorProductConfig("t6", width, heads, **dict(zip(("q_rank", "k_rank", "v_rank"), ranks, strict=True)))


PAPERS_RATIOS = [((6, 2, 2), 47, 1.22), ((6, 1, 1), 47, 0.61), ((16, 1, 1), 32, 0.875)]


@pytest.mark.parametrize(("ranks", "heads", "ratio"), PAPERS_RATIOS)
def test_the_cost_model_has_the_papers_ratios(ranks, heads, ratio):
    """Appendix A.4: multiply-adds of a query and a key in factor space over those of MHA with as many heads."""
    costs = plan(config(64, heads, *ranks), "cpu")
    assert costs.factors_forward / costs.materialized_forward == pytest.approx(ratio, abs=0.005)


def test_wide_heads_at_rank_1_train_in_factor_space_and_rank_2_does_not():
    wide, papers = config(256, 16, 4, 1, 1), config(64, 47, 6, 2, 2)
    assert plan(wide, "cpu").choice == "factors"
    assert plan(papers, "cpu").choice == "materialized"
    assert FlashTPA().flops_per_token(papers, 99) == SDPA().flops_per_token(papers, 99)
    assert FlashTPA(training="factors").flops_per_token(wide, 99) < SDPA().flops_per_token(wide, 99)


def test_what_it_cannot_do_is_refused_by_name(monkeypatch):
    core = FlashTPA()
    with pytest.raises(ValueError, match="model=mha: has no factors"):
        core.check(small_config("mha").model, "cpu", torch.float32)
    with pytest.raises(TypeError, match="got Dense"):
        core(Dense(*torch.randn(3, 1, 4, 2, 8)), None, None, AttentionMask(), 0.3)
    factored = random_factors(1, 4, 4, 2, (1, 1, 1), 8, 8)
    with pytest.raises(ValueError, match="document_mask"):
        core(factored, None, None, AttentionMask(documents=torch.zeros(1, 4)), 0.3)
    assert list(FlashTPA(training="fast").errors()) == ["core.training='fast': must be auto, factors or materialized"]
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="pip install triton"):
        load_kernels()


def test_a_run_trains_with_it(small_run, tmp_path, capsys):
    losses = {}
    for core in ("sdpa", "flash_tpa"):
        overrides = [*small_run, f"core={core}", f"run.dir={tmp_path}/{core}", "trainer.max_steps=2"]
        assert train.main(load(compose("train", overrides))) == 0
        losses[core] = [line["train/loss"] for line in read_metrics(tmp_path / core / "metrics.jsonl")]
        said = "flash_tpa trains through explicit keys and values (core.training=auto)"
        assert (said in " ".join(capsys.readouterr().out.split())) == (core == "flash_tpa")
    assert len(losses["sdpa"]) == 2 and losses["flash_tpa"] == pytest.approx(losses["sdpa"], abs=1e-4)
