"""A file is there whole or not at all."""

import hashlib
import os
import stat
import threading

import pytest

from data.files import sha256_of, write_atomic


@pytest.mark.parametrize(
    ("content", "expected"),
    [("caf\u00e9\n", b"caf\xc3\xa9\n"), (b"\x00\xff", b"\x00\xff"), ([b"some ", b"chunks"], b"some chunks"), ([], b"")],
)
def test_every_kind_of_content(tmp_path, content, expected):
    path = tmp_path / "file"
    write_atomic(path, content)
    assert path.read_bytes() == expected and sha256_of(path) == hashlib.sha256(expected).hexdigest()
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(str(path), "old")

    def chunks():
        yield b"new"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write_atomic(path, chunks())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_others_may_read_it(tmp_path):
    """On a cluster, shards are read by other users: the umask decides, as for any file."""
    umask = os.umask(0o022)
    try:
        write_atomic(tmp_path / "file", "x")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_many_writers_at_once(tmp_path):
    path, texts = tmp_path / "file", [f"{i}" * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomic, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and os.listdir(tmp_path) == ["file"]
