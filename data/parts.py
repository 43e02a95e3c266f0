"""A preparation by several processes at once, on one machine or many: N parts, which the last one to finish joins.

Part I is the I-th contiguous share of the files of the source, tokenised with the tokenizer of the whole source and
split by its threshold, into shards of its own in `<data.dir>.parts-<hash>/<I>`. Joining reads the parts in order and
writes their tokens with the writer of an undivided preparation, so shards, indexes and manifest are the same to the
byte. Parts and joining resume after a kill, each by its own journal.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from configs.errors import ConfigError
from data.build import (
    Job,
    Preparation,
    clear,
    make_tokenizer,
    read_finished,
    read_journal,
    tokenise_all,
    validation_up_to,
)  # fmt: skip
from data.documents import SPLITS, Tokenised
from data.parallel import Rates, report
from data.shards import Manifest, map_tokens
from data.tokenizers import load_tokenizer

CHUNK = 4_000_000  # tokens joined at a time


@dataclass(frozen=True)
class Division:
    """A preparation in parts. Another identity of the job or another number of parts has a folder of its own."""

    job: Job
    parts: int

    @property
    def dir(self) -> Path:
        dir = Path(self.job.data.dir)
        digest = hashlib.sha256(json.dumps([self.job.identity, self.parts]).encode()).hexdigest()
        return dir.with_name(f"{dir.name}.parts-{digest[:8]}")

    @property
    def tokenizer_dir(self) -> Path:
        return self.dir / "tokenizer"

    def folder(self, part: int) -> Path:
        return self.dir / f"{part:05d}"

    def journal(self, part: int) -> dict[str, Any] | None:
        return read_journal(self.folder(part), self.job.identity | {"part": part})

    def is_finished(self, part: int) -> bool:
        journal = self.journal(part)
        return bool(journal) and journal["stream_state"] == "end"

    def all_finished(self) -> bool:
        return all(self.is_finished(part) for part in range(self.parts))


def prepare_part(division: Division, part: int) -> None:
    """Tokenise one part, resuming from what an earlier start has left. ConfigError if there is no such part."""
    job, parts = division.job, division.parts
    if not 0 <= part < parts:
        raise ConfigError(f"part={part}: must lie between 0 and parts - 1 = {parts - 1}")
    if not job.source.divisible:
        raise ConfigError(
            f"parts={parts}: data.source={job.data.source} is prepared in one piece; leave part and parts out"
        )
    stream = job.source.open(job.progress)
    if stream.num_shards < parts:
        raise ConfigError(f"parts={parts}: the source has {stream.num_shards} file(s), and a part is at least one file")
    folder = division.folder(part)
    division.dir.mkdir(parents=True, exist_ok=True)
    val_up_to = validation_up_to(stream, job.data)
    with filelock.FileLock(division.dir / "tokenizer.lock"):
        if not division.tokenizer_dir.exists():
            unfinished = division.dir / "tokenizer.partial"
            clear(unfinished)
            make_tokenizer(job, stream, val_up_to, unfinished)
            unfinished.rename(division.tokenizer_dir)
    with filelock.FileLock(division.dir / f"{folder.name}.lock"):
        journal = division.journal(part)
        if division.is_finished(part):
            report(f"{folder}: finished already", job.progress)
            return
        if not journal:
            clear(folder)
        own = job.source.open().shard(num_shards=parts, index=part, contiguous=True)
        tokenizer = load_tokenizer(job.tokenizer, division.tokenizer_dir)
        made = Preparation(folder, job, tokenizer, job.identity | {"part": part})
        made.start(journal, own)
        tokenise_all(own, made, division.tokenizer_dir, val_up_to)
        made.stream_state = "end"
        made.close()


def join(division: Division, dir: Path) -> Manifest:
    """Make in `dir` what an undivided preparation makes there, from the finished parts."""
    job = division.job
    if found := read_finished(dir, job.identity):
        return found
    tokenizer = load_tokenizer(job.tokenizer, division.tokenizer_dir)
    identity = job.identity | {"parts": division.parts}
    journal = read_journal(dir, identity)
    if not journal:
        clear(dir)
        tokenizer.save(dir)
    made = Preparation(dir, job, tokenizer, identity)
    chunks = Chunks(division, made.dtype)
    made.start(journal, chunks)
    with Rates("Joining", job.progress, tokens=made.tokens.total()) as rates:
        for number, chunk in enumerate(chunks, chunks.done + 1):
            made.add(chunk, {"chunks": number})
            rates.advance(tokens=sum(map(len, chunk.tokens.values())))
    return made.finish()


class Chunks:
    """The tokens of finished parts in order, in a stream that can be resumed; the counts of a part come at its end."""

    def __init__(self, division: Division, dtype: str):
        self.division, self.dtype, self.done = division, dtype, 0

    def load_state_dict(self, state: dict) -> None:
        self.done = state["chunks"]

    def __iter__(self) -> Iterator[Tokenised]:
        return islice(self._all(), self.done, None)

    def _all(self) -> Iterator[Tokenised]:
        none = np.empty(0, self.dtype)
        for part in range(self.division.parts):
            journal, uncounted = self.division.journal(part), dict.fromkeys(SPLITS, 0)
            for split in SPLITS:
                for shard in journal["writers"][split]["shards"]:
                    tokens = map_tokens(self.division.folder(part) / shard["file"], self.dtype)
                    for start in range(0, len(tokens), CHUNK):
                        chunk = dict.fromkeys(SPLITS, none) | {split: tokens[start : start + CHUNK]}
                        yield Tokenised(chunk, uncounted, uncounted)
            documents, bytes_, _, skipped = journal["counters"]
            yield Tokenised(dict.fromkeys(SPLITS, none), documents, bytes_, Counter(skipped))


def remove_parts(dir: Path) -> None:
    """Remove the parts that `dir` was joined from, and what is left of other divisions."""
    for parts in dir.parent.glob(f"{dir.name}.parts-*"):
        shutil.rmtree(parts, ignore_errors=True)
