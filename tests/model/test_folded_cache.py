"""Decoding over a folded sequence equals the full pass, token by token and in chunks, across the ends of blocks."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.transformer import Transformer
from tests.model.helpers import config_of, small_network, wake_up

FOLDS = ["[7]", "[3,4]", "[4,1]", "[2,3,2]"]


def network(model: str, fold: str, *overrides: str) -> Transformer:
    torch.manual_seed(0)
    return wake_up(Transformer(small_network(model, "core=sequence_tensor", f"core.fold={fold}", *overrides))).eval()


def decode(net: Transformer, tokens, chunks: list[int], dtype=None):
    cache = net.new_cache(len(tokens), dtype=dtype)
    pieces = [net.decode(piece, cache, last=False) for piece in tokens.split(chunks, dim=1)]
    return torch.cat(pieces, dim=1), cache


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("model", ["gqa", "t6"])
def test_chunks_of_any_size_equal_the_full_pass(model, fold):
    net, tokens = network(model, fold), torch.randint(0, 300, (2, 15))
    whole = net.logits(tokens)
    for chunks in ([1] * 15, [4, 1, 1, 7, 1, 1], [15], [5, 10]):
        torch.testing.assert_close(decode(net, tokens, chunks)[0], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fold", [[8, 8], [4, 16], [4, 4, 4]])
def test_a_token_costs_what_its_axes_hold(fold):
    """Multiply-adds of scores and values over a whole sequence, as PyTorch counts them: no more than keys are read."""
    net, seq_len = network("mha", str(fold).replace(" ", ""), "size.n_layers=1"), math.prod(fold)
    tokens = torch.randint(0, 300, (1, seq_len))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decode(net, tokens, [1] * seq_len)
    with FlopCounterMode(display=False) as rest, sdpa_kernel(SDPBackend.MATH):
        for token in tokens.split(1, dim=1):
            net.logits(token)  # attends only to itself
    config, core = net.config.attention, net.config.core
    a_key = 2 * 2 * config.n_heads * config.head_dim
    keys = (counter.get_total_flops() - rest.get_total_flops()) / a_key / seq_len
    inner, last = core.fold[:-1], core.fold[-1]
    # On average half of every axis, and each block once more, whole, when it is folded.
    assert keys == pytest.approx(sum((n + 1) / 2 + n for n in inner) + (last + 1) / 2 - 1, rel=0.15)


@pytest.mark.parametrize("fold", ["[3,4]", "[2,3,2]"])
def test_rows_of_different_lengths(fold):
    net, prompts = network("mha", fold), [torch.randint(0, 300, (n,)).tolist() for n in (2, 9, 5)]
    together = net.generate(prompts, 8, chunk=4)
    assert together == net.generate(prompts, 8, use_cache=False)
    assert together == [net.generate([prompt], 8)[0] for prompt in prompts]


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("model", ["gqa", "mla", "t6", "t6_third_order"])
def test_the_bytes_are_the_counted_ones_and_those_of_unfinished_blocks(model, fold):
    net = network(model, fold, "size.n_layers=1")
    cache = decode(net, torch.randint(0, 300, (2, 7)), [7], torch.bfloat16)[1]
    config, core = net.config.attention, net.config.core
    last = len(core.fold)
    per_token = sum(
        t.nbytes for name, p in cache.layers[0].parts.items() if name.endswith(f"_{last}") for t in p.tensors()
    )
    counted = sum(torch.Size(shape).numel() for shape in core.cache_shapes(config).values())
    assert per_token == 2 * cache.batch * cache.capacity * counted
    blocks = {p.values.size(1) for name, p in cache.layers[0].parts.items() if not name.endswith(f"_{last}")}
    assert blocks == {torch.Size(core.fold[:d]).numel() for d in range(1, last)}


def test_tpa_keeps_its_keys_as_factors():
    config = config_of("t6", "size=small", "core=sequence_tensor")
    shapes = config.core.cache_shapes(config.model)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 2372  # 392 without the fold


def test_what_its_cache_cannot_do_is_refused():
    net, tokens = network("mha", "[3,4]"), torch.randint(0, 300, (1, 8))
    with pytest.raises(ValueError, match="closed values are not quantised"):
        net.new_cache(1, dtype=torch.int8)
    cache = decode(net, tokens, [8])[1]
    cache.set_lengths(4)
    with pytest.raises(ValueError, match=r"cannot go back, from \[8\] to \[4\] tokens"):
        net.decode(tokens[:, :1], cache)
    cache.set_lengths(0)
    torch.testing.assert_close(net.decode(tokens, cache, last=False), net.logits(tokens), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="decode without compiling"):
        net.generate([[1, 2]], 2, compiled=True)
    for dtype, compiled in ((torch.int8, False), (None, True)):
        with pytest.raises(ValueError, match="core=sequence_tensor: "):
            net.config.core.check_decoding(dtype, compiled)
    net.config.core.check_decoding(None, False)
