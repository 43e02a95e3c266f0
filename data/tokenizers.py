"""Three kinds of tokenizer behind one interface: sentencepiece (trained here or given), tiktoken, Hugging Face's.

None reads control tokens out of the text: "<|endoftext|>" in a document is ordinary text. The first two are lossless,
`decode(encode(text)) == text` (sentencepiece: with `byte_fallback`). A tokenizer is stored with the data it made, and
loaded from there without a network.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tiktoken
import tokenizers

from configs.errors import ConfigError
from configs.schema_data import TokenizerConfig

MODEL_FILE = "tokenizer.model"  # sentencepiece's
JSON_FILE = "tokenizer.json"  # Hugging Face's
TIKTOKEN_FILE = "tokenizer.tiktoken.json"
END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 64_000_000  # of text is plenty to train a vocabulary
MAX_LINE = 16_384  # bytes


class Tokenizer(Protocol):
    """What every kind has: text to token ids and back."""

    vocab_size: int
    end_of_text: int  # the id that ends a document
    fingerprint: str  # SHA-256 of what the tokenizer is

    def encode(self, text: str) -> list[int]: ...

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """The tokens of all `texts` in a row, uint32, with end-of-text after each."""

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, dir: Path) -> None:
        """Write it where `load_tokenizer` finds it."""


def joined(documents: Iterable, end_of_text: int) -> np.ndarray:
    end = np.array([end_of_text], dtype=np.uint32)
    parts = [part for tokens in documents for part in (np.asarray(tokens, dtype=np.uint32), end)]
    return np.concatenate(parts) if parts else end[:0]


class SentencePieceTokenizer:
    """A trained sentencepiece model, from the bytes of its file."""

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.end_of_text: int = self._processor.eos_id()
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        # sentencepiece writes a space as U+2581: a real one in the text goes byte by byte, not to come back as a space
        self._marker = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]

    def encode(self, text: str) -> list[int]:
        first, *rest = text.split("\u2581")
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._marker + self._processor.encode(part)
        return ids

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        return joined(map(self.encode, texts), self.end_of_text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(token) for token in ids])

    def save(self, dir: Path) -> None:
        (dir / MODEL_FILE).write_bytes(self._model)


class TiktokenTokenizer:
    """One of tiktoken's encodings."""

    def __init__(self, encoding: tiktoken.Encoding):
        self._encoding = encoding
        self.vocab_size: int = encoding.n_vocab
        self.end_of_text: int = encoding.eot_token
        digest = hashlib.sha256(encoding.name.encode())
        tokens = {rank: token for token, rank in encoding._mergeable_ranks.items()}
        tokens |= {rank: token.encode() for token, rank in encoding._special_tokens.items()}
        for rank in range(encoding.n_vocab):
            piece = tokens.get(rank, b"")  # some encodings leave numbers out
            digest.update(len(piece).to_bytes(4, "little") + piece)
        self.fingerprint: str = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        encode = self._encoding.encode_to_numpy  # no list of Python integers on the way
        return joined((encode(text, disallowed_special=()) for text in texts), self.end_of_text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(token) for token in ids])

    def save(self, dir: Path) -> None:
        encoding = self._encoding
        fields = {
            "name": encoding.name,
            "pat_str": encoding._pat_str,
            "special_tokens": encoding._special_tokens,
            "mergeable_ranks": {base64.b64encode(t).decode(): rank for t, rank in encoding._mergeable_ranks.items()},
        }
        (dir / TIKTOKEN_FILE).write_text(json.dumps(fields))


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizers` tokenizer, from the text of its tokenizer.json."""

    def __init__(self, text: str, end_of_text: str):
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # control tokens in a document are text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        if end_of_text not in vocabulary:
            special = [added.content for added in self._tokenizer.get_added_tokens_decoder().values() if added.special]
            raise ConfigError(
                f"tokenizer.end_of_text={end_of_text!r}: no token of this tokenizer; its special tokens are "
                + (", ".join(map(repr, sorted(special)[:20])) or "none")
            )
        self.end_of_text: int = vocabulary[end_of_text]
        self._text = text
        self.fingerprint: str = hashlib.sha256(f"{text}\0{end_of_text}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return joined((encoded.ids for encoded in batch), self.end_of_text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def save(self, dir: Path) -> None:
        (dir / JSON_FILE).write_text(self._text, encoding="utf-8")


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the first SAMPLE_BYTES of `texts`: line breaks and tabs are tokens of their own."""
    size = 0
    for text in texts:
        for line in re.split(r"[\n\t\0]+", text):
            encoded = line.encode()
            size += len(encoded)
            if line and len(encoded) <= MAX_LINE:
                yield line
        if size > SAMPLE_BYTES:
            return


def train_sentencepiece(texts: Iterable[str], config: TokenizerConfig) -> SentencePieceTokenizer:
    """Train a BPE vocabulary of `config.vocab_size` on `texts`; the same texts, the same model.

    ConfigError where the texts are too few for so large a vocabulary, or need more characters than a small one has.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            byte_fallback=config.byte_fallback,
            character_coverage=0.9995 if config.byte_fallback else 1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\n\n", "\t"],
            max_sentence_length=MAX_LINE,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_TEXT,
            num_threads=2,
            minloglevel=3,
        )
    except RuntimeError as error:
        wrong = f"tokenizer.vocab_size={config.vocab_size}"
        if found := re.search(r"Vocabulary size too high .* value <= (\d+)", str(error)):
            raise ConfigError(f"{wrong}: the text to train on is too small, at most {found[1]}") from error
        if found := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise ConfigError(f"{wrong}: the characters of the text alone need {found[1]}; at least that") from error
        if "sentences_.empty()" in str(error):
            raise ConfigError(f"{wrong}: there is no text to train the tokenizer on") from error
        raise
    return SentencePieceTokenizer(model.getvalue())


def new_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that `config` names, to tokenise with; None where it is to be trained first.

    ConfigError where it cannot be had, or has another vocabulary size.
    """
    if config.kind == "tiktoken":
        return checked(load_tiktoken(config.encoding), config, f"the encoding {config.encoding}")
    if not config.path:
        return None
    if config.kind == "sentencepiece":
        found = sentencepiece_from(Path(config.path), f"tokenizer.path={config.path}: there is no such file")
    else:
        found = HuggingFaceTokenizer(huggingface_text(config.path), config.end_of_text)
    return checked(found, config, config.path)


def load_tokenizer(config: TokenizerConfig, dir: str | Path) -> Tokenizer:
    """The tokenizer stored with the data in `dir`. ConfigError where it isn't there or isn't as large as `config` says.

    Where the data holds none of tiktoken's files, tiktoken itself is asked.
    """
    dir = Path(dir)
    if config.kind == "sentencepiece":
        missing = f"data.dir={dir}: holds no {MODEL_FILE}: run `python -m data.prepare data=NAME` to train it"
        return checked(sentencepiece_from(dir / MODEL_FILE, missing), config, str(dir / MODEL_FILE))
    if config.kind == "tiktoken":
        path = dir / TIKTOKEN_FILE
        found = stored_tiktoken(path) if path.is_file() else load_tiktoken(config.encoding)
        return checked(found, config, f"the encoding {config.encoding}")
    path = dir / JSON_FILE
    if not path.is_file():
        raise ConfigError(f"data.dir={dir}: holds no {JSON_FILE}: run `python -m data.prepare data=NAME` to store it")
    return checked(HuggingFaceTokenizer(huggingface_text(str(path)), config.end_of_text), config, str(path))


def checked(tokenizer: Tokenizer, config: TokenizerConfig, what: str) -> Tokenizer:
    if tokenizer.vocab_size != config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size={config.vocab_size}: {what} has {tokenizer.vocab_size} tokens; "
            f"set tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def sentencepiece_from(path: Path, missing: str) -> SentencePieceTokenizer:
    if not path.is_file():
        raise ConfigError(missing)
    try:
        tokenizer = SentencePieceTokenizer(path.read_bytes())
    except RuntimeError as error:
        raise ConfigError(f"{path}: is not a sentencepiece model") from error
    if tokenizer.end_of_text < 0:
        raise ConfigError(f"{path}: has no end-of-sentence token to end documents with")
    return tokenizer


def stored_tiktoken(path: Path) -> TiktokenTokenizer:
    try:
        fields = json.loads(path.read_bytes())
        ranks = {base64.b64decode(token): rank for token, rank in fields.pop("mergeable_ranks").items()}
        return TiktokenTokenizer(tiktoken.Encoding(mergeable_ranks=ranks, **fields))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is not a stored tokenizer ({error}); prepare the data again") from error


def load_tiktoken(encoding: str) -> TiktokenTokenizer:
    from configs.load import did_you_mean  # it needs all of the configuration: too much for every worker process

    known = tiktoken.list_encoding_names()
    if encoding not in known:
        raise ConfigError(f"tokenizer.encoding={encoding}: no encoding of tiktoken's; {did_you_mean(encoding, known)}")
    try:
        return TiktokenTokenizer(tiktoken.get_encoding(encoding))
    except Exception as error:  # no network and no cached file, in any of the ways that a download can fail
        raise ConfigError(
            f"tokenizer.encoding={encoding}: tiktoken cannot download its file ({type(error).__name__}); set "
            "TIKTOKEN_CACHE_DIR to a folder where tiktoken has loaded it before"
        ) from error


def huggingface_text(path: str) -> str:
    """The tokenizer.json at `path`, in the folder `path`, or of the repository `path` on the hub."""
    file = Path(path) / JSON_FILE if Path(path).is_dir() else Path(path)
    try:
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            tokenizers.Tokenizer.from_str(text)
            return text
        return tokenizers.Tokenizer.from_pretrained(path).to_str()
    except Exception as error:  # `tokenizers` raises a bare Exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"tokenizer.path={path}: is neither a {JSON_FILE}, a folder that holds one, nor a repository that the "
            f"Hugging Face hub answers with one ({reason})"
        ) from error
