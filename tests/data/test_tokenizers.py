import dataclasses

import pytest

from configs.schema import ConfigError, TokenizerConfig
from data.tokenizers import MODEL_FILE, load_tokenizer, train_sentencepiece
from tests.data.conftest import texts

SENTENCEPIECE = TokenizerConfig("sentencepiece-320", "sentencepiece", 320)
GPT2 = TokenizerConfig("gpt2", "tiktoken", 50257, encoding="gpt2")
HARD = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\tx\t",
    " leading and trailing  ",
    "two  spaces   three",
    "a\r\nb\rc",
    "def f(x):\n\treturn  x\n\n\n    # end\n",
    "é漢字😀 ñ ß",
    "a\u00a0b\u3000c\u200b\ufeff",
    "\u2581 and \u2581\u2581x",
    "nul\x00l",
    "<unk><s></s><|endoftext|><0x0A>",
    "e\u0301 vs \u00e9, ﬁ, Å",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    dir = tmp_path_factory.mktemp("tokenizer")
    return train_sentencepiece(texts(100), SENTENCEPIECE, dir / MODEL_FILE), dir


def gpt2():
    try:
        return load_tokenizer(GPT2, ".")
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("text", HARD)
def test_sentencepiece_is_lossless(trained, text):
    tokenizer, _ = trained
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids and all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("text", HARD)
def test_tiktoken_is_lossless(text):
    tokenizer = gpt2()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.end_of_text not in ids


def test_gpt2_is_gpt2():
    tokenizer = gpt2()
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode_batch(["Hello", " world"]) == [[15496], [995]]


def test_training_is_deterministic_and_loading_gives_the_same(trained, tmp_path):
    tokenizer, dir = trained
    again = train_sentencepiece(texts(100), SENTENCEPIECE, tmp_path / MODEL_FILE)
    loaded = load_tokenizer(SENTENCEPIECE, dir)
    assert tokenizer.fingerprint == again.fingerprint == loaded.fingerprint
    assert loaded.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]
    assert train_sentencepiece(texts(90), SENTENCEPIECE, tmp_path / "other").fingerprint != tokenizer.fingerprint


def test_too_little_text(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size=320: the text to train on is too small, at most \d+"):
        train_sentencepiece(["hello world"], SENTENCEPIECE, tmp_path / MODEL_FILE)
    with pytest.raises(ConfigError, match="there is no text"):
        train_sentencepiece([], SENTENCEPIECE, tmp_path / MODEL_FILE)
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size=262: the characters of the text alone need \d+"):
        train_sentencepiece(texts(10), dataclasses.replace(SENTENCEPIECE, vocab_size=262), tmp_path / MODEL_FILE)


def test_load_errors(trained, tmp_path):
    _, dir = trained
    with pytest.raises(ConfigError, match="holds no tokenizer.model: run `python -m data.prepare"):
        load_tokenizer(SENTENCEPIECE, tmp_path)
    with pytest.raises(ConfigError, match="tokenizer.vocab_size=512: .* has 320 tokens"):
        load_tokenizer(dataclasses.replace(SENTENCEPIECE, vocab_size=512), dir)
    (tmp_path / MODEL_FILE).write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="is not a sentencepiece model"):
        load_tokenizer(SENTENCEPIECE, tmp_path)
    with pytest.raises(ConfigError, match="tokenizer.encoding=gpt-2: .* did you mean gpt2?"):
        load_tokenizer(dataclasses.replace(GPT2, encoding="gpt-2"), tmp_path)


def test_vocab_size_of_an_encoding():
    gpt2()
    with pytest.raises(ConfigError, match="tokenizer.vocab_size=50304: the encoding gpt2 has 50257 tokens"):
        load_tokenizer(dataclasses.replace(GPT2, vocab_size=50304), ".")


def test_no_network_and_no_cache(tmp_path, monkeypatch):
    import tiktoken.registry

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ConfigError, match="tokenizer.encoding=gpt2: .* TIKTOKEN_CACHE_DIR"):
        load_tokenizer(GPT2, tmp_path)
