"""The numbers of arXiv 2501.06425 come out of the formulas."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.app import configured
from configs.errors import Mistakes
from model import counting
from model.attention.latent import LatentConfig
from model.cores.full import Full
from model.counting.match import decide, match_params
from model.transformer import SizeConfig, Transformer
from tests.model.helpers import MODELS, PACKAGED, small_network
from training.config import Config

PAPER_HEADS = {  # small, medium, large, xl
    "mha": (12, 16, 20, 25),
    "mqa": (23, 31, 39, 49),
    "gqa": (22, 30, 38, 48),
    "mla": (13, 23, 34, 49),
    "t6_kvonly": (22, 29, 37, 47),
    "t6": (34, 47, 61, 78),
}
CACHE_NUMBERS = {
    "mha": (1536, 3200),
    "gqa": (256, 256),
    "mqa": (128, 128),
    "mla": (288, 288),
    "t6": (392, 568),
    "t6_kvonly": (344, 444),
}


def network(*overrides):
    return configured(Config, ["tokenizer=gpt2", *overrides]).network()


@pytest.mark.parametrize("model", PAPER_HEADS)
def test_head_counts_are_the_papers(model):
    for size, heads in zip(("small", "medium", "large", "xl"), PAPER_HEADS[model], strict=True):
        net = network(f"model={model}", f"size={size}")
        assert net.attention.n_heads == heads
        # The closest count is the table's everywhere, except for TPA at small.
        exceptions = {("t6", "small"): 33, ("t6_kvonly", "small"): 21}
        assert match_params(net.attention, net.d_model).n_heads == exceptions.get((model, size), heads)


@pytest.mark.parametrize("model", CACHE_NUMBERS)
def test_cache_sizes_are_the_specifications(model):
    for size, numbers in zip(("small", "xl"), CACHE_NUMBERS[model], strict=True):
        assert counting.kv_numbers_per_token(network(f"model={model}", f"size={size}").attention) == numbers


@pytest.mark.parametrize(("size", "millions"), [("small", 124), ("medium", 353), ("large", 772), ("xl", 1555)])
def test_mha_has_the_papers_parameters(size, millions):
    assert round(counting.num_params(network("model=mha", f"size={size}")) / 1e6) == millions


def test_the_papers_heads_give_way_where_they_no_longer_match():
    assert network("model=t6", "size=small").attention.n_heads == 34
    assert network("model=t6", "size=small", "model.n_heads=7").attention.n_heads == 7
    wide = network("model=t6", "size=small", "model.q_rank=24")
    assert wide.attention.n_heads < 34
    assert wide.attention.num_params(768) == pytest.approx(4 * 768**2, rel=0.02)
    assert network("model=mha", "size=small", "size.d_model=512").attention.n_heads == 8


@pytest.mark.parametrize("model", MODELS)
def test_counted_flops_are_those_that_pytorch_counts(model):
    """PyTorch counts products as done: plain attention takes all T keys, and MLA's values padded to its keys'."""
    net, seq_len = small_network(model), 32
    built, tokens = Transformer(net), torch.randint(0, 300, (1, seq_len))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        built(tokens, tokens).backward()
    causal = net.n_layers * net.core.flops_per_token(net.attention, seq_len)
    all_keys = net.n_layers * 2 * net.attention.n_heads * 2 * net.attention.qk_head_dim * seq_len
    ours = counting.training_flops_per_token(net, seq_len) + 3 * (all_keys - causal)
    assert counter.get_total_flops() / seq_len == pytest.approx(ours, rel=2e-3)  # the counted norm weights of MLA


def test_flops_grow_with_length_only_through_attention():
    net = network("model=mha", "size=small")
    short, long = (counting.training_flops_per_token(net, n) for n in (1023, 2047))
    assert long - short == pytest.approx(3 * net.n_layers * 4 * 768 * 512)


VARIANT_CACHES = {  # the specification's formulas, with H heads, head_dim D, ranks R_k and R_v
    "t6": lambda h, d, rk, rv: (rk + rv) * (h + d),
    "t6_kvonly": lambda h, d, rk, rv: (rk + rv) * (h + d),
    "t6_noncontextual_a": lambda h, d, rk, rv: (rk + rv) * d,
    "t6_noncontextual_b": lambda h, d, rk, rv: (rk + rv) * h,
    "t6_shared_b": lambda h, d, rk, rv: rk * (2 * h + d),
    "t6_sigmoid_a": lambda h, d, rk, rv: (rk + rv) * (h + d),
    "t6_softmax_a": lambda h, d, rk, rv: (rk + rv) * (h + d),
    "t6_third_order": lambda h, d, rk, rv: (rk + rv) * (h + d // 4 + 4),
}


@pytest.mark.parametrize("model", VARIANT_CACHES)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_variants_have_the_caches_and_parameters_of_the_specification(model, rank):
    net = network(f"model={model}", "size=small", f"model.k_rank={rank}", f"model.v_rank={rank}")
    a = net.attention
    assert counting.kv_numbers_per_token(a) == VARIANT_CACHES[model](a.n_heads, 64, rank, rank)
    if model in ("t6", "t6_sigmoid_a", "t6_softmax_a"):
        assert a.num_params(768) == 768 * (6 + 2 * rank) * (a.n_heads + 64) + 768 * a.n_heads * 64
    if model == "t6_kvonly":
        assert a.num_params(768) == 768 * 2 * rank * (a.n_heads + 64) + 2 * 768 * a.n_heads * 64


@pytest.mark.parametrize("model", MODELS)
def test_matching_by_flops_is_the_closest_head_count(model):
    net = network(f"model={model}", "size=medium", "size.match=flops", "trainer.seq_len=4096")
    costs = {}
    for step in (-1, 0, 1):
        a = net.attention.replace(n_heads=net.attention.n_heads + step * net.attention.head_multiple)
        costs[step] = abs(counting.over_mha(replace(net, attention=a), 4096)["flops"] - 1)
    assert costs[0] == min(costs.values()) < 0.05


@pytest.mark.parametrize("model", ["t6", "t6_kvonly", "gqa", "mla", "t6_shared_b", "t6_noncontextual_a"])
def test_matching_by_cache_turns_the_ranks_and_keeps_the_parameters(model):
    net = network(f"model={model}", "size=medium", "size.match=kv_bytes")
    ratios = counting.over_mha(net, 1024)
    assert ratios["kv_bytes"] == pytest.approx(1, abs=0.08) and ratios["params"] == pytest.approx(1, abs=0.05)
    if model == "t6":
        assert net.attention.k_rank == net.attention.v_rank > 2


@pytest.mark.parametrize(
    "overrides", [[], ["core=sequence_tensor"], ["core=sequence_tensor", "core.full_every=2"], ["core=sliding_window"]]
)
def test_the_ratio_of_caches_is_that_of_what_is_kept(overrides):
    """A folded T6 keeps more than its factors."""
    kept, by_mha = (network(f"model={model}", "size=medium", *more) for model, more in (("t6", overrides), ("mha", [])))
    ratio = counting.summary(kept, 1024)["attention_kv_bytes_over_mha"]
    assert ratio == counting.kv_bytes_per_token(kept) / counting.kv_bytes_per_token(by_mha)
    assert ratio > 0.8 if "core=sequence_tensor" in overrides else ratio < 0.3


def test_what_is_missing_or_wrong_once_the_size_has_decided():
    size, ranks = SizeConfig(name="odd", n_layers=1, d_model=64), {"q_lora_rank": 8, "kv_lora_rank": 0}
    for by_size, mistakes in (
        ({}, [f"model.{key} is null, and" for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim")]),
        ({"odd": ranks}, ["model.qk_rope_head_dim is null, and model.by_size has no value for this size: set it"]),
        ({"default": ranks | {"qk_rope_head_dim": 5}}, ["model.kv_lora_rank=0: must be at least 1"]),
        ({"default": ranks | {"kv_lora_rank": 4}, "odd": {"qk_rope_head_dim": 5}}, ["model.qk_rope_head_dim=5: RoPE"]),
    ):
        with pytest.raises(Mistakes) as found:
            decide(LatentConfig(name="mla", by_size=by_size), Full(), size, seq_len=128)
        for line, start in zip(found.value.errors, mistakes, strict=True):
            assert line.startswith(start)


@pytest.mark.parametrize("model", PACKAGED)
def test_the_activation_estimate_is_near_what_pytorch_keeps(model):
    """Everything that autograd saves in a training step, each storage once, weights left out; fp32."""
    net, tokens = small_network(model, "size.n_layers=3", "tokenizer.vocab_size=512"), torch.randint(0, 300, (2, 64))
    built, kept = Transformer(net), {}
    weights = {p.untyped_storage().data_ptr() for p in built.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built(tokens, tokens)
    measured = sum(size for size, _ in kept.values()) / tokens.numel()
    assert counting.activation_bytes_per_token(net, bytes_per_number=4) == pytest.approx(measured, rel=0.25)
