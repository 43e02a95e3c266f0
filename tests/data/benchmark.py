"""How fast documents become shards and shards become batches, next to the plain loops that others use, in one run:
`python -m tests.data.benchmark [overrides]`, best with tokenizer=gpt2 and documents of your own.

The plain loops are those of nanoGPT and its descendants: a pool of processes that takes documents in chunks of 16 and
fills a preallocated numpy buffer, and random crops from a memmap. Every side gets the same documents, in memory, and
the same number of processes; each is timed several times, in turns, and the median counts. On a machine that others
use too, processor time is more reliable than the clock.
"""

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from configs.app import app
from data.build import Job, Preparation, divide, make_tokenizer, tokenise_all
from data.config import DataCommand, TokenizerConfig
from data.documents import Division, encoded
from data.loader import TrainLoader
from data.shards import HEADER_BYTES, map_tokens
from data.tokenizers import Tokenizer, load_tokenizer

SHARD_TOKENS = 100_000_000
SEQ_LEN, BATCH = 1024, 16  # of the loaders
LOADER_BATCHES = 600


class BenchmarkConfig(DataCommand):
    text_bytes: int = Field(60_000_000, ge=1)  # the documents are repeated up to about this much
    rounds: int = Field(3, ge=1)


class Listed:
    """Documents in memory as a stream that always starts at the first one."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __iter__(self):
        return ({"text": text} for text in self.texts)

    def state_dict(self) -> dict:
        return {}


def read_texts(job: Job, text_bytes: int) -> list[str]:
    """Return good documents of the source, repeated up to `text_bytes`."""
    found, size = [], 0
    for document in job.source.open():
        content = encoded(document["text"], job.data.max_document_bytes)
        if isinstance(content, bytes):
            found.append(document["text"])
            size += len(content)
        if size > text_bytes:
            return found
    count = len(found) * round(text_bytes / size)
    return [text for text, _ in zip(cycle(found), range(count), strict=False)]


# --- the plain loops

_plain: Tokenizer | None = None  # of this process


def set_plain(config: TokenizerConfig, dir: Path) -> None:
    global _plain
    _plain = load_tokenizer(config, dir)


def plain_tokens(text: str) -> np.ndarray:
    tokens = [_plain.end_of_text]
    tokens.extend(_plain.encode(text))
    return np.array(tokens).astype(np.uint16 if _plain.vocab_size <= 2**16 else np.uint32)


def plain_count(texts: list[str]) -> int:
    return sum(len(_plain.encode(text)) for text in texts)


def plain_pool(texts: list[str], job: Job, dir: Path) -> int:
    """Tokenise in a pool of processes into a preallocated buffer, written to a file when it is full."""
    dtype = job.data.dtype_for(job.tokenizer.vocab_size)
    buffer, filled, total = np.empty(SHARD_TOKENS, dtype=dtype), 0, 0
    with multiprocessing.Pool(job.data.workers, set_plain, (job.tokenizer, dir)) as pool:
        for tokens in pool.imap(plain_tokens, texts, chunksize=16):
            if filled + len(tokens) > SHARD_TOKENS:
                buffer[:filled].tofile(dir / "plain.bin")
                filled = 0
            buffer[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
            total += len(tokens)
    buffer[:filled].tofile(dir / "plain.bin")
    return total


def tokenizer_alone(texts: list[str], job: Job, dir: Path, workers: int) -> int:
    """Encode and nothing else: each process has its share of the documents and sends nothing back."""
    with multiprocessing.Pool(workers, set_plain, (job.tokenizer, dir)) as pool:
        return sum(pool.map(plain_count, [texts[i::workers] for i in range(workers)], chunksize=1))


def random_crops(file: Path, dtype: str) -> int:
    """Repeat get_batch of nanoGPT."""
    for _ in range(LOADER_BATCHES):
        data = np.memmap(file, dtype=dtype, mode="r", offset=HEADER_BYTES)
        starts = torch.randint(len(data) - SEQ_LEN, (BATCH,))
        torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in starts])
        torch.stack([torch.from_numpy(data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in starts])
    return LOADER_BATCHES * BATCH * SEQ_LEN


# --- ours


def prepare(texts: list[str], job: Job, dir: Path, division: Division) -> Preparation:
    """Make shards in `dir/shards`, with the tokenizer in `dir`."""
    shutil.rmtree(dir / "shards", ignore_errors=True)
    made = Preparation(dir / "shards", job, {}, lambda: load_tokenizer(job.tokenizer, dir))
    tokenise_all(Listed(texts), made, division)
    made.close()
    return made


def loaded(loader: TrainLoader) -> int:
    return sum(tokens.numel() for tokens, _ in loader.batches(0, LOADER_BATCHES))


# --- measuring


def rate(function: Callable[[], int]) -> tuple[float, float]:
    """Return tokens a second, and a second of processor time, of a function that returns the number of its tokens."""
    began, used = time.perf_counter(), sum(os.times()[:4])
    tokens = function()
    return tokens / (time.perf_counter() - began), tokens / max(sum(os.times()[:4]) - used, 1e-9)


def measure(title: str, sides: dict[str, Callable[[], int]], rounds: int) -> Table:
    """Return a table of the median rates of each side, and how many times as fast the first is."""
    rates = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            rates[name].append(rate(side))
    table = Table(title, "tokens/s", "ours is", "tokens/s of processor time", "ours is")
    medians = {name: [statistics.median(each) for each in zip(*pairs, strict=True)] for name, pairs in rates.items()}
    ours = next(iter(medians.values()))
    for name, values in medians.items():
        cells = [(f"{value:,.0f}", f"{our / value:.2f} x") for our, value in zip(ours, values, strict=True)]
        table.add_row(name, *cells[0], *cells[1])
    return table


def main(config: BenchmarkConfig) -> None:
    workers = config.data.workers or len(os.sched_getaffinity(0))
    job = Job(config.data.replace(workers=workers, shard_tokens=SHARD_TOKENS), config.tokenizer, progress=False)
    texts = read_texts(job, config.text_bytes)
    one_share = texts[: max(1, len(texts) // workers)]
    console, name = Console(soft_wrap=True), config.tokenizer.name
    with tempfile.TemporaryDirectory() as folder:
        dir = Path(folder)
        division = divide(Listed(texts), job.data)
        make_tokenizer(job, Listed(texts), division).save(dir)
        preparing = {
            "data.prepare": lambda: sum(one.tokens for one in prepare(texts, job, dir, division).writers.values()),
            "process pool, 16 documents at a time": partial(plain_pool, texts, job, dir),
            f"{name} alone on {workers} processes": partial(tokenizer_alone, texts, job, dir, workers),
            f"{name} alone on 1 process": partial(tokenizer_alone, one_share, job, dir, 1),
        }
        console.print(measure("Preparation", preparing, config.rounds))
        console.print(f"{sum(map(len, texts)) / 1e6:.0f} M characters, {workers} processes")
        made = prepare(texts, job, dir, division)
        files = [made.dir / shard.file for shard in made.writers["train"].shards]
        shards = SimpleNamespace(arrays=[map_tokens(file, made.dtype) for file in files], split="train", dir=dir)
        loading = {
            "data.loader": partial(loaded, TrainLoader(shards, SEQ_LEN, 0, BATCH, BATCH)),
            "random crops from a memmap": partial(random_crops, files[0], made.dtype),
        }
        console.print(measure("Loader", loading, config.rounds))
    console.print(f"{BATCH} sequences of {SEQ_LEN} tokens a batch, one thread")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app(main, BenchmarkConfig)
