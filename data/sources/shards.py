"""Token shards that another program wrote: the .bin files of llm.c, or those of nanoGPT, which have no header.

They come without manifest and tokenizer. The configuration names the tokenizer, and on first use the shards are read
once to make what is missing: the document indexes, the counts and the manifest.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np

from configs.errors import ConfigError
from data.build import Job, write_manifest
from data.config import DataConfig
from data.documents import SPLITS
from data.files import sha256_of
from data.parallel import Rates, ordered_map, report
from data.shards import FORMATS, HEADER_BYTES, Manifest, Shard, Split, document_index, map_tokens, save_index
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

    def fingerprint(self) -> str:
        return ""  # by which a manifest shows that another program wrote the shards

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
            raise ConfigError(
                f"data.dir={dir}: holds no {names} (as a word of the name); set data.dir to the folder of the shards"
            )
        return found

    def adopt(self, job: Job) -> Manifest:
        """Index the shards and write tokenizer and manifest next to them.

        ConfigError if they are not whole, or do not match the tokenizer, or the folder cannot be written to.
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
        splits, counts = {}, {}
        with Rates("Indexing", job.progress) as rates:
            for split, paths in files.items():
                shards, counts[split] = [], np.zeros(tokenizer.vocab_size, dtype=np.int64)
                at_start = [True, *(bool(read_tokens(path, dtype)[-1] == tokenizer.end_of_text) for path in paths[:-1])]
                options = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
                indexing = partial(index, dtype=dtype, **options)
                for shard, seen in ordered_map(indexing, zip(paths, at_start, strict=True), self.config.workers):
                    shards.append(shard)
                    counts[split] += seen
                    rates.advance(shards=1, tokens=shard.tokens)
                tokens, documents = (sum(getattr(shard, key) for shard in shards) for key in ("tokens", "documents"))
                beginning = tokenizer.decode(read_tokens(paths[0], dtype)[:DECODED_AT_START])
                report(f"{paths[0]}: read as {dtype}, begins with {beginning!r}", job.progress)
                ratio = bytes_per_token(read_tokens(paths[0], dtype)[:DECODED_TOKENS], tokenizer)
                splits[split] = Split(shards, tokens, documents, round(ratio * tokens), ratio)
        return write_manifest(dir, job, tokenizer, splits, counts["train"], {}, dtype)


def common_dtype(files: dict[str, list[Path]], data: DataConfig, tokenizer: Tokenizer) -> str:
    """Return the dtype of all files. ConfigError if they differ, or do not match the configuration."""
    dtypes = {file_format(path, data.token_dtype)[0] for paths in files.values() for path in paths}
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


def file_format(path: Path, token_dtype: str) -> tuple[str, int]:
    """Return (dtype, offset of the tokens); without a header of llm.c `token_dtype`, or uint16 for auto."""
    start = tuple(np.fromfile(path, dtype="<i4", count=2).tolist())
    without = "uint16" if token_dtype == "auto" else token_dtype
    return next(((dtype, HEADER_BYTES) for dtype, known in FORMATS.items() if start == known), (without, 0))


def read_tokens(path: Path, token_dtype: str) -> np.ndarray:
    """Return the tokens of a file, mapped into memory. ConfigError if it is not whole, or its tokens are wider.

    Nothing in a file without a header says how wide its tokens are. If they are wider than they are read, every second
    one is 0.
    """
    dtype, offset = file_format(path, token_dtype)
    size, width = path.stat().st_size - offset, np.dtype(dtype).itemsize
    whole = size > 0 and size % width == 0
    if not whole or (offset and np.fromfile(path, dtype="<i4", count=3)[2] != size // width):
        raise ConfigError(f"{path}: is not whole: it has {size + offset} bytes; copy it again")
    tokens = map_tokens(path, dtype, offset)
    sample = tokens[:DECODED_TOKENS]
    if not offset and not (sample[::2].any() and sample[1::2].any()):
        others = "set data.token_dtype=uint32 if they have 4 bytes; " if dtype == "uint16" else ""
        raise ConfigError(
            f"{path}: has no header of llm.c, and read as {dtype} every second token is 0, so its tokens are wider: "
            f"{others}others must be saved again as uint16 or uint32"
        )
    return tokens


def index(task: tuple[Path, bool], dtype: str, vocab_size: int, end_of_text: int) -> tuple[Shard, np.ndarray]:
    """Write the index of one shard, (file, whether it starts with a document).

    Return the shard and how often each token occurs [vocab_size].
    """
    path, at_start = task
    tokens, offset = read_tokens(path, dtype), file_format(path, dtype)[1]
    if tokens.max() >= vocab_size:
        hint = "" if offset else f" (it has no header of llm.c, and is read as {dtype}: data.token_dtype)"
        raise ConfigError(
            f"{path}: holds token {tokens.max()}, and tokenizer.vocab_size={vocab_size}; choose the tokenizer that "
            f"made it{hint}"
        )
    starts, documents = document_index(tokens, end_of_text, at_start)
    save_index(path, starts)
    return Shard(path.name, len(tokens), documents, sha256_of(path), offset), np.bincount(tokens, minlength=vocab_size)


def bytes_per_token(tokens: np.ndarray, tokenizer: Tokenizer) -> float:
    text = tokenizer.decode(tokens[tokens != tokenizer.end_of_text])
    return len(text.encode()) / len(tokens)
