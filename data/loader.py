"""The order of samples, and batches of them.

A sample is `seq_len + 1` consecutive tokens of one shard: a shard of n tokens holds (n - 1) // seq_len of them, and
sample i starts at token i * seq_len. Which samples a step sees is a pure function of the seed and the step; the number
of processes, the micro-batch size and restarts only decide who reads them. So a loader has no state to save.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from configs.errors import ConfigError
from data.shards import TokenShards

ROUNDS = 6
EVAL_KEY = 0
IGNORED = -100  # a target that does not count: the default ignore_index of cross_entropy
PREFETCH = 4  # micro-batches


def mix(x: np.ndarray) -> np.ndarray:
    """Return the finalizer of splitmix64: every bit of uint64 `x` changes about half of the bits of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Return the images of `index` (integers in [0, n)) under the permutation of range(n) that `key` picks.

    A Feistel network permutes the smallest range 4^k that holds n; what lands outside [0, n) walks on along its cycle.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    round_keys = mix(np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))
    result = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    walking = np.ones(result.shape, dtype=bool)
    while walking.any():
        x = result[walking]
        left, right = x >> half, x & low
        for round_key in round_keys:
            left, right = right, left ^ (mix(right + round_key) & low)
        result[walking] = (left << half) | right
        walking = result >= n
    return result.astype(np.int64)


class Samples:
    """The samples of one split by number, shard after shard. ConfigError if no shard is as long as one sample."""

    def __init__(self, shards: TokenShards, seq_len: int):
        self.arrays, self.seq_len = shards.arrays, seq_len
        self.ends = np.cumsum([max(0, len(array) - 1) // seq_len for array in self.arrays], dtype=np.int64)
        self.count = int(self.ends[-1]) if len(self.ends) else 0
        if not self.count:
            longest = max(map(len, self.arrays), default=0)
            raise ConfigError(
                f"trainer.seq_len={seq_len}: the longest {shards.split} shard has {longest} tokens in "
                f"{shards.dir}, and a sample needs one more than seq_len: at most {longest - 1}"
            )

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Return the samples `numbers` [B] as int64 [B, seq_len + 1]."""
        rows = np.empty((len(numbers), self.seq_len + 1), dtype=np.int64)
        which = np.searchsorted(self.ends, numbers, side="right")
        for row, number, shard in zip(rows, numbers, which, strict=True):
            start = (number - (self.ends[shard - 1] if shard else 0)) * self.seq_len
            row[:] = self.arrays[shard][start : start + self.seq_len + 1]
        return rows


def split_targets(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens [B, T], targets [B, T]) of samples [B, T + 1]."""
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@dataclass(eq=False)
class TrainLoader:
    """Training batches: step s (from 0) sees the global samples [s * global_batch_size, (s + 1) * global_batch_size).
    Global sample g is at place g % n_samples of the permutation of epoch g // n_samples."""

    shards: TokenShards
    seq_len: int
    seed: int
    micro_batch_size: int
    global_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        self.samples = Samples(self.shards, self.seq_len)
        self.n_samples = self.samples.count  # in one epoch
        self.accumulation_steps, rest = divmod(self.global_batch_size, self.micro_batch_size * self.world_size)
        if rest:
            raise ValueError("global_batch_size must be a multiple of micro_batch_size x world_size")

    def epochs(self, step: int) -> float:
        """Return the number of passes over the data after `step` steps."""
        return step * self.global_batch_size / self.n_samples

    def numbers(self, step: int, micro: int) -> np.ndarray:
        """Return which samples are this rank's micro-batch `micro` of step `step`: [micro_batch_size]."""
        first = step * self.global_batch_size + (micro * self.world_size + self.rank) * self.micro_batch_size
        epochs, places = np.divmod(np.arange(first, first + self.micro_batch_size), self.n_samples)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = int.from_bytes(hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()[:8], "little")
            numbers[here] = permute(places[here], self.n_samples, key)
        return numbers

    def micro_batch(self, step: int, micro: int) -> np.ndarray:
        """Return this rank's micro-batch `micro` of step `step`: int64 [micro_batch_size, seq_len + 1]."""
        return self.samples.read(self.numbers(step, micro))

    def batches(
        self,
        start_step: int,
        last_step: int,
        device: torch.device | str = "cpu",
        skipped: Callable[[int], int] = lambda step: 0,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (tokens [B, T], targets [B, T]): `accumulation_steps` micro-batches for each step in
        range(start_step, last_step), read ahead by a thread that ends with the iterator. A step for which `skipped`
        is n reads the data of n steps later."""
        device = torch.device(device)
        places = ((step, micro) for step in range(start_step, last_step) for micro in range(self.accumulation_steps))

        def read(step: int, micro: int) -> torch.Tensor:
            rows = torch.from_numpy(self.micro_batch(step + skipped(step), micro))
            return rows.pin_memory() if device.type == "cuda" else rows

        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
            ahead = deque(thread.submit(read, *place) for place in islice(places, PREFETCH))
            while ahead:
                rows = ahead.popleft().result()
                ahead.extend(thread.submit(read, *place) for place in islice(places, 1))
                yield split_targets(rows.to(device, non_blocking=True))


@dataclass(eq=False)
class EvalLoader:
    """A fixed set of samples, each read once by one of the ranks: the same for every seed, world size and batch size.

    There are `n_samples`: `max_samples` of them, spread over the data, or all. Every rank yields `len` batches (tokens
    [B, T], targets [B, T]) of at most `micro_batch_size`; if it has run out of samples, its targets are all IGNORED.
    """

    shards: TokenShards
    seq_len: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    max_samples: int | None = None

    def __post_init__(self):
        self.samples = Samples(self.shards, self.seq_len)
        count = self.samples.count
        self.n_samples = count if self.max_samples is None else min(self.max_samples, count)
        self.numbers = permute(np.arange(self.n_samples), count, EVAL_KEY)[self.rank :: self.world_size]

    def __len__(self) -> int:
        return -(-self.n_samples // (self.world_size * self.micro_batch_size))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self) * self.micro_batch_size, self.micro_batch_size):
            numbers = self.numbers[start : start + self.micro_batch_size]
            rows = self.samples.read(numbers if len(numbers) else np.zeros(1, dtype=np.int64))
            tokens, targets = split_targets(torch.from_numpy(rows))
            yield tokens, targets if len(numbers) else torch.full_like(targets, IGNORED)
