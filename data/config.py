"""The configuration of data and tokenizers, and of the commands that work on them."""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, create_model, model_validator

from configs.block import Block
from configs.errors import Mistakes
from configs.kinds import Name, OptionalPath
from configs.load import Command
from data.sources.base import SourceConfig, source_of

UINT16_TOKENS = 2**16  # as many as the smaller of the two dtypes tells apart


class TokenizerConfig(Block):
    """A tokenizer of one of three libraries."""

    name: Name
    kind: Literal["sentencepiece", "tiktoken", "huggingface"]
    vocab_size: int = Field(ge=1, le=2**31)
    encoding: str | None = Field(None, min_length=1)  # tiktoken: its name
    path: OptionalPath = None  # a file that holds it; null: train it. huggingface: a folder or a name on the hub, too
    end_of_text: str = Field("<|endoftext|>", min_length=1)  # huggingface: the token that ends a document
    byte_fallback: bool = True  # sentencepiece: characters outside the vocabulary become bytes

    @model_validator(mode="after")
    def _check_keys(self):
        lines = []
        if self.kind == "tiktoken" and not self.encoding:
            lines.append("encoding is not set: tiktoken needs the name of an encoding, for example gpt2")
        if self.kind == "huggingface" and not self.path:
            lines.append("path is not set: give a tokenizer.json, its folder or a name on the Hugging Face hub")
        if self.kind == "sentencepiece" and not self.path and self.vocab_size < 260:  # 256 bytes and control tokens
            lines.append(f"vocab_size={self.vocab_size}: must be at least 260")
        if lines:
            raise Mistakes(*lines)
        return self

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary of the model: a multiple of 128 suits matrix units (50257 becomes 50304)."""
        return -(-self.vocab_size // 128) * 128


class DataConfig(SourceConfig):
    """Where documents come from, and how they are split and stored."""

    name: Name
    val_fraction: float = Field(0.05, gt=0, lt=1)  # the share of `validation`
    # What is validation: documents chosen by a hash of their name or text, or the end of each document.
    validation: Literal["documents", "ends"] = "documents"
    shard_tokens: int = Field(100_000_000, ge=1, lt=2**31)  # the header of a shard holds no larger number
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"  # auto: uint16 if the vocabulary fits, else uint32
    document_mask: bool = False  # tokens attend to their own document only, and positions start again with each

    def dtype_for(self, vocab_size: int) -> str:
        """Return the dtype of shards whose vocabulary has this size."""
        smallest = "uint16" if vocab_size <= UINT16_TOKENS else "uint32"
        return smallest if self.token_dtype == "auto" else self.token_dtype

    def settings(self) -> dict[str, Any]:
        """Return what decides the contents of the shards, by configuration key."""
        return {f"data.{key}": getattr(self, key) for key in source_of(self).settings_keys}


def fill_data_dir(data: DataConfig, tokenizer: TokenizerConfig) -> DataConfig:
    """Return `data` with its default folder if it has none.

    A choice that stands for any documents, such as data=files, has a folder for each set of keys that it is given.
    """
    if data.dir:
        return data
    name = f"{data.name}-{tokenizer.name}"
    if source_of(data).is_any and data.name == data.source:
        name += "-" + hashlib.sha256(json.dumps(data.settings(), sort_keys=True).encode()).hexdigest()[:8]
    return data.replace(dir=f"data/shards/{name}")


def check_vocabulary(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    """Raise Mistakes if `data.token_dtype` cannot hold the tokens."""
    if data.token_dtype == "uint16" and tokenizer.vocab_size > UINT16_TOKENS:
        raise Mistakes(
            f"tokenizer.vocab_size={tokenizer.vocab_size}: data.token_dtype=uint16 holds at most {UINT16_TOKENS}; "
            "set data.token_dtype=auto"
        )


OTHER_KEYS = ("run", "model", "size", "core", "optim", "schedule", "deepspeed", "wandb", "trainer", "device")
Run = create_model("Run", __base__=Command, **dict.fromkeys(OTHER_KEYS, (Any, None)))


class DataCommand(Run):
    """A command that works on data: it takes all overrides of a run and reads those of two blocks."""

    data: DataConfig
    tokenizer: TokenizerConfig

    @model_validator(mode="after")
    def _resolve(self):
        check_vocabulary(self.data, self.tokenizer)
        self.data = fill_data_dir(self.data, self.tokenizer)
        return self
