"""From a stream of documents to a folder of shards, in bounded memory, so that a killed build goes on where it was.

Only this process writes. What it has done is in `journal.json`: where the source stands, and how much of each open
shard belongs to the documents before that. Whatever was written after the journal is cut off when the build goes on,
and the same documents make the same bytes again.
"""

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError
from configs.schema_data import DataConfig, TokenizerConfig
from data import sources
from data.documents import SPLITS, NotText, Tokenised, encoded, place_of, set_tokeniser, tokenise
from data.parallel import Rates, ordered_map, say
from data.shards import MANIFEST_FILE, Manifest, Split, fingerprint_of, read_manifest, write_atomically
from data.tokenizers import Tokenizer, load_tokenizer, new_tokenizer, train_sentencepiece
from data.writer import ShardWriter

JOURNAL_FILE = "journal.json"
JOURNAL_EVERY = 20  # seconds; and after each finished shard
TASK_DOCUMENTS, TASK_CHARACTERS = 512, 500_000  # of a work item, whichever comes first
FEW_DOCUMENTS = 1000  # a smaller source gets a validation document even where the hash gives it none


class Preparation:
    """The writers of both splits and everything else that is counted along the way."""

    def __init__(self, dir: Path, data: DataConfig, tokenizer: Tokenizer, identity: dict[str, Any]):
        dtype = data.dtype_for(tokenizer.vocab_size)
        options = (data.shard_tokens, tokenizer.vocab_size, tokenizer.end_of_text, dtype)
        self.dir, self.identity, self.stream_state = dir, identity, None
        self.writers = {split: ShardWriter(dir, split, *options) for split in SPLITS}
        self.documents, self.bytes, self.tokens = Counter(), Counter(), Counter()  # by split
        self.skipped = Counter()  # by reason
        self.token_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)  # of the train split
        self._saved = time.monotonic()

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
        fields = {
            "identity": self.identity,
            "stream_state": self.stream_state,
            "writers": {split: writer.state() for split, writer in self.writers.items()},
            "counters": [dict(self.documents), dict(self.bytes), dict(self.tokens), dict(self.skipped)],
            "token_counts": self.token_counts.tolist(),
        }
        write_atomically(self.dir / JOURNAL_FILE, [json.dumps(fields).encode()])
        for writer in self.writers.values():
            writer.publish()
        self._saved = time.monotonic()

    def restore(self, journal: dict[str, Any]) -> None:
        self.stream_state = journal["stream_state"]
        for split, writer in self.writers.items():
            writer.restore(journal["writers"][split])
        self.documents, self.bytes, self.tokens, self.skipped = map(Counter, journal["counters"])
        self.token_counts[:] = journal["token_counts"]


def read_journal(dir: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The journal of an earlier start with the same settings and source; None where there is none."""
    try:
        journal = json.loads((dir / JOURNAL_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return journal if journal.get("identity") == json.loads(json.dumps(identity)) else None


def read_finished(dir: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of a build that was killed when all was done but its name."""
    if not (dir / MANIFEST_FILE).is_file() or (dir / JOURNAL_FILE).exists():
        return None
    manifest = read_manifest(dir)
    there = {"settings": manifest.settings, "tokenizer": dict(manifest.tokenizer), "source": manifest.source}
    there["tokenizer"].pop("fingerprint")
    return manifest if there == json.loads(json.dumps(identity)) else None


def has_finished_shards(dir: Path) -> bool:
    """Whether the folder of an unfinished build is worth going on with."""
    return any(dir.glob("*.bin"))


def build(data: DataConfig, config: TokenizerConfig, dir: Path, settings: dict[str, Any], progress: bool) -> Manifest:
    """Make shards, tokenizer and manifest in `dir`, going on from what an earlier start has left there."""
    stream = sources.open_documents(data, progress)
    identity = {
        "settings": settings,
        "tokenizer": dataclasses.asdict(config),
        "source": sources.fingerprint(data, progress),
    }
    if found := read_finished(dir, identity):
        return found
    journal = read_journal(dir, identity)
    val_up_to = validation_up_to(stream, data)
    if journal:
        tokenizer = load_tokenizer(config, dir)
    else:
        shutil.rmtree(dir, ignore_errors=True)
        dir.mkdir()
        tokenizer = make_tokenizer(config, stream, data, val_up_to, dir, progress)
    made = Preparation(dir, data, tokenizer, identity)
    start(made, journal, stream, progress)
    tokenise_all(stream, data, config, dir, val_up_to, made, progress)
    return finish(made, data, config, tokenizer, settings, identity["source"])


def start(made: Preparation, journal: dict[str, Any] | None, stream: sources.Stream, progress: bool) -> None:
    """Go on from the journal, or begin one."""
    if not journal:
        made.save()
        return
    made.restore(journal)
    if journal["stream_state"]:
        stream.load_state_dict(journal["stream_state"])
    say(f"{made.dir}: going on after {made.documents.total() + made.skipped.total():,} documents", progress)


def tokenise_all(
    stream, data: DataConfig, config: TokenizerConfig, dir: Path, val_up_to: float, made: Preparation, progress: bool
) -> None:
    """Everything of `stream`, with the tokenizer stored in `dir`."""
    setup = {"setup": set_tokeniser, "setup_args": (config, dir, val_up_to, data.max_document_bytes)}
    before = {"documents": made.documents.total() + made.skipped.total(), "tokens": made.tokens.total()}
    tasks = sources.batches(stream, TASK_DOCUMENTS, TASK_CHARACTERS)
    with Rates("Tokenising", progress, **before) as rates:
        for done, state in ordered_map(tokenise, tasks, data.workers, **setup):
            made.add(done, state)
            documents = sum(done.documents.values()) + done.skipped.total()
            rates.advance(documents=documents, tokens=sum(map(len, done.tokens.values())))


def finish(
    made: Preparation, data: DataConfig, config: TokenizerConfig, tokenizer: Tokenizer, settings: dict, source: str
) -> Manifest:
    """The last shards and the manifest. ConfigError where a split is empty."""
    check_splits(made.documents, made.skipped, data)
    for writer in made.writers.values():
        writer.close()
    made.save()
    splits = {
        split: Split(
            made.writers[split].shards,
            made.tokens[split],
            made.documents[split],
            made.bytes[split],
            bytes_per_token=made.bytes[split] / made.tokens[split],
        )
        for split in SPLITS
    }
    manifest = Manifest(
        name=data.name,
        settings=settings,
        splits=splits,
        tokenizer=dataclasses.asdict(config) | {"fingerprint": tokenizer.fingerprint},
        unigram_entropy=entropy(made.token_counts),
        skipped=dict(sorted(made.skipped.items())),
        fingerprint=fingerprint_of(splits, tokenizer.fingerprint),
        source=source,
        token_dtype=data.dtype_for(tokenizer.vocab_size),
    )
    manifest.save(made.dir)
    (made.dir / JOURNAL_FILE).unlink()
    return manifest


def check_splits(documents: Counter, skipped: Counter, data: DataConfig) -> None:
    """ConfigError where one of the splits has no documents."""
    total = documents.total()
    if not total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "there are no documents"
        raise ConfigError(f"data.column={data.column}: no document holds text ({reasons})")
    if not all(documents[split] for split in SPLITS):
        raise ConfigError(
            f"data.val_fraction={data.val_fraction}: {total} document(s) cannot be split into train and val: at least "
            "two different ones are needed (a text file is one document), and a fraction that gives each some"
        )


def good_documents(stream: sources.Stream, data: DataConfig, skipped: Counter) -> Iterator[tuple[dict, float]]:
    """(document, its place) of those that hold text; the others are counted by reason in `skipped`."""
    for document in stream:
        content = encoded(document["text"], data.max_document_bytes)
        if isinstance(content, NotText):
            skipped[content.reason] += 1
        else:
            yield document, place_of(document, content)


def validation_up_to(stream: sources.Stream, data: DataConfig) -> float:
    """The place up to which documents are validation: `val_fraction`, or more for a small source without any there."""
    skipped = Counter()
    places = [place for _, place in islice(good_documents(stream, data, skipped), FEW_DOCUMENTS)]
    if len(places) == FEW_DOCUMENTS:
        return data.val_fraction
    up_to = max(data.val_fraction, min(places, default=0.0))
    check_splits(Counter("val" if place <= up_to else "train" for place in places), skipped, data)
    return up_to


def make_tokenizer(
    config: TokenizerConfig, stream: sources.Stream, data: DataConfig, val_up_to: float, dir: Path, progress: bool
) -> Tokenizer:
    """The tokenizer that `config` names, or one trained on training documents; stored in `dir`."""
    tokenizer = new_tokenizer(config)
    if tokenizer is None:
        say(f"Training {config.name} on the train split", progress)
        train = (document["text"] for document, place in good_documents(stream, data, Counter()) if place > val_up_to)
        tokenizer = train_sentencepiece(train, config)
    tokenizer.save(dir)
    return load_tokenizer(config, dir)


def entropy(counts: np.ndarray) -> float:
    """Nats a token of the distribution that `counts` is a sample of."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
