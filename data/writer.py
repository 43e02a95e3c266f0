"""Writing token shards so that a killed preparation can resume."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.files import sha256_of
from data.shards import HEADER_BYTES, Shard, document_index, header, map_tokens, save_index

OPEN = ".open"  # the ending of a shard that the journal does not know as finished


class ShardWriter:
    """Write the tokens of one split into `<split>_000000.bin`, ..., of `shard_tokens` tokens each except the last.

    Each gets a document index next to it. Tokens are appended to an open file. `state()` tells how much of it counts,
    and a writer with `restore(state)` cuts off the rest. Finished shards get their names in `publish()`, to be called
    after the state has been saved: a file with the name of a shard is finished and is never written again.
    """

    def __init__(self, dir: str | Path, split: str, shard_tokens: int, vocab_size: int, end_of_text: int, dtype: str):
        self.dir, self.split, self.shard_tokens, self.vocab_size = Path(dir), split, shard_tokens, vocab_size
        self.end_of_text, self.dtype = end_of_text, np.dtype(dtype).newbyteorder("<")
        self.shards: list[Shard] = []
        self._tokens = 0  # in the open shard
        self._at_start = True  # the open shard begins with a document
        self._file = None

    def write(self, tokens: np.ndarray) -> bool:
        """Append tokens, the end-of-text of each document included. Return whether a shard was finished.

        ValueError for a token outside the vocabulary.
        """
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"token {tokens.max()} is outside the vocabulary of {self.vocab_size}")
        before = len(self.shards)
        while len(tokens) > (room := self.shard_tokens - self._tokens):
            self._append(tokens[:room])
            self._finish()
            tokens = tokens[room:]
        self._append(tokens)
        return len(self.shards) > before

    def close(self) -> list[Shard]:
        """Finish the last shard and return the shards of the split."""
        if self._tokens:
            self._finish()
        return self.shards

    def state(self) -> dict[str, Any]:
        """Return, as plain values, how far the files go that are on disk by then."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        return {"shards": shards, "tokens": self._tokens, "at_start": self._at_start}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a saved state: publish its shards, cut off what came after."""
        self.shards = [Shard(**shard) for shard in state["shards"]]
        self._tokens, self._at_start = state["tokens"], state["at_start"]
        self.publish()
        if self._tokens:
            self._file = open(self._open_path(), "r+b")
            self._file.truncate(HEADER_BYTES + self._tokens * self.dtype.itemsize)
            self._file.seek(0, os.SEEK_END)

    def publish(self) -> None:
        """Give the finished shards their names."""
        for shard in self.shards:
            unnamed = self.dir / f"{shard.file}{OPEN}"
            if unnamed.exists():
                os.replace(unnamed, self.dir / shard.file)

    def _open_path(self) -> Path:
        return self.dir / f"{self.split}_{len(self.shards):06d}.bin{OPEN}"

    def _append(self, tokens: np.ndarray) -> None:
        if not len(tokens):
            return
        if self._file is None:
            self._file = open(self._open_path(), "wb+")
            self._file.write(bytes(HEADER_BYTES))
        self._file.write(tokens.astype(self.dtype, copy=False).data)
        self._tokens += len(tokens)

    def _finish(self) -> None:
        path = self._open_path()
        self._file.seek(0)
        self._file.write(header(self._tokens, self.dtype).data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        tokens = map_tokens(path, self.dtype)
        starts, documents = document_index(tokens, self.end_of_text, self._at_start)
        file = path.name.removesuffix(OPEN)
        save_index(self.dir / file, starts)
        self.shards.append(Shard(file, self._tokens, documents, sha256_of(path)))
        self._tokens, self._at_start = 0, bool(tokens[-1] == self.end_of_text)
