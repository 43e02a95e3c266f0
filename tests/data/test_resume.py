"""A preparation killed at any moment and started again ends with the bytes of an undisturbed one."""

import contextlib
import functools
import gzip
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data.build
from configs.errors import ConfigError
from data.build import JOURNAL_FILE, Preparation
from data.prepare import prepare
from data.shards import TokenShards, verify
from data.tokenizers import train_sentencepiece
from tests.data.conftest import make_config, texts, write_jsonl

ROOT = Path(__file__).parents[2]
KILLS = 12


def contents(dir):
    return {path.name: path.read_bytes() for path in sorted(dir.iterdir())}


def start(config):
    """A preparation in a process of its own, which leads a group of processes with its workers."""

    def run():
        os.setsid()
        prepare(*config, progress=False)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def finished(partial):
    """What its journal calls finished, or all shards of a folder without one, and when they were written.

    The folder may take its final name while we look.
    """
    names = [path.name for path in partial.glob("*.bin")]
    with contextlib.suppress(FileNotFoundError):
        writers = json.loads((partial / JOURNAL_FILE).read_bytes()).get("writers", {})
        names = [shard["file"] for writer in writers.values() for shard in writer["shards"]]
    times = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            times[name] = (partial / name).stat().st_mtime_ns
    return times


def nobody_left(group) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments(tmp_path, workers):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts(900, seed=i)) for i in range(4)]
    options = {"shard_tokens": 3000, "val_fraction": 0.1, "workers": workers}
    began = time.monotonic()
    prepare(*make_config(tmp_path / "undisturbed", files, **options), progress=False)
    seconds = time.monotonic() - began
    config = make_config(tmp_path / "shards", files, **options)
    partial, dir = tmp_path / "shards.partial", tmp_path / "shards"
    generator = random.Random(workers)
    kills, before = 0, {}
    while kills < KILLS // 2:  # six for each number of workers
        process = start(config)
        while process.is_alive() and len(finished(partial)) <= len(before):
            time.sleep(0.001)  # until it has finished another shard
        time.sleep(generator.uniform(0, seconds / KILLS))
        process.kill()
        process.join()
        assert nobody_left(process.pid) and process.exitcode in (0, -signal.SIGKILL)
        if dir.exists():  # it was quicker than we: it has to be right, and another one begins
            assert contents(dir) == contents(tmp_path / "undisturbed")
            shutil.rmtree(dir)
            before = {}
            continue
        kills += 1
        now = finished(partial)
        assert before.items() <= now.items()  # nothing finished was written again
        before = now
    prepare(*config, progress=False)
    assert contents(dir) == contents(tmp_path / "undisturbed")  # shards, indexes, tokenizer and manifest
    assert verify(dir) == [] and not partial.exists()


@pytest.mark.parametrize("moment", ["save", "manifest", "unlink", "rename"])
def test_killed_at_each_moment_of_the_end(tmp_path, moment):
    """The moments that a random kill hardly ever meets: between the last shard and the folder's own name."""
    file = write_jsonl(tmp_path / "a.jsonl", texts(300))
    undisturbed = make_config(tmp_path / "undisturbed", [file], shard_tokens=3000)
    prepare(*undisturbed, progress=False)
    config = make_config(tmp_path / "shards", [file], shard_tokens=3000)
    where = {
        "save": (Preparation, "save", 3), "manifest": (data.build, "write_manifest", 1), "unlink": (Path, "unlink", 1),
        "rename": (Path, "rename", 1),
    }[moment]  # fmt: skip

    def run():
        owner, name, times = where
        original, calls = getattr(owner, name), itertools.count(1)

        def killed(*args, **kwargs):
            if next(calls) >= times:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, killed)
        prepare(*config, progress=False)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    before = finished(tmp_path / "shards.partial") or finished(tmp_path / "shards")
    if before and moment != "unlink":
        (tmp_path / "shards.partial/.manifest.json.0123.partial").write_text("half")  # of a write that was killed
    assert process.exitcode == -signal.SIGKILL and before
    prepare(*config, progress=False)
    (tmp_path / "shards" / JOURNAL_FILE).unlink(missing_ok=True)  # it stays if only its removal is missing
    assert contents(tmp_path / "shards") == contents(tmp_path / "undisturbed")
    assert before.items() <= finished(tmp_path / "shards").items()


def test_an_interrupted_command_resumes(tmp_path):
    file = write_jsonl(tmp_path / "many.jsonl", texts(20_000))
    overrides = ["data=files", f"data.files=[{file}]", f"data.dir={tmp_path}/shards", "tokenizer.vocab_size=320"]
    command = [sys.executable, "-m", "data.prepare", *overrides, "data.shard_tokens=20000", "data.workers=2"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed
    )
    deadline = time.monotonic() + 60
    while not finished(tmp_path / "shards.partial") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert nobody_left(process.pid)
    assert process.returncode == 130 and "what is done is kept" in said and "Traceback" not in said, said
    with pytest.raises(ConfigError, match="not prepared"):
        TokenShards(tmp_path / "shards", "train")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming after" in done.stderr and "Training" not in done.stderr, done.stderr
    assert verify(tmp_path / "shards") == [] and not (tmp_path / "shards.partial").exists()


def test_other_settings_or_other_files_start_again(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", texts(400))
    partial = tmp_path / "shards.partial"

    def run():
        original, saves = Preparation.save, itertools.count(1)

        def killed(self):
            original(self)
            if next(saves) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        Preparation.save = killed
        prepare(*make_config(tmp_path / "shards", [file], shard_tokens=2000), progress=False)

    for change in ("file", "settings"):
        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join()
        assert finished(partial)
        if change == "file":
            write_jsonl(file, texts(300, seed=5))
        options = {"shard_tokens": 2000 if change == "file" else 2500}
        made = prepare(*make_config(tmp_path / "shards", [file], **options), progress=False)
        other = prepare(*make_config(tmp_path / f"new-{change}", [file], **options), progress=False)
        assert made.fingerprint == other.fingerprint
        shutil.rmtree(tmp_path / "shards")


def test_a_source_that_breaks_keeps_what_is_done(tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", texts(1500))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(good.read_bytes())[:-2000])
    data, tokenizer = make_config(tmp_path / "shards", [good, tmp_path / "b.jsonl.gz"], shard_tokens=2000)
    train_sentencepiece(texts(100), tokenizer).save(tmp_path)
    config = data, tokenizer.replace(path=str(tmp_path / "tokenizer.model"))
    with pytest.raises(ConfigError, match="b.jsonl.gz: cannot be read .*; copy it again"):
        prepare(*config, progress=False)
    assert len(finished(tmp_path / "shards.partial")) > 5
