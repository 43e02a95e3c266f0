import numpy as np
import pytest
import tokenizers
import transformers

from configs.errors import ConfigError
from data.config import TokenizerConfig
from data.tokenizers import load_tokenizer, new_tokenizer, train_sentencepiece
from tests.data.conftest import texts

SENTENCEPIECE = TokenizerConfig(name="sentencepiece-320", kind="sentencepiece", vocab_size=320)
GPT2 = TokenizerConfig(name="gpt2", kind="tiktoken", vocab_size=50257, encoding="gpt2")
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
    tokenizer = train_sentencepiece(texts(100), SENTENCEPIECE)
    tokenizer.save(dir)
    return tokenizer, dir


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
    assert tokenizer.encode_documents(["Hello", " world"]).tolist() == [15496, 50256, 995, 50256]


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_documents_in_a_row_are_the_documents_one_by_one(trained, kind):
    tokenizer = trained[0] if kind == "sentencepiece" else gpt2()
    row = tokenizer.encode_documents(HARD)
    assert row.dtype == np.uint32 and tokenizer.encode_documents([]).tolist() == []
    assert row.tolist() == [token for text in HARD for token in [*tokenizer.encode(text), tokenizer.end_of_text]]


def test_training_is_deterministic_and_loading_gives_the_same(trained):
    tokenizer, dir = trained
    again = train_sentencepiece(texts(100), SENTENCEPIECE)
    loaded = load_tokenizer(SENTENCEPIECE, dir)
    assert tokenizer.fingerprint == again.fingerprint == loaded.fingerprint
    assert [loaded.encode(text) for text in HARD] == [tokenizer.encode(text) for text in HARD]
    assert train_sentencepiece(texts(90), SENTENCEPIECE).fingerprint != tokenizer.fingerprint


def test_too_little_text():
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size=320: the text to train on allows at most \d+"):
        train_sentencepiece(["hello world"], SENTENCEPIECE)
    with pytest.raises(ConfigError, match="there is no text"):
        train_sentencepiece([], SENTENCEPIECE)
    with pytest.raises(ConfigError, match=r"vocab_size=262: the characters of the text alone need at least \d+"):
        train_sentencepiece(texts(10), SENTENCEPIECE.replace(vocab_size=262))


def test_load_errors(trained, tmp_path):
    _, dir = trained
    with pytest.raises(ConfigError, match="holds no tokenizer.model; run `python -m data.prepare"):
        load_tokenizer(SENTENCEPIECE, tmp_path)
    with pytest.raises(ConfigError, match="tokenizer.vocab_size=512: .* has 320 tokens"):
        load_tokenizer(SENTENCEPIECE.replace(vocab_size=512), dir)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="is not a sentencepiece model"):
        load_tokenizer(SENTENCEPIECE, tmp_path)
    with pytest.raises(ConfigError, match="tokenizer.encoding=gpt-2: .* did you mean gpt2?"):
        load_tokenizer(GPT2.replace(encoding="gpt-2"), tmp_path)


def test_vocab_size_of_an_encoding():
    gpt2()
    with pytest.raises(ConfigError, match="tokenizer.vocab_size=50304: gpt2 has 50257 tokens"):
        load_tokenizer(GPT2.replace(vocab_size=50304), ".")


def test_no_network_and_no_cache(tmp_path, monkeypatch):
    import tiktoken.registry

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ConfigError, match="tokenizer.encoding=gpt2: .* TIKTOKEN_CACHE_DIR"):
        load_tokenizer(GPT2, tmp_path)


def test_tiktoken_is_stored_with_the_data(tmp_path, monkeypatch):
    tokenizer = gpt2()
    tokenizer.save(tmp_path)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: pytest.fail("asked tiktoken"))
    stored = load_tokenizer(GPT2, tmp_path)
    assert stored.fingerprint == tokenizer.fingerprint and stored.end_of_text == 50256
    assert [stored.encode(text) for text in HARD] == [tokenizer.encode(text) for text in HARD]
    (tmp_path / "tokenizer.tiktoken.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer.tiktoken.json: is not a stored tokenizer"):
        load_tokenizer(GPT2, tmp_path)


def test_a_given_sentencepiece_model(trained, tmp_path):
    tokenizer, dir = trained
    given = SENTENCEPIECE.replace(path=str(dir / "tokenizer.model"))
    assert new_tokenizer(given).fingerprint == tokenizer.fingerprint
    with pytest.raises(ConfigError, match="tokenizer.path=nowhere.model: there is no such file"):
        new_tokenizer(given.replace(path="nowhere.model"))
    with pytest.raises(ConfigError, match="tokenizer.vocab_size=512: .* has 320 tokens"):
        new_tokenizer(given.replace(vocab_size=512))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """(config, folder) of a byte-level BPE trained with Hugging Face's library."""
    dir = tmp_path_factory.mktemp("hf")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts(50), vocab_size=400, special_tokens=["<|endoftext|>", "<pad>"])
    bpe.save(str(dir / "tokenizer.json"))
    return TokenizerConfig(name="mine", kind="huggingface", vocab_size=bpe.get_vocab_size(), path=str(dir)), dir


@pytest.mark.parametrize("text", HARD)
def test_hugging_face_is_lossless_where_its_model_is(hugging_face, text):
    tokenizer = new_tokenizer(hugging_face[0])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.end_of_text not in ids
    assert tokenizer.encode_documents([text, "x"]).tolist() == [
        *ids, tokenizer.end_of_text, *tokenizer.encode("x"), tokenizer.end_of_text
    ]  # fmt: skip


def test_hugging_face_is_stored_with_the_data(hugging_face, tmp_path):
    config, dir = hugging_face
    tokenizer = new_tokenizer(config)
    tokenizer.save(tmp_path)
    assert load_tokenizer(config, tmp_path).fingerprint == tokenizer.fingerprint
    assert new_tokenizer(config.replace(path=str(dir / "tokenizer.json"))).vocab_size == config.vocab_size
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(dir / "tokenizer.json"))
    fast.save_pretrained(tmp_path / "saved")
    saved = new_tokenizer(config.replace(path=str(tmp_path / "saved")))
    assert saved.encode(HARD[9]) == tokenizer.encode(HARD[9])


def test_hugging_face_errors(hugging_face, tmp_path):
    config, dir = hugging_face
    with pytest.raises(ConfigError, match="tokenizer.end_of_text='</s>': .* special tokens are '<pad>', '<|endoftext|"):
        new_tokenizer(config.replace(end_of_text="</s>"))
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (str(tmp_path), "nobody/has-this"):
        with pytest.raises(ConfigError, match=f"tokenizer.path={path}: is neither"):
            new_tokenizer(config.replace(path=path))
    with pytest.raises(ConfigError, match="holds no tokenizer.json; run"):
        load_tokenizer(config, dir / "nothing")
