"""The typed configuration of data and tokenizers."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from configs.errors import ConfigError, at_least

DATA_SOURCES = ("builtin", "files", "hub", "shards", "mixture")
SOURCE_KEYS = ("files", "path", "subset", "split", "revision", "streaming", "column")  # what a source itself has


@dataclass
class TokenizerConfig:
    """`kind` says which library: sentencepiece (trained on a sample, or the model in `path`), tiktoken (`encoding` by
    name) or huggingface (a tokenizer.json, its folder or a name on the hub in `path`)."""

    name: str
    kind: str
    vocab_size: int
    encoding: str | None = None
    path: str | None = None
    end_of_text: str = "<|endoftext|>"  # huggingface: the token that ends a document
    byte_fallback: bool = True

    @property
    def padded_vocab_size(self) -> int:
        """The model's vocabulary: padded to a multiple of 128 for the matrix units (50257 becomes 50304)."""
        return -(-self.vocab_size // 128) * 128

    def errors(self):
        if self.kind not in ("sentencepiece", "tiktoken", "huggingface"):
            yield f"tokenizer.kind={self.kind!r}: must be sentencepiece, tiktoken or huggingface"
        if self.kind == "tiktoken" and not self.encoding:
            yield "tokenizer.encoding is not set: tiktoken needs the name of an encoding, for example gpt2"
        if self.kind == "huggingface" and not self.path:
            yield "tokenizer.path is not set: give a tokenizer.json, its folder or a name on the Hugging Face hub"
        trained = self.kind == "sentencepiece" and not self.path
        low = 260 if trained else 1  # 256 bytes and the control tokens
        if self.vocab_size < low:
            yield f"tokenizer.vocab_size={self.vocab_size}: must be at least {low}"
        if self.vocab_size > 2**31:
            yield f"tokenizer.vocab_size={self.vocab_size}: must be at most 2^31"


@dataclass
class DataConfig:
    """Where documents come from (`source`) and where their shards are (`dir`).

    Sources: builtin; files (globs in `files`); hub (the Hugging Face data set `path`); mixture (a list of these with
    weights); shards (token shards that another program wrote into `dir`).
    """

    name: str
    source: str
    dir: str
    files: list[str] = field(default_factory=list)  # globs of parquet, jsonl or text files
    path: str | None = None  # hub: a data set's name, or a folder laid out like one
    subset: str | None = None  # hub: its configuration
    split: str = "train"  # hub
    revision: str | None = None  # hub: a commit, tag or branch; null: the newest
    streaming: bool = True  # hub: read while downloading; false: download it all first
    mixture: list[dict[str, Any]] = field(default_factory=list)  # each with a weight, a source and the source's keys
    column: str = "text"
    val_fraction: float = 0.05  # of the documents, chosen by a hash of their name or text
    max_document_bytes: int = 10_000_000  # longer ones are skipped
    shard_tokens: int = 100_000_000
    token_dtype: str = "auto"  # auto: uint16 where the vocabulary fits, else uint32
    document_mask: bool = False  # tokens attend to their own document only, and positions start again with each
    workers: int | None = None  # default: all cores

    def errors(self):
        if self.source not in DATA_SOURCES:
            yield f"data.source={self.source!r}: must be {', '.join(DATA_SOURCES[:-1])} or {DATA_SOURCES[-1]}"
        if self.source == "hub" and not self.path:
            yield "data.path is not set: give the name of a data set on the Hugging Face hub"
        if self.source == "mixture" and not self.mixture:
            yield "data.mixture=[]: must list the sources to mix, each with a weight"
        for number, part in enumerate(self.mixture):
            yield from self.mixture_errors(f"data.mixture[{number}]", part)
        if not 0 < self.val_fraction < 1:
            yield f"data.val_fraction={self.val_fraction}: must lie between 0 and 1"
        if self.token_dtype not in ("auto", "uint16", "uint32"):
            yield f"data.token_dtype={self.token_dtype!r}: must be auto, uint16 or uint32"
        if self.shard_tokens >= 2**31:
            yield f"data.shard_tokens={self.shard_tokens}: must be less than 2^31, the header's limit"
        yield from at_least(1, "data", self, "shard_tokens", "max_document_bytes", "workers")

    def mixture_errors(self, name: str, part: dict[str, Any]):
        known = {"weight", "source", *SOURCE_KEYS}
        yield from (f"{name}.{key}: unknown key; known keys: {', '.join(sorted(known))}" for key in part.keys() - known)
        weight = part.get("weight")
        if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
            yield f"{name}.weight={weight}: must be a positive number"
        if part.get("source") not in ("builtin", "files", "hub"):
            yield f"{name}.source={part.get('source')!r}: must be builtin, files or hub"
        if isinstance(part.get("files", []), str):
            yield f"{name}.files={part['files']!r}: must be a list of patterns"
        if part.get("source") == "hub" and not part.get("path"):
            yield f"{name}.path is not set: give the name of a data set on the Hugging Face hub"

    def parts(self) -> "list[tuple[float, DataConfig]]":
        """The sources of a mixture with their weights; what one leaves out is as in the mixture itself."""
        plain = [{key: value for key, value in part.items() if key != "weight"} for part in self.mixture]
        return [
            (part["weight"], dataclasses.replace(self, mixture=[], **keys))
            for part, keys in zip(self.mixture, plain, strict=True)
        ]

    def dtype_for(self, vocab_size: int) -> str:
        """The dtype of shards of so large a vocabulary. ConfigError where `token_dtype` cannot hold it."""
        if self.token_dtype == "uint16" and vocab_size > 2**16:
            raise ConfigError(
                f"tokenizer.vocab_size={vocab_size}: data.token_dtype=uint16 holds at most {2**16}; "
                "set data.token_dtype=auto"
            )
        return ("uint16" if vocab_size <= 2**16 else "uint32") if self.token_dtype == "auto" else self.token_dtype
