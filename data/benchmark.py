"""How fast documents become shards and shards become batches, beside the plain loops that others use, in one run:
`python -m data.benchmark [overrides]`, best with tokenizer=gpt2 and documents of your own.

The plain loops are those of nanoGPT and its descendants: a pool of processes that takes documents in chunks of 16 and
fills a preallocated numpy buffer, and random crops from a memmap. Every side gets the same documents, in memory, and as
many processes; each is timed several times, in turns, and the median counts. The processor's time tells more than the
clock's on a machine that others use too.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from configs.app import app
from configs.errors import at_least
from configs.load import load_extended
from configs.schema import Config
from data.build import Preparation, make_tokenizer, tokenise_all, validation_up_to
from data.documents import encoded
from data.loader import TrainLoader
from data.parallel import count_workers
from data.shards import HEADER_BYTES, map_tokens
from data.sources import open_documents
from data.tokenizers import Tokenizer, load_tokenizer

SHARD_TOKENS = 100_000_000
SEQ_LEN, BATCH = 1024, 16  # of the loaders
LOADER_BATCHES = 600


@dataclass
class BenchmarkConfig(Config):
    text_bytes: int = 60_000_000  # the documents are repeated up to about this much
    rounds: int = 3

    def own_errors(self):
        yield from at_least(1, "", self, "text_bytes", "rounds")


class Listed:
    """Documents in memory as a stream that starts only at its first one."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __iter__(self):
        return ({"text": text} for text in self.texts)

    def state_dict(self) -> dict:
        return {}


def read_texts(config: BenchmarkConfig) -> list[str]:
    """Good documents of the source, over and over up to `text_bytes`."""
    found, size = [], 0
    for document in open_documents(config.data):
        if isinstance(content := encoded(document["text"], config.data.max_document_bytes), bytes):
            found.append(document["text"])
            size += len(content)
        if size > config.text_bytes:
            return found
    return [text for text, _ in zip(cycle(found), range(len(found) * round(config.text_bytes / size)), strict=False)]


# --- the plain loops

_plain: Tokenizer | None = None  # of this process


def set_plain(config, dir: Path) -> None:
    global _plain
    _plain = load_tokenizer(config, dir)


def plain_tokens(text: str) -> np.ndarray:
    tokens = [_plain.end_of_text]
    tokens.extend(_plain.encode(text))
    return np.array(tokens).astype(np.uint16 if _plain.vocab_size <= 2**16 else np.uint32)


def plain_count(texts: list[str]) -> int:
    return sum(len(_plain.encode(text)) for text in texts)


def plain_pool(texts: list[str], config: Config, dir: Path, workers: int) -> int:
    """Tokenise over a pool of processes into a preallocated buffer, written to a file when it is full."""
    dtype = np.uint16 if config.tokenizer.vocab_size <= 2**16 else np.uint32
    buffer, filled, total = np.empty(SHARD_TOKENS, dtype=dtype), 0, 0
    with multiprocessing.Pool(workers, set_plain, (config.tokenizer, dir)) as pool:
        for tokens in pool.imap(plain_tokens, texts, chunksize=16):
            if filled + len(tokens) > SHARD_TOKENS:
                buffer[:filled].tofile(dir / "plain.bin")
                filled = 0
            buffer[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
            total += len(tokens)
    buffer[:filled].tofile(dir / "plain.bin")
    return total


def bare(texts: list[str], config: Config, dir: Path, workers: int) -> int:
    """The tokenizer alone: nothing but encoding, each process on its share of the documents, nothing sent back."""
    with multiprocessing.Pool(workers, set_plain, (config.tokenizer, dir)) as pool:
        return sum(pool.map(plain_count, [texts[i::workers] for i in range(workers)], chunksize=1))


def random_crops(file: Path, dtype: str, offset: int, batches: int) -> int:
    """nanoGPT's get_batch, over and over."""
    for _ in range(batches):
        data = np.memmap(file, dtype=dtype, mode="r", offset=offset)
        starts = torch.randint(len(data) - SEQ_LEN, (BATCH,))
        torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in starts])
        torch.stack([torch.from_numpy(data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in starts])
    return batches * BATCH * SEQ_LEN


# --- ours


def preparation(texts: list[str], config: Config, dir: Path, val_up_to: float) -> tuple[int, Preparation]:
    tokenizer = load_tokenizer(config.tokenizer, dir)
    made = Preparation(dir, config.data, tokenizer, {})
    tokenise_all(Listed(texts), config.data, config.tokenizer, dir, val_up_to, made, progress=False)
    for writer in made.writers.values():
        writer.close()
    made.save()
    return made.tokens.total(), made


def rate(function: Callable, *args) -> tuple[float, float]:
    """Tokens a second, and tokens a second of processor time, of a function that returns how many it has handled."""
    began, used = time.perf_counter(), sum(os.times()[:4])
    tokens = function(*args)
    return tokens / (time.perf_counter() - began), tokens / max(sum(os.times()[:4]) - used, 1e-9)


def measure(sides: dict[str, Callable[[], tuple]], rounds: int) -> dict[str, list[float]]:
    """The medians of each side's rates over rounds in which every side has its turn."""
    rates = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            rates[name].append(side())
    return {name: [statistics.median(each) for each in zip(*values, strict=True)] for name, values in rates.items()}


def main(config: BenchmarkConfig) -> None:
    workers = config.data.workers = count_workers(config.data.workers)
    config.data.shard_tokens = SHARD_TOKENS
    texts = read_texts(config)
    show = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        dir = Path(folder)
        val_up_to = validation_up_to(Listed(texts), config.data)
        make_tokenizer(config.tokenizer, Listed(texts), config.data, val_up_to, dir, progress=True)
        one = texts[: max(1, len(texts) // workers)]
        made = measure(
            {
                "data.prepare": lambda: rate(lambda: preparation(texts, config, dir, val_up_to)[0]),
                "process pool, 16 documents at a time": lambda: rate(plain_pool, texts, config, dir, workers),
                f"{config.tokenizer.name} alone on {workers} processes": lambda: rate(
                    bare, texts, config, dir, workers
                ),
                f"{config.tokenizer.name} alone on 1 process": lambda: rate(bare, one, config, dir, 1),
            },
            config.rounds,
        )
        show.print(table("Preparation", made), f"{sum(map(len, texts)) / 1e6:.0f} M characters, {workers} processes")
        loaded = measure(loaders(config, dir, preparation(texts, config, dir, val_up_to)[1]), config.rounds)
    show.print(table("Loader", loaded), f"{BATCH} sequences of {SEQ_LEN} tokens a batch, one thread")


def loaders(config: Config, dir: Path, made: Preparation) -> dict[str, Callable[[], tuple]]:
    dtype = config.data.dtype_for(config.tokenizer.vocab_size)
    files = [dir / shard.file for shard in made.writers["train"].shards]
    shards = SimpleNamespace(arrays=[map_tokens(file, dtype) for file in files], split="train", dir=dir)
    loader = TrainLoader(shards, SEQ_LEN, 0, BATCH, BATCH)

    def ours() -> int:
        return sum(tokens.numel() for tokens, _ in loader.batches(0, LOADER_BATCHES))

    return {
        "data.loader": lambda: rate(ours),
        "random crops from a memmap": lambda: rate(random_crops, files[0], dtype, HEADER_BYTES, LOADER_BATCHES),
    }


def table(title: str, rates: dict[str, list[float]]) -> Table:
    """Both rates of each side, and how many times as fast ours, the first, is."""
    shown = Table(title, "tokens/s", "ours is", "tokens/s of processor time", "ours is")
    ours = next(iter(rates.values()))
    for name, values in rates.items():
        pairs = zip(ours, values, strict=True)
        shown.add_row(name, *(cell for our, value in pairs for cell in (f"{value:,.0f}", f"{our / value:.2f} x")))
    return shown


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app(main, load=partial(load_extended, cls=BenchmarkConfig))
