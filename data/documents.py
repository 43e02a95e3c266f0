"""What happens to documents in a worker process: bad ones are counted, good ones are split and tokenised."""

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
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
    """What has become of some documents, in their order; by split."""

    tokens: dict[str, np.ndarray]  # of all documents in a row, end-of-text after each
    documents: dict[str, int]
    bytes: dict[str, int]  # of the text in UTF-8
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
    return content if len(content) <= max_bytes else NotText("too long")


def place(content: bytes) -> float:
    """Return a pseudo-random number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


def place_of(document: dict, content: bytes) -> float:
    """Return where a document falls between train and validation: by its name if it has one, else by its text."""
    return place(document["name"].encode() if "name" in document else content)


class Tokeniser:
    """Documents to tokens, with one tokenizer. Documents whose place is at most `val_up_to` are validation."""

    def __init__(self, tokenizer: Tokenizer, val_up_to: float, max_bytes: int):
        self.tokenizer, self.val_up_to, self.max_bytes = tokenizer, val_up_to, max_bytes

    def __call__(self, documents: list[dict]) -> Tokenised:
        texts = {split: [] for split in SPLITS}
        done = Tokenised({}, {}, dict.fromkeys(SPLITS, 0))
        for document in documents:
            content = encoded(document["text"], self.max_bytes)
            if isinstance(content, NotText):
                done.skipped[content.reason] += 1
                continue
            split = "val" if place_of(document, content) <= self.val_up_to else "train"
            texts[split].append(document["text"])
            done.bytes[split] += len(content)
        dtype = np.uint16 if self.tokenizer.vocab_size <= 2**16 else np.uint32
        for split in SPLITS:
            done.tokens[split] = self.tokenizer.encode_documents(texts[split]).astype(dtype)
            done.documents[split] = len(texts[split])
        return done


_tokeniser: Tokeniser | None = None  # of this process


def set_tokeniser(config: TokenizerConfig, dir: Path, val_up_to: float, max_bytes: int) -> None:
    """Make this process ready for `tokenise`, with the tokenizer stored in `dir`."""
    global _tokeniser
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokeniser = Tokeniser(load_tokenizer(config, dir), val_up_to, max_bytes)


def tokenise(item: tuple[list[dict], dict]) -> tuple[Tokenised, dict]:
    """Turn (documents, the state of the source after them) into (what has become of them, that state)."""
    documents, state = item
    return _tokeniser(documents), state
