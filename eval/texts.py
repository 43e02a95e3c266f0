"""The text that a suite reads, as streams of tokens, and the windows in which a model sees them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from configs.errors import ConfigError, Mistakes
from data.loader import EVAL_KEY, IGNORED, permute
from data.shards import TokenShards
from data.sources.base import SourceConfig, source_of
from eval.config import SuiteConfig
from eval.loading import LoadedRun
from training.ranks import rank, world_size


class TextSource(SuiteConfig):
    """A suite on a text: local `files`, a Hugging Face data set (`path`), a folder of prepared shards (`data_dir`) or,
    if none is given, the validation split of the run's own data."""

    files: list[str] = Field(default_factory=list)  # globs of parquet, jsonl or text files; a text file is a document
    path: str | None = None  # of the hub, or a folder laid out like one of its data sets
    subset: str | None = None
    split: str = "test"  # of the hub's
    column: str = "text"
    join: str | None = None  # if rows are not documents of their own: what to put between them to make them one
    data_dir: str | None = None  # its val split; the tokenizer must be the run's

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
        """Return the number of tokens in the document of each of the tokens first..last-1 of a stream."""
        length = len(self.streams[stream])
        if self.starts is None:
            return np.full(last - first, length - 1)
        starts = self.starts[stream].astype(np.int64)
        borders = np.unique(np.concatenate(([0], starts, [length])))
        return np.diff(borders)[np.searchsorted(borders, np.arange(first, last), side="right") - 1]


def read_text(source: TextSource, run: LoadedRun) -> Text:
    """Return the text that `source` names, in the run's tokens. ConfigError if there is none."""
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
        f"{manifest.name}, validation", shards.arrays, manifest.splits["val"].bytes_per_token, shards.documents(),
        manifest.unigram_entropy,
    )  # fmt: skip


def open_shards(folder: str) -> TokenShards:
    try:
        return TokenShards(folder, "val")
    except ConfigError as error:  # which names keys of the data block
        raise ConfigError(*(line.replace("data.dir", "suite.data_dir") for line in error.errors)) from None


def texts_of(source: TextSource) -> Iterator[str]:
    """Yield the rows of files or of the hub that are texts."""
    kind, keys = "hub" if source.path else "files", ("files", "path", "subset", "split", "column")
    config = SourceConfig(source=kind, **{key: getattr(source, key) for key in keys})
    try:
        yield from (row["text"] for row in source_of(config).open() if isinstance(row["text"], str))
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
    return Text(name, streams, sum(len(text.encode()) for text in texts) / predicted)


class Window(NamedTuple):
    """A model sees tokens [begin, end) of a stream; of those that it predicts, begin + 1 to end, the ones from `scored`
    on count."""

    stream: int
    begin: int
    end: int
    scored: int


def slide(text: Text, seq_len: int, stride: int | None, whole: bool) -> list[Window]:
    """Return windows of `seq_len` tokens, each `stride` after the one before, in which every token counts once.

    `whole` leaves out what is shorter at the end of a stream, as the loader of training's validation does.
    """
    windows = []
    for number, stream in enumerate(text.streams):
        predicted, begin, scored = len(stream) - 1, 0, 1
        while scored <= predicted:
            end = min(begin + seq_len, predicted)
            if whole and end - begin < seq_len:
                break
            windows.append(Window(number, begin, end, scored))
            begin, scored = begin + (stride or seq_len), end + 1
    return windows


def spread(windows: list[Window], limit: int | None) -> list[Window]:
    """Return at most `limit` of the windows, spread over all of them; the same as an EvalLoader takes."""
    if limit is None or limit >= len(windows):
        return windows
    return [windows[place] for place in permute(np.arange(limit), len(windows), EVAL_KEY)]


def share_out(windows: list[Window], batch_size: int) -> list[list[int]]:
    """Return the numbers of this rank's windows in batches, like lengths together.

    All ranks get the same number of batches; those of ranks that have no more windows are empty.
    """
    order = sorted(range(len(windows)), key=lambda n: windows[n].begin - windows[n].end)
    mine, count = order[rank() :: world_size()], -(-len(order) // (world_size() * batch_size))
    return [mine[start : start + batch_size] for start in range(0, count * batch_size, batch_size)]


def stack(text: Text, windows: list[Window], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and targets of windows, [B, T] each, padded at the end; targets that don't count are IGNORED."""
    tokens = torch.zeros(len(windows), max(window.end - window.begin for window in windows), dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    for row, (stream, begin, end, scored) in enumerate(windows):
        seen = torch.from_numpy(text.streams[stream][begin : end + 1].astype(np.int64))
        tokens[row, : end - begin] = seen[:-1]
        targets[row, scored - begin - 1 : end - begin] = seen[scored - begin :]
    return tokens.to(device), targets.to(device)
