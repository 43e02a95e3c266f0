"""Token shards on disk: the .bin files of llm.c, and the manifest that describes them.

A shard is a header of 256 int32 (magic, version, the number of tokens, zeros) and its tokens: magic 20240520 and
version 1 for uint16, 20240801 and 7 for uint32, as llm.c has them for the vocabularies of GPT-2 and Llama 3. Next to
it, `<shard>.index.npy` holds the offsets (uint32) at which its documents start. The data in a folder exists when its
`manifest.json` does.
"""

import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError
from data.config import TokenizerConfig
from data.documents import SPLITS
from data.files import sha256_of, write_atomic

MAGIC, VERSION = 20240520, 1  # of uint16 shards
FORMATS = {"uint16": (MAGIC, VERSION), "uint32": (20240801, 7)}
HEADER_BYTES = 256 * 4
MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 2
PREPARE_AGAIN = "remove it and prepare the data again (with its folder, unless another program wrote the shards)"


@dataclass
class Shard:
    file: str
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
    source: str  # fingerprint of the documents; empty if another program wrote the shards
    token_dtype: str = "uint16"
    version: int = MANIFEST_VERSION

    @property
    def is_foreign(self) -> bool:
        """Whether another program wrote the shards, so that they cannot be made again here."""
        return not self.source

    def tokens(self, split: str) -> int:
        return self.splits[split].tokens

    def documents(self, split: str) -> int:
        return self.splits[split].documents

    def bytes_per_token(self, split: str) -> float:
        return self.splits[split].bytes_per_token

    def tokenizer_config(self) -> TokenizerConfig:
        return TokenizerConfig(**{key: value for key, value in self.tokenizer.items() if key != "fingerprint"})

    def save(self, dir: Path) -> None:
        write_atomic(dir / MANIFEST_FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def fingerprint_of(splits: dict[str, Split], tokenizer_fingerprint: str) -> str:
    """Return the SHA-256 of all tokens and the tokenizer."""
    checksums = [shard.sha256 for split in SPLITS for shard in splits[split].shards]
    return hashlib.sha256("\n".join([*checksums, tokenizer_fingerprint]).encode()).hexdigest()


def header(tokens: int, dtype) -> np.ndarray:
    values = np.zeros(256, dtype="<i4")
    values[:3] = *FORMATS[np.dtype(dtype).name], tokens
    return values


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


def save_index(shard: Path, starts: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, starts)
    write_atomic(index_file(shard), content.getvalue())


def read_manifest(dir: str | Path) -> Manifest:
    """Return the manifest of a data folder. ConfigError if there is none, or one that this code did not write."""
    path = Path(dir) / MANIFEST_FILE
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"data.dir={dir}: not prepared: run `python -m data.prepare data=NAME`") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}); {PREPARE_AGAIN}") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != MANIFEST_VERSION:
        raise ConfigError(f"{path}: has version {version}, must be {MANIFEST_VERSION}; {PREPARE_AGAIN}")
    try:
        splits = {}
        for split in SPLITS:
            found = fields["splits"][split]
            splits[split] = Split(**found | {"shards": [Shard(**shard) for shard in found["shards"]]})
        return Manifest(**fields | {"splits": splits})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{path}: is not a whole manifest ({error}); {PREPARE_AGAIN}") from error


def problem_with(path: Path, shard: Shard, dtype: str) -> str | None:
    """Return what is wrong with the size or the header of a shard, None if nothing is."""
    try:
        size = path.stat().st_size
        start = np.fromfile(path, dtype="<i4", count=3)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    expected = shard.offset + np.dtype(dtype).itemsize * shard.tokens
    if size != expected:
        return f"{path}: has {size} bytes, must have {expected} ({shard.tokens} tokens)"
    if not shard.offset:
        return None
    kind = list(FORMATS[dtype])
    if list(start[:2]) != kind:
        return f"{path}: starts with {list(map(int, start[:2]))}, must start with {kind}: not a shard of {dtype} tokens"
    if start[2] != shard.tokens:
        return f"{path}: its header has {start[2]} tokens, the manifest {shard.tokens}"
    return None


class TokenShards:
    """The shards of one split, mapped into memory: `arrays` holds an array of tokens (uint16 or uint32) for each shard.

    ConfigError if the data is not prepared, or a shard has the wrong size or header.
    """

    def __init__(self, dir: str | Path, split: str):
        self.dir, self.split = Path(dir), split
        self.manifest = read_manifest(dir)
        shards, dtype = self.manifest.splits[split].shards, self.manifest.token_dtype
        problems = [found for shard in shards if (found := problem_with(self.dir / shard.file, shard, dtype))]
        if problems:
            again = f"remove {dir} and run `python -m data.prepare data={self.manifest.name}` to make it again"
            if self.manifest.is_foreign:
                again = f"copy the shard again or, if it is a new one, remove {self.dir / MANIFEST_FILE}"
            raise ConfigError(*(f"{problem}; {again}" for problem in problems))
        self.arrays = [map_tokens(self.dir / shard.file, dtype, shard.offset) for shard in shards]
        self.tokens = self.manifest.tokens(split)

    def documents(self) -> list[np.ndarray]:
        """Return the index of each shard: the offsets (uint32) at which its documents start."""
        return [np.load(index_file(self.dir / shard.file)) for shard in self.manifest.splits[self.split].shards]


def verify(dir: str | Path, end_of_text: int | None = None) -> list[str]:
    """Read everything and return what differs from the checksums and counts of the manifest, a line for each problem.

    Given the tokenizer's `end_of_text`, the document indexes are compared with the tokens too.
    """
    dir = Path(dir)
    try:
        manifest = read_manifest(dir)
    except ConfigError as error:
        return error.errors
    problems = []
    for split, expected in manifest.splits.items():
        at_start: bool | None = True  # the next shard starts with a document; None: unknown, the last one is broken
        for shard in expected.shards:
            path = dir / shard.file
            problem = problem_with(path, shard, manifest.token_dtype) or problem_with_checksum(path, shard)
            if problem:
                at_start = None
            elif end_of_text is not None:
                tokens = map_tokens(path, manifest.token_dtype, shard.offset)
                if at_start is not None:
                    problem = problem_with_index(path, shard, *document_index(tokens, end_of_text, at_start))
                at_start = bool(tokens[-1] == end_of_text)
            if problem:
                problems.append(problem)
        for key in ("tokens", "documents"):
            total = sum(getattr(shard, key) for shard in expected.shards)
            if total != getattr(expected, key):
                problems.append(
                    f"{dir / MANIFEST_FILE}: {split} has {getattr(expected, key)} {key}, its shards have {total}"
                )
    if fingerprint_of(manifest.splits, manifest.tokenizer["fingerprint"]) != manifest.fingerprint:
        problems.append(f"{dir / MANIFEST_FILE}: the fingerprint is not that of its shards and tokenizer")
    return problems


def problem_with_checksum(path: Path, shard: Shard) -> str | None:
    sha256 = sha256_of(path)
    return None if sha256 == shard.sha256 else f"{path}: its sha256 is {sha256}, the manifest has {shard.sha256}"


def problem_with_index(path: Path, shard: Shard, starts: np.ndarray, documents: int) -> str | None:
    try:
        index = np.load(index_file(path))
    except (OSError, ValueError) as error:
        return f"{index_file(path)}: cannot be read ({error})"
    if not np.array_equal(index, starts):
        return f"{index_file(path)}: is not the index of the documents in {path.name}"
    if documents != shard.documents:
        return f"{path}: {documents} documents end in it, the manifest has {shard.documents}"
    return None
