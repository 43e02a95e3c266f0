"""A checkpoint is complete, or it is skipped and named."""

import json
import random
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from configs.app import configured
from configs.errors import ConfigError
from data.prepare import prepare
from model.transformer import Transformer
from tests.conftest import ROOT, SMALL_RUN
from training import checkpoint, saver
from training.config import Config
from training.jsonl import read_lines


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    """A run with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    assert train.main(configured(Config, [*SMALL_RUN, *small_data, f"run.dir={folder}"])) == 0
    return folder


def flip(path, place=-100):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped weights": (lambda f: flip(f / "model.safetensors"), "model.safetensors: does not have the checksum"),
    "flipped header": (lambda f: flip(f / "model.safetensors", 9), "model.safetensors: does not have the checksum"),
    "flipped moments": (
        lambda f: flip(f / "optimizer.safetensors"),
        "optimizer.safetensors: does not have the checksum",
    ),
    "truncated": (lambda f: (f / "optimizer.safetensors").write_bytes(b"x" * 10), "has 10 bytes instead of"),
    "deleted": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: is missing"),
    "unfinished": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json, so it was never finished"),
    "torn manifest": (lambda f: (f / "manifest.json").write_text('{"step": 8, "fi'), "manifest.json: cannot be read"),
    "altered manifest": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"step": 8', '"step": 9')),
        "manifest.json: does not have its own checksum",
    ),
    "other manifest": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_named_and_skipped(finished, tmp_path, damage):
    shutil.copytree(finished, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_00000008"
    said = []
    assert checkpoint.newest(tmp_path / "run", said.append) == newest and not said
    action, message = DAMAGE[damage]
    action(newest)
    assert checkpoint.newest(tmp_path / "run", said.append) == newest.with_name("step_00000004")
    assert len(said) == 1 and message in said[0] and "step_00000008" in said[0]


def test_any_damage_to_any_byte_is_noticed(finished, tmp_path):
    """Bytes sampled over every file, the first and the last among them: flipped, cut off there; and each file gone."""
    shutil.copytree(finished, tmp_path / "run")
    newest, chance = tmp_path / "run/checkpoints/step_00000008", random.Random(0)
    before = newest.with_name("step_00000004")

    def noticed(path) -> None:
        said = []
        assert checkpoint.newest(tmp_path / "run", said.append) == before
        assert len(said) == 1 and str(path.parent) in said[0] and "taking the checkpoint before it" in said[0]

    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(20))}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
            noticed(path)
            path.write_bytes(whole[:place])
            noticed(path)
        path.unlink()
        noticed(path)
        path.write_bytes(whole)
    assert checkpoint.newest(tmp_path / "run", print) == newest


LOSSES = {
    "every one is broken": lambda folder: [flip(one / "model.safetensors") for one in folder.glob("step_*")],
    "they are gone": shutil.rmtree,
    "the folder is a link to nothing": lambda folder: (shutil.rmtree(folder), folder.symlink_to("unmounted")),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_whose_checkpoints_cannot_be_read_does_not_begin_again(finished, small_data, tmp_path, loss, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    LOSSES[loss](run / "checkpoints")
    metrics = (run / "metrics.jsonl").read_bytes()
    command = [*SMALL_RUN, *small_data, f"run.dir={run}"]
    assert train.main(configured(Config, command)) == 1
    assert "has saved checkpoints, none of which can be read" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == metrics
    if loss == "every one is broken":
        assert len(list((run / "checkpoints").iterdir())) == 2
    if loss == "they are gone":
        (run / "latest").unlink()  # to begin again on purpose
        assert train.main(configured(Config, command)) == 0


def test_what_is_no_checkpoint_is_neither_read_nor_deleted(finished, small_data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    folder = run / "checkpoints"
    shutil.copytree(folder / "step_00000008", folder / "step_backup")
    shutil.rmtree(folder / "step_00000008")
    (folder / "step_note.txt").write_text("mine")
    (folder / "step_00000099").symlink_to("step_00000099")  # a loop
    assert checkpoint.newest(run, print) == folder / "step_00000004"
    assert train.main(configured(Config, [*SMALL_RUN, *small_data, f"run.dir={run}"])) == 0
    left = {path.name for path in folder.iterdir()}
    assert left == {"step_00000004", "step_00000008", "step_00000099", "step_backup", "step_note.txt"}


def test_a_checkpoint_of_another_run_is_refused_with_the_differing_keys(finished, small_data, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    (tmp_path / "other/summary.json").unlink()
    overrides = [*SMALL_RUN, *small_data, f"run.dir={tmp_path}/mine", "model.q_rank=3", "size.d_model=32"]
    assert train.main(configured(Config, overrides)) == 0
    shutil.rmtree(tmp_path / "mine/checkpoints")
    shutil.copytree(finished / "checkpoints", tmp_path / "mine/checkpoints")
    (tmp_path / "mine/summary.json").unlink()
    with pytest.raises(ConfigError, match="is a checkpoint of another run") as caught:
        train.main(configured(Config, overrides))
    assert "model.q_rank: 6 there, 3 here" in str(caught.value) and "size.d_model: 64 there, 32 here" in str(
        caught.value
    )


def test_weights_are_not_taken_over_from_another_tokenizer(finished, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"other words make other pieces\nthan those of number {number}\n" * 600)
    data = [f"data.files=['{folder}/*.txt']", f"data.dir={tmp_path}/shards", "data.val_fraction=0.2"]
    overrides = [*SMALL_RUN, *data, "tokenizer.vocab_size=300", f"run.dir={tmp_path}/run"]
    config = configured(Config, overrides)
    prepare(config.data, config.tokenizer, progress=False)
    overrides.append(f"trainer.init_from={finished}")
    with pytest.raises(ConfigError, match="another architecture or tokenizer") as caught:
        train.main(configured(Config, overrides))
    assert "tokenizer.fingerprint: " in str(caught.value) and "tokenizer.vocab_size: 512 there" in str(caught.value)


def test_only_the_newest_checkpoints_are_kept(small_data, tmp_path):
    overrides = [
        *SMALL_RUN,
        *small_data,
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=3",
        f"run.dir={tmp_path}/run",
    ]
    assert train.main(configured(Config, overrides)) == 0
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == [f"step_0000000{n}" for n in (6, 7, 8)]


def test_every_nth_and_the_best_are_kept_too():
    manifests = [
        {"step": s, "val_loss": loss} for s, loss in ((1, 3.0), (2, 1.5), (3, None), (4, 2.0), (5, 2.5), (6, None))
    ]
    assert checkpoint.keepers(2, None, False)(manifests) == {5, 6}
    assert checkpoint.keepers(1, 3, False)(manifests) == {3, 6}
    assert checkpoint.keepers(1, 4, True)(manifests) == {2, 4, 6}
    assert checkpoint.keepers(1, None, True)([{"step": 9, "val_loss": None}]) == {9}


def test_a_disk_that_is_full_does_not_end_a_run(small_data, tmp_path):
    """Files past 200 kB cannot be written, as on a full disk: training continues, reports it, and ends as an error."""
    overrides = [*SMALL_RUN, *small_data, f"run.dir={tmp_path}/run"]
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    limited = f"import resource, runpy; {limit}; runpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", limited, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("could not be saved, training continues") == 2 and "File too large" in done.stdout
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == list(range(1, 9))
    assert train.main(configured(Config, overrides)) == 0  # with room again the same command ends well


def test_a_log_that_cannot_be_written_does_not_end_a_run(small_run, tmp_path):
    """/dev/full takes no byte, as the disk of Slurm's log may not."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "train.py", *small_run]
        assert subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, timeout=300).returncode == 0
    assert (tmp_path / "run/summary.json").exists()


def test_a_disk_without_room_for_a_byte_costs_nothing_once_there_is_room(small_run, tmp_path, monkeypatch, capsys):
    """No file can grow between steps 3 and 6: lines of metrics.jsonl wait, a checkpoint and its event are not there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = train.seed_step

    def fill(seed, step, rank):
        if step in (3, 7):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0 if step == 3 else soft, hard))
        original(seed, step, rank)

    monkeypatch.setattr(train, "seed_step", fill)
    try:
        assert train.main(configured(Config, small_run)) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out = capsys.readouterr().out
    assert out.count("cannot be written, lines wait") == 1
    assert "The checkpoint of step 4 could not be saved" in out
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == list(range(1, 9))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000008"]


@pytest.mark.parametrize("damage", ["torn manifest", "truncated", "flipped weights"])
def test_a_broken_checkpoint_does_not_take_the_place_of_a_complete_one(finished, small_data, tmp_path, damage, capsys):
    """Step 8 is broken; the run resumes from step 4 and saves step 6: of the two that are kept none is step 8."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    checkpoints = tmp_path / "run/checkpoints"
    DAMAGE[damage][0](checkpoints / "step_00000008")
    overrides = [*SMALL_RUN, *small_data, f"run.dir={tmp_path}/run", "trainer.checkpoint_every=6"]
    there = []
    with pytest.MonkeyPatch.context() as patch:
        prune = saver.prune
        patch.setattr(saver, "prune", lambda *args: (prune(*args), there.append(sorted(checkpoints.iterdir()))))
        assert train.main(configured(Config, overrides)) == 0
    assert [[path.name[-1] for path in paths] for paths in there] == [["4", "6"], ["6", "8"]]
    assert "could not be saved" not in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "run", print) == checkpoints / "step_00000008"


def test_weights_are_not_taken_over_from_a_broken_checkpoint(finished, small_run, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    named = tmp_path / "other/checkpoints/step_00000008"
    flip(named / "model.safetensors")
    with pytest.raises(ConfigError, match=r"trainer.init_from: .*model.safetensors: does not have the checksum"):
        train.main(configured(Config, [*small_run, f"trainer.init_from={named}"]))


def test_the_manifest_says_what_the_checkpoint_is(finished):
    manifest = json.loads((finished / "checkpoints/step_00000008/manifest.json").read_text())
    assert (manifest["step"], manifest["tokens"], manifest["optimizer_scalars"]) == (8, 8 * 512, {"step": 8.0})
    assert manifest["identity"]["model.name"] == "t6" and manifest["versions"]["torch"].startswith("2.")
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors"}


def test_weights_that_do_not_fit_are_named(finished):
    config = configured(Config, [*SMALL_RUN, "model=mha"])
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_weights(Transformer(config.network()), finished / "checkpoints/step_00000008")
    missing, unexpected = str(caught.value).splitlines()[1:]
    assert "Missing key(s)" in missing and '"blocks.0.attention.qkv_proj.weight"' in missing
    assert "Unexpected key(s)" in unexpected and '"blocks.1.attention.factor_proj.weight"' in unexpected


def test_loaded_weights_are_those_saved_and_the_head_stays_tied(finished):
    config = configured(Config, SMALL_RUN)
    model = Transformer(config.network())
    checkpoint.load_weights(model, checkpoint.find(str(finished), print))
    weights = load_file(finished / "checkpoints/step_00000008/model.safetensors")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert model.head.weight is model.embedding.weight
    with pytest.raises(ConfigError, match=r"trainer.init_from=.*nowhere"):
        checkpoint.find("nowhere", print)


def test_a_copy_next_to_the_checkpoints_is_none_to_start_from(tmp_path):
    for name in ("step_backup", "step_1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="is neither a checkpoint, a run folder"):
        checkpoint.check_source(str(tmp_path))
    (tmp_path / "checkpoints/step_backup").rename(tmp_path / "checkpoints/step_00000001")
    checkpoint.check_source(str(tmp_path))
