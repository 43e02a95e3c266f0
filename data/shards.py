"""Token shards on disk: the .bin files of llm.c, their writer and reader, and the manifest that describes them.

A shard is a header of 256 int32 (magic, version, the number of tokens, zeros) and its tokens, uint16 or uint32. Next to
it, `<shard>.index.npy` holds the offsets (uint32) at which its documents start. The data in a folder exists when its
`manifest.json` does.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from configs.errors import ConfigError
from data.config import TokenizerConfig
from data.documents import SPLITS
from data.files import seal, sha256_of, write_atomic
from data.tokenizers import load_tokenizer

FORMATS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}  # llm.c's magic and version: of GPT-2's, of Llama 3's
HEADER_BYTES = 256 * 4
MANIFEST_FILE = "manifest.json"
PREPARE_AGAIN = "remove it and prepare the data again (with its folder, unless another program wrote the shards)"


@dataclass
class Shard:
    file: Annotated[str, Field(pattern=r"^[^/\x00]*[^./\x00][^/\x00]*$")]  # a name in the folder, not a path
    tokens: int
    documents: int  # that end in this shard
    sha256: str  # of the whole file
    offset: int = HEADER_BYTES  # where the tokens start; the .bin files of nanoGPT have no header


@dataclass
class Split:
    shards: list[Shard]
    tokens: int  # end-of-text tokens are counted
    documents: int
    bytes: int  # of the documents' text in UTF-8
    bytes_per_token: float


@dataclass(kw_only=True)
class Manifest:
    """What a data folder holds."""

    name: str  # data.name
    settings: dict[str, Any]  # what of the data config decides the tokens
    tokenizer: dict[str, Any]  # the tokenizer's config, and its fingerprint
    splits: dict[str, Split]  # train and val
    unigram_entropy: float  # nats a token, of the train split's token distribution
    skipped: dict[str, int]  # documents left out, by reason
    fingerprint: str  # of all tokens and the tokenizer
    source: str  # fingerprint of the documents; empty if another program wrote the shards
    token_dtype: str = "uint16"
    version: Literal[2]  # another number for another format
    checksum: str = ""  # of all of the above; older manifests have none

    def tokenizer_config(self) -> TokenizerConfig:
        return TokenizerConfig(**{key: value for key, value in self.tokenizer.items() if key != "fingerprint"})


def fingerprint_of(splits: dict[str, Split], tokenizer_fingerprint: str) -> str:
    """Return the SHA-256 of all tokens and the tokenizer."""
    checksums = [shard.sha256 for split in SPLITS for shard in splits[split].shards]
    return hashlib.sha256("\n".join([*checksums, tokenizer_fingerprint]).encode()).hexdigest()


def map_tokens(path: Path, dtype: str, offset: int = HEADER_BYTES) -> np.ndarray:
    """Return the tokens of a shard, mapped into memory."""
    # as a plain array: slicing the memmap class of numpy costs five times as much
    return np.asarray(np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", offset=offset))


def document_index(tokens: np.ndarray, end_of_text: int, at_start: bool) -> tuple[np.ndarray, int]:
    """Return (the offsets at which documents start, the number that end) in a shard; `at_start`: it starts with one."""
    ends = np.flatnonzero(tokens == end_of_text)
    starts = ends[ends < len(tokens) - 1] + 1
    return np.concatenate(([0] if at_start else [], starts)).astype(np.uint32), len(ends)


def index_file(shard: Path) -> Path:
    return shard.with_suffix(".index.npy")


def write_index(shard: Path, tokens: np.ndarray, end_of_text: int, at_start: bool) -> int:
    """Write the offsets at which documents start next to a shard; return the number of documents that end in it."""
    starts, documents = document_index(tokens, end_of_text, at_start)
    content = io.BytesIO()
    np.save(content, starts)
    write_atomic(index_file(shard), content.getvalue())
    return documents


def read_manifest(dir: str | Path) -> Manifest:
    """Return the manifest of a data folder. ConfigError if there is none, or one that this code did not write."""
    path = Path(dir) / MANIFEST_FILE
    try:
        manifest = TypeAdapter(Manifest).validate_json(content := path.read_bytes())
        if manifest.checksum and manifest.checksum != seal(json.loads(content)):
            raise ConfigError(f"{path}: was changed since it was written; {PREPARE_AGAIN}")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"data.dir={dir}: not prepared: run `python -m data.prepare data=NAME`") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))} {each['msg']}".strip() for each in error.errors())
        raise ConfigError(f"{path}: is not a manifest of this version ({wrong}); {PREPARE_AGAIN}") from error


def problem_with(path: Path, shard: Shard, dtype: str) -> str | None:
    """Return what is wrong with the size or the header of a shard, None if nothing is."""
    try:
        size, start = path.stat().st_size, np.fromfile(path, dtype="<i4", count=3).tolist()
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    expected = shard.offset + np.dtype(dtype).itemsize * shard.tokens
    if size != expected:
        return f"{path}: has {size} bytes, must have {expected} ({shard.tokens} tokens)"
    header = [*FORMATS[dtype], shard.tokens]
    if shard.offset and start != header:
        return f"{path}: its header is {start}, must be {header}: the format of {dtype} tokens, and how many there are"
    return None


class ShardWriter:
    """Write the tokens of one split into `<split>_000000.bin`, ..., of `shard_tokens` tokens each except the last.

    Tokens are appended to the last one, the open shard. `state()` tells how much of it counts, and a writer with
    `restore(state)` cuts off the rest. What the state calls finished is never written again.
    """

    def __init__(self, dir: str | Path, split: str, shard_tokens: int, vocab_size: int, end_of_text: int, dtype: str):
        self.dir, self.split, self.shard_tokens, self.vocab_size = Path(dir), split, shard_tokens, vocab_size
        self.end_of_text, self.dtype = end_of_text, np.dtype(dtype).newbyteorder("<")
        self.shards: list[Shard] = []
        self._file = None  # the open shard
        self._open_tokens, self._at_start = 0, True  # the tokens in it, and whether it begins with a document

    def write(self, tokens: np.ndarray) -> bool:
        """Append tokens; return whether a shard was finished. ValueError for a token outside the vocabulary."""
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"token {tokens.max()} is outside the vocabulary of {self.vocab_size}")
        before = len(self.shards)
        while len(tokens):
            if self._open_tokens == self.shard_tokens:
                self.finish_shard()
            if self._file is None:
                self._file = open(self._open_path(), "wb+")
                self._file.write(bytes(HEADER_BYTES))
            here, tokens = np.split(tokens, [self.shard_tokens - self._open_tokens])
            self._file.write(here.astype(self.dtype, copy=False).data)
            self._open_tokens += len(here)
        return len(self.shards) > before

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return sum(shard.tokens for shard in self.shards) + self._open_tokens

    def state(self) -> dict[str, Any]:
        """Return, as plain values, how much of the files is on disk by then."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        shards = [asdict(shard) for shard in self.shards]
        return {"shards": shards, "tokens": self._open_tokens, "at_start": self._at_start}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a saved state: cut off what came after."""
        for path in self.dir.glob(f"{self.split}_*.bin.open"):  # as they were named until they were finished
            path.rename(path.with_suffix(""))
        self.shards = [Shard(**shard) for shard in state["shards"]]
        self._open_tokens, self._at_start = state["tokens"], state["at_start"]
        if self._open_tokens:
            self._file = open(self._open_path(), "r+b")
            self._file.truncate(HEADER_BYTES + self._open_tokens * self.dtype.itemsize)
            self._file.seek(0, os.SEEK_END)

    def _open_path(self) -> Path:
        return self.dir / f"{self.split}_{len(self.shards):06d}.bin"

    def finish_shard(self) -> None:
        """Finish the open shard, if there is one."""
        if not self._file:
            return
        path = self._open_path()
        self._file.seek(0)
        self._file.write(np.array([*FORMATS[self.dtype.name], self._open_tokens], dtype="<i4").data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        tokens = map_tokens(path, self.dtype)
        documents = write_index(path, tokens, self.end_of_text, self._at_start)
        self.shards.append(Shard(path.name, self._open_tokens, documents, sha256_of(path)))
        self._open_tokens, self._at_start = 0, bool(tokens[-1] == self.end_of_text)


class TokenShards:
    """The shards of one split, mapped into memory: `arrays` holds an array of tokens (uint16 or uint32) for each shard.
    ConfigError if the data is not prepared, or a shard has the wrong size or header."""

    def __init__(self, dir: str | Path, split: str):
        self.dir, self.split = Path(dir), split
        self.manifest = read_manifest(dir)
        shards, dtype = self.manifest.splits[split].shards, self.manifest.token_dtype
        problems = [found for shard in shards if (found := problem_with(self.dir / shard.file, shard, dtype))]
        if problems:
            again = f"remove {dir} and run `python -m data.prepare data={self.manifest.name}` to make it again"
            if not self.manifest.source:
                again = f"copy the shard again or, if it is a new one, remove {self.dir / MANIFEST_FILE}"
            raise ConfigError(*(f"{problem}; {again}" for problem in problems))
        self.arrays = [map_tokens(self.dir / shard.file, dtype, shard.offset) for shard in shards]

    def documents(self) -> list[np.ndarray]:
        """Return the index of each shard: the offsets (uint32) at which its documents start."""
        return [np.load(index_file(self.dir / shard.file)) for shard in self.manifest.splits[self.split].shards]


def verify(dir: str | Path) -> list[str]:
    """Read everything and return what differs from the checksums and counts of the manifest, a line each."""
    dir, problems, end_of_text = Path(dir), [], None
    try:
        manifest = read_manifest(dir)
    except ConfigError as error:
        return error.errors
    try:
        tokenizer = load_tokenizer(manifest.tokenizer_config(), dir)
        end_of_text = tokenizer.end_of_text
        if tokenizer.fingerprint != manifest.tokenizer["fingerprint"]:
            problems.append(f"{dir}: the tokenizer is not the one that made the shards (their fingerprints differ)")
    except ConfigError as error:
        problems += error.errors
    for split, expected in manifest.splits.items():
        problems += problems_of_shards(dir, expected.shards, manifest.token_dtype, end_of_text)
        for key in ("tokens", "documents"):
            stated, total = getattr(expected, key), sum(getattr(shard, key) for shard in expected.shards)
            if total != stated:
                problems.append(f"{dir / MANIFEST_FILE}: {split} has {stated} {key}, its shards have {total}")
    if fingerprint_of(manifest.splits, manifest.tokenizer["fingerprint"]) != manifest.fingerprint:
        problems.append(f"{dir / MANIFEST_FILE}: the fingerprint is not that of its shards and tokenizer")
    return problems


def problems_of_shards(dir: Path, shards: list[Shard], dtype: str, end_of_text: int | None) -> Iterator[str]:
    """Yield what is wrong with the shards of a split, and with their indexes if `end_of_text` is given."""
    at_start: bool | None = True  # the next shard starts with a document; None: unknown, the last one is broken
    for shard in shards:
        path, was_at_start, at_start = dir / shard.file, at_start, None
        if problem := problem_with(path, shard, dtype):
            yield problem
        elif (sha256 := sha256_of(path)) != shard.sha256:
            yield f"{path}: its sha256 is {sha256}, the manifest has {shard.sha256}"
        elif end_of_text is not None:
            tokens = map_tokens(path, dtype, shard.offset)
            at_start = bool(tokens[-1] == end_of_text)
            starts, documents = document_index(tokens, end_of_text, bool(was_at_start))
            if documents != shard.documents:
                yield f"{path}: {documents} documents end in it, the manifest has {shard.documents}"
            try:
                if was_at_start is not None and not np.array_equal(np.load(index_file(path)), starts):
                    yield f"{index_file(path)}: is not the index of the documents in {path.name}"
            except (OSError, ValueError) as error:
                yield f"{index_file(path)}: cannot be read ({error})"
