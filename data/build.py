"""From a stream of documents to a folder of shards, in bounded memory, so that a killed build can resume.

Only this process writes. What it has done is in `journal.json`: where the source stands, and how much of each open
shard belongs to the documents before that. What was written after the journal is cut off when the build resumes, and
the same documents make the same bytes again.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError
from data.config import DataConfig, TokenizerConfig
from data.documents import SPLITS, NotText, Tokenised, encoded, place_of, set_tokeniser, tokenise
from data.files import remove_partial, write_atomic
from data.parallel import Rates, ordered_map, report
from data.shards import MANIFEST_FILE, Manifest, Split, fingerprint_of, read_manifest
from data.sources.base import Source, Stream, batches, source_of
from data.tokenizers import Tokenizer, load_tokenizer, new_tokenizer, train_sentencepiece
from data.writer import ShardWriter

JOURNAL_FILE = "journal.json"
JOURNAL_EVERY = 20  # seconds; and after each finished shard
TASK_DOCUMENTS, TASK_CHARACTERS = 512, 500_000  # of a work item, whichever comes first
FEW_DOCUMENTS = 1000  # a smaller source gets a validation document even if the hash gives it none


@dataclass(frozen=True)
class Job:
    """What is to be prepared."""

    data: DataConfig
    tokenizer: TokenizerConfig
    progress: bool = True  # report it

    @cached_property
    def source(self) -> Source:
        return source_of(self.data)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the shards: another identity is another preparation."""
        return {
            "settings": self.data.settings(),
            "tokenizer": self.tokenizer.model_dump(),
            "source": self.source.fingerprint(self.progress),
        }


class Preparation:
    """The writers of both splits in `dir`, and everything else that is counted along the way."""

    def __init__(self, dir: Path, job: Job, tokenizer: Tokenizer, identity: dict[str, Any]):
        self.dir, self.job, self.tokenizer, self.identity = dir, job, tokenizer, identity
        self.dtype = job.data.dtype_for(tokenizer.vocab_size)
        options = (job.data.shard_tokens, tokenizer.vocab_size, tokenizer.end_of_text, self.dtype)
        self.writers = {split: ShardWriter(dir, split, *options) for split in SPLITS}
        self.documents, self.bytes, self.tokens = Counter(), Counter(), Counter()  # by split
        self.skipped = Counter()  # by reason
        self.token_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)  # of the train split
        self.stream_state = None
        self._saved = time.monotonic()

    @property
    def seen(self) -> int:
        """The number of documents so far, skipped ones included."""
        return self.documents.total() + self.skipped.total()

    def start(self, journal: dict[str, Any] | None, stream) -> None:
        """Resume from the journal and move `stream` to where it stands, or begin a journal."""
        if not journal:
            self.save()
            return
        remove_partial(self.dir)
        self.stream_state = journal["stream_state"]
        for split, writer in self.writers.items():
            writer.restore(journal["writers"][split])
        self.documents, self.bytes, self.tokens, self.skipped = map(Counter, journal["counters"])
        self.token_counts[:] = journal["token_counts"]
        if self.stream_state:
            stream.load_state_dict(self.stream_state)
        report(f"{self.dir}: resuming after {self.seen:,} documents", self.job.progress)

    def add(self, done: Tokenised, stream_state: dict) -> None:
        """Write the next documents, after which the source stands at `stream_state`; keep the journal up to date."""
        finished = [self.writers[split].write(done.tokens[split]) for split in SPLITS]
        self.token_counts += np.bincount(done.tokens["train"], minlength=len(self.token_counts))
        self.documents.update(done.documents)
        self.bytes.update(done.bytes)
        self.tokens.update({split: len(done.tokens[split]) for split in SPLITS})
        self.skipped.update(done.skipped)
        self.stream_state = stream_state
        if any(finished) or time.monotonic() - self._saved > JOURNAL_EVERY:
            self.save()

    def save(self) -> None:
        """Write the journal, then give finished shards their names."""
        fields = {
            "identity": self.identity,
            "stream_state": self.stream_state,
            "writers": {split: writer.state() for split, writer in self.writers.items()},
            "counters": [dict(self.documents), dict(self.bytes), dict(self.tokens), dict(self.skipped)],
            "token_counts": self.token_counts.tolist(),
        }
        write_atomic(self.dir / JOURNAL_FILE, json.dumps(fields))
        for writer in self.writers.values():
            writer.publish()
        self._saved = time.monotonic()

    def close(self) -> None:
        """Finish the last shards."""
        for writer in self.writers.values():
            writer.close()
        self.save()

    def finish(self) -> Manifest:
        """Finish the last shards and write the manifest. ConfigError if a split is empty."""
        check_splits(self.documents, self.skipped, self.job.data)
        self.close()
        splits = {}
        for split, writer in self.writers.items():
            tokens, size = self.tokens[split], self.bytes[split]
            splits[split] = Split(writer.shards, tokens, self.documents[split], size, bytes_per_token=size / tokens)
        skipped = dict(sorted(self.skipped.items()))
        manifest = write_manifest(self.dir, self.job, self.tokenizer, splits, self.token_counts, skipped, self.dtype)
        (self.dir / JOURNAL_FILE).unlink()
        return manifest


def write_manifest(
    dir: Path, job: Job, tokenizer: Tokenizer, splits: dict[str, Split], counts: np.ndarray, skipped: dict, dtype: str
) -> Manifest:
    """Write the manifest of the shards in `dir` and return it; `counts` are of the tokens of the train split."""
    manifest = Manifest(
        name=job.data.name,
        settings=job.identity["settings"],
        splits=splits,
        tokenizer=job.identity["tokenizer"] | {"fingerprint": tokenizer.fingerprint},
        unigram_entropy=entropy(counts),
        skipped=skipped,
        fingerprint=fingerprint_of(splits, tokenizer.fingerprint),
        source=job.identity["source"],
        token_dtype=dtype,
    )
    manifest.save(dir)
    return manifest


def read_journal(dir: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the journal that an earlier start with the same identity has left, None if there is none."""
    try:
        journal = json.loads((dir / JOURNAL_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return journal if journal.get("identity") == json.loads(json.dumps(identity)) else None


def read_finished(dir: Path, identity: dict[str, Any]) -> Manifest | None:
    """Return the manifest of a build that was killed when only the name of its folder was missing."""
    if not (dir / MANIFEST_FILE).is_file() or (dir / JOURNAL_FILE).exists():
        return None
    manifest = read_manifest(dir)
    there = {"settings": manifest.settings, "tokenizer": dict(manifest.tokenizer), "source": manifest.source}
    there["tokenizer"].pop("fingerprint")
    return manifest if there == json.loads(json.dumps(identity)) else None


def has_finished_shards(dir: Path) -> bool:
    """Return whether the folder of an unfinished build is worth keeping."""
    return any(dir.glob("*.bin"))


def clear(dir: Path) -> None:
    """Make `dir` an empty folder."""
    shutil.rmtree(dir, ignore_errors=True)
    dir.mkdir()


def build(job: Job, dir: Path) -> Manifest:
    """Make shards, tokenizer and manifest in `dir`, resuming from what an earlier start has left there."""
    stream = job.source.open(job.progress)
    if found := read_finished(dir, job.identity):
        return found
    journal = read_journal(dir, job.identity)
    val_up_to = validation_up_to(stream, job.data)
    if journal:
        tokenizer = load_tokenizer(job.tokenizer, dir)
    else:
        clear(dir)
        tokenizer = make_tokenizer(job, stream, val_up_to, dir)
    made = Preparation(dir, job, tokenizer, job.identity)
    made.start(journal, stream)
    tokenise_all(stream, made, dir, val_up_to)
    return made.finish()


def tokenise_all(stream: Stream, made: Preparation, store: Path, val_up_to: float) -> None:
    """Add the whole of `stream` to `made`, with the tokenizer stored in `store`."""
    job = made.job
    tasks = batches(stream, TASK_DOCUMENTS, TASK_CHARACTERS)
    setup_args = (job.tokenizer, store, val_up_to, job.data.max_document_bytes)
    with Rates("Tokenising", job.progress, documents=made.seen, tokens=made.tokens.total()) as rates:
        for done, state in ordered_map(tokenise, tasks, job.data.workers, set_tokeniser, setup_args):
            made.add(done, state)
            documents = sum(done.documents.values()) + done.skipped.total()
            rates.advance(documents=documents, tokens=sum(map(len, done.tokens.values())))


def check_splits(documents: Counter, skipped: Counter, data: DataConfig) -> None:
    """Raise ConfigError if a split has no documents."""
    total = documents.total()
    if not total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "there are no documents"
        raise ConfigError(f"data.column={data.column}: no document holds text ({reasons})")
    if not all(documents[split] for split in SPLITS):
        raise ConfigError(
            f"data.val_fraction={data.val_fraction}: {total} document(s) cannot be split into train and val: at least "
            "two different documents are needed (a text file is one), and a fraction that gives each split some"
        )


def good_documents(stream: Stream, data: DataConfig, skipped: Counter) -> Iterator[tuple[dict, float]]:
    """Yield (document, its place) of those that hold text; count the others by reason in `skipped`."""
    for document in stream:
        content = encoded(document["text"], data.max_document_bytes)
        if isinstance(content, NotText):
            skipped[content.reason] += 1
        else:
            yield document, place_of(document, content)


def validation_up_to(stream: Stream, data: DataConfig) -> float:
    """Return the place up to which documents are validation: `val_fraction`, or the lowest place of a small source."""
    skipped = Counter()
    places = [place for _, place in islice(good_documents(stream, data, skipped), FEW_DOCUMENTS)]
    if len(places) == FEW_DOCUMENTS:
        return data.val_fraction
    up_to = max(data.val_fraction, min(places, default=0.0))
    check_splits(Counter("val" if place <= up_to else "train" for place in places), skipped, data)
    return up_to


def make_tokenizer(job: Job, stream: Stream, val_up_to: float, dir: Path) -> Tokenizer:
    """Store in `dir` the tokenizer that is configured, or one trained on the training documents, and return it."""
    tokenizer = new_tokenizer(job.tokenizer)
    if tokenizer is None:
        report(f"Training {job.tokenizer.name} on the train split", job.progress)
        documents = good_documents(stream, job.data, Counter())
        texts = (document["text"] for document, place in documents if place > val_up_to)
        tokenizer = train_sentencepiece(texts, job.tokenizer)
    tokenizer.save(dir)
    return load_tokenizer(job.tokenizer, dir)


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of the distribution that `counts` is a sample of, in nats a token."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
