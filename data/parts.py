"""A preparation by several processes at once, on one machine or many: N parts, and the last to finish joins them.

Part I is the I-th contiguous share of the source's files, tokenised with the tokenizer of the whole source and split by
its threshold, into shards of its own in `<data.dir>.parts-<hash>/<I>`. Joining reads the parts in order and writes
their tokens with the writer of an undivided preparation, so shards, indexes and manifest are the same to the byte. Both
go on where they were after a kill, each by its own journal.
"""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from configs.errors import ConfigError
from configs.schema_data import DataConfig, TokenizerConfig
from data import sources
from data.build import (
    Preparation,
    finish,
    make_tokenizer,
    read_finished,
    read_journal,
    start,
    tokenise_all,
    validation_up_to,
)
from data.documents import SPLITS, Tokenised
from data.parallel import Rates, say
from data.shards import Manifest, map_tokens
from data.tokenizers import load_tokenizer

CHUNK = 4_000_000  # tokens joined at a time
DIVISIBLE = ("files", "hub")


@dataclasses.dataclass(frozen=True)
class Division:
    """What the parts of one preparation have in common."""

    identity: dict[str, Any]  # what decides the shards
    parts: int
    dir: Path

    def folder(self, part: int) -> Path:
        return self.dir / f"{part:05d}"

    def journal(self, part: int) -> dict[str, Any] | None:
        return read_journal(self.folder(part), self.identity | {"part": part})

    def is_finished(self, part: int) -> bool:
        journal = self.journal(part)
        return bool(journal) and journal["stream_state"] == "end"


def divide(data: DataConfig, config: TokenizerConfig, settings: dict[str, Any], parts: int) -> Division:
    """Other settings, another source or number of parts have a folder of their own."""
    identity = {
        "settings": settings,
        "tokenizer": dataclasses.asdict(config),
        "source": sources.fingerprint(data),
    }
    digest = hashlib.sha256(json.dumps([identity, parts]).encode()).hexdigest()[:8]
    dir = Path(data.dir)
    return Division(identity, parts, dir.with_name(f"{dir.name}.parts-{digest}"))


def prepare_part(
    data: DataConfig, config: TokenizerConfig, settings: dict[str, Any], part: int, parts: int, progress: bool
) -> None:
    """Tokenise one part, going on from what an earlier start has left. ConfigError where there is no such part."""
    if not 0 <= part < parts:
        raise ConfigError(f"part={part}: must lie between 0 and parts - 1 = {parts - 1}")
    if data.source not in DIVISIBLE:
        raise ConfigError(
            f"parts={parts}: data.source={data.source} is prepared in one piece; leave part and parts out"
        )
    stream = sources.open_documents(data, progress)
    if stream.num_shards < parts:
        raise ConfigError(f"parts={parts}: the source has {stream.num_shards} file(s), and a part is at least one file")
    division = divide(data, config, settings, parts)
    folder = division.folder(part)
    division.dir.mkdir(parents=True, exist_ok=True)
    val_up_to = validation_up_to(stream, data)
    with filelock.FileLock(division.dir / "tokenizer.lock"):
        store = division.dir / "tokenizer"
        if not store.exists():
            unfinished = division.dir / "tokenizer.partial"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make_tokenizer(config, stream, data, val_up_to, unfinished, progress)
            unfinished.rename(store)
    with filelock.FileLock(division.dir / f"{folder.name}.lock"):
        if division.is_finished(part):
            return say(f"{folder}: finished already", progress)
        journal = division.journal(part)
        if not journal:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        own = sources.open_documents(data).shard(num_shards=parts, index=part, contiguous=True)
        made = Preparation(folder, data, load_tokenizer(config, store), division.identity | {"part": part})
        start(made, journal, own, progress)
        tokenise_all(own, data, config, store, val_up_to, made, progress)
        for writer in made.writers.values():
            writer.close()
        made.stream_state = "end"
        made.save()


def all_finished(data: DataConfig, config: TokenizerConfig, settings: dict[str, Any], parts: int) -> bool:
    division = divide(data, config, settings, parts)
    return all(division.is_finished(part) for part in range(parts))


def join(
    data: DataConfig, config: TokenizerConfig, dir: Path, settings: dict[str, Any], progress: bool, parts: int
) -> Manifest:
    """Make in `dir` what an undivided preparation makes there, from the finished parts."""
    division = divide(data, config, settings, parts)
    if found := read_finished(dir, division.identity):
        return found
    tokenizer = load_tokenizer(config, division.dir / "tokenizer")
    identity = division.identity | {"parts": parts}
    journal = read_journal(dir, identity)
    if not journal:
        shutil.rmtree(dir, ignore_errors=True)
        dir.mkdir()
        tokenizer.save(dir)
    made = Preparation(dir, data, tokenizer, identity)
    chunks = Chunks(division, tokenizer.vocab_size, data)
    start(made, journal, chunks, progress)
    with Rates("Joining", progress, tokens=made.tokens.total()) as rates:
        for number, chunk in enumerate(chunks, chunks.done + 1):
            made.add(chunk, {"chunks": number})
            rates.advance(tokens=sum(map(len, chunk.tokens.values())))
    return finish(made, data, config, tokenizer, settings, division.identity["source"])


class Chunks:
    """The tokens of finished parts in order, as a stream with a position; a part's counts come with its last chunk."""

    def __init__(self, division: Division, vocab_size: int, data: DataConfig):
        self.division, self.dtype, self.done = division, data.dtype_for(vocab_size), 0

    def load_state_dict(self, state: dict) -> None:
        self.done = state["chunks"]

    def __iter__(self) -> Iterator[Tokenised]:
        return islice(self._all(), self.done, None)

    def _all(self) -> Iterator[Tokenised]:
        for part in range(self.division.parts):
            journal, uncounted = self.division.journal(part), dict.fromkeys(SPLITS, 0)
            for split in SPLITS:
                for shard in journal["writers"][split]["shards"]:
                    tokens = map_tokens(self.division.folder(part) / shard["file"], self.dtype)
                    for at in range(0, len(tokens), CHUNK):
                        parts = dict.fromkeys(SPLITS, tokens[:0]) | {split: tokens[at : at + CHUNK]}
                        yield Tokenised(parts, uncounted, uncounted)
            documents, bytes_, _, skipped = journal["counters"]
            none = np.empty(0, self.dtype)
            yield Tokenised(dict.fromkeys(SPLITS, none), documents, bytes_, Counter(skipped))


def remove_parts(dir: Path) -> None:
    """The parts that `dir` was joined from, and what was left of other divisions."""
    for parts in dir.parent.glob(f"{dir.name}.parts-*"):
        shutil.rmtree(parts, ignore_errors=True)
