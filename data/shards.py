"""Token shards on disk: llm.c's .bin files and the manifest that says what they are.

A shard is a header of 256 int32 (20240520, version 1, the number of tokens, zeros) and its tokens as uint16. The data
in a folder exists when its `manifest.json` does.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import ConfigError, TokenizerConfig

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
SPLITS = ("train", "val")


@dataclass
class Shard:
    file: str
    tokens: int
    documents: int  # that end in this shard
    sha256: str  # of the whole file


@dataclass
class Split:
    shards: list[Shard]
    tokens: int  # end-of-text tokens are counted
    documents: int
    bytes: int  # of the documents' text in UTF-8
    bytes_per_token: float


@dataclass
class Manifest:
    """What a data folder holds."""

    name: str  # data.name
    settings: dict[str, Any]  # what of the data config decides the tokens
    tokenizer: dict[str, Any]  # the tokenizer's config, and its fingerprint
    splits: dict[str, Split]  # train and val
    unigram_entropy: float  # nats a token, of the train split's token distribution
    skipped: dict[str, int]  # documents left out, by reason
    fingerprint: str  # of all tokens and the tokenizer
    version: int = MANIFEST_VERSION

    def tokens(self, split: str) -> int:
        return self.splits[split].tokens

    def documents(self, split: str) -> int:
        return self.splits[split].documents

    def bytes_per_token(self, split: str) -> float:
        return self.splits[split].bytes_per_token

    def tokenizer_config(self) -> TokenizerConfig:
        return TokenizerConfig(**{key: value for key, value in self.tokenizer.items() if key != "fingerprint"})

    def save(self, dir: Path) -> None:
        write_atomically(dir / MANIFEST_FILE, [json.dumps(dataclasses.asdict(self), indent=2).encode() + b"\n"])


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def fingerprint_of(splits: dict[str, Split], tokenizer_fingerprint: str) -> str:
    checksums = [shard.sha256 for split in SPLITS for shard in splits[split].shards]
    return hashlib.sha256("\n".join([*checksums, tokenizer_fingerprint]).encode()).hexdigest()


def header(tokens: int) -> np.ndarray:
    values = np.zeros(256, dtype="<i4")
    values[:3] = MAGIC, VERSION, tokens
    return values


class ShardWriter:
    """Write the documents of one split into `<split>_000000.bin`, ..., of `shard_tokens` tokens each but the last."""

    def __init__(self, dir: Path, split: str, shard_tokens: int, vocab_size: int):
        if vocab_size > 2**16:
            raise ConfigError(f"tokenizer.vocab_size={vocab_size}: shards store tokens as uint16, so at most {2**16}")
        if shard_tokens >= 2**31:
            raise ConfigError(f"data.shard_tokens={shard_tokens}: must be less than 2^31, the header's limit")
        self.dir, self.split, self.shard_tokens, self.vocab_size = Path(dir), split, shard_tokens, vocab_size
        self.shards: list[Shard] = []
        self._parts: list[np.ndarray] = []
        self._tokens = self._documents = 0

    def write(self, document: np.ndarray) -> None:
        """Append one document's tokens, end-of-text included. ValueError for a token outside the vocabulary."""
        if len(document) and not 0 <= document.min() <= document.max() < self.vocab_size:
            raise ValueError(f"token {document.max()} is outside the vocabulary of {self.vocab_size}")
        while len(document) > (room := self.shard_tokens - self._tokens):
            self._append(document[:room])
            self._save()
            document = document[room:]
        self._append(document)
        self._documents += 1

    def close(self) -> list[Shard]:
        """Write what is left; the shards of the split."""
        if self._tokens:
            self._save()
        return self.shards

    def _append(self, tokens: np.ndarray) -> None:
        self._parts.append(tokens.astype("<u2"))
        self._tokens += len(tokens)

    def _save(self) -> None:
        parts = [header(self._tokens).tobytes(), np.concatenate(self._parts).data]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        file = f"{self.split}_{len(self.shards):06d}.bin"
        write_atomically(self.dir / file, parts)
        self.shards.append(Shard(file, self._tokens, self._documents, digest.hexdigest()))
        self._parts, self._tokens, self._documents = [], 0, 0


def read_manifest(dir: str | Path) -> Manifest:
    """The manifest of a data folder. ConfigError where there is none, or one that this code did not write."""
    path = Path(dir) / MANIFEST_FILE
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"data.dir={dir}: not prepared: run `python -m data.prepare data=NAME`") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}); remove {dir} and prepare the data again") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != MANIFEST_VERSION:
        raise ConfigError(
            f"{path}: has version {version}, must be {MANIFEST_VERSION}; remove {dir} and prepare it again"
        )
    try:
        splits = {split: fields["splits"][split] for split in SPLITS}
        shards = {split: [Shard(**shard) for shard in splits[split]["shards"]] for split in SPLITS}
        return Manifest(**fields | {"splits": {key: Split(**splits[key] | {"shards": shards[key]}) for key in SPLITS}})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{path}: is not a whole manifest ({error}); remove {dir} and prepare it again") from error


def problem_with(path: Path, tokens: int) -> str | None:
    """What a quick look finds wrong with a shard that should hold `tokens` tokens: its size and its header."""
    try:
        size = path.stat().st_size
        start = np.fromfile(path, dtype="<i4", count=3)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    expected = HEADER_BYTES + 2 * tokens
    if size != expected:
        return f"{path}: has {size} bytes, must have {expected} ({tokens} tokens)"
    if list(start[:2]) != [MAGIC, VERSION]:
        return f"{path}: starts with {list(map(int, start[:2]))}, must start with {[MAGIC, VERSION]}: not a token shard"
    if start[2] != tokens:
        return f"{path}: its header says {start[2]} tokens, the manifest {tokens}"
    return None


class TokenShards:
    """The shards of one split, mapped into memory: `arrays` holds one uint16 array of tokens a shard.

    ConfigError where the data is not prepared, or where a shard has the wrong size or header.
    """

    def __init__(self, dir: str | Path, split: str):
        self.dir, self.split = Path(dir), split
        self.manifest = read_manifest(dir)
        shards = self.manifest.splits[split].shards
        problems = [found for shard in shards if (found := problem_with(self.dir / shard.file, shard.tokens))]
        if problems:
            again = f"remove {dir} and run `python -m data.prepare data={self.manifest.name}` to make it again"
            raise ConfigError(*(f"{problem}; {again}" for problem in problems))
        self.arrays = [np.memmap(self.dir / shard.file, dtype="<u2", mode="r", offset=HEADER_BYTES) for shard in shards]
        self.tokens = self.manifest.tokens(split)


def verify(dir: str | Path) -> list[str]:
    """Read everything and compare it with the manifest's checksums and counts; what is wrong, one line a problem."""
    dir = Path(dir)
    try:
        manifest = read_manifest(dir)
    except ConfigError as error:
        return error.errors
    problems = []
    for split in SPLITS:
        expected = manifest.splits[split]
        for shard in expected.shards:
            path = dir / shard.file
            if found := problem_with(path, shard.tokens):
                problems.append(found)
                continue
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != shard.sha256:
                problems.append(f"{path}: its sha256 is {sha256}, the manifest says {shard.sha256}")
        for key in ("tokens", "documents"):
            total = sum(getattr(shard, key) for shard in expected.shards)
            if total != getattr(expected, key):
                problems.append(
                    f"{dir / MANIFEST_FILE}: {split} has {getattr(expected, key)} {key}, its shards have {total}"
                )
    if fingerprint_of(manifest.splits, manifest.tokenizer["fingerprint"]) != manifest.fingerprint:
        problems.append(f"{dir / MANIFEST_FILE}: the fingerprint is not that of its shards and tokenizer")
    return problems
