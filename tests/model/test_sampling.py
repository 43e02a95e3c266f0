"""The filters are those of Hugging Face transformers; draws follow the probabilities and the seeds."""

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.sampling import GREEDY, Sampling, draws

THEIRS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.3, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.1, "temperature": 2.0, "top_k": 30, "top_p": 0.8, "min_p": 0.3},
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(settings):
    torch.manual_seed(0)
    logits, before = torch.randn(6, 50) * 3, torch.randint(0, 50, (6, 9))
    logits[0, :10] = logits[0, 10]  # ties
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter_(1, before, True)
    theirs = LogitsProcessorList([THEIRS[key](value) for key, value in settings.items()])(before, logits)
    torch.testing.assert_close(Sampling(**settings).filter(logits, seen), theirs)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.0, -torch.inf]]).expand(20_000, -1)
    drawn = Sampling().choose(logits, draws([3], 20_000, torch.device("cpu"))[:, 0])
    shares = drawn.bincount(minlength=5) / 20_000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.015, rtol=0)


def test_what_is_filtered_out_is_never_drawn():
    logits = torch.full((4, 6), -torch.inf)
    logits[range(4), [0, 2, 5, 3]] = 1.0
    for uniform in (0.0, 0.5, 1 - 2**-53):
        drawn = Sampling(temperature=0.5).choose(logits, torch.full((4,), uniform, dtype=torch.float64))
        assert drawn.tolist() == [0, 2, 5, 3]


def test_greedy_is_the_argmax_after_the_penalty():
    logits, seen = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[False, True, False]])
    uniforms = torch.zeros(1, dtype=torch.float64)
    assert GREEDY.choose(logits, uniforms).tolist() == [1]
    assert Sampling(temperature=0, repetition_penalty=2.0).choose(logits, uniforms, seen).tolist() == [2]


def test_a_seeds_draws_depend_on_nothing_else():
    device = torch.device("cpu")
    assert torch.equal(draws([4, 5, 6], 7, device)[:, 1:2], draws([5], 7, device))
    assert torch.equal(draws([5], 9, device)[:7], draws([5], 7, device))
