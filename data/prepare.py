"""Documents to token shards: `python -m data.prepare data=NAME [overrides]`.

Everything is written into `<data.dir>.partial` and renamed into place at the end, so that nobody sees half of it.
"""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import filelock
import numpy as np

from configs.app import app
from configs.schema import Config, ConfigError, DataConfig, TokenizerConfig
from data.parallel import ordered_map, progress_bar, say
from data.shards import MANIFEST_FILE, SPLITS, Manifest, ShardWriter, Split, TokenShards, fingerprint_of, read_manifest
from data.sources import good_documents, load_documents, matching_files
from data.tokenizers import MODEL_FILE, Tokenizer, load_tokenizer, train_sentencepiece

DOCUMENTS_A_TASK = 64


def prepare(config: Config, progress: bool = True) -> Manifest:
    """Make the shards of `config.data` with `config.tokenizer` in `config.data.dir`, unless they are there already.

    ConfigError where the folder holds data made with other settings, something else, or a broken shard.
    """
    dir = Path(config.data.dir)
    if found := prepared(config):
        say(f"{dir}: already prepared, {describe(found)}", progress)
        return found
    check_before_work(config)
    partial, lock = dir.with_name(f"{dir.name}.partial"), dir.with_name(f"{dir.name}.lock")
    try:
        dir.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock):
            try:
                if found := prepared(config):  # by another process, in the meantime
                    return found
                shutil.rmtree(partial, ignore_errors=True)  # whoever left it is gone: we have the lock
                partial.mkdir()
                manifest = build(config, partial, progress)
                partial.rename(dir)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except PermissionError as error:
        raise ConfigError(f"data.dir={dir}: cannot be written ({error})") from error
    say(f"{dir}: prepared, {describe(manifest)}", progress)
    return manifest


def ensure_prepared(config: Config, progress: bool = True) -> Manifest:
    """The manifest of the prepared data; the built-in corpus is prepared on first use (one process at a time).

    ConfigError where any other source is not prepared, naming the command that does it.
    """
    if found := prepared(config):
        return found
    if config.data.source != "builtin":
        data = config.data
        files = f" data.files='[{','.join(data.files)}]'" if data.files else ""
        raise ConfigError(
            f"data.dir={data.dir}: not prepared: run `python -m data.prepare data={data.name}{files}` "
            "with the same overrides as here"
        )
    return prepare(config, progress)


def prepared(config: Config) -> Manifest | None:
    """The manifest in `config.data.dir` after a quick check of settings and shards; None where there is none."""
    dir = Path(config.data.dir)
    if not (dir / MANIFEST_FILE).is_file():
        return None
    manifest = read_manifest(dir)
    ours = settings_of(config.data) | tokenizer_settings(config.tokenizer)
    theirs = manifest.settings | tokenizer_settings(manifest.tokenizer_config())
    errors = [
        f"data.dir={dir}: was prepared with {key}={theirs.get(key)}, not {value}; choose another data.dir or "
        "remove the folder"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if errors:
        raise ConfigError(*errors)
    for split in SPLITS:
        TokenShards(dir, split)
    return manifest


def check_before_work(config: Config) -> None:
    """What can be found wrong before anything is written."""
    dir = Path(config.data.dir)
    if dir.is_dir() and any(dir.iterdir()):
        raise ConfigError(
            f"data.dir={dir}: holds files but no {MANIFEST_FILE}; choose another data.dir or remove the folder"
        )
    if dir.exists() and not dir.is_dir():
        raise ConfigError(f"data.dir={dir}: is a file, must be a folder or a name that is free")
    if config.data.source == "files":
        matching_files(config.data)
    if config.tokenizer.kind == "tiktoken":
        load_tokenizer(config.tokenizer, dir)


def settings_of(data: DataConfig) -> dict:
    """The settings that decide the shards' contents, by config key."""
    keys = ("source", "files", "column", "val_fraction", "shard_tokens")
    return {f"data.{key}": getattr(data, key) for key in keys}


def tokenizer_settings(tokenizer: TokenizerConfig) -> dict:
    return {f"tokenizer.{key}": value for key, value in dataclasses.asdict(tokenizer).items() if key != "name"}


def build(config: Config, dir: Path, progress: bool) -> Manifest:
    """Read, split, train the tokenizer, tokenise; leaves shards, tokenizer and manifest in `dir`."""
    data = config.data
    cache = dir / "cache"
    documents, skipped = good_documents(load_documents(data, progress, cache), data)
    splits = split_documents(documents, data)
    tokenizer = make_tokenizer(config.tokenizer, splits["train"], dir, progress)
    written, counts = {}, {}
    for split in SPLITS:
        with progress_bar(f"Tokenising {split}", len(splits[split]), "documents", progress) as advance:
            written[split], counts[split] = write_split(split, splits[split], config, tokenizer, dir, advance)
    manifest = Manifest(
        name=data.name,
        settings=settings_of(data),
        splits=written,
        tokenizer=dataclasses.asdict(config.tokenizer) | {"fingerprint": tokenizer.fingerprint},
        unigram_entropy=entropy(counts["train"]),
        skipped=skipped,
        fingerprint=fingerprint_of(written, tokenizer.fingerprint),
    )
    del documents, splits  # their files are mapped into memory from the cache
    shutil.rmtree(cache, ignore_errors=True)
    manifest.save(dir)
    return manifest


def write_split(
    split: str,
    documents: datasets.Dataset,
    config: Config,
    tokenizer: Tokenizer,
    dir: Path,
    advance: Callable[[int], None],
) -> tuple[Split, np.ndarray]:
    """Write the shards of one split; what is in them, and how often each token occurs [vocab_size]."""
    writer = ShardWriter(dir, split, config.data.shard_tokens, tokenizer.vocab_size)
    counts, size = np.zeros(tokenizer.vocab_size, dtype=np.int64), 0
    for batch, batch_size in tokenise(documents, config.tokenizer, dir, config.data.workers):
        for tokens in batch:
            writer.write(tokens)
        counts += np.bincount(np.concatenate(batch), minlength=tokenizer.vocab_size)
        size += batch_size
        advance(len(batch))
    shards, total = writer.close(), int(counts.sum())
    return Split(shards, total, len(documents), size, bytes_per_token=size / total), counts


def split_documents(documents: datasets.Dataset, data: DataConfig) -> dict[str, datasets.Dataset]:
    """Train and validation documents by a hash of each one's name (or text), whatever their order; neither is empty."""
    column = "name" if "name" in documents.column_names else "text"
    places = np.array([place(value) for batch in documents.iter(batch_size=1000) for value in batch[column]])
    in_val = places <= max(data.val_fraction, places.min(initial=1.0))
    if in_val.all():
        raise ConfigError(
            f"data.val_fraction={data.val_fraction}: {len(places)} document(s) cannot be split into "
            "train and val: at least two different ones are needed (a text file is one document)"
        )
    return {"train": documents.select(np.flatnonzero(~in_val)), "val": documents.select(np.flatnonzero(in_val))}


def place(text: str) -> float:
    """A pseudo-random number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def make_tokenizer(config: TokenizerConfig, train: datasets.Dataset, dir: Path, progress: bool) -> Tokenizer:
    if config.kind == "sentencepiece":
        say(f"Training {config.name} on the train split", progress)
        shuffled = train.shuffle(seed=0, keep_in_memory=True)  # a sample of it is enough
        texts = (text for batch in shuffled.iter(batch_size=1000) for text in batch["text"])
        train_sentencepiece(texts, config, dir / MODEL_FILE)
    return load_tokenizer(config, dir)


def tokenise(
    documents: datasets.Dataset, config: TokenizerConfig, dir: Path, workers: int | None
) -> Iterator[tuple[list[np.ndarray], int]]:
    """(each document's tokens with end-of-text, the bytes of their text) a batch of documents."""
    batches = (batch["text"] for batch in documents.select_columns(["text"]).iter(batch_size=DOCUMENTS_A_TASK))
    return ordered_map(tokenise_batch, batches, workers, setup=set_tokenizer, setup_args=(config, dir))


_tokenizer: Tokenizer | None = None  # of this worker process


def set_tokenizer(config: TokenizerConfig, dir: Path) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(config, dir)


def tokenise_batch(texts: list[str]) -> tuple[list[np.ndarray], int]:
    end = [_tokenizer.end_of_text]
    tokens = [np.array(ids + end, dtype=np.uint16) for ids in _tokenizer.encode_batch(texts)]
    return tokens, sum(len(text.encode()) for text in texts)


def entropy(counts: np.ndarray) -> float:
    """Nats a token of the distribution that `counts` is a sample of."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def describe(manifest: Manifest) -> str:
    parts = (f"{manifest.tokens(key):,} {key} tokens in {manifest.documents(key):,} documents" for key in SPLITS)
    skipped = sum(manifest.skipped.values())
    return ", ".join(parts) + (f"; skipped {skipped:,} ({manifest.skipped})" if skipped else "")


def main(config: Config) -> None:
    prepare(config, progress=int(os.environ.get("RANK", 0)) == 0)


if __name__ == "__main__":
    app(main)
