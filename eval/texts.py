"""The text that a suite reads, as streams of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from pydantic import Field, model_validator

from configs.errors import ConfigError, Mistakes
from configs.kinds import OptionalPath
from data.documents import encoded
from data.shards import TokenShards
from data.sources.base import SourceConfig, documents_of, source_of
from eval.config import SuiteConfig
from eval.loading import LoadedRun


class TextSource(SuiteConfig):
    """A suite on a text: local `files`, a Hugging Face data set (`path`), a folder of prepared shards (`data_dir`) or,
    if none is given, the validation split of the run's own data."""

    files: list[str] = Field(default_factory=list)  # globs of parquet, jsonl or text files; a text file is a document
    path: OptionalPath = None  # of the hub, or a folder laid out like one of its data sets
    subset: str | None = Field(None, min_length=1)
    split: str = Field("test", min_length=1)  # of the hub's
    column: str = Field("text", min_length=1)
    join: str | None = None  # if rows are not documents of their own: what to put between them to make them one
    data_dir: OptionalPath = None  # its val split; the tokenizer must be the run's

    @model_validator(mode="after")
    def _one_source(self):
        given = [key for key in ("files", "path", "data_dir") if getattr(self, key)]
        if len(given) > 1:
            raise Mistakes(f"{' and '.join(given)}: give one source of text at a time")
        return self

    def check(self) -> None:
        """Raise a ConfigError if there is no such text, as far as its beginning tells."""
        if self.files or self.path:
            next(texts_of(self), None)
        elif self.data_dir:
            open_shards(self.data_dir)


LONGEST = 2**31  # bytes of a document


@dataclass
class Text:
    """Streams of tokens: a model sees a stream's first token and predicts the others.

    A stream is a document after an end-of-text, or a shard; `starts` says where its documents begin.
    """

    name: str
    streams: list[np.ndarray]
    starts: list[np.ndarray]
    bytes_per_token: float  # of what is predicted
    whole_windows: bool = False  # what is shorter at the end of a stream is left out, as in training's validation

    def document_lengths(self, stream: int, first: int, last: int) -> np.ndarray:
        """Return the number of tokens in the document of each of the tokens first..last-1 of a stream."""
        starts, end = self.starts[stream].astype(np.int64), len(self.streams[stream])
        borders = np.unique(np.concatenate(([0], starts, [end])))
        return np.diff(borders)[np.searchsorted(borders, np.arange(first, last), side="right") - 1]

    def documents(self) -> list[np.ndarray]:
        """Return each document, from the end-of-text before it if that is in its stream."""
        return [
            stream[max(start - 1, 0) : end]
            for stream, starts in zip(self.streams, self.starts, strict=True)
            for start, end in pairwise([*starts.tolist(), len(stream)])
        ]


def read_text(source: TextSource, run: LoadedRun) -> Text:
    """Return the text that `source` names, in the run's tokens. ConfigError if there is none."""
    if source.files or source.path:
        return encode_documents(source, run)
    shards = open_shards(source.data_dir) if source.data_dir else run.validation()
    tokenizer = shards.manifest.tokenizer
    if tokenizer["fingerprint"] != run.tokenizer.fingerprint:
        raise ConfigError(
            f"suite.data_dir={source.data_dir}: was tokenised by {tokenizer['name']}, which is not the tokenizer of "
            f"{run.dir}; prepare it again with that one, or give the text itself with suite.files="
        )
    return text_of(shards)


def text_of(shards: TokenShards) -> Text:
    """Return the text of a validation split."""
    name, bytes_per_token = f"{shards.manifest.name}, validation", shards.manifest.splits["val"].bytes_per_token
    return Text(name, shards.arrays, shards.documents(), bytes_per_token, whole_windows=True)


def open_shards(folder: str) -> TokenShards:
    try:
        return TokenShards(folder, "val")
    except ConfigError as error:  # which names keys of the data block
        raise ConfigError(*(line.replace("data.dir", "suite.data_dir") for line in error.errors)) from None


def texts_of(source: TextSource) -> Iterator[str]:
    """Yield the rows of files or of the hub, except missing ones. ConfigError for one that is no text: without it the
    result would be that of another text."""
    kind, keys = "hub" if source.path else "files", ("files", "path", "subset", "split", "column")
    given = {key: getattr(source, key) for key in keys}
    try:
        documents = source_of(SourceConfig(source=kind, max_document_bytes=LONGEST, **given)).open()
        for number, document in enumerate(documents_of(documents), 1):
            found = encoded(document["text"], LONGEST)
            if isinstance(found, bytes) or found.reason == "empty":
                yield document["text"]
            elif found.reason != "missing":
                place = f"data.path={source.path}" if source.path else f"data.files={','.join(source.files)}"
                raise ConfigError(f"{place}: document {number}: {found.reason}; correct or remove it")
    except ConfigError as error:  # which names keys of the data block
        raise ConfigError(*(line.replace("data.", "suite.") for line in error.errors)) from None


def encode_documents(source: TextSource, run: LoadedRun) -> Text:
    """Return the documents of files or of the hub, each as a stream of its own."""
    name, texts = source.path or ", ".join(source.files), list(texts_of(source))
    if source.join is not None:
        texts = [source.join.join(texts)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ConfigError(f"suite: {name} holds no text")
    start = [run.tokenizer.end_of_text]
    streams = [np.asarray(start + run.tokenizer.encode(text), dtype=np.int64) for text in texts]
    predicted = sum(len(stream) - 1 for stream in streams)
    starts = [np.array([1])] * len(streams)
    return Text(name, streams, starts, sum(len(text.encode()) for text in texts) / predicted)
