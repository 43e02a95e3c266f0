"""Token shards that another program wrote: llm.c's .bin files, or nanoGPT's, which have no header.

They come without manifest and tokenizer. The configuration names the tokenizer, and on first use the shards are read
once to make what is missing: the document indexes, the counts and the manifest.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError
from configs.schema_data import DataConfig, TokenizerConfig
from data.build import entropy
from data.documents import SPLITS
from data.parallel import Rates, ordered_map
from data.shards import (
    FORMATS,
    HEADER_BYTES,
    Manifest,
    Shard,
    Split,
    document_index,
    fingerprint_of,
    map_tokens,
    save_index,
    sha256_of,
)
from data.tokenizers import Tokenizer, load_tokenizer, new_tokenizer

DECODED_TOKENS = 1_000_000  # whose text says how many bytes a token has


def foreign_shards(dir: Path) -> dict[str, list[Path]]:
    """The .bin files of each split, by name. ConfigError where a split has none."""
    found = {split: sorted(path for path in dir.glob("*.bin") if split in path.name) for split in SPLITS}
    missing = [split for split in SPLITS if not found[split]]
    if missing:
        names = " and ".join(f"*{split}*.bin" for split in missing)
        raise ConfigError(f"data.dir={dir}: holds no {names}; set data.dir to the folder of the shards")
    return found


def adopt(dir: Path, data: DataConfig, config: TokenizerConfig, settings: dict[str, Any], progress: bool) -> Manifest:
    """Index the shards in `dir` and write tokenizer and manifest beside them.

    ConfigError where they are not whole, or not of the tokenizer's vocabulary, or the folder cannot be written to.
    """
    files = foreign_shards(dir)
    if not (tokenizer := new_tokenizer(config)):
        raise ConfigError(
            f"tokenizer={config.name}: shards from elsewhere need the tokenizer that made them, for example "
            "tokenizer=gpt2, or tokenizer.path=FILE with tokenizer=sentencepiece"
        )
    tokenizer.save(dir)
    dtypes = {file_format(path)[0] for paths in files.values() for path in paths}
    if len(dtypes) > 1:
        raise ConfigError(f"data.dir={dir}: holds shards of uint16 and of uint32; keep one kind in a folder")
    [dtype] = dtypes
    if data.token_dtype not in ("auto", dtype):
        raise ConfigError(f"data.token_dtype={data.token_dtype}: the shards in {dir} are {dtype}")
    if tokenizer.vocab_size > 2 ** (8 * np.dtype(dtype).itemsize):
        raise ConfigError(
            f"tokenizer.vocab_size={tokenizer.vocab_size}: the shards in {dir} are {dtype}, too small for it; "
            "choose the tokenizer that made them"
        )
    splits, counts = {}, {}
    with Rates("Indexing", progress, total=sum(map(len, files.values()))) as rates:
        for split, paths in files.items():
            shards, counts[split] = [], np.zeros(tokenizer.vocab_size, dtype=np.int64)
            ends = [True, *(bool(last_token(path) == tokenizer.end_of_text) for path in paths[:-1])]
            tasks = [(path, at_start, config, dir) for path, at_start in zip(paths, ends, strict=True)]
            for shard, seen in ordered_map(index, tasks, data.workers):
                shards.append(shard)
                counts[split] += seen
                rates.advance(shards=1, tokens=shard.tokens)
            splits[split] = measured(shards, map_tokens(paths[0], *file_format(paths[0])), tokenizer)
    manifest = Manifest(
        name=data.name,
        settings=settings,
        splits=splits,
        tokenizer=dataclasses.asdict(config) | {"fingerprint": tokenizer.fingerprint},
        unigram_entropy=entropy(counts["train"]),
        skipped={},
        fingerprint=fingerprint_of(splits, tokenizer.fingerprint),
        source="",
        token_dtype=dtype,
    )
    manifest.save(dir)
    return manifest


def file_format(path: Path) -> tuple[str, int]:
    """(dtype, where the tokens start); a file without llm.c's header is uint16 all through."""
    start = np.fromfile(path, dtype="<i4", count=3).tolist()
    for dtype, known in FORMATS.items():
        if tuple(start[:2]) == known:
            return dtype, HEADER_BYTES
    return "uint16", 0


def last_token(path: Path) -> int:
    return int(map_tokens(path, *file_format(path))[-1])


def index(task: tuple[Path, bool, TokenizerConfig, Path]) -> tuple[Shard, np.ndarray]:
    """Read one shard, and write its index: what it is, and how often each token occurs [vocab_size]."""
    path, at_start, config, dir = task
    dtype, offset = file_format(path)
    size = path.stat().st_size - offset
    tokens = map_tokens(path, dtype, offset) if size and size % np.dtype(dtype).itemsize == 0 else np.empty(0, dtype)
    if not len(tokens) or (offset and np.fromfile(path, dtype="<i4", count=3)[2] != len(tokens)):
        raise ConfigError(f"{path}: is not whole: it has {size + offset} bytes; copy it again")
    if tokens.max() >= config.vocab_size:
        what = "" if offset else " (it has no header of llm.c's, so it is read as nanoGPT's uint16)"
        raise ConfigError(
            f"{path}: holds token {tokens.max()}, and tokenizer.vocab_size={config.vocab_size}; choose the tokenizer "
            f"that made it{what}"
        )
    starts, documents = document_index(tokens, load_tokenizer(config, dir).end_of_text, at_start)
    save_index(path, starts)
    counts = np.bincount(tokens, minlength=config.vocab_size)
    return Shard(path.name, len(tokens), documents, sha256_of(path), offset), counts


def measured(shards: list[Shard], tokens: np.ndarray, tokenizer: Tokenizer) -> Split:
    """The split of these shards; its bytes are those of the first tokens' text, scaled up to all of them."""
    first = tokens[:DECODED_TOKENS]
    text = tokenizer.decode(first[first != tokenizer.end_of_text].tolist())
    total, ratio = sum(shard.tokens for shard in shards), len(text.encode()) / len(first)
    return Split(shards, total, sum(shard.documents for shard in shards), round(ratio * total), bytes_per_token=ratio)
