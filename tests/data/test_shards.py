import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from configs.errors import ConfigError
from data.shards import ShardWriter, TokenShards, read_manifest, verify


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the small data folder, to break."""
    return shutil.copytree(small[1], tmp_path / "copy")


def test_round_trip_is_exact(tmp_path):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 50256, size) for size in (1, 999, 0, 2500, 1000, 3)]
    documents = [np.append(document[:-1], 50256) for document in documents]
    writer = ShardWriter(tmp_path, "train", 1000, 50257, 50256, "uint16")
    for document in documents:
        writer.write(document)
    writer.finish_shard()
    shards = writer.shards
    assert [shard.tokens for shard in shards] == [1000, 1000, 1000, 1000, 504]
    assert sum(shard.documents for shard in shards) == len(documents)
    parts = [np.fromfile(tmp_path / shard.file, dtype=np.uint16, offset=1024) for shard in shards]
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(documents))
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == [f"train_{i:06d}.bin" for i in range(5)]
    assert not list(tmp_path.glob(".*"))
    lengths, starts = np.cumsum([0, *map(len, documents)])[:-1], []
    for number in range(5):
        starts += (1000 * number + np.load(tmp_path / f"train_{number:06d}.index.npy")).tolist()
    assert starts == lengths.tolist()


def test_llm_c_header(tmp_path):
    writer = ShardWriter(tmp_path, "val", 10, 70, 0, "uint16")
    writer.write(np.array([1, 2, 69]))
    writer.finish_shard()
    raw = (tmp_path / "val_000000.bin").read_bytes()
    assert raw[:12] == b"\x88\xd8\x34\x01" + b"\x01\x00\x00\x00" + b"\x03\x00\x00\x00"
    assert int.from_bytes(raw[:4], "little") == 20240520
    assert raw[12:1024] == bytes(1012) and raw[1024:] == b"\x01\x00\x02\x00\x45\x00"


def test_tokens_must_be_in_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        ShardWriter(tmp_path, "train", 10, 10, 0, "uint16").write(np.array([10]))


def test_manifest_and_shards_agree(small):
    _, dir = small
    manifest = read_manifest(dir)
    train = TokenShards(dir, "train")
    assert manifest.splits["train"].tokens == sum(map(len, train.arrays)) > 4000
    assert len(train.arrays) > 1 and verify(dir) == []
    counts = np.bincount(np.concatenate(train.arrays))
    share = counts[counts > 0] / counts.sum()
    assert manifest.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())


def test_missing_manifest(tmp_path):
    for dir in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="data.dir=.*: not prepared: run `python -m data.prepare data=NAME`"):
            TokenShards(dir, "train")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not a manifest of this version (Invalid JSON"),
        ("[]", "is not a manifest of this version"),
        ('{"version": 99}', "version Input should be 2"),
        ('{"version": 2}', "fingerprint Field required"),
    ],
)
def test_bad_manifest(copy, content, message):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_manifest(copy)
    assert message in verify(copy)[0]


def test_torn_shard(copy):
    path = copy / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:5000])
    message = r"train_000001.bin: has 5000 bytes, must have 9024 \(4000 tokens\); .*`python -m data.prepare data=files`"
    with pytest.raises(ConfigError, match=message):
        TokenShards(copy, "train")
    TokenShards(copy, "val")  # the other split is whole
    path.unlink()
    with pytest.raises(ConfigError, match="train_000001.bin: cannot be read"):
        TokenShards(copy, "train")


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, 1, "its header is [1, 1, 4000], must be [20240520, 1, 4000]"),
        (1, 2, "its header is [20240520, 2, 4000], must be [20240520, 1, 4000]"),
        (2, 7, "its header is [20240520, 1, 7], must be [20240520, 1, 4000]"),
    ],
)
def test_foreign_header(copy, position, value, message):
    with open(copy / "train_000000.bin", "r+b") as file:
        file.seek(4 * position)
        file.write(np.int32(value).tobytes())
    with pytest.raises(ConfigError, match=re.escape(f"train_000000.bin: {message}")):
        TokenShards(copy, "train")


def test_verify_finds_a_flipped_bit_and_wrong_counts(copy):
    path = copy / "val_000000.bin"
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)
    TokenShards(copy, "val")  # a quick look cannot see it
    assert len(verify(copy)) == 1 and "val_000000.bin: its sha256 is" in verify(copy)[0]

    fields = dataclasses.asdict(read_manifest(copy))
    fields["splits"]["train"]["tokens"] += 1
    fields |= {"fingerprint": "0" * 64, "checksum": ""}  # which older manifests do not have
    (copy / "manifest.json").write_text(json.dumps(fields))
    problems = "\n".join(verify(copy))
    assert "tokens, its shards have" in problems and "fingerprint" in problems


@pytest.mark.parametrize("key", ["unigram_entropy", "bytes_per_token", "name", "skipped"])
def test_a_manifest_that_was_edited_is_refused(copy, key):
    fields = json.loads((copy / "manifest.json").read_text())
    block = fields["splits"]["val"] if key == "bytes_per_token" else fields
    block[key] = {"a": 1} if key == "skipped" else "x" if key == "name" else block[key] + 1e-9
    (copy / "manifest.json").write_text(json.dumps(fields))
    assert ["was changed since it was written" in line for line in verify(copy)] == [True]


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "..", ".", "a/b.bin", ""])
def test_a_shard_outside_its_folder_is_refused(copy, name):
    fields = json.loads((copy / "manifest.json").read_text()) | {"checksum": ""}
    fields["splits"]["train"]["shards"][0]["file"] = name
    (copy / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="splits.train.shards.0.file String should match pattern"):
        read_manifest(copy)


def test_large_vocabularies_are_uint32_with_llama_3s_header(tmp_path):
    tokens = np.array([70_000, 2, 100_255, 100_256], dtype=np.uint32)
    writer = ShardWriter(tmp_path, "train", 10, 100_257, 100_256, "uint32")
    writer.write(tokens)
    writer.finish_shard()
    raw = (tmp_path / "train_000000.bin").read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240801, 7, 4] and len(raw) == 1024 + 16
    np.testing.assert_array_equal(np.frombuffer(raw[1024:], "<u4"), tokens)


@pytest.mark.parametrize("older", [False, True])
def test_a_writer_resumes_from_its_state(tmp_path, older):
    def writer(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return ShardWriter(tmp_path / name, "train", 100, 50, 0, "uint16")

    tokens = np.random.default_rng(0).integers(0, 50, 1000)
    whole, torn = writer("whole"), writer("torn")
    whole.write(tokens)
    torn.write(tokens[:333])
    state = torn.state()
    torn.write(tokens[333:700])  # after the state was taken: to be forgotten
    torn.state()  # all of it reaches the disk
    if older:  # which gave a shard its name when it was finished
        for path in (tmp_path / "torn").glob("*.bin"):
            path.rename(f"{path}.open")
    again = writer("torn")
    again.restore(state)
    assert (tmp_path / "torn" / "train_000003.bin").stat().st_size == 1024 + 2 * 33
    again.write(tokens[333:])
    again.finish_shard()
    whole.finish_shard()
    assert again.shards == whole.shards
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "torn" / path.name).read_bytes()


def test_verify_finds_a_wrong_index(copy):
    np.save(copy / "train_000001.index.npy", np.array([3], dtype=np.uint32))
    (copy / "val_000000.index.npy").unlink()
    first, second = verify(copy)
    assert "train_000001.index.npy: is not the index" in first and "val_000000.index.npy: cannot be read" in second
