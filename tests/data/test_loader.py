import random
import threading
from itertools import islice, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from data.loader import IGNORED, EvalLoader, TrainLoader, permute
from data.shards import TokenShards

SEQ_LEN = 16


def made_up(*lengths):
    """Shards whose tokens are all different."""
    total = np.cumsum([0, *lengths])
    arrays = [np.arange(start, end, dtype=np.uint16) for start, end in pairwise(total)]
    return SimpleNamespace(arrays=arrays, split="train", dir="made-up")


def loader(shards, micro=2, total=8, rank=0, world=1, seed=0):
    return TrainLoader(shards, SEQ_LEN, seed, micro, total, rank, world)


def step_samples(shards, step, micro, world):
    """All samples of a step in global order, as `world` ranks read them."""
    ranks = [loader(shards, micro, 8, rank, world) for rank in range(world)]
    return np.concatenate([each.micro_batch(step, i) for i in range(ranks[0].accumulation_steps) for each in ranks])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 97, 255, 256, 257, 1000, 4099, 65537])
def test_permutation_is_a_bijection(n):
    for key in (0, 1, 2**64 - 1):
        np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permutation_looks_shuffled():
    n = 10_000
    images = permute(np.arange(n), n, key=1)
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.05
    assert (images == np.arange(n)).sum() < 10  # about 1 fixed point in a random permutation
    assert abs(np.mean(np.diff(images) > 0) - 0.5) < 0.02
    assert (images == permute(np.arange(n), n, key=2)).sum() < 10
    assert abs(images[:1000].mean() - n / 2) < 300  # a prefix is spread evenly


def test_permutation_works_on_any_part_and_on_huge_ranges():
    n = 1000
    np.testing.assert_array_equal(permute(np.array([3, 999, 3]), n, 5), permute(np.arange(n), n, 5)[[3, 999, 3]])
    huge = permute(np.arange(1000), 2**40 + 1, 5)
    assert len(set(huge)) == 1000 and huge.min() >= 0 and huge.max() <= 2**40


def test_small_permutations_are_all_reached():
    assert len({tuple(permute(np.arange(3), 3, key)) for key in range(200)}) == 6


def test_samples_stay_in_their_shard_and_overlap_by_one():
    shards = made_up(33, 16, 17, 100)  # 2, 0, 1 and 6 samples
    data = loader(shards)
    assert data.n_samples == 9
    rows = data.samples.read(np.arange(9))
    assert rows.dtype == np.int64 and rows.shape == (9, SEQ_LEN + 1)
    assert [row[0] for row in rows] == [0, 16, 49, 66, 82, 98, 114, 130, 146]
    assert all((np.diff(row) == 1).all() for row in rows)


def test_order_does_not_depend_on_world_size_or_micro_batch():
    shards = made_up(1000, 777)
    for step in (0, 3, 40):
        expected = step_samples(shards, step, micro=8, world=1)
        for micro, world in ((1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (1, 8)):
            np.testing.assert_array_equal(step_samples(shards, step, micro, world), expected)


@pytest.mark.parametrize("case", range(25))
def test_random_machines_and_restarts_see_the_same_global_batches(case):
    """Compare a run on random machines, stopped at random steps and started on others, with one that never stops."""
    generator = random.Random(case)
    shards = made_up(*(generator.randint(SEQ_LEN + 1, 900) for _ in range(generator.randint(1, 5))))
    total, steps, seed = generator.choice([4, 6, 8, 12, 24]), generator.randint(3, 12), generator.randint(0, 99)
    expected = np.concatenate([loader(shards, total, total, seed=seed).micro_batch(step, 0) for step in range(steps)])
    stops = sorted({0, steps, *(generator.randint(0, steps) for _ in range(3))})
    found = []
    for start, end in pairwise(stops):
        world = generator.choice([n for n in range(1, total + 1) if total % n == 0])
        micro = generator.choice([n for n in range(1, total // world + 1) if total // world % n == 0])
        ranks = [iter(loader(shards, micro, total, rank, world, seed).batches(start, end)) for rank in range(world)]
        for _ in range((end - start) * total // (micro * world)):
            for tokens, targets in map(next, ranks):
                found.append(torch.cat((tokens, targets[:, -1:]), dim=1).numpy())
        assert all(next(each, None) is None for each in ranks)
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_every_epoch_reads_every_sample_once_and_in_another_order():
    shards = made_up(1000, 777)
    data = loader(shards, micro=5, total=5)  # 110 samples: the epoch ends on a step
    assert data.n_samples == 110 and data.epochs(33) == 1.5
    epochs = [np.concatenate([data.numbers(step, 0) for step in range(22 * e, 22 * (e + 1))]) for e in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(110))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_a_micro_batch_across_the_end_of_an_epoch():
    shards = made_up(1000, 777)
    data = loader(shards, micro=8, total=8)
    stream = np.concatenate([data.numbers(step, 0) for step in range(40)])
    np.testing.assert_array_equal(np.sort(stream[:110]), np.arange(110))  # 110 is not a multiple of 8
    np.testing.assert_array_equal(np.sort(stream[110:220]), np.arange(110))
    tiny = loader(made_up(33), micro=8, total=8)  # 2 samples: several epochs in one micro-batch
    assert np.bincount(tiny.numbers(0, 0)).tolist() == [4, 4]


def test_seed_changes_the_order():
    shards = made_up(1000)
    assert not np.array_equal(loader(shards, seed=0).micro_batch(0, 0), loader(shards, seed=1).micro_batch(0, 0))


def test_resumed_batches_are_equal_to_the_bit(small):
    shards = TokenShards(small[1], "train")
    data = loader(shards)
    whole = list(data.batches(0, 12))
    assert len(whole) == 12 * data.accumulation_steps
    resumed = list(loader(TokenShards(small[1], "train")).batches(7, 12))
    for (tokens, targets), (again, again_targets) in zip(whole[7 * 4 :], resumed, strict=True):
        assert torch.equal(tokens, again) and torch.equal(targets, again_targets)
        assert tokens.dtype == torch.int64 and tokens.shape == targets.shape == (2, SEQ_LEN)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_thread_ends_with_the_iterator():
    batches = loader(made_up(1000)).batches(0, 10**9)
    assert len(list(islice(batches, 3))) == 3
    assert any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


def test_errors_in_the_thread_reach_the_consumer():
    data = loader(made_up(1000))
    data.samples.arrays[0] = data.samples.arrays[0][:40]  # the file shrank under us
    with pytest.raises(ValueError):
        list(data.batches(0, 50))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [1, 4, 7])
@pytest.mark.parametrize("max_samples", [None, 1, 10, 10**6])
def test_evaluation_reads_each_sample_once(world, micro, max_samples):
    shards = made_up(600, 300)  # 37 + 18 samples
    ranks = [EvalLoader(shards, SEQ_LEN, micro, rank, world, max_samples) for rank in range(world)]
    assert {each.n_samples for each in ranks} == {min(max_samples or 55, 55)}
    first_tokens = []
    for each in ranks:
        batches = list(each)
        assert len(batches) == len(each) == len(ranks[0])
        for tokens, targets in batches:
            assert 1 <= len(tokens) <= micro and tokens.shape == targets.shape
            if (targets == IGNORED).all():
                continue  # this rank only keeps the others company
            assert torch.equal(targets, tokens + 1)
            first_tokens += tokens[:, 0].tolist()
    everything = EvalLoader(shards, SEQ_LEN, 55, max_samples=max_samples)
    assert sorted(first_tokens) == sorted(next(iter(everything))[0][:, 0].tolist())
    assert len(set(first_tokens)) == len(first_tokens) == everything.n_samples


def test_sequences_longer_than_the_data(small):
    with pytest.raises(ConfigError, match="trainer.seq_len=4000: the longest train shard has 4000 .* at most 3999"):
        TrainLoader(TokenShards(small[1], "train"), 4000, 0, 1, 1)
    val = TokenShards(small[1], "val")
    longest = max(map(len, val.arrays))
    with pytest.raises(ConfigError, match=f"the longest val shard has {longest} tokens"):
        EvalLoader(val, longest, 1)
    assert EvalLoader(val, longest - 1, 1).n_samples == [len(array) for array in val.arrays].count(longest)


def test_batch_sizes_that_do_not_multiply_out():
    with pytest.raises(ValueError, match="global_batch_size must be a multiple"):
        loader(made_up(1000), micro=3, total=8)
