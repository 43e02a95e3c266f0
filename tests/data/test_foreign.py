"""Shards that other programs wrote are indexed on first use."""

import json
import shutil

import numpy as np
import pytest

from configs.app import configured
from configs.errors import ConfigError
from data.config import DataCommand, TokenizerConfig
from data.prepare import ensure_prepared, prepare
from data.shards import TokenShards, read_manifest, verify
from tests.data.conftest import texts
from tests.data.test_tokenizers import GPT2, gpt2

END = 50256


def write(path, tokens, kind="llm.c"):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = (20240801, 7, len(tokens)) if kind == "llama" else (20240520, 1, len(tokens))
    with open(path, "wb") as file:
        if kind != "nanogpt":
            file.write(header.tobytes())
        file.write(np.asarray(tokens, dtype=np.uint32 if kind == "llama" else np.uint16).tobytes())


def blocks(*overrides):
    """Return (data, tokenizer) of a command line."""
    command = configured(DataCommand, list(overrides))
    return command.data, command.tokenizer


def config(dir, *overrides):
    return blocks("data=shards", f"data.dir={dir}", "tokenizer=gpt2", *overrides)


def rows():
    """A few documents as llm.c's scripts write them: end-of-text first."""
    tokenizer = gpt2()
    return [token for text in texts(40) for token in [END, *tokenizer.encode(text)]]


@pytest.mark.parametrize("kind", ["llm.c", "nanogpt"])
def test_published_shards_drop_in(tmp_path, kind):
    tokens = rows()
    half = len(tokens) // 2
    for name, part in (("train_000001", tokens[:half]), ("train_000002", tokens[half:]), ("val_000000", tokens[:999])):
        write(tmp_path / f"fineweb_{name}.bin", part, kind)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    manifest = ensure_prepared(*config(tmp_path, "data.workers=2"), progress=False)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert manifest.splits["train"].tokens == len(tokens) and manifest.splits["train"].documents == 40
    text_bytes = sum(len(text.encode()) for text in texts(40))
    assert manifest.splits["train"].bytes_per_token == pytest.approx(text_bytes / len(tokens), rel=0.01)
    train = TokenShards(tmp_path, "train")
    np.testing.assert_array_equal(np.concatenate(train.arrays), tokens)
    starts = np.concatenate([train.documents()[0], half + train.documents()[1]])
    np.testing.assert_array_equal(starts, [0, *(np.flatnonzero(np.array(tokens) == END) + 1)])
    assert verify(tmp_path) == []
    assert ensure_prepared(*config(tmp_path), progress=False) == manifest == read_manifest(tmp_path)
    assert prepare(*config(tmp_path), progress=False) == manifest


def test_uint32_shards(tmp_path):
    tokens = np.array([70_000, 99_999, 0] * 20)
    for split in ("train", "val"):
        write(tmp_path / f"x_{split}_0.bin", tokens, "llama")
    with pytest.raises(ConfigError, match="x_train_0.bin: holds token 99999, and tokenizer.vocab_size=50257; choose"):
        ensure_prepared(*config(tmp_path), progress=False)
    with pytest.raises(ConfigError, match="data.token_dtype=uint16: the shards in .* are uint32"):
        ensure_prepared(*config(tmp_path, "data.token_dtype=uint16"), progress=False)


@pytest.mark.parametrize(("dtype", "remedy"), [("int32", "uint32 if they have 4 bytes"), ("int64", "saved again")])
def test_tokens_of_another_width_are_not_read_as_uint16(tmp_path, dtype, remedy, capsys):
    """Every other token would be a 0, which the vocabulary has too."""
    for split in ("train", "val"):
        np.array(rows(), dtype=dtype).tofile(tmp_path / f"{split}.bin")
    with pytest.raises(ConfigError, match=f"train.bin: has no header.*as uint16 every second token is 0.*{remedy}"):
        ensure_prepared(*config(tmp_path), progress=False)
    wide = config(tmp_path, "data.token_dtype=uint32")
    if dtype == "int64":
        with pytest.raises(ConfigError, match="read as uint32 every second token is 0"):
            ensure_prepared(*wide, progress=False)
        return
    manifest = ensure_prepared(*wide, progress=True)
    assert manifest.splits["train"].tokens == len(rows()) and manifest.token_dtype == "uint32"
    np.testing.assert_array_equal(TokenShards(tmp_path, "train").arrays[0], rows())
    assert f"train.bin: read as uint32, begins with '<|endoftext|>{texts(40)[0][:9]}" in capsys.readouterr().err


def test_a_split_is_a_word_of_the_name(tmp_path):
    """A `retrieval` file is no validation, and a `constrained` one no training."""
    for name, count in (("retrieval_train", 40), ("retrieval_val", 20), ("test", 9)):
        write(tmp_path / f"{name}.bin", [1, END] * count)
    manifest = ensure_prepared(*config(tmp_path), progress=False)
    assert [manifest.splits[split].tokens for split in ("train", "val")] == [80, 40]
    (tmp_path / "manifest.json").unlink()
    write(tmp_path / "train_val.bin", [1, END])
    with pytest.raises(ConfigError, match="train_val.bin: is named after both train and val; rename it"):
        ensure_prepared(*config(tmp_path), progress=False)


def test_mistakes(tmp_path):
    gpt2()
    with pytest.raises(ConfigError, match=r"holds no \*train\*.bin and \*val\*.bin .*; set data.dir"):
        ensure_prepared(*config(tmp_path), progress=False)
    write(tmp_path / "train.bin", [1, END] * 50)
    write(tmp_path / "val.bin", [1, END] * 50)
    with pytest.raises(ConfigError, match="tokenizer=sentencepiece-4096: shards of another program need the tokenizer"):
        ensure_prepared(*blocks("data=shards", f"data.dir={tmp_path}"), progress=False)
    content = (tmp_path / "val.bin").read_bytes()
    (tmp_path / "val.bin").write_bytes(content[:-2])
    with pytest.raises(ConfigError, match="val.bin: is not whole: it has 1222 bytes; copy it again"):
        ensure_prepared(*config(tmp_path), progress=False)
    (tmp_path / "val.bin").write_bytes(content)
    for torn in (b"", content[:-1]):  # in the middle, where the next shard needs its last token
        (tmp_path / "train-0.bin").write_bytes(torn)
        with pytest.raises(ConfigError, match=f"train-0.bin: is not whole: it has {len(torn)} bytes"):
            ensure_prepared(*config(tmp_path), progress=False)
    (tmp_path / "train-0.bin").unlink()
    write(tmp_path / "val_2.bin", [1, END], "llama")
    with pytest.raises(ConfigError, match="holds shards of uint16 and of uint32"):
        ensure_prepared(*config(tmp_path), progress=False)


def test_a_torn_shard_does_not_ask_to_remove_the_others(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"{split}_0.bin", rows())
    ensure_prepared(*config(tmp_path), progress=False)
    shard = tmp_path / "train_0.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="train_0.bin: has .*; copy the shard again or") as caught:
        ensure_prepared(*config(tmp_path), progress=False)
    assert f"remove {tmp_path}/manifest.json" in str(caught.value) and "data.prepare" not in str(caught.value)


def test_another_tokenizer_does_not_ask_to_remove_the_shards(tmp_path):
    gpt2()
    for split in ("train", "val"):
        write(tmp_path / f"{split}.bin", [1, END] * 50)
    ensure_prepared(*config(tmp_path), progress=False)
    data, _ = config(tmp_path)
    other = TokenizerConfig(name="other", kind="tiktoken", vocab_size=50281, encoding="p50k_base")
    with pytest.raises(
        ConfigError, match="was prepared with tokenizer.vocab_size=50257, not 50281; .*its manifest.json"
    ):
        ensure_prepared(data, other, progress=False)


def test_a_large_vocabulary_of_ones_own(tmp_path):
    """More than 65,536 tokens: uint32 by itself, a refusal where uint16 is asked for."""
    import tokenizers

    words = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    documents = [f"w{i} w{2 * i} w{69_999 - i}" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    overrides = [
        "data=files", f"data.files=[{tmp_path}/a.jsonl]", f"data.dir={tmp_path}/shards", "tokenizer=huggingface",
        f"tokenizer.path={tmp_path}/tokenizer.json", "tokenizer.vocab_size=70001", "data.workers=1",
    ]  # fmt: skip
    made = prepare(*blocks(*overrides), progress=False)
    assert made.token_dtype == "uint32" and verify(tmp_path / "shards") == []
    found = np.concatenate([array for s in ("train", "val") for array in TokenShards(tmp_path / "shards", s).arrays])
    assert found.dtype == np.uint32 and len(found) == 4 * 60 and found.max() == 70_000
    shutil.rmtree(tmp_path / "shards")
    with pytest.raises(ConfigError, match="tokenizer.vocab_size=70001: data.token_dtype=uint16 holds at most 65536"):
        blocks(*overrides, "data.token_dtype=uint16")


def test_gpt2_config_is_the_yaml():
    assert blocks("tokenizer=gpt2")[1] == GPT2
