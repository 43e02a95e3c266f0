"""A sliding window in blocks equals full attention under the window's mask, and costs what the window holds."""

import pytest
import torch

from model.attention.base import Dense
from model.attention.multi_head import MultiHeadConfig
from model.cores.full import Full
from model.cores.sliding_window import SlidingWindow
from model.mask import AttentionMask


def attend(core, mask, *qkv):
    return core.attend([Dense(*qkv)], mask, 0.5)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("window", "seq_len"), [(1, 5), (4, 4), (4, 5), (4, 16), (5, 13), (20, 13)])
def test_blocks_equal_the_mask_spelt_out(window, seq_len, documents):
    torch.manual_seed(0)
    qkv = [torch.randn(2, seq_len, heads, 4).requires_grad_() for heads in (4, 2, 2)]
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3], [0] * 16])[:, :seq_len]
    mask = AttentionMask(documents=numbers if documents else None)
    ours = attend(SlidingWindow(window=window), mask, *qkv)
    wanted = attend(Full(), AttentionMask(documents=mask.documents, window=window), *qkv)
    assert AttentionMask(window=window).allowed(seq_len, seq_len).sum(1).max() == min(window, seq_len)
    torch.testing.assert_close(ours, wanted)
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), qkv) for x in (ours, wanted)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_rows_of_a_cache_keep_their_window():
    q, k, v = (torch.randn(2, n, 1, 4) for n in (2, 9, 9))
    starts = torch.tensor([7, 3])
    k[1, 5:], v[1, 5:] = torch.nan, torch.nan  # beyond the second row's two queries
    cached = attend(SlidingWindow(window=3), AttentionMask(starts=starts), q, k, v)
    for row, start in enumerate(starts.tolist()):
        for t in range(2):
            seen = slice(start + t - 2, start + t + 1)
            alone = attend(
                Full(), AttentionMask(), q[row : row + 1, t : t + 1], k[row : row + 1, seen], v[row : row + 1, seen]
            )
            torch.testing.assert_close(cached[row : row + 1, t : t + 1], alone)


def test_decoding_reads_no_further_back_than_the_window():
    q, k, v = (torch.randn(2, n, 1, 4) for n in (2, 9, 9))
    wanted = attend(Full(), AttentionMask(window=3), q, k, v)
    k[:, :5], v[:, :5] = torch.nan, torch.nan  # the first query, at 7, sees 5, 6 and 7
    torch.testing.assert_close(attend(SlidingWindow(window=3), AttentionMask(), q, k, v), wanted)


def test_operations_count_the_keys_that_are_seen():
    config = MultiHeadConfig(name="mha", head_dim=4, n_heads=3)
    for window, seq_len in ((5, 13), (20, 13)):
        seen = AttentionMask(window=window).allowed(seq_len, seq_len).sum().item()
        assert SlidingWindow(window=window).flops_per_token(config, seq_len) == pytest.approx(
            4 * 4 * 3 * seen / seq_len
        )
