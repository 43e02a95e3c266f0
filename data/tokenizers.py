"""Three kinds of tokenizer behind one interface: sentencepiece (trained here or given), tiktoken and Hugging Face.

To none of them is a control token in the text special: "<|endoftext|>" in a document is ordinary text. The first two
are lossless, `decode(encode(text)) == text` (sentencepiece: with `byte_fallback`). A tokenizer is stored with the data
it made, and loaded from there without a network.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import sentencepiece
import tiktoken
import tokenizers

from configs.errors import ConfigError, did_you_mean
from data.config import TokenizerConfig
from data.files import write_atomic

SAMPLE_BYTES = 64_000_000  # of text is plenty to train a vocabulary
MAX_LINE = 16_384  # bytes
TOO_LITTLE = {  # what sentencepiece raises, and what is wrong with the text
    r"Vocabulary size too high .* value <= (\d+)": r"the text to train on allows at most \1",
    r"required_chars\. \d+ vs (\d+)": r"the characters of the text alone need at least \1",
    r"sentences_\.empty\(\)": "there is no text to train the tokenizer on",
}


class Tokenizer:
    """Text to token ids and back."""

    file: ClassVar[str]  # its name in a data folder
    content: bytes  # of that file
    vocab_size: int
    end_of_text: int  # the id that ends a document
    fingerprint: str  # SHA-256 of what the tokenizer is
    decode_list: Callable[[list[int]], str]  # of the library

    @classmethod
    def read(cls, config: TokenizerConfig) -> "Tokenizer | None":
        """Return the tokenizer that `config` names, None if it is to be trained. ConfigError if it is unavailable."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_list([int(token) for token in ids])

    def encode_all(self, texts: list[str]) -> Iterable[Sequence[int]]:
        """Return the tokens of each of `texts`, as fast as the library can."""
        return map(self.encode, texts)

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Return the tokens of all `texts` in a row, uint32, with end-of-text after each."""
        end = np.array([self.end_of_text], dtype=np.uint32)
        parts = [part for ids in self.encode_all(texts) for part in (np.asarray(ids, dtype=np.uint32), end)]
        return np.concatenate([end[:0], *parts])

    def save(self, dir: Path) -> None:
        """Write it where `load_tokenizer` finds it."""
        write_atomic(dir / self.file, self.content)


class SentencePieceTokenizer(Tokenizer):
    """A trained sentencepiece model, from the bytes of its file."""

    file = "tokenizer.model"

    def __init__(self, model: bytes):
        self.content, self.fingerprint = model, hashlib.sha256(model).hexdigest()
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size, self.end_of_text = self.processor.vocab_size(), self.processor.eos_id()
        self.decode_list = self.processor.decode
        # sentencepiece writes a space as U+2581: a real one in the text is encoded as bytes, or it would become a space
        self.marker = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]

    @classmethod
    def read(cls, config: TokenizerConfig) -> "SentencePieceTokenizer | None":
        if not config.path:
            return None
        if not Path(config.path).is_file():
            raise ConfigError(f"tokenizer.path={config.path}: there is no such file")
        try:
            tokenizer = cls(Path(config.path).read_bytes())
        except RuntimeError as error:
            raise ConfigError(f"{config.path}: is not a sentencepiece model") from error
        if tokenizer.end_of_text < 0:
            raise ConfigError(f"{config.path}: has no end-of-sentence token to end documents with")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        first, *rest = map(self.processor.encode, text.split("\u2581"))
        return first + [token for part in rest for token in self.marker + part]


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken."""

    file = "tokenizer.tiktoken.json"

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding, self.encode, self.decode_list = encoding, encoding.encode_ordinary, encoding.decode
        self.vocab_size, self.end_of_text = encoding.n_vocab, encoding.eot_token
        digest = hashlib.sha256(encoding.name.encode())
        tokens = {rank: token for token, rank in encoding._mergeable_ranks.items()}
        tokens |= {rank: token.encode() for token, rank in encoding._special_tokens.items()}
        for rank in range(encoding.n_vocab):
            piece = tokens.get(rank, b"")  # some encodings leave numbers out
            digest.update(len(piece).to_bytes(4, "little") + piece)
        self.fingerprint = digest.hexdigest()

    @classmethod
    def read(cls, config: TokenizerConfig) -> "TiktokenTokenizer":
        if config.path:
            try:
                fields = json.loads(Path(config.path).read_bytes())
                ranks = {base64.b64decode(token): rank for token, rank in fields.pop("mergeable_ranks").items()}
                return cls(tiktoken.Encoding(mergeable_ranks=ranks, **fields))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{config.path}: is not a stored tokenizer ({error}); prepare the data again"
                ) from error
        name, known = config.encoding, tiktoken.list_encoding_names()
        if name not in known:
            raise ConfigError(f"tokenizer.encoding={name}: unknown to tiktoken; {did_you_mean(name, known)}")
        try:
            return cls(tiktoken.get_encoding(name))
        except Exception as error:  # no network and no cached file, in any of the ways that a download can fail
            raise ConfigError(
                f"tokenizer.encoding={name}: tiktoken cannot download its file ({type(error).__name__}); set "
                "TIKTOKEN_CACHE_DIR to a folder where tiktoken has loaded it before"
            ) from error

    @property
    def content(self) -> bytes:
        encoding = self.encoding
        ranks = {base64.b64encode(token).decode(): rank for token, rank in encoding._mergeable_ranks.items()}
        fields = {"name": encoding.name, "pat_str": encoding._pat_str, "special_tokens": encoding._special_tokens}
        return json.dumps(fields | {"mergeable_ranks": ranks}).encode()

    def encode_all(self, texts: list[str]) -> Iterable[np.ndarray]:
        return (self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts)  # no Python integers


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's `tokenizers`, and the text of its tokenizer.json."""

    file = "tokenizer.json"

    def __init__(self, tokenizer: tokenizers.Tokenizer, text: str, end_of_text: str):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # control tokens in a document are text
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if end_of_text not in vocabulary:
            special = [added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special]
            raise ConfigError(
                f"tokenizer.end_of_text={end_of_text!r}: is not a token of this tokenizer; its special tokens are "
                + (", ".join(map(repr, sorted(special)[:20])) or "none")
            )
        self.tokenizer, self.decode_list = tokenizer, partial(tokenizer.decode, skip_special_tokens=False)
        self.vocab_size, self.end_of_text = max(vocabulary.values()) + 1, vocabulary[end_of_text]
        self.content = text.encode()
        self.fingerprint = self.fingerprint_of(text, end_of_text)

    @staticmethod
    def fingerprint_of(text: str, end_of_text: str) -> str:
        """Return the fingerprint of a tokenizer.json whose text is `text`."""
        return hashlib.sha256(f"{text}\0{end_of_text}".encode()).hexdigest()

    @classmethod
    def read(cls, config: TokenizerConfig) -> "HuggingFaceTokenizer":
        file = Path(config.path, cls.file) if Path(config.path).is_dir() else Path(config.path)
        try:
            if file.is_file():
                text = file.read_text(encoding="utf-8")
            else:
                text = tokenizers.Tokenizer.from_pretrained(config.path).to_str()
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # `tokenizers` raises a bare Exception
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"tokenizer.path={config.path}: is neither a {cls.file}, a folder that holds one, nor a repository "
                f"with one on the Hugging Face hub ({reason})"
            ) from error
        return cls(tokenizer, text, config.end_of_text)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> Iterable[list[int]]:
        return (encoded.ids for encoded in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))


KINDS = {"sentencepiece": SentencePieceTokenizer, "tiktoken": TiktokenTokenizer, "huggingface": HuggingFaceTokenizer}


def new_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """Return the tokenizer that `config` names, None if it is to be trained. ConfigError if it has another size."""
    tokenizer = KINDS[config.kind].read(config)
    if tokenizer and tokenizer.vocab_size != config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size={config.vocab_size}: {config.path or config.encoding} has {tokenizer.vocab_size} "
            f"tokens; set tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def load_tokenizer(config: TokenizerConfig, dir: str | Path) -> Tokenizer:
    """Return the tokenizer stored with the data in `dir`; an encoding of tiktoken is found without being stored.
    ConfigError if there is none, or its vocabulary has another size than in `config`."""
    path = Path(dir) / KINDS[config.kind].file
    if not path.is_file() and config.kind != "tiktoken":
        raise ConfigError(f"data.dir={dir}: holds no {path.name}; run `python -m data.prepare data=NAME` to store one")
    return new_tokenizer(config.replace(path=str(path)) if path.is_file() else config)


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the first SAMPLE_BYTES of `texts`: line breaks and tabs are tokens of their own."""
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
    """Train a BPE vocabulary of `config.vocab_size` on `texts`; the same texts give the same model.
    ConfigError if there is too little text for the vocabulary, or it has more characters than the vocabulary holds."""
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
            eos_piece="<|endoftext|>",
            num_threads=2,
            minloglevel=3,
        )
    except RuntimeError as error:
        for pattern, reason in TOO_LITTLE.items():
            if found := re.search(pattern, str(error)):
                raise ConfigError(f"tokenizer.vocab_size={config.vocab_size}: {found.expand(reason)}") from error
        raise
    return SentencePieceTokenizer(model.getvalue())
