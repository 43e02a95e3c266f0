import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from configs.errors import ConfigError
from data import build
from data.inspect import document_lengths, find_folder, inspect
from data.prepare import ensure_prepared, prepare
from data.shards import TokenShards, read_manifest, verify
from data.tokenizers import load_tokenizer
from tests.data.conftest import make_config, texts, write_jsonl
from tests.data.test_config import blocks
from tests.data.test_tokenizers import GPT2, gpt2

ROOT = Path(__file__).parents[2]


def decoded(config, dir, split):
    """The documents of a split, from its shards."""
    tokenizer = load_tokenizer(config[1], dir)
    tokens = np.concatenate(TokenShards(dir, split).arrays)
    ends = np.flatnonzero(tokens == tokenizer.end_of_text)
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def test_shards_hold_the_documents(small):
    config, dir = small
    manifest = read_manifest(dir)
    train, val = decoded(config, dir, "train"), decoded(config, dir, "val")
    assert sorted(train + val) == sorted(texts(200)) and 20 < len(val) < 60
    assert (manifest.splits["train"].documents, manifest.splits["val"].documents) == (len(train), len(val))
    for split, documents in (("train", train), ("val", val)):
        size = sum(len(text.encode()) for text in documents)
        assert manifest.splits[split].bytes == size
        assert manifest.splits[split].bytes_per_token == size / manifest.splits[split].tokens
    assert verify(dir) == [] and not list(dir.parent.glob("*.partial")) and not list(dir.parent.glob("*.lock"))
    assert {path.name.split("_")[0] for path in dir.iterdir()} == {"train", "val", "manifest.json", "tokenizer.model"}


def test_the_same_for_every_number_of_workers_and_start_method(small, tmp_path, start_method):
    config, dir = small
    again = make_config(tmp_path / "shards", config[0].files, shard_tokens=4000, val_fraction=0.2, workers=2)
    assert prepare(*again, progress=False).fingerprint == read_manifest(dir).fingerprint


def test_the_split_does_not_depend_on_the_order(small, tmp_path):
    config, dir = small
    file = write_jsonl(tmp_path / "reversed.jsonl", texts(200)[::-1])
    again = make_config(tmp_path / "shards", [file], val_fraction=0.2)
    prepare(*again, progress=False)
    assert set(decoded(again, tmp_path / "shards", "val")) == set(decoded(config, dir, "val"))


def test_prepared_twice(small):
    config, dir = small
    before = {path: path.stat().st_mtime_ns for path in dir.iterdir()}
    assert prepare(*config, progress=False) == ensure_prepared(*config, progress=False) == read_manifest(dir)
    assert before == {path: path.stat().st_mtime_ns for path in dir.iterdir()}


def test_documents_that_change_after_a_preparation_are_noticed(tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", texts(100))
    config = make_config(tmp_path / "shards", [tmp_path / "*.jsonl"], vocab_size=300)
    prepare(*config, progress=False)
    write_jsonl(tmp_path / "b.jsonl", texts(100, seed=1))
    with pytest.raises(ConfigError, match="shards: the documents .* have changed since they were prepared; remove the"):
        prepare(*config, progress=False)
    assert ensure_prepared(*config) and "the shards are those of before" in capsys.readouterr().err
    file.unlink()
    (tmp_path / "b.jsonl").unlink()  # nobody can tell, and a run needs the shards alone
    assert ensure_prepared(*config) and not capsys.readouterr().err


def test_documents_that_change_during_a_preparation_are_noticed(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts(100))
    config = make_config(tmp_path / "shards", [file], vocab_size=300)
    tokenise_all = build.tokenise_all

    def meanwhile(*arguments):
        tokenise_all(*arguments)
        write_jsonl(file, texts(90))

    monkeypatch.setattr(build, "tokenise_all", meanwhile)
    with pytest.raises(ConfigError, match="have changed while they were prepared; start again"):
        prepare(*config, progress=False)
    assert not (tmp_path / "shards").exists()
    monkeypatch.undo()
    assert sum(split.documents for split in prepare(*config, progress=False).splits.values()) == 90


def test_prepared_with_other_settings(small, tmp_path):
    config, dir = small
    other = make_config(dir, config[0].files, shard_tokens=5000, val_fraction=0.1, column="body", vocab_size=400)
    for function in (prepare, ensure_prepared):
        with pytest.raises(ConfigError) as error:
            function(*other, progress=False)
        message = str(error.value)
        for key in (
            "data.shard_tokens=4000, not 5000",
            "data.val_fraction=0.2, not 0.1",
            "data.column=text, not body",
            "tokenizer.vocab_size=320, not 400",
        ):
            assert f"was prepared with {key}; choose another data.dir or remove the folder" in message
        assert "data.files" not in message and len(error.value.errors) == 4


def test_a_folder_with_something_else_is_left_alone(small, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files but no manifest.json"):
        prepare(*make_config(tmp_path, small[0][0].files), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        prepare(*make_config(tmp_path / "mine.txt", small[0][0].files), progress=False)


def test_what_lies_next_to_the_folder_is_left_alone(small, tmp_path):
    """Names that a preparation would use, and a pattern as the folder's name."""
    config = make_config(tmp_path / "x", small[0][0].files)
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial/mine").write_text("mine")
    with pytest.raises(ConfigError, match="x.partial: is in the way"):
        prepare(*config, progress=False)
    (tmp_path / "x.partial").rename(tmp_path / "y.parts-01234567")
    (tmp_path / "x.lock").write_text("mine")
    with pytest.raises(ConfigError, match="x.lock: is in the way"):
        prepare(*config, progress=False)
    assert (tmp_path / "x.lock").read_text() == "mine"
    prepare(*make_config(tmp_path / "*", small[0][0].files), progress=False)
    assert (tmp_path / "y.parts-01234567/mine").read_text() == "mine"


def test_files_are_not_prepared_on_first_use(tmp_path):
    config = make_config(tmp_path / "shards", ["a/*.jsonl"])
    with pytest.raises(ConfigError, match=r"not prepared: run `python -m data.prepare data=files .* data.files='\[a/"):
        ensure_prepared(*config)
    assert not list(tmp_path.iterdir())


def test_failed_preparation_leaves_nothing(tmp_path):
    file = write_jsonl(tmp_path / "one.jsonl", texts(1))
    with pytest.raises(ConfigError, match=r"data.val_fraction=0.05: 1 document\(s\) cannot be split"):
        prepare(*make_config(tmp_path / "shards", [file]), progress=False)
    write_jsonl(file, ["hello", "world"])
    with pytest.raises(ConfigError, match="tokenizer.vocab_size=320: the text to train on allows at most"):
        prepare(*make_config(tmp_path / "shards", [file]), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["one.jsonl"]


@pytest.mark.parametrize("count", [200, 1500])
def test_a_source_of_any_size_has_a_validation_document(tmp_path, count):
    file = write_jsonl(tmp_path / "some.jsonl", [f"{text} {number}" for number, text in enumerate(texts(1) * count)])
    manifest = prepare(*make_config(tmp_path / "shards", [file], val_fraction=1e-6, vocab_size=300), progress=False)
    assert (manifest.splits["val"].documents, manifest.splits["train"].documents) == (1, count - 1)


def test_a_full_or_unwritable_disk_is_one_message(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "some.jsonl", texts(50))
    config = make_config(tmp_path / "shards", [file])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data.shards.ShardWriter.write", full)
    with pytest.raises(ConfigError, match="data.dir=.*/shards: cannot write .No space left.*same command resumes"):
        prepare(*config, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["some.jsonl"]
    with pytest.raises(ConfigError, match=r"data.dir=.*some.jsonl/shards: cannot write"):
        prepare(*make_config(file / "shards", [file]), progress=False)
    with pytest.raises(ConfigError, match="/proc/shards.lock: cannot be made"):
        prepare(*make_config("/proc/shards", [file]), progress=False)


def test_a_folder_is_no_pattern(tmp_path):
    with pytest.raises(ConfigError, match=r"data.files: '.*' is a folder: give a pattern, such as .*/\*.txt"):
        prepare(*make_config(tmp_path / "shards", [tmp_path]), progress=False)


def test_skipped_documents_are_in_the_manifest(tmp_path):
    file = write_jsonl(tmp_path / "some.jsonl", [*texts(50), None, "", {"no": "text"}])
    manifest = prepare(*make_config(tmp_path / "shards", [file]), progress=False)
    assert manifest.skipped == {"empty": 1, "missing": 1, "not text": 1}
    assert manifest.splits["train"].documents + manifest.splits["val"].documents == 50


def test_gpt2(small, tmp_path):
    gpt2()
    config = make_config(tmp_path / "shards", small[0][0].files)[0], GPT2
    manifest = prepare(*config, progress=False)
    documents = decoded(config, tmp_path / "shards", "train") + decoded(config, tmp_path / "shards", "val")
    assert sorted(documents) == sorted(texts(200))
    assert manifest.tokenizer["vocab_size"] == 50257 and (tmp_path / "shards" / "tokenizer.tiktoken.json").exists()


def test_preparing_imports_no_torch():
    """The command and its worker processes start without it."""
    code = (
        "import sys; import data.prepare; from data.sources.base import source_class, source_names; "
        "print([source_class(name).__name__ for name in source_names()]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_two_at_once_prepare_once(tmp_path):
    file = write_jsonl(tmp_path / "documents.jsonl", texts(300))
    code = (
        "from tests.data.conftest import make_config; from data.prepare import prepare; "
        f"print(prepare(*make_config({str(tmp_path / 'shards')!r}, [{str(file)!r}])).fingerprint)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and sum("Tokenising" in errors for _, errors in outputs) == 1
    assert all("prepared" in errors for _, errors in outputs)
    assert verify(tmp_path / "shards") == []


def test_inspect(small, tmp_path):
    dir = small[1]
    console = Console(record=True, width=120, file=open(os.devnull, "w"))
    assert inspect(dir, console, out=tmp_path / "plot.png") == []
    shown = console.export_text()
    for part in ("unigram entropy", "bytes per token", "all shards match", "Document 0.", "plot.png",
                 "tokens of the median document"):  # fmt: skip
        assert part in shown, part
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    [problem] = inspect(tmp_path, console)
    assert "not prepared" in problem
    with pytest.raises(ConfigError, match="out=.*plot.png/plot.png: cannot write"):
        inspect(dir, console, out=tmp_path / "plot.png/plot.png")


def test_document_lengths(small):
    config, dir = small
    tokenizer, shards = load_tokenizer(config[1], dir), TokenShards(dir, "train")
    lengths = document_lengths(shards)
    assert lengths.tolist() == [len(tokenizer.encode(text)) + 1 for text in decoded(config, dir, "train")]


def test_commands(tmp_path):
    """Prepare, inspect, break a byte, inspect: the exit codes are 0, 0, 1; and 2 where nothing is prepared."""
    file = write_jsonl(tmp_path / "documents.jsonl", texts(100))
    dir = tmp_path / "shards"
    overrides = ["data=files", f"data.files=[{file}]", f"data.dir={dir}", "tokenizer.vocab_size=320"]

    def run(module):
        return subprocess.run([sys.executable, "-m", module, *overrides], cwd=ROOT, text=True, capture_output=True)

    missing = run("data.inspect")
    assert missing.returncode == 2
    expected = "python -m data.prepare data=files tokenizer=sentencepiece "
    expected += f"data.dir={dir} data.files='[{file}]' tokenizer.vocab_size=320"
    assert f"not prepared: run `{expected}`" in missing.stderr
    made = run("data.prepare")
    assert made.returncode == 0 and "Tokenising" in made.stderr, made.stderr
    assert run("data.inspect").returncode == 0 and (dir / "lengths.png").exists()
    shard = dir / "train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    broken = run("data.inspect")
    assert broken.returncode == 1 and not broken.stderr, broken.stderr
    assert "train_000000.bin: its sha256 is" in broken.stdout


def test_tokenizer_names_do_not_matter(small):
    config, dir = small
    renamed = make_config(dir, config[0].files, shard_tokens=4000, val_fraction=0.2)
    assert ensure_prepared(renamed[0], config[1].replace(name="another-name")) == read_manifest(dir)


@pytest.mark.parametrize("lines", [1, 2000])
def test_one_long_document_is_trained_on_and_its_end_is_validation(tmp_path, lines):
    """As nanoGPT's first data set is: one file, the last tenth of which is validation."""
    (tmp_path / "play.txt").write_text(text := ("\n" if lines > 1 else " ").join(f"word{n}" for n in range(2000)))
    with pytest.raises(ConfigError, match="or data.validation=ends"):
        prepare(*make_config(tmp_path / "shards", [tmp_path / "play.txt"], vocab_size=300), progress=False)
    data, tokenizer = make_config(
        tmp_path / "shards", [tmp_path / "play.txt"], vocab_size=300, val_fraction=0.1, validation="ends"
    )
    manifest = prepare(data, tokenizer, progress=False)
    stored = load_tokenizer(tokenizer, tmp_path / "shards")
    parts = [stored.decode(TokenShards(tmp_path / "shards", split).arrays[0][:-1]) for split in ("train", "val")]
    assert "".join(parts) == text and len(parts[1]) == pytest.approx(len(text) / 10, abs=10)
    assert lines == 1 or parts[0].endswith("\n")
    assert [manifest.splits[split].documents for split in ("train", "val")] == [1, 1]
    assert sum(split.bytes for split in manifest.splits.values()) == len(text.encode())
    with pytest.raises(ConfigError, match="was prepared with data.validation=ends, not documents"):
        ensure_prepared(data.replace(validation="documents"), tokenizer)


def test_inspecting_takes_the_only_documents_that_are_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", texts(100, seed=ord(name)))
    chosen = ["data=files", "tokenizer.vocab_size=300"]
    with pytest.raises(ConfigError, match="not prepared"):
        find_folder(*blocks(*chosen))
    folders = []
    for name in ("a", "b"):
        config = blocks(*chosen, f"data.files=[{name}.jsonl]")
        prepare(*config, progress=False)
        folders.append(Path(config[0].dir))
        assert find_folder(*config) == folders[-1]
        if name == "a":
            assert find_folder(*blocks(*chosen)) == folders[0]
    with pytest.raises(ConfigError, match="several are prepared; choose one with data.dir=data/shards/files-"):
        find_folder(*blocks(*chosen))
