"""Two tokenizers behind one interface: sentencepiece (trained here) and tiktoken (encodings by name).

Both are lossless, `decode(encode(text)) == text` (sentencepiece: with `byte_fallback`), and neither reads control
tokens out of the text: "<|endoftext|>" in a document is ordinary text.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import tiktoken

from configs.load import did_you_mean
from configs.schema import ConfigError, TokenizerConfig

MODEL_FILE = "tokenizer.model"
END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 64_000_000  # of text is plenty to train a vocabulary
MAX_LINE = 16_384  # bytes


class SentencePieceTokenizer:
    """A trained sentencepiece model, from the bytes of its file."""

    def __init__(self, model: bytes):
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

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode([int(token) for token in ids])


class TiktokenTokenizer:
    """One of tiktoken's encodings."""

    def __init__(self, encoding: tiktoken.Encoding):
        self._encoding = encoding
        self.vocab_size: int = encoding.n_vocab
        self.end_of_text: int = encoding.eot_token
        digest = hashlib.sha256(encoding.name.encode())
        for token in range(encoding.n_vocab):
            piece = encoding.decode_single_token_bytes(token)
            digest.update(len(piece).to_bytes(4, "little") + piece)
        self.fingerprint: str = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([int(token) for token in ids])


Tokenizer = SentencePieceTokenizer | TiktokenTokenizer


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


def train_sentencepiece(texts: Iterable[str], config: TokenizerConfig, path: Path) -> SentencePieceTokenizer:
    """Train a BPE vocabulary of `config.vocab_size` on `texts` and write it to `path`; the same texts, the same bytes.

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
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(model.getvalue())


def load_tokenizer(config: TokenizerConfig, dir: str | Path) -> Tokenizer:
    """The tokenizer of the data in `dir`. ConfigError where it isn't there or isn't the one that `config` says."""
    tokenizer = load_tiktoken(config.encoding) if config.kind == "tiktoken" else load_sentencepiece(Path(dir))
    if tokenizer.vocab_size != config.vocab_size:
        what = f"the encoding {config.encoding}" if config.kind == "tiktoken" else str(Path(dir) / MODEL_FILE)
        raise ConfigError(
            f"tokenizer.vocab_size={config.vocab_size}: {what} has {tokenizer.vocab_size} tokens; "
            f"set tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def load_sentencepiece(dir: Path) -> SentencePieceTokenizer:
    path = dir / MODEL_FILE
    if not path.is_file():
        raise ConfigError(f"data.dir={dir}: holds no {MODEL_FILE}: run `python -m data.prepare data=NAME` to train it")
    try:
        return SentencePieceTokenizer(path.read_bytes())
    except RuntimeError as error:
        raise ConfigError(f"{path}: is not a sentencepiece model; remove {dir} and prepare the data again") from error


def load_tiktoken(encoding: str) -> TiktokenTokenizer:
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
