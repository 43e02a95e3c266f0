"""The text that a suite reads, as streams of tokens, and the windows in which a model sees them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from configs.errors import ConfigError
from configs.schema_data import DataConfig
from configs.schema_eval import TextSource
from data.loader import EVAL_KEY, permute
from data.shards import TokenShards
from data.sources import open_documents
from eval.loading import LoadedRun


@dataclass
class Text:
    """Streams of tokens: a model sees a stream's first token and predicts the others.

    A stream is a document that begins with end-of-text, or a shard, in which `starts` says where documents begin.
    """

    name: str
    streams: list[np.ndarray]
    bytes_per_token: float  # of what is predicted
    starts: list[np.ndarray] | None = None  # None: each stream is one document
    unigram_entropy: float | None = None

    def document_lengths(self, stream: int, first: int, last: int) -> np.ndarray:
        """Tokens in the document of each of the tokens first..last-1 of a stream."""
        length = len(self.streams[stream])
        if self.starts is None:
            return np.full(last - first, length - 1)
        starts = self.starts[stream].astype(np.int64)
        borders = np.unique(np.concatenate(([0], starts, [length])))
        return np.diff(borders)[np.searchsorted(borders, np.arange(first, last), side="right") - 1]


def read_text(source: TextSource, run: LoadedRun) -> Text:
    """The text that `source` names, in the run's tokens. ConfigError where there is none."""
    if source.files or source.path:
        return encode_documents(source, run)
    folder = source.data_dir or run.config.data.dir
    shards = open_shards(folder)
    manifest = shards.manifest
    if source.data_dir and manifest.tokenizer.get("fingerprint") != run.tokenizer.fingerprint:
        raise ConfigError(
            f"suite.data_dir={folder}: was tokenised by {manifest.tokenizer.get('name')}, which is not the tokenizer "
            f"of {run.dir}; prepare it again with that one, or give the text itself with suite.files="
        )
    return Text(
        f"{manifest.name}, validation", shards.arrays, manifest.bytes_per_token("val"), shards.documents(),
        manifest.unigram_entropy,
    )  # fmt: skip


def check_source(source: TextSource) -> None:
    """ConfigError where there is no such text, as far as a look at its beginning tells."""
    if source.files or source.path:
        next(texts_of(source), None)
    elif source.data_dir:
        open_shards(source.data_dir)


def open_shards(folder: str) -> TokenShards:
    try:
        return TokenShards(folder, "val")
    except ConfigError as error:  # which speaks of the data block
        raise ConfigError(*(line.replace("data.dir", "suite.data_dir") for line in error.errors)) from None


def texts_of(source: TextSource) -> Iterator[str]:
    """The rows of files or of the hub that are texts."""
    config = DataConfig(
        name="suite", source="hub" if source.path else "files", dir="", files=source.files, path=source.path,
        subset=source.subset, split=source.split, column=source.column,
    )  # fmt: skip
    try:
        yield from (row["text"] for row in open_documents(config) if isinstance(row["text"], str))
    except ConfigError as error:  # which speaks of the data block
        raise ConfigError(*(line.replace("data.", "suite.") for line in error.errors)) from None


def encode_documents(source: TextSource, run: LoadedRun) -> Text:
    """The documents of files or of the hub; each is a stream of its own."""
    name, texts = source.path or ", ".join(source.files), list(texts_of(source))
    if source.join is not None:
        texts = [source.join.join(texts)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ConfigError(f"suite: {name} holds no text")
    start = [run.tokenizer.end_of_text]
    streams = [np.asarray(start + run.tokenizer.encode(text), dtype=np.int64) for text in texts]
    predicted = sum(len(stream) - 1 for stream in streams)
    return Text(name, streams, sum(len(text.encode()) for text in texts) / predicted)


@dataclass
class Windows:
    """Windows over streams, as arrays [N]: a model sees tokens [begin, end) of a stream, and of those it predicts,
    begin + 1 to end, the ones from `scored` on count."""

    stream: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, which) -> "Windows":
        return Windows(self.stream[which], self.begin[which], self.end[which], self.scored[which])


def slide(text: Text, seq_len: int, stride: int | None, whole: bool) -> Windows:
    """Windows of `seq_len` tokens, each `stride` after the one before, in which every token counts once.

    `whole` leaves out what is shorter at the end of a stream, as the loader of training's validation does.
    """
    rows = []
    for number, stream in enumerate(text.streams):
        predicted, begin, scored = len(stream) - 1, 0, 1
        while scored <= predicted:
            end = min(begin + seq_len, predicted)
            if whole and end - begin < seq_len:
                break
            rows.append((number, begin, end, scored))
            begin, scored = begin + (stride or seq_len), end + 1
    return Windows(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)


def some(windows: Windows, limit: int | None) -> Windows:
    """At most `limit` of the windows, spread over all of them; the same as an EvalLoader takes."""
    count = len(windows)
    if limit is None or limit >= count:
        return windows
    return windows[permute(np.arange(limit), count, EVAL_KEY)]
