"""Generation: the same text however it is batched, cut into chunks, cached or compiled."""

import pytest
import torch

from model.generation import prefill, stream
from model.sampling import Sampling
from model.transformer import Transformer
from tests.model.helpers import small_network, wake_up

PROMPTS = [[5, 9, 13], list(range(20, 31)), [7], [5, 9, 13]]
WARM = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return wake_up(Transformer(small_network("t6", "size.n_layers=1")))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), WARM], ids=["greedy", "warm"])
def test_batches_chunks_and_caches_change_nothing(net, sampling):
    wanted = net.generate(PROMPTS, 12, sampling=sampling, seed=3, use_cache=False)
    assert [len(row) for row in wanted] == [12] * 4
    for options in ({}, {"chunk": 4}, {"chunk": 1}, {"cache_dtype": torch.float64}):
        assert net.generate(PROMPTS, 12, sampling=sampling, seed=3, **options) == wanted
    alone = [net.generate([prompt], 12, sampling=sampling, seed=3 + i)[0] for i, prompt in enumerate(PROMPTS)]
    assert alone == wanted
    assert (wanted[0] == wanted[3]) == (sampling.temperature == 0)


def test_greedy_is_the_argmax_of_the_full_pass(net):
    for prompt, new in zip(PROMPTS, net.generate(PROMPTS, 12), strict=True):
        logits = net.logits(torch.tensor([prompt + new]))[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == new


def test_the_compiled_step_gives_the_same(net):
    wanted = net.generate(PROMPTS, 12, sampling=WARM)
    for _ in range(2):  # the second time it is there
        assert net.generate(PROMPTS, 12, sampling=WARM, compiled=True) == wanted


def test_rows_end_with_their_stop_tokens(net):
    whole = net.generate(PROMPTS, 12, sampling=WARM)
    stops = [whole[0][4], whole[1][7]]
    places = [min([row.index(stop) for stop in stops if stop in row], default=12) for row in whole]
    assert net.generate(PROMPTS, 12, sampling=WARM, stop_tokens=stops) == [
        row[:place] for row, place in zip(whole, places, strict=True)
    ]
    both = whole[:2]
    steps = list(stream(net, PROMPTS[:2], 12, WARM, stop_tokens=stops))
    assert len(steps) == min(12, max(places[:2]) + 1)  # nothing is computed once every row has ended
    assert [row[0] for row in steps][: places[0]] == both[0][: places[0]] and steps[-1][0] is None


def test_tokens_that_pad_the_vocabulary_are_never_drawn(net):
    hot = Sampling(temperature=100.0)
    assert max(max(row) for row in net.generate(PROMPTS, 50, sampling=hot)) >= 300
    assert max(max(row) for row in net.generate(PROMPTS, 50, sampling=hot, vocab_size=300)) < 300


def test_generation_leaves_the_model_as_it_was(net):
    net.train()
    steps = stream(net, PROMPTS, 5)
    next(steps)
    assert not net.training
    steps.close()  # as Ctrl-C does
    assert net.training and torch.is_grad_enabled()
    assert all(p.grad is None for p in net.parameters())


def test_a_prompt_has_a_token(net):
    with pytest.raises(ValueError, match="at least one token"):
        net.generate([[3], []], 5)
    assert net.generate(PROMPTS, 0) == [[]] * 4


FOLDED = ["core=sequence_tensor", "core.fold=[3,4]"]


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [(["t6"], None), (["mla"], None), (["t6", *FOLDED], None), (["t6"], torch.int8), (["mla"], torch.int8)],
    ids=str,
)
@torch.no_grad()
def test_rows_of_a_cache_change_places(overrides, dtype):
    """As in a beam search: the next logits are those of the rows in their new order, of which some are copies."""
    torch.manual_seed(0)
    net, rows, token = wake_up(Transformer(small_network(*overrides))).eval(), [2, 0, 0, 1, 3], torch.tensor([[11]] * 5)
    cache, wanted = (net.new_cache(len(prompts), dtype=dtype) for prompts in (PROMPTS, rows))
    prefill(net, PROMPTS, cache, 512)
    prefill(net, [PROMPTS[row] for row in rows], wanted, 512)
    cache.select(torch.tensor(rows))
    for _ in range(4):
        torch.testing.assert_close(net.decode(token, cache), net.decode(token, wanted), atol=1e-5, rtol=0)
