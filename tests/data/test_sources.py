"""Streams of documents: every kind of file, the hub's loader on local folders, mixtures, and resuming in the middle."""

import bz2
import codecs
import gzip
import itertools
import json
import lzma
import multiprocessing
import os
import signal
import tracemalloc

import datasets
import numpy as np
import pyarrow.parquet
import pytest

from configs.app import configured
from configs.errors import ConfigError
from data.build import Preparation
from data.config import DataCommand, DataConfig
from data.documents import Division, NotText, Tokeniser, encoded
from data.prepare import prepare
from data.sources import files
from data.sources.base import source_of
from data.tokenizers import train_sentencepiece
from tests.data.conftest import make_config, texts, write_jsonl
from tests.data.test_tokenizers import GPT2, SENTENCEPIECE, gpt2

PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def read(config):
    return [document["text"] for document in source_of(config[0]).open()]


@pytest.mark.parametrize("kind", ["jsonl", "json.gz", "jsonl.zst", "jsonl.xz", "jsonl.bz2", "parquet", "txt", "md.gz"])
def test_file_kinds(tmp_path, kind):
    documents = texts(6)
    for i, text in enumerate(documents):
        file, (kind_of_content, *packed) = tmp_path / f"{i}.{kind}", kind.split(".")
        if kind == "parquet":
            datasets.Dataset.from_dict({"id": [1], "body": [text]}).to_parquet(file)
            continue
        content = (text if kind_of_content in ("txt", "md") else json.dumps({"body": text}) + "\n").encode()
        file.write_bytes(PACK[packed[0]](content) if packed else content)
    config = make_config(tmp_path / "shards", [tmp_path / f"[0-9].{kind}"], column="body")
    assert read(config) == documents


BAD_LINES = [
    b"\n", b'{"text": null}\n', b'{"other": "no text"}\n', b'{"text": 3}\n', b'{"text": ["x"]}\n', b'"a string"\n',
    b'{"text": ""}\n', b'{"text": " \\n"}\n', b'{"text": "lone \\ud800 surrogate"}\n', b'{"text": "bad \xff byte"}\n',
    b'{"text": "to\n', b'{"text": "' + b"x" * 300 + b'"}\n', b'{"text": "' + b"x" * 30_000 + b'"}\n',
]  # fmt: skip
REASONS = {"empty": 2, "invalid UTF-8": 2, "missing": 2, "not JSON": 1, "not text": 3, "too long": 2}


def test_bad_documents_are_counted_by_reason_and_skipped(tmp_path):
    good = [json.dumps({"text": text[:200]}).encode() + b"\n" for text in texts(60)]
    mixed = [line for pair in itertools.zip_longest(good, BAD_LINES, fillvalue=b"") for line in pair]
    (tmp_path / "mixed.jsonl").write_bytes(b"".join(mixed))
    (tmp_path / "good.jsonl").write_bytes(b"".join(good))
    made = {
        name: prepare(
            *make_config(tmp_path / name, [tmp_path / f"{name}.jsonl"], max_document_bytes=250, vocab_size=300),
            progress=False,
        )
        for name in ("mixed", "good")
    }
    assert made["mixed"].skipped == REASONS and made["good"].skipped == {}
    assert made["mixed"].fingerprint == made["good"].fingerprint


def test_parquet_files_may_differ_in_all_but_the_column(tmp_path):
    tables = [
        {"text": pyarrow.array([], pyarrow.string())},
        {"text": pyarrow.array([None], pyarrow.null()), "score": [1]},
        {"text": pyarrow.array(["large"], pyarrow.large_string()), "score": ["high"]},
        {"text": [7], "url": ["a"]},
        {"body": ["b"]},
        {"text": ["last"]},
    ]
    for number, columns in enumerate(tables):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{number}.parquet")
    found = read(make_config(tmp_path, [tmp_path / "*.parquet"]))
    assert found == [None, "large", 7, NotText("missing"), "last"]


def test_a_source_that_breaks_off_is_one_message_in_every_pass(tmp_path):
    good = pyarrow.table({"text": texts(50)})
    pyarrow.parquet.write_table(good, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(good, tmp_path / "b.parquet", compression="none")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[4:1000] = bytes(996)
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match="the source broke off .*; the same command resumes here"):
        prepare(*make_config(tmp_path / "shards", [tmp_path / "*.parquet"], val_fraction=1e-6), progress=False)


def test_bad_values_in_parquet_and_text_files(tmp_path):
    datasets.Dataset.from_dict({"text": [None, "", "good"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    found = read(make_config(tmp_path, [tmp_path / "a.parquet"])) + read(make_config(tmp_path, [tmp_path / "b.txt"]))
    reasons = [value.reason if isinstance(value := encoded(text, 100), NotText) else value for text in found]
    assert reasons == ["missing", "empty", b"good", "invalid UTF-8"]


def test_a_packed_file_is_read_no_further_than_a_document_may_be_long(tmp_path):
    for kind, size in (("short", 100), ("long", 10**8)):
        with gzip.open(tmp_path / f"{kind}.txt.gz", "wb") as file:
            for _ in range(0, size, 10**7):
                file.write(b"x" * min(size, 10**7))
    tracemalloc.start()
    found = read(make_config(tmp_path, [tmp_path / "*.txt.gz"], max_document_bytes=1000))
    assert found == [NotText("too long"), "x" * 100] and tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_a_separator_cuts_a_text_file_into_documents(tmp_path, monkeypatch, chunk):
    """As TinyStories is one file, its stories apart by <|endoftext|>."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    end = "<|endoftext|>"
    stories = ["Once.\n\nTwice.", "ж" * 20, "x" * 200, f"half <|endof{end[:9]}", "caf\udce9", "last"]
    content = f"\ufeff{end}\n" + f"\n{end}\n".join(stories) + f"\n{end}\n \n{end}"
    (tmp_path / "a.txt").write_bytes(content.encode("utf-8", "surrogateescape"))
    (tmp_path / "b.txt").write_text("another file")
    config = make_config(tmp_path, [tmp_path / "*.txt"], max_document_bytes=100, separator=end)
    assert read(config) == [*stories[:2], NotText("too long"), *stories[3:], "another file"]
    with pytest.raises(ConfigError, match="no document holds text .*; data.separator= cuts a text file"):
        (tmp_path / "b.txt").unlink()
        prepare(*make_config(tmp_path / "shards", [tmp_path / "a.txt"], max_document_bytes=100), progress=False)


def test_a_line_may_be_much_longer_than_its_text(tmp_path):
    """Escaped, Cyrillic takes three times its bytes; and another column may hold anything."""
    rows = [{"text": "ж" * 450}, {"id": "x" * 50_000, "text": "short"}, {"text": "z"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read(make_config(tmp_path, [tmp_path / "a.jsonl"], max_document_bytes=1000))
    assert found == ["ж" * 450, "short", "z"]


def test_a_tokeniser_splits_by_hash_and_counts(tmp_path):
    tokenizer = train_sentencepiece(texts(100), SENTENCEPIECE)
    tokenizer.save(tmp_path)
    documents = [{"text": text} for text in [*texts(50), None, "é"]]
    done, state = Tokeniser(SENTENCEPIECE, tmp_path, division=Division(0.5), max_bytes=10_000)((documents, {"at": 52}))
    assert state == {"at": 52}
    assert done.documents["train"] + done.documents["val"] == 51 and min(done.documents.values()) > 10
    assert sum(done.bytes.values()) == sum(map(len, texts(50))) + 2 and done.skipped == {"missing": 1}
    assert all((tokens == tokenizer.end_of_text).sum() == done.documents[s] for s, tokens in done.tokens.items())


def test_the_mark_of_utf8_is_no_part_of_the_text_and_utf16_is_none(tmp_path):
    mark = codecs.BOM_UTF8
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(mark + b'{"text": "first"}\n{"text": "second"}\n')
    assert read(make_config(tmp_path, [tmp_path / "*.jsonl"])) == ["first", "second"] * 2
    (tmp_path / "a.txt").write_bytes(mark + "caf\u00e9".encode())
    (tmp_path / "b.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes("text".encode("utf-16-le"))
    found = [encoded(text, 100) for text in read(make_config(tmp_path, [tmp_path / "*.txt"]))]
    assert found == ["caf\u00e9".encode(), NotText("invalid UTF-8"), NotText("holds NUL characters")]


def test_a_document_that_the_tokenizer_cannot_take_is_skipped_alone(tmp_path):
    tokenizer = gpt2()
    tokenizer.save(tmp_path)
    documents = [{"text": text} for text in ["one", "two" + " " * 1_000_000 + "three", "four"]]
    done, _ = Tokeniser(GPT2, tmp_path, division=Division(0.0), max_bytes=10**7)((documents, {}))
    np.testing.assert_array_equal(done.tokens["train"], tokenizer.encode_documents(["one", "four"]))
    assert done.skipped == {"cannot be tokenised": 1} and done.documents["train"] == 2 and done.bytes["train"] == 7


def test_no_document_holds_text(tmp_path):
    file = write_jsonl(tmp_path / "some.jsonl", [1, 2, None])
    with pytest.raises(ConfigError, match="data.column=text: no document holds text .2 not text, 1 missing."):
        prepare(*make_config(tmp_path / "shards", [file]), progress=False)


def test_bad_files(tmp_path):
    def load(*files, column="text"):
        return read(make_config(tmp_path / "shards", files, column=column))

    good = write_jsonl(tmp_path / "good.jsonl", texts(3))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.bin").write_bytes(b"123")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "empty.jsonl").touch()
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "good.parquet")
    with pytest.raises(ConfigError, match="data.files: no file matches '.*nothing.jsonl'"):
        load(good, tmp_path / "nothing.jsonl")
    with pytest.raises(ConfigError, match=r"data.files=\[\]: must name the files"):
        load()
    with pytest.raises(ConfigError, match="a.bin has no known extension: must be one of .parquet, .jsonl"):
        load(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match="of several kinds, json lines .*good.jsonl.*, text .*a.txt"):
        load(good, tmp_path / "a.txt")
    for file in (good, tmp_path / "good.parquet"):
        with pytest.raises(ConfigError, match="data.column=body: no such column .*columns there: text"):
            load(file, column="body")
    (tmp_path / "array.json").write_text(json.dumps([{"text": text} for text in texts(3)], indent=1))
    with pytest.raises(ConfigError, match="array.json is one JSON array; write one object a line"):
        load(tmp_path / "array.json")
    with pytest.raises(ConfigError, match="empty.jsonl.* cannot be read as json lines: it is empty"):
        load(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="cannot be read as parquet: .*"):
        load(tmp_path / "broken.parquet")


def test_patterns_follow_no_loops_and_names_may_look_like_patterns(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.txt", "a/2.txt", "[1].txt"):
        (tmp_path / name).write_text(name)
    for link in ("a/loop", "a/other"):
        (tmp_path / link).symlink_to(tmp_path)
    assert sorted(read(make_config(tmp_path, [tmp_path / "**/*.txt"]))) == ["[1].txt", "a/1.txt", "a/2.txt"]
    assert read(make_config(tmp_path, [tmp_path / "[1].txt"])) == ["[1].txt"]


def on_the_hub(folder, documents, column="content", subset="sample-10"):
    """A data set as it lies on the hub: a card that names the configurations and their files."""
    (folder / "sample").mkdir(parents=True)
    for i in range(3):
        part = datasets.Dataset.from_dict({column: documents[i::3], "id": list(range(len(documents[i::3])))})
        part.to_parquet(folder / f"sample/{i:03d}.parquet")
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n  - split: train\n    path: sample/*.parquet\n---\n"
    )


def test_packed_files_of_several_parts_and_torn_ones(tmp_path):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts(40)]
    for kind, pack in PACK.items():
        file = tmp_path / f"a.jsonl.{kind}"
        file.write_bytes(pack(b"".join(lines[:20])) + pack(b"".join(lines[20:])))
        assert read(make_config(tmp_path, [file])) == texts(40)
        file.write_bytes(file.read_bytes()[:-30])
        with pytest.raises(ConfigError, match=f"a.jsonl.{kind}: cannot be read .*; copy it again"):
            read(make_config(tmp_path, [file]))


def hub(path, **keys):
    return DataConfig(name="hub", source="hub", path=str(path), subset="sample-10", column="content", **keys)


@pytest.mark.parametrize("streaming", [True, False])
def test_the_hubs_loader(tmp_path, streaming, monkeypatch):
    on_the_hub(tmp_path / "set", texts(30))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = [document["text"] for document in source_of(hub(tmp_path / "set", streaming=streaming)).open()]
    assert found == [text for i in range(3) for text in texts(30)[i::3]]


def test_the_hubs_mistakes(tmp_path):
    on_the_hub(tmp_path / "set", texts(3), column="words")
    with pytest.raises(ConfigError, match="data.column=content: no such column in the documents; there are words"):
        source_of(hub(tmp_path / "set")).open()
    wrong = hub(tmp_path / "set", split="test")
    with pytest.raises(ConfigError, match="data.path=.*set: cannot be read as a Hugging Face data set: .*test"):
        source_of(wrong).open()
    with pytest.raises(ConfigError, match="data.path=nobody/nothing: cannot be read as a Hugging Face data set"):
        source_of(hub("nobody/nothing")).open()


def sources(tmp_path):
    """One configuration of each kind."""
    write_jsonl(tmp_path / "a.jsonl", [f"a {i}" for i in range(40)])
    write_jsonl(tmp_path / "b.jsonl", [f"b {i}" for i in range(60)])
    on_the_hub(tmp_path / "set", [f"hub {i}" for i in range(90)])
    files = make_config(tmp_path, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"])[0]
    part = {"source": "hub", "path": str(tmp_path / "set"), "subset": "sample-10", "column": "content"}
    parts = [{"weight": 1, "source": "files", "files": [str(tmp_path / "*.jsonl")]}, {"weight": 2.5} | part]
    return {
        "files": files,
        "hub": hub(tmp_path / "set"),
        "mixture": DataConfig(name="mixture", source="mixture", mixture=parts),
    }


@pytest.mark.parametrize("kind", ["files", "hub", "mixture"])
def test_every_stream_resumes_where_its_state_says(tmp_path, kind):
    config = sources(tmp_path)[kind]
    stream, found, states = source_of(config).open(), [], []
    for document in stream:
        found.append(document["text"])
        states.append(json.loads(json.dumps(stream.state_dict())))
    assert len(found) > 80
    for place in (0, 1, 39, 40, 60, len(found) - 2):
        again = source_of(config).open()
        again.load_state_dict(states[place])
        assert [document["text"] for document in again] == found[place + 1 :]
    assert [document["text"] for document in stream] == found  # and from the start where there is none


def test_a_mixture_keeps_its_shares_and_says_what_ended_it(tmp_path):
    stream = source_of(sources(tmp_path)["mixture"]).open()
    found = [document["text"].split()[0] for document in stream]
    assert f"data.mixture[1] has no more documents, so the mixture ends with {len(found) - 90}, 90" in stream.ending
    assert 120 <= len(found) <= 127  # the hub's 90 are used up first: 90 / 2.5 of the others
    for length in (7, 35, 70, len(found)):
        assert abs(found[:length].count("hub") - length * 2.5 / 3.5) <= 1


def test_mistakes_in_a_mixture_are_named():
    parts = "[{weight:0,source:hub,path:x},{weight:1,source:hub},{source:web,fils:[],files:a}]"
    with pytest.raises(ConfigError) as caught:
        configured(DataCommand, ["data=mixture", f"data.mixture={parts}"])
    found = str(caught.value)
    for message in ("[0].weight=0: must be", "[1].path is not set", "[2].source=web: must be builtin, files or hub",
                    "[2].weight is not set", "[2].fils: unknown key; did you mean files", "[2].files=a: must be a list",
                    ):  # fmt: skip
        assert f"data.mixture{message}" in found
    with pytest.raises(ConfigError, match=r"data.mixture=\[\]: must list the sources"):
        configured(DataCommand, ["data=mixture", "data.mixture=[]"])


def test_the_shipped_hub_configuration_prepares_a_local_copy(tmp_path):
    """`data=fineweb_edu_10b` as it is, except that its path is a folder, killed in the middle and resumed."""
    on_the_hub(tmp_path / "set", texts(1500), column="text", subset="sample-10BT")
    overrides = ["data=fineweb_edu_10b", f"data.path={tmp_path}/set", "data.val_fraction=0.01", "data.workers=1",
                 "tokenizer.vocab_size=320", "data.shard_tokens=5000"]  # fmt: skip
    command = configured(DataCommand, [*overrides, f"data.dir={tmp_path}/undisturbed"])
    undisturbed = prepare(command.data, command.tokenizer, progress=False)
    config = command.data.replace(dir=str(tmp_path / "shards")), command.tokenizer
    assert undisturbed.splits["train"].documents + undisturbed.splits["val"].documents == 1500

    def killed_after(tasks):
        original, calls = Preparation.add, itertools.count(1)

        def add(self, *args):
            original(self, *args)
            if next(calls) == tasks:
                os.kill(os.getpid(), signal.SIGKILL)

        Preparation.add = add
        prepare(*config, progress=False)

    process = multiprocessing.get_context("fork").Process(target=killed_after, args=(2,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and list((tmp_path / "shards.partial").glob("*.bin"))
    assert prepare(*config, progress=False).fingerprint == undisturbed.fingerprint
