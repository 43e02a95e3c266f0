"""From a stream of documents to a folder of shards, in bounded memory, so that a killed build can resume.

Only this process writes. `journal.json` says where the source stands, and how much of each open shard belongs to the
documents before that. What was written after the journal is cut off when the build resumes.

Several processes, on one machine or many, may build N parts, which the last one to finish joins. Part I is the I-th
contiguous share of the source's files, tokenised and split like the whole source, into shards of its own in
`<data.dir>.parts-<hash>/<I>`. Joining writes the tokens of the parts in order, with the writer of an undivided build.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from configs.errors import ConfigError
from data.config import DataConfig, TokenizerConfig
from data.documents import SPLITS, Division, Tokenised, Tokeniser, good_documents
from data.files import seal, write_atomic
from data.parallel import ordered_map, report, with_rates
from data.shards import MANIFEST_FILE, Manifest, ShardWriter, Split, fingerprint_of, map_tokens
from data.sources.base import Source, Stream, batches, documents_of, source_of
from data.tokenizers import Tokenizer, load_tokenizer, new_tokenizer, train_sentencepiece

JOURNAL_FILE = "journal.json"
JOURNAL_EVERY = 20  # seconds; and after each finished shard
TASK_DOCUMENTS, TASK_CHARACTERS = 512, 500_000  # of a work item, whichever comes first
CHUNK = 4_000_000  # tokens joined at a time
CHANGED = "the documents (the names, sizes or times of their files) have changed"
END = "end"  # where the source of a finished part stands


@dataclass(frozen=True)
class Job:
    """What is to be prepared, in how many parts."""

    data: DataConfig
    tokenizer: TokenizerConfig
    progress: bool = True  # report it
    parts: int = 1

    @cached_property
    def source(self) -> Source:
        return source_of(self.data, self.progress)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the shards: another identity is another build."""
        settings, tokenizer = self.data.settings(), self.tokenizer.model_dump()
        return {"settings": settings, "tokenizer": tokenizer, "source": self.source.fingerprint()}

    @property
    def parts_dir(self) -> Path:
        """The folder of the parts, another one for another identity or another number of parts."""
        digest = hashlib.sha256(json.dumps([self.identity, self.parts]).encode()).hexdigest()
        return Path(f"{Path(self.data.dir)}.parts-{digest[:8]}")

    def part_dir(self, part: int) -> Path:
        return self.parts_dir / f"{part:05d}"

    def finished_part(self, part: int) -> dict[str, Any] | None:
        """Return the journal of a finished part, None if it is not finished."""
        journal = read_journal(self.part_dir(part), self.identity | {"part": part})
        return journal if journal and journal["stream_state"] == END else None


class Preparation:
    """The shards of both splits in `dir`, and what is counted along the way, as an earlier start with the same
    `identity` has left them; else new ones, in an emptied folder that holds the tokenizer that `make` returns."""

    def __init__(self, dir: Path, job: Job, identity: dict[str, Any], make: Callable[[], Tokenizer]):
        self.dir, self.job, self.identity = dir, job, identity
        journal = read_journal(dir, identity)
        if not journal:
            empty(dir)
            make().save(dir)
        self.tokenizer = load_tokenizer(job.tokenizer, dir)
        self.dtype = job.data.dtype_for(self.tokenizer.vocab_size)
        options = (job.data.shard_tokens, self.tokenizer.vocab_size, self.tokenizer.end_of_text, self.dtype)
        self.writers = {split: ShardWriter(dir, split, *options) for split in SPLITS}
        self.documents, self.bytes = Counter(), Counter()  # by split
        self.skipped = Counter()  # by reason
        self.token_counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)  # of the train split
        self.stream_state = journal and journal["stream_state"]
        if journal:
            for partial in dir.glob(".*.partial"):  # of a process that was killed in the middle of `write_atomic`
                partial.unlink()
            self.count(*journal["counts"])
            for split, writer in self.writers.items():
                writer.restore(journal["writers"][split])
            tokens = sum(writer.tokens for writer in self.writers.values())
            report(f"{dir}: resuming after {tokens:,} tokens", job.progress)
        self.save()

    def count(self, documents: dict, bytes: dict, skipped: dict, token_counts: np.ndarray | list[int]) -> None:
        self.documents.update(documents)
        self.bytes.update(bytes)
        self.skipped.update(skipped)
        self.token_counts += token_counts

    def add(self, done: Tokenised, stream_state: dict) -> None:
        """Count and write the next documents, after which the source stands at `stream_state`."""
        token_counts = np.bincount(done.tokens["train"], minlength=len(self.token_counts))
        self.count(done.documents, done.bytes, done.skipped, token_counts)
        self.write(done.tokens, stream_state)

    def write(self, tokens: dict[str, np.ndarray], stream_state: Any) -> None:
        """Write the next tokens, after which the source stands at `stream_state`; keep the journal up to date."""
        finished = [self.writers[split].write(tokens[split]) for split in tokens]
        self.stream_state = stream_state
        if any(finished) or time.monotonic() - self._saved > JOURNAL_EVERY:
            self.save()

    def save(self) -> None:
        """Write the journal."""
        writers = {split: writer.state() for split, writer in self.writers.items()}
        counts = [self.documents, self.bytes, self.skipped, self.token_counts.tolist()]
        fields = {"job": self.identity, "stream_state": self.stream_state, "writers": writers, "counts": counts}
        write_atomic(self.dir / JOURNAL_FILE, json.dumps(fields))
        self._saved = time.monotonic()

    def close(self) -> None:
        """Finish the last shards."""
        for writer in self.writers.values():
            writer.finish_shard()
        self.save()

    def finish(self) -> Manifest:
        """Finish the last shards and write the manifest. ConfigError if a split is empty, or the documents changed."""
        check_splits(self.documents, self.skipped, self.job.data)
        if self.job.source.has_changed(self.job.identity["source"]):
            raise ConfigError(f"data.dir={self.job.data.dir}: {CHANGED} while they were prepared; start again")
        self.close()
        splits = {}
        for split, writer in self.writers.items():
            size = self.bytes[split]
            splits[split] = Split(writer.shards, writer.tokens, self.documents[split], size, size / writer.tokens)
        return write_manifest(self.dir, self.job, self.tokenizer, splits, self.token_counts, self.skipped, self.dtype)


def is_unfinished(dir: Path) -> bool:
    """Return whether a folder is what an earlier start of a build has left."""
    return (dir / JOURNAL_FILE).is_file()


def empty(dir: Path) -> None:
    """Make a folder for a new build, in place of an unfinished one. ConfigError if it holds anything else."""
    if dir.exists() and not is_unfinished(dir) and any(dir.iterdir()):
        raise ConfigError(f"{dir}: is in the way: it is no unfinished preparation; move it, or choose another data.dir")
    shutil.rmtree(dir, ignore_errors=True)
    dir.mkdir()
    write_atomic(dir / JOURNAL_FILE, "{}")  # from here on it is one


def write_manifest(
    dir: Path, job: Job, tokenizer: Tokenizer, splits: dict[str, Split], counts: np.ndarray, skipped: dict, dtype: str
) -> Manifest:
    """Write the manifest of the shards in `dir` and return it; `counts` are of the tokens of the train split."""
    share = counts[counts > 0] / counts.sum()
    manifest = Manifest(
        name=job.data.name,
        settings=job.identity["settings"],
        splits=splits,
        tokenizer=job.identity["tokenizer"] | {"fingerprint": tokenizer.fingerprint},
        unigram_entropy=float(-(share * np.log(share)).sum()),
        skipped=dict(sorted(skipped.items())),
        fingerprint=fingerprint_of(splits, tokenizer.fingerprint),
        source=job.identity["source"],
        token_dtype=dtype,
        version=2,
    )
    manifest.checksum = seal(asdict(manifest))
    write_atomic(dir / MANIFEST_FILE, json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def read_journal(dir: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the journal that an earlier start with the same identity has left, None if there is none."""
    try:
        journal = json.loads((dir / JOURNAL_FILE).read_bytes())
    except FileNotFoundError:
        return None
    return journal if journal.get("job") == identity else None


def build(job: Job, dir: Path) -> Manifest:
    """Make shards, tokenizer and manifest in `dir`, resuming from what an earlier start has left there."""
    stream = job.source.open()
    division = divide(stream, job.data)
    made = Preparation(dir, job, job.identity, lambda: make_tokenizer(job, stream, division))
    tokenise_all(stream, made, division)
    return made.finish()


def tokenise_all(stream: Stream, made: Preparation, division: Division) -> None:
    """Add what `made` does not have yet of `stream`."""
    job = made.job
    if made.stream_state:
        stream.load_state_dict(made.stream_state)
    tokeniser = Tokeniser(job.tokenizer, made.dir, division, job.data.max_document_bytes)
    tasks = batches(stream, TASK_DOCUMENTS, TASK_CHARACTERS)
    counts = {
        "documents": lambda result: result[0].documents.total() + result[0].skipped.total(),
        "tokens": lambda result: sum(map(len, result[0].tokens.values())),
    }
    results = ordered_map(tokeniser, tasks, job.data.workers)
    for done, state in with_rates(results, "Tokenising", job.progress, **counts):
        made.add(done, state)
    if ending := getattr(stream, "ending", None):
        report(ending, job.progress)


def check_splits(documents: Counter, skipped: Counter, data: DataConfig) -> None:
    """Raise ConfigError if a split has no documents."""
    total = documents.total()
    if not total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "there are no documents"
        is_long = skipped["too long"] and not data.separator
        remedy = "; data.separator= cuts a text file into documents" if is_long else ""
        raise ConfigError(f"data.column={data.column}: no document holds text ({reasons}){remedy}")
    if not all(documents[split] for split in SPLITS):
        raise ConfigError(
            f"data.val_fraction={data.val_fraction}: {total} document(s) cannot be split into train and val: at least "
            "two different documents are needed (a text file is one), or data.validation=ends, which takes the end of "
            "each document for validation"
        )


def divide(stream: Stream, data: DataConfig) -> Division:
    """Return how the documents are divided: up to `val_fraction`, or to the lowest place if none lies there.

    Reads the source until both splits have a document, or to its end: hashes alone, before any work is done.
    """
    skipped, total, lowest, highest = Counter(), 0, 1.0, 0.0
    if data.validation == "ends":
        ends, documents = Division(-1.0, data.val_fraction), Counter()
        for text, _, place in good_documents(documents_of(stream), data.max_document_bytes, skipped):
            documents.update(ends(text, place).keys())
            if all(documents[split] for split in SPLITS):
                break
        check_splits(documents, skipped, data)
        return ends
    for _, _, place in good_documents(documents_of(stream), data.max_document_bytes, skipped):
        total, lowest, highest = total + 1, min(lowest, place), max(highest, place)
        if lowest <= data.val_fraction < highest:
            return Division(data.val_fraction)
    up_to = max(data.val_fraction, lowest)
    train = max(0, total - 1) if highest > up_to else 0
    check_splits(Counter(train=train, val=total - train), skipped, data)
    return Division(up_to)


def make_tokenizer(job: Job, stream: Stream, division: Division) -> Tokenizer:
    """Return the tokenizer that is configured, or one trained on the training documents of `stream`."""
    if tokenizer := new_tokenizer(job.tokenizer):
        return tokenizer
    report(f"Training {job.tokenizer.name} on the train split", job.progress)
    good = good_documents(documents_of(stream), job.data.max_document_bytes, Counter())
    texts = (division(text, place).get("train") for text, _, place in good)
    return train_sentencepiece(filter(None, texts), job.tokenizer)


def prepare_part(job: Job, part: int) -> None:
    """Tokenise one part, resuming from what an earlier start has left. ConfigError if there is no such part."""
    if not 0 <= part < job.parts:
        raise ConfigError(f"part={part}: must lie between 0 and parts - 1 = {job.parts - 1}")
    if not job.source.divisible:
        raise ConfigError(f"parts={job.parts}: data.source={job.data.source} is prepared in one piece; leave parts out")
    stream = job.source.open()
    if stream.num_shards < job.parts:
        raise ConfigError(f"parts={job.parts}: the source has {stream.num_shards} file(s); a part is at least one")
    division = divide(stream, job.data)
    folder, store = job.part_dir(part), job.parts_dir / "tokenizer"
    store.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{store}.lock"):
        if not any(store.glob("tokenizer.*")):
            make_tokenizer(job, stream, division).save(store)
    with filelock.FileLock(f"{folder}.lock"):
        if job.finished_part(part):
            report(f"{folder}: finished already", job.progress)
            return
        made = Preparation(folder, job, job.identity | {"part": part}, lambda: load_tokenizer(job.tokenizer, store))
        tokenise_all(job.source.open().shard(num_shards=job.parts, index=part, contiguous=True), made, division)
        made.stream_state = END
        made.close()


def join(job: Job, dir: Path) -> Manifest:
    """Make in `dir` what `build` makes there, from the finished parts."""
    store, parts = job.parts_dir / "tokenizer", [job.finished_part(part) for part in range(job.parts)]
    made = Preparation(dir, job, job.identity | {"parts": job.parts}, lambda: load_tokenizer(job.tokenizer, store))
    if made.stream_state is None:  # otherwise they are counted
        for part in parts:
            made.count(*part["counts"])
    done = made.stream_state or 0
    left = islice(chunks(job, parts, made.dtype), done, None)
    counted = with_rates(left, "Joining", job.progress, tokens=lambda chunk: len(chunk[1]))
    for number, (split, tokens) in enumerate(counted, done + 1):
        made.write({split: tokens}, number)
    return made.finish()


def chunks(job: Job, parts: list[dict[str, Any]], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (split, tokens) of the finished parts, whose journals are given, in order."""
    for number, part in enumerate(parts):
        for split in SPLITS:
            for shard in part["writers"][split]["shards"]:
                tokens = map_tokens(job.part_dir(number) / shard["file"], dtype)
                for start in range(0, len(tokens), CHUNK):
                    yield split, tokens[start : start + CHUNK]
