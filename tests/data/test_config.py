"""The data and tokenizer blocks: defaults, mistakes, a source of one's own, and the command that prepares them."""

import json
import re
import shlex

import pytest

import data.sources
from configs.app import choices, configured
from configs.errors import ConfigError
from data.config import DataCommand
from data.prepare import ensure_prepared, preparing_command
from data.sources.base import source_class, source_names, source_of
from tests.data.conftest import texts


def blocks(*overrides):
    command = configured(DataCommand, list(overrides))
    return command.data, command.tokenizer


def mistakes(*overrides):
    with pytest.raises(ConfigError) as caught:
        blocks(*overrides)
    return caught.value.errors


def test_defaults():
    data, tokenizer = blocks()
    assert (data.source, data.dir, tokenizer.name) == (
        "builtin", "data/shards/builtin-sentencepiece-4096", "sentencepiece-4096"
    )  # fmt: skip
    assert blocks("data=fineweb_10b")[0].dir == "data/shards/fineweb_10b-sentencepiece-4096"
    assert blocks("tokenizer=huggingface")[1].name == "huggingface-49152"
    assert blocks("data=shards")[0].dir == "data/shards/foreign"


def test_one_choice_of_many_documents_has_a_folder_for_each():
    given = [[], ["data.files=[a.txt]"], ["data.files=[b.txt]"], ["data.files=[a.txt]", "data.column=body"]]
    folders = [blocks("data=files", *keys)[0].dir for keys in given]
    assert len(set(folders)) == 4
    assert all(re.fullmatch(r"data/shards/files-sentencepiece-4096-[0-9a-f]{8}", folder) for folder in folders)
    assert blocks("data=files", "data.files=[a.txt]", "data.workers=3", "data.document_mask=true")[0].dir == folders[1]


def test_every_source_has_a_configuration_of_its_name():
    assert source_names() == ["builtin", "files", "hub", "mixture", "shards"]
    for name in source_names():
        assert name in choices("data") and blocks(f"data={name}")[0].source == name
    assert {name for name in source_names() if source_class(name).on_first_use} == {"builtin", "shards"}
    assert {name for name in source_names() if source_class(name).mixable} == {"builtin", "files", "hub"}


def test_identity_and_settings_have_the_keys_of_older_runs():
    source = source_of(blocks("data=hub")[0])
    assert source.identity_keys == (
        "name", "source", "files", "path", "subset", "split", "revision", "mixture", "column", "separator",
        "val_fraction", "validation", "document_mask",
    )  # fmt: skip
    assert blocks("data=shards")[0].settings() == {"data.source": "shards"}
    assert list(blocks()[0].settings()) == [
        "data.source", "data.files", "data.path", "data.subset", "data.split", "data.revision", "data.mixture",
        "data.column", "data.separator", "data.val_fraction", "data.validation", "data.max_document_bytes",
        "data.shard_tokens", "data.token_dtype",
    ]  # fmt: skip


def test_mistakes_come_together():
    assert sorted(mistakes("data.source=web", "data.val_fraction=2", "data.shard_tokens=0", "data.fils=a",
                           "data.files=a.txt", "tokenizer.kind=bpe", "data.workers=0")) == [
        "data.files=a.txt: must be a list, as in [A,B]",
        "data.fils: unknown key; did you mean data.files?",
        "data.shard_tokens=0: must be at least 1",
        "data.source=web: must be builtin, files, hub, mixture or shards",
        "data.val_fraction=2: must be less than 1.0",
        "data.workers=0: must be at least 1",
        "tokenizer.kind=bpe: must be sentencepiece, tiktoken or huggingface",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=hub", "data.path=null"], "data.path is not set: give the name of a data set"),
        (["data.shard_tokens=2147483648"], "data.shard_tokens=2147483648: must be less than 2147483648"),
        (["tokenizer.vocab_size=259"], "tokenizer.vocab_size=259: must be at least 260"),
        (["tokenizer=gpt2", "tokenizer.encoding=null"], "tokenizer.encoding is not set: tiktoken needs"),
        (["tokenizer=huggingface", "tokenizer.path=null"], "tokenizer.path is not set: give a tokenizer.json"),
        (
            ["data.token_dtype=uint16", "tokenizer.vocab_size=70000"],
            "tokenizer.vocab_size=70000: data.token_dtype=uint16 holds at most 65536; set data.token_dtype=auto",
        ),
    ],
)
def test_mistakes_between_keys(overrides, message):
    [found] = mistakes(*overrides)
    assert found.startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=files", "data.files=[a/*.jsonl,'b c.txt']", "data.val_fraction=0.2"],
        ["data=fineweb_edu_10b", "tokenizer=gpt2", "data.revision='0012'", "data.workers=3"],
        ["data=mixture", "data.dir='/some where/else'", "tokenizer.vocab_size=512", "data.streaming=false"],
        ["data=hub", "data.name=mine", "data.path=a/b", "tokenizer=huggingface", "tokenizer.vocab_size=99"],
        ["tokenizer=gpt2", "tokenizer.name=other", "tokenizer.encoding=p50k_base", "tokenizer.vocab_size=50281"],
    ],
)
def test_the_command_that_prepares_it(overrides):
    """Split as a shell does, it configures the same blocks."""
    data, tokenizer = blocks(*overrides)
    words = shlex.split(preparing_command(data, tokenizer))
    assert words[:3] == ["python", "-m", "data.prepare"]
    again = blocks(*words[3:])
    assert again == (data.replace(workers=None), tokenizer)
    assert len(words) < 10  # and names no key that it need not


def test_a_source_is_one_file(tmp_path, monkeypatch):
    """The class of a new file is found by its name, and prepared by a run if it says so."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "poems.py").write_text(
        "import json\nfrom pathlib import Path\nimport datasets\nfrom data.sources.base import Source\n"
        "class Poems(Source):\n"
        "    on_first_use = True\n"
        "    def open(self, progress=False):\n"
        "        return datasets.Dataset.from_list(json.loads(Path(self.config.path).read_text()))"
        ".to_iterable_dataset()\n"
        "    def facts(self, progress=False):\n"
        "        return [Path(self.config.path).stat().st_mtime_ns]\n"
    )
    monkeypatch.setattr(data.sources, "__path__", [*data.sources.__path__, str(tmp_path / "sources")])
    (tmp_path / "poems.json").write_text(json.dumps([{"text": text} for text in texts(60)]))
    overrides = [f"data.path={tmp_path}/poems.json", f"data.dir={tmp_path}/shards", "tokenizer.vocab_size=320"]
    made = ensure_prepared(*blocks("data.source=poems", "data.workers=1", *overrides), progress=False)
    assert made.splits["train"].documents + made.splits["val"].documents == 60
    part = f"{{weight:1,source:poems,path:{tmp_path}/poems.json}}"
    mixed, _ = blocks("data=mixture", f"data.mixture=[{part},{part}]")
    assert len(list(source_of(mixed).open())) == 120
