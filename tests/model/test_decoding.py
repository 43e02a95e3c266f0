"""Decoding from a cache is the full forward pass, for every mechanism; and the cache is as large as counted."""

from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from model import counting
from model.attention.base import Dense
from model.cache import BLOCK, KVCache, Part
from model.cores.full import Full
from model.generation import decode_step, prefill
from model.mask import AttentionMask
from model.transformer import Transformer
from tests.model.helpers import FACTORED, MODELS, PACKAGED, config_of, from_multi_head, small_network, wake_up

END = 7
OPTIONS = ["model.qk_norm=true", "model.output_gate=true", "model.rope_fraction=0.5"]
RAGGED = [5, 1, 12]
CASES = [  # the lengths of the prompts, the chunk, a static cache
    ([9, 9, 9], 16, False),
    ([9, 9, 9], 4, True),
    ([1, 1, 1], 1, False),
    (RAGGED, 1, False),
    (RAGGED, 4, True),
    (RAGGED, 16, False),
]
# docs/design.md states them, of logits whose standard deviation is 0.6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.025, torch.float16: 0.005, torch.int8: 0.04}
WITH_KERNELS = [(model, "sdpa") for model in MODELS] + [(model, "factors") for model in FACTORED]
LARGE = 1e4


def build(model, *overrides, document_end=None):
    torch.manual_seed(0)
    network = small_network(model, *overrides, document_end=document_end)
    return wake_up(Transformer(network)).requires_grad_(False)


def poison(cache, value=torch.nan):
    """`value` wherever no token lies."""
    for part in cache.parts():
        for row, length in enumerate(cache.lengths.tolist()):
            for tensor in part.tensors():
                tensor[row, length:] = value if tensor.is_floating_point() else 127


def decode(net, tokens, lengths, chunk, cache, static=False):
    """Logits by row and position: the first `lengths` of each row of `tokens` in chunks, the rest token by token.

    `static`: as a compiled step does it, over the whole capacity and with a mask.
    """
    found = [[] for _ in lengths]
    for start in range(0, max(lengths), chunk):
        poison(cache)
        piece = tokens[:, start : start + chunk][:, : max(lengths) - start]
        counts = (torch.tensor(lengths) - start).clamp(0, piece.size(1))
        logits = net.decode(piece, cache, None if min(lengths) == max(lengths) else counts, last=False)
        for row, count in enumerate(counts.tolist()):
            found[row].append(logits[row, :count])
    if static:
        cache.fix_shapes()
    for _ in range(tokens.size(1) - max(lengths)):
        poison(cache, *([LARGE] if static else []))  # a mask silences all but NaN
        step = tokens.gather(1, cache.lengths[:, None])
        with mock.patch("torch.compiler.is_compiling", lambda: static):
            logits = net.decode(step, cache, last=False)
        for row in range(len(lengths)):
            found[row].append(logits[row])
    return [torch.cat(row) for row in found]


@pytest.mark.parametrize("options", [[], OPTIONS], ids=["plain", "varied"])
@pytest.mark.parametrize(("model", "kernel"), WITH_KERNELS)
def test_cached_decoding_is_the_full_pass(model, kernel, options):
    net = build(model, f"core.kernel={kernel}", *options)
    tokens = torch.randint(0, 300, (3, 17))
    full = build(model, *options).logits(tokens)  # through explicit keys and values
    for lengths, chunk, static in CASES[-2:] if options else CASES:
        cache = net.new_cache(3, 17)
        for ours, wanted in zip(decode(net, tokens, lengths, chunk, cache, static), full, strict=True):
            torch.testing.assert_close(ours, wanted[: len(ours)], atol=1e-5, rtol=0)
        assert cache.lengths.tolist() == [length + 17 - max(lengths) for length in lengths]


SWITCHES = [
    ["t6_noncontextual_a", "model.contextual_b=false"],  # all is constant: there is nothing to cache
    ["t6_noncontextual_a", "model.shared_b=true", "model.a_activation=softmax"],
    ["t6_noncontextual_b", "model.shared_b=true", "model.qk_norm=true"],
    ["t6_third_order", "model.shared_b=true"],
    ["t6_third_order", "model.contextual_a=false", "model.qk_norm=true"],
    ["t6_third_order", "model.contextual_b=false"],
    ["t6_kvonly", "model.contextual_a=false", "model.rope_fraction=0"],
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("switches", SWITCHES, ids=",".join)
def test_tpas_switches_combine(switches):
    net = build(*switches)
    tokens = torch.randint(0, 300, (3, 17))
    for ours, wanted in zip(decode(net, tokens, RAGGED, 4, net.new_cache(3)), net.logits(tokens), strict=True):
        torch.testing.assert_close(ours, wanted[: len(ours)], atol=1e-5, rtol=0)


def test_a_converted_mha_decodes():
    net = build("gqa", "model.qk_norm=true")
    tokens = torch.randint(0, 300, (3, 17))
    full = net.logits(tokens)
    for block in net.blocks:
        block.attention = from_multi_head(block.attention)
    for ours, wanted in zip(decode(net, tokens, RAGGED, 4, net.new_cache(3)), full, strict=True):
        torch.testing.assert_close(ours, wanted[: len(ours)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("model", "kernel"), WITH_KERNELS)
def test_lower_precision_comes_close_and_bytes_are_those_counted(model, kernel, dtype):
    net = build(model, f"core.kernel={kernel}")
    tokens = torch.randint(0, 300, (3, 17))
    cache = net.new_cache(3, 20, dtype)
    assert cache.nbytes == 3 * 20 * counting.kv_bytes_per_token(net.config, dtype)
    for ours, wanted in zip(decode(net, tokens, RAGGED, 4, cache), net.logits(tokens), strict=True):
        torch.testing.assert_close(ours, wanted[: len(ours)], atol=TOLERANCE[dtype], rtol=0)
    assert all(tensor.dtype in (dtype, torch.bfloat16) for part in cache.parts() for tensor in part.tensors())


@pytest.mark.parametrize(("model", "kernel"), [*((model, "sdpa") for model in MODELS), ("t6", "factors")])
def test_a_step_compiles_once(model, kernel):
    document_end = END if kernel == "sdpa" else None
    net = build(model, f"core.kernel={kernel}", "size.n_layers=1", document_end=document_end)
    counter = CompileCounter()
    step = torch.compile(decode_step, backend=counter, fullgraph=True, dynamic=False, isolate_recompiles=True)
    tokens = torch.randint(0, 300, (2, 14))
    for lengths in ([3, 6], [4, 4]):  # the second cache has another prompt, and the same shapes
        cache = net.new_cache(2, 16)
        prefill(net, [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)], cache, 4)
        cache.fix_shapes()
        for _ in range(8):
            logits = step(net, tokens.gather(1, cache.lengths[:, None]), cache)
    assert counter.frame_count == 1
    torch.testing.assert_close(logits, net.logits(tokens[:, :12])[:, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["mha", "mla", "t6_shared_b"])
def test_documents_stay_apart_in_the_cache(model):
    net = build(model, document_end=END)
    tokens = torch.randint(END + 1, 300, (3, 20))
    for row, place in ((0, 3), (0, 4), (0, 12), (1, 11), (1, 15), (2, 0), (2, 19)):
        tokens[row, place] = END
    full = net.logits(tokens)
    for lengths, chunk, static in CASES:
        cache = net.new_cache(3, 20)
        for ours, wanted in zip(decode(net, tokens, lengths, chunk, cache, static), full, strict=True):
            torch.testing.assert_close(ours, wanted[: len(ours)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [[], ["model.qk_norm=true"]], ids=["plain", "qk_norm"])
def test_mla_expands_its_latent_for_long_chunks_only(options, monkeypatch):
    net = build("mla", "model.kv_lora_rank=32", *options)  # from (32 x 16) / (32 - 16) = 32 tokens on
    tokens = torch.randint(0, 300, (2, 90))
    seen = []
    attend = Full.attend
    monkeypatch.setattr(
        Full, "attend", lambda core, views, *rest: seen.append(type(views[0]).__name__) or attend(core, views, *rest)
    )
    full = net.logits(tokens)
    cache = net.new_cache(2)
    ours = torch.cat([net.decode(piece, cache, last=False) for piece in tokens.split((33, 40, 17), dim=1)], dim=1)
    torch.testing.assert_close(ours, full, atol=1e-5, rtol=0)
    assert seen == ["Latent"] * 6 + ["Absorbed"] * 2


def test_a_cache_grows_by_blocks_and_forgets_on_demand():
    net = build("t6")
    tokens = torch.randint(0, 300, (2, BLOCK + 9))
    cache = net.new_cache(2)
    net.decode(tokens[:, :BLOCK], cache)
    assert cache.capacity == BLOCK
    first = net.decode(tokens[:, BLOCK:], cache, last=False)
    assert cache.capacity == 2 * BLOCK and cache.lengths.tolist() == [BLOCK + 9] * 2
    torch.testing.assert_close(first, net.logits(tokens)[:, BLOCK:], atol=1e-5, rtol=0)
    cache.set_lengths(BLOCK)
    torch.testing.assert_close(net.decode(tokens[:, BLOCK:], cache, last=False), first)
    cache.set_lengths([3, BLOCK])
    again = net.decode(torch.stack((tokens[0, 3:5], tokens[1, BLOCK : BLOCK + 2])), cache, last=False)
    torch.testing.assert_close(again[0], net.logits(tokens[:1, :5])[0, 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(again[1], first[1, :2], atol=1e-5, rtol=0)
    cache.reserve(2 * BLOCK)
    assert cache.capacity == 4 * BLOCK and cache.lengths.tolist() == [5, BLOCK + 2]
    with pytest.raises(ValueError, match="must be 2 numbers of at most 1024 tokens"):
        cache.set_lengths(BLOCK * 5)
    with pytest.raises(ValueError, match="3 rows of tokens for a cache of 2"):
        net.decode(tokens[:1].expand(3, -1), cache)


def test_a_full_static_cache_refuses_more():
    net = build("mqa")
    cache = net.new_cache(1, 4)
    cache.fix_shapes()
    net.decode(torch.tensor([[1, 2, 3, 4]]), cache)
    with pytest.raises((IndexError, RuntimeError)):
        net.decode(torch.tensor([[5]]), cache)


@pytest.mark.parametrize("model", ["t6", "mla"])
def test_autocast_decodes_in_its_own_precision(model, monkeypatch):
    """And reads the cache as it is: in another dtype it would be copied at every step."""
    read, found = Part.read, set()
    monkeypatch.setattr(
        Part, "read", lambda part, n, dtype: found.add((part.values.dtype, dtype)) or read(part, n, dtype)
    )
    net = build(model)
    net.autocast_dtype = torch.bfloat16
    tokens = torch.randint(0, 300, (2, 12))
    wanted = net.logits(tokens).float()
    for _ in range(2):
        cache = net.new_cache(2)
        ours = torch.stack([net.decode(tokens[:, i : i + 1], cache) for i in range(12)], dim=1)
        assert found == {(torch.bfloat16, torch.bfloat16)}
        torch.testing.assert_close(ours.float(), wanted, atol=0.05, rtol=0)
        net.store_weights_as_computed()
    assert net.head.weight.dtype == torch.bfloat16 and net.head.weight is net.embedding.weight


@pytest.mark.parametrize("size", ["small", "xl"])
@pytest.mark.parametrize("model", PACKAGED)
def test_the_longest_context_is_what_can_be_allocated(model, size):
    """At the size itself: meta tensors are allocated without memory."""
    network = config_of(model, f"size={size}", "tokenizer=gpt2").network()
    weights, memory = 2 * counting.num_params(network), 24 * 2**30
    for dtype in (torch.bfloat16, torch.int8):
        tokens = counting.longest_context(network, memory, dtype)
        sizes = []
        for capacity in (tokens, tokens + 1):
            layers = [
                network.core.cache(network.attention, 1, capacity, dtype, "meta") for _ in range(network.n_layers)
            ]
            sizes.append(KVCache(layers, 1, capacity, "meta").nbytes)
        assert weights + sizes[0] <= memory < weights + sizes[1]


@pytest.mark.parametrize("compiling", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_core_reads_nothing_beyond_a_rows_queries(causal, compiling):
    torch.manual_seed(0)
    attend = Full().attend
    documents = torch.tensor([[0] * 2 + [1] * 9, [0] * 5 + [1] * 6, [0] * 11])
    for n_queries in (1, 4):
        starts = torch.tensor([0, 3, 11 - n_queries])
        q, k, v = torch.randn(3, n_queries, 6, 8), torch.randn(3, 11, 2, 8), torch.randn(3, 11, 2, 4)
        for known in (None, documents):
            poisoned = k.clone(), v.clone()
            for row, start in enumerate(starts):
                for tensor in poisoned:
                    tensor[row, start + n_queries :] = LARGE if compiling else torch.nan
            mask = AttentionMask(causal, known, starts)
            with mock.patch("torch.compiler.is_compiling", lambda: compiling):
                ours = attend([Dense(q, *poisoned)], mask, 0.3)
            for row, start in enumerate(starts):
                alone, n = slice(row, row + 1), start + n_queries
                mask = AttentionMask(causal, None if known is None else known[alone, :n])
                wanted = attend([Dense(q[alone], k[alone, :n], v[alone, :n])], mask, 0.3)
                torch.testing.assert_close(ours[alone], wanted)
