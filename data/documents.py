"""What happens to documents in a worker process: bad ones are counted, good ones are split and tokenised."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from data.config import TokenizerConfig
from data.tokenizers import Tokenizer, load_tokenizer

SPLITS = ("train", "val")


@dataclass(frozen=True)
class NotText:
    """What a source yields in place of a document that it could not read."""

    reason: str


@dataclass
class Tokenised:
    """What has become of some documents, in their order."""

    tokens: dict[str, np.ndarray] = field(default_factory=dict)  # by split: of all in a row, end-of-text after each
    documents: Counter = field(default_factory=Counter)  # by split
    bytes: Counter = field(default_factory=Counter)  # of the text in UTF-8, by split
    skipped: Counter = field(default_factory=Counter)  # documents by reason


def encoded(text, max_bytes: int) -> bytes | NotText:
    """Return a value of the text column in UTF-8, or why it is not a document."""
    if text is None:
        return NotText("missing")
    if isinstance(text, NotText):
        return text
    if not isinstance(text, str):
        return NotText("not text")
    if not text or text.isspace():
        return NotText("empty")
    if len(text) > max_bytes:
        return NotText("too long")
    try:
        content = text.encode()
    except UnicodeEncodeError:  # lone surrogates, which is also how readers pass on bytes that are not UTF-8
        return NotText("invalid UTF-8")
    if b"\0" in content:  # UTF-16 without a mark at its beginning, or a binary file
        return NotText("holds NUL characters")
    return content if len(content) <= max_bytes else NotText("too long")


def place(content: bytes) -> float:
    """Return a pseudo-random number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


def good_documents(documents: Iterable[dict], max_bytes: int, skipped: Counter) -> Iterator[tuple[str, int, float]]:
    """Yield (text, its bytes in UTF-8, its place) of the documents that hold text; count the others by reason.

    The place, by which documents are split, depends on the name of a document if it has one, else on its text.
    """
    for document in documents:
        content = encoded(document["text"], max_bytes)
        if isinstance(content, NotText):
            skipped[content.reason] += 1
        else:
            yield document["text"], len(content), place(document.get("name", "").encode() or content)


@dataclass(frozen=True)
class Division:
    """How documents become training and validation."""

    val_up_to: float  # documents whose place is at most this are validation
    tail: float = 0.0  # the share of every other document, at its end, that is validation too

    def __call__(self, text: str, place: float) -> dict[str, str]:
        """Return the text of each split, of those that have any; a tail begins where a line does, if it can."""
        if place <= self.val_up_to or not self.tail:
            return {"val" if place <= self.val_up_to else "train": text}
        at = len(text) - round(self.tail * len(text))
        at = (text.rfind("\n", 0, at) + 1) or at
        return {split: part for split, part in (("train", text[:at]), ("val", text[at:])) if part.strip()}


@dataclass
class Tokeniser:
    """Turn (documents, the state of the source after them) into (what has become of them, that state)."""

    config: TokenizerConfig
    dir: Path  # where the tokenizer is stored
    division: Division
    max_bytes: int

    @cached_property
    def tokenizer(self) -> Tokenizer:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        return load_tokenizer(self.config, self.dir)

    def __call__(self, item: tuple[list[dict], dict]) -> tuple[Tokenised, dict]:
        documents, state = item
        done = Tokenised()
        found: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}  # (text, its bytes)
        for text, _, where in good_documents(documents, self.max_bytes, done.skipped):
            for split, part in self.division(text, where).items():
                found[split].append((part, len(part.encode())))
        for split, texts in found.items():
            tokens = self.encoded(texts)
            if tokens is None:  # one of them cannot be, such as a million spaces in a row
                good = [text for text in texts if self.encoded([text]) is not None]
                done.skipped["cannot be tokenised"] += len(texts) - len(good)
                texts, tokens = good, self.encoded(good)
            done.tokens[split], done.documents[split] = tokens, len(texts)
            done.bytes[split] = sum(size for _, size in texts)
        return done, state

    def encoded(self, texts: list[tuple[str, int]]) -> np.ndarray | None:
        """Return the tokens of (text, size) pairs, None if the library fails."""
        with suppress(Exception):
            return self.tokenizer.encode_documents([text for text, _ in texts])
