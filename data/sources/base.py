"""What a source of documents is, which configuration keys it may read, and how it is found by its name."""

import hashlib
import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from pydantic import Field, field_validator, model_validator

from configs.block import Block
from configs.errors import ConfigError, Mistakes
from configs.kinds import OptionalFolder, OptionalPath

DOCUMENT_KEYS = (
    "source", "files", "path", "subset", "split", "revision", "mixture", "column", "separator", "val_fraction",
    "validation",
)  # fmt: skip


class Stream(Protocol):
    """Documents `{"text": ..., "name": ...}` (only some have a name), in an order that can be resumed.

    A Hugging Face `IterableDataset` is one. `state_dict` returns where the iteration stands, as plain values, and after
    `load_state_dict` the next one starts there.
    """

    def __iter__(self) -> Iterator[dict]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class SourceConfig(Block):
    """The keys of `data` that sources read."""

    in_mixture: ClassVar[bool] = False
    source: str  # a file in data/sources
    # Where the shards are; default: data/shards/<data.name>-<tokenizer.name>, with a hash of the keys if the name alone
    # does not say which documents.
    dir: OptionalFolder = None
    files: list[str] = Field(default_factory=list)  # globs of parquet, jsonl or text files
    path: OptionalPath = None  # hub: the name of a data set, or a folder laid out like one
    subset: str | None = Field(None, min_length=1)  # hub: its configuration
    split: str = Field("train", min_length=1)  # hub
    revision: str | None = Field(None, min_length=1)  # hub: a commit, tag or branch; null: the most recent
    streaming: bool = True  # hub: read while downloading; false: download everything first
    mixture: list[dict[str, Any]] = Field(default_factory=list)  # each with a weight, a source and the source's keys
    separator: str | None = Field(None, min_length=1)  # between the documents of a text file; null: a file is one
    column: str = Field("text", min_length=1)
    max_document_bytes: int = Field(10_000_000, ge=1, le=2**40)  # longer documents are skipped
    workers: int | None = Field(None, ge=1, le=1024)  # processes; null: one for each core

    @field_validator("source")
    @classmethod
    def _check_source(cls, value: str) -> str:
        *names, last = [name for name in source_names() if source_class(name).mixable or not cls.in_mixture]
        if value not in (*names, last):
            raise ValueError(f"must be {', '.join(names)} or {last}")
        return value

    @model_validator(mode="after")
    def _check_keys(self):
        if lines := list(source_of(self).mistakes()):
            raise Mistakes(*lines)
        return self


class Source(ABC):
    """A source as `data` describes it. A source that reads a key of its own adds it to `SourceConfig`, and to
    `identity_keys` and `settings_keys` if it decides what the documents are."""

    on_first_use: ClassVar[bool] = False  # a run prepares it, without a command
    mixable: ClassVar[bool] = True  # it can be part of a mixture
    divisible: ClassVar[bool] = False  # it consists of files and can be prepared in parts
    in_place: ClassVar[bool] = False  # its shards are in data.dir already; its `adopt(job)` indexes them
    is_any: ClassVar[bool] = False  # its keys name the documents: one choice of `data` stands for many
    # Its facts are read in no time, so a preparation is compared with the documents as they are now.
    is_watched: ClassVar[bool] = False
    identity_keys: ClassVar[tuple[str, ...]] = ("name", *DOCUMENT_KEYS, "document_mask")  # what makes a run that run
    settings_keys: ClassVar[tuple[str, ...]] = (  # what decides the contents of shards
        *DOCUMENT_KEYS, "max_document_bytes", "shard_tokens", "token_dtype"
    )  # fmt: skip

    def __init__(self, config: SourceConfig, progress: bool = False):
        self.config, self.progress = config, progress  # report what takes long

    def mistakes(self) -> Iterator[str]:
        """Yield what is wrong with the configuration by itself, as `key=value: what would be right`."""
        yield from ()

    def check(self) -> None:
        """Raise ConfigError if a quick look finds no documents."""

    @abstractmethod
    def open(self) -> Stream:
        """Return the documents from the first one. ConfigError if there are none, or they lack the column."""

    @abstractmethod
    def facts(self) -> list:
        """Return, as plain values, what changes whenever the documents do; nothing if it is not made from documents."""

    def has_changed(self, fingerprint: str) -> bool:
        """Return whether the documents are not those of `fingerprint`; False if nobody can tell: they may be gone."""
        if not (self.is_watched and fingerprint):
            return False
        try:
            return self.fingerprint() != fingerprint
        except ConfigError:
            return False

    def fingerprint(self) -> str:
        """Return the SHA-256 of the facts; empty without any, as for shards that another program wrote."""
        facts = self.facts()
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest() if facts else ""


def source_names() -> list[str]:
    """Return the names of all sources, sorted."""
    folders = importlib.import_module(__package__).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folders) if module.name != "base")


def source_class(name: str) -> type[Source]:
    """Return the class that stands in data/sources/<name>.py."""
    module = importlib.import_module(f"{__package__}.{name}")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Source)]
    return next(cls for cls in classes if cls.__module__ == module.__name__)


def source_of(config: SourceConfig, progress: bool = False) -> Source:
    """Return the source that `data` names."""
    return source_class(config.source)(config, progress)


def documents_of(stream: Stream) -> Iterator[dict]:
    """Yield the documents. ConfigError if the source breaks off, as at a broken file or without a network."""
    try:
        yield from stream
    except ConfigError:
        raise
    except Exception as error:  # of any of the libraries that read and download
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"the source broke off ({reason}); the same command resumes here") from error


def batches(stream: Stream, documents: int, characters: int) -> Iterator[tuple[list[dict], dict]]:
    """Yield (documents, the state of the stream after them); a batch ends after so many documents or characters."""
    batch, size = [], 0
    for document in documents_of(stream):
        batch.append(document)
        size += len(document["text"]) if isinstance(document["text"], str) else 0
        if len(batch) >= documents or size >= characters:
            yield batch, stream.state_dict()
            batch, size = [], 0
    if batch:
        yield batch, stream.state_dict()
