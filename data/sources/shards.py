"""Token shards that another program wrote: the .bin files of llm.c, or those of nanoGPT, which have no header.

The configuration names their tokenizer, and on first use they are read once to make indexes and manifest.
"""

import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from configs.errors import ConfigError
from data.build import Job, write_manifest
from data.config import DataConfig
from data.documents import SPLITS
from data.files import sha256_of
from data.parallel import ordered_map, report, with_rates
from data.shards import FORMATS, HEADER_BYTES, Manifest, Shard, Split, map_tokens, write_index
from data.sources.base import Source, Stream
from data.tokenizers import Tokenizer, new_tokenizer

DECODED_TOKENS = 1_000_000  # whose text shows the bytes of a token
DECODED_AT_START = 24  # tokens that are shown
NAMES = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}  # words of a file's name, by its split


class Shards(Source):
    """The .bin files in `data.dir`."""

    on_first_use = True
    mixable = False
    in_place = True
    settings_keys = ("source",)

    def check(self) -> None:
        self.files()

    def open(self) -> Stream:
        raise ConfigError("data.source=shards: holds tokens and no documents; choose another source")

    def facts(self) -> list:
        return []  # by which a manifest shows that another program wrote the shards

    def files(self) -> dict[str, list[Path]]:
        """Return the files of each split, sorted by name. ConfigError if a split has none."""
        dir = self.config.dir
        words = {path: set(re.split("[^a-z]+", path.stem.lower())) for path in sorted(Path(dir).glob("*.bin"))}
        found = {split: [path for path, own in words.items() if own & NAMES[split]] for split in SPLITS}
        if both := sorted(set(found["train"]) & set(found["val"])):
            raise ConfigError(f"{both[0]}: is named after both train and val; rename it")
        missing = [split for split in SPLITS if not found[split]]
        if missing:
            names = " and ".join(f"*{split}*.bin" for split in missing)
            raise ConfigError(f"data.dir={dir}: holds no {names} (a word of the name); set data.dir to their folder")
        return found

    def adopt(self, job: Job) -> Manifest:
        """Write indexes, tokenizer and manifest next to the shards.

        ConfigError if they are not whole or not the tokenizer's.
        """
        files, dir = self.files(), Path(self.config.dir)
        tokenizer = new_tokenizer(job.tokenizer)
        if not tokenizer:
            raise ConfigError(
                f"tokenizer={job.tokenizer.name}: shards of another program need the tokenizer that made them, for "
                "example tokenizer=gpt2, or tokenizer.path=FILE with tokenizer=sentencepiece"
            )
        tokenizer.save(dir)
        dtype = common_dtype(files, job.data, tokenizer)
        options = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
        indexing = partial(index, token_dtype=job.data.token_dtype, **options)
        splits, counts = {}, {}
        for split, paths in files.items():
            indexed = ordered_map(indexing, pairwise([None, *paths]), self.config.workers)
            shards, counts[split] = [], np.zeros(tokenizer.vocab_size, dtype=np.int64)
            counted = with_rates(indexed, f"Indexing {split}", job.progress, tokens=lambda pair: pair[0].tokens)
            for shard, seen in counted:
                shards.append(shard)
                counts[split] += seen
            tokens, documents = (sum(getattr(shard, key) for shard in shards) for key in ("tokens", "documents"))
            first = read_tokens(paths[0], dtype)[0][:DECODED_TOKENS]
            beginning = tokenizer.decode(first[:DECODED_AT_START])
            report(f"{paths[0]}: read as {dtype}, begins with {beginning!r}", job.progress)
            text = tokenizer.decode(first[first != tokenizer.end_of_text])
            ratio = len(text.encode()) / len(first)
            splits[split] = Split(shards, tokens, documents, round(ratio * tokens), ratio)
        return write_manifest(dir, job, tokenizer, splits, counts["train"], {}, dtype)


def common_dtype(files: dict[str, list[Path]], data: DataConfig, tokenizer: Tokenizer) -> str:
    """Return the dtype of all files. ConfigError if they differ, or do not match the configuration."""
    dtypes = {read_tokens(path, data.token_dtype)[0].dtype.name for paths in files.values() for path in paths}
    if len(dtypes) > 1:
        raise ConfigError(f"data.dir={data.dir}: holds shards of uint16 and of uint32; keep one kind in a folder")
    dtype = dtypes.pop()
    if data.token_dtype not in ("auto", dtype):
        raise ConfigError(f"data.token_dtype={data.token_dtype}: the shards in {data.dir} are {dtype}")
    if tokenizer.vocab_size > 2 ** (8 * np.dtype(dtype).itemsize):
        raise ConfigError(
            f"tokenizer.vocab_size={tokenizer.vocab_size}: the shards in {data.dir} are {dtype}, too small for it; "
            "choose the tokenizer that made them"
        )
    return dtype


def read_tokens(path: Path, token_dtype: str) -> tuple[np.ndarray, int]:
    """Return (the tokens of a file, mapped into memory; their offset). ConfigError if it is not whole.

    Without a header of llm.c nothing in a file says how wide its tokens are: `token_dtype` does, or uint16 for auto. If
    they are wider than they are read, every second one is 0: a ConfigError.
    """
    start = np.fromfile(path, dtype="<i4", count=3).tolist()
    formats = [(dtype, HEADER_BYTES) for dtype, known in FORMATS.items() if start[:2] == list(known)]
    dtype, offset = formats[0] if formats else ("uint16" if token_dtype == "auto" else token_dtype, 0)
    size, width = path.stat().st_size - offset, np.dtype(dtype).itemsize
    if size <= 0 or size % width or (offset and start[2:] != [size // width]):
        raise ConfigError(f"{path}: is not whole: it has {size + offset} bytes; copy it again")
    tokens = map_tokens(path, dtype, offset)
    sample = tokens[:DECODED_TOKENS]
    if not offset and not (sample[::2].any() and sample[1::2].any()):
        others = "set data.token_dtype=uint32 if they have 4 bytes; " if dtype == "uint16" else ""
        raise ConfigError(
            f"{path}: has no header of llm.c, and read as {dtype} every second token is 0, so its tokens are wider: "
            f"{others}others must be saved again as uint16 or uint32"
        )
    return tokens, offset


def index(
    task: tuple[Path | None, Path], token_dtype: str, vocab_size: int, end_of_text: int
) -> tuple[Shard, np.ndarray]:
    """Write the index of the second of two consecutive shards, None and it if it is the first.

    Return the shard and how often each token occurs [vocab_size].
    """
    before, path = task
    tokens, offset = read_tokens(path, token_dtype)
    if tokens.max() >= vocab_size:
        hint = "" if offset else f" (it has no header of llm.c, and is read as {tokens.dtype}: data.token_dtype)"
        raise ConfigError(
            f"{path}: holds token {tokens.max()}, and tokenizer.vocab_size={vocab_size}; choose the tokenizer that "
            f"made it{hint}"
        )
    at_start = before is None or bool(read_tokens(before, token_dtype)[0][-1] == end_of_text)
    documents = write_index(path, tokens, end_of_text, at_start)
    return Shard(path.name, len(tokens), documents, sha256_of(path), offset), np.bincount(tokens, minlength=vocab_size)
