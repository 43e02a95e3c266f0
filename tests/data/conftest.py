"""A small prepared data folder, made once, and the configuration that makes it."""

import json
import multiprocessing
import random

import pytest

from data.config import DataConfig, TokenizerConfig
from data.prepare import prepare

WORDS = [
    "the",
    "a",
    "model",
    "attends",
    "to",
    "every",
    "token",
    "of",
    "its",
    "past",
    "and",
    "learns",
    "what",
    "comes",
    "next",
    "from",
    "keys",
    "values",
    "queries",
]


def texts(count, seed=0):
    """`count` different documents of a few lines."""
    generator = random.Random(seed)
    return [
        f"Document {i}.\n" + "\n".join(" ".join(generator.choices(WORDS, k=12)) + "." for _ in range(8))
        for i in range(count)
    ]


def make_config(dir, files, *, vocab_size=320, name="files", source="files", workers=1, **data):
    """Return (data, tokenizer) for local files and a small sentencepiece vocabulary."""
    tokenizer = TokenizerConfig(name=f"sentencepiece-{vocab_size}", kind="sentencepiece", vocab_size=vocab_size)
    files = [str(file) for file in files]
    return DataConfig(name=name, source=source, dir=str(dir), files=files, workers=workers, **data), tokenizer


def write_jsonl(path, documents, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in documents))
    return path


@pytest.fixture(params=["fork", "spawn"])
def start_method(request):
    """The test runs once for each way of starting worker processes."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Return (data and tokenizer, folder): 200 documents in shards of 4,000 tokens. Read only."""
    folder = tmp_path_factory.mktemp("small")
    file = write_jsonl(folder / "documents.jsonl", texts(200))
    config = make_config(folder / "shards", [file], shard_tokens=4000, val_fraction=0.2)
    prepare(*config, progress=False)
    return config, folder / "shards"
