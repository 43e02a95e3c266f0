"""`trainer.fork_from`: a run goes on from another's checkpoint, optimizer and data included."""

import shutil

import pytest

import train
from configs.app import configured
from configs.errors import ConfigError
from tests.conftest import SMALL_RUN
from training.checkpoint import problems, read_manifest
from training.config import Config
from training.jsonl import read_lines
from training.metrics import log_event
from training.recovery import Rollbacks
from training.stored import read_events


def run(overrides: list[str]) -> int:
    return train.main(configured(Config, overrides))


@pytest.fixture(scope="module")
def settings(small_data) -> list[str]:
    return [*SMALL_RUN, *small_data, "trainer.samples=0", "trainer.keep_checkpoints=9", "trainer.checkpoint_every=2"]


@pytest.fixture(scope="module")
def trunk(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trunk") / "run"
    assert run([*settings, f"run.dir={folder}"]) == 0
    return folder


def values(folder, *keys: str) -> dict[int, list[float]]:
    return {line["step"]: [line[key] for key in keys] for line in read_lines(folder / "metrics.jsonl")}


def test_a_fork_with_the_trunks_schedule_is_the_trunk(trunk, settings, tmp_path):
    log_event(trunk, "rollback", 6, to_step=5)  # later than the fork: not its own
    command = [*settings, f"run.dir={tmp_path}/fork", f"trainer.fork_from={trunk}/checkpoints/step_00000004"]
    assert run(command) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = f"checkpoints/step_00000008/{name}"
        assert (tmp_path / "fork" / last).read_bytes() == (trunk / last).read_bytes()
    keys = ("train/loss", "optim/grad_norm", "optim/lr", "tokens")
    theirs = values(trunk, *keys)
    assert values(tmp_path / "fork", *keys) == {step: theirs[step] for step in (5, 6, 7, 8)}
    assert run(command) == 0  # finished
    assert len(read_lines(tmp_path / "fork/metrics.jsonl")) == 4


def test_another_schedule_and_horizon(trunk, settings, tmp_path):
    other = ["schedule=wsd", "schedule.decay_fraction=0.5", "schedule.warmup_steps=1", "trainer.max_steps=12"]
    command = [*settings, *other, f"run.dir={tmp_path}/fork", f"trainer.fork_from={trunk}", "optim.lr=1e-3"]
    assert run(command) == 0
    rates = values(tmp_path / "fork", "optim/lr")
    assert list(rates) == [9, 10, 11, 12] and rates[9] > rates[10] > rates[12]
    manifest = read_manifest(tmp_path / "fork/checkpoints/step_00000008")
    assert manifest["identity"] == configured(Config, command).identity() and manifest["forked_from"].startswith(
        str(trunk)
    )
    assert not problems(tmp_path / "fork/checkpoints/step_00000008")
    assert [event["event"] for event in read_events(tmp_path / "fork")][-2:] == ["fork", "start"]


def test_what_the_trunk_skipped_stays_skipped(trunk, settings, tmp_path):
    copy = tmp_path / "trunk"
    shutil.copytree(trunk, copy)
    log_event(copy, "rollback", 5, to_step=2)
    log_event(copy, "rollback", 8, to_step=6)
    command = [*settings, f"run.dir={tmp_path}/fork", f"trainer.fork_from={copy}/checkpoints/step_00000004"]
    assert run([*command, "trainer.max_steps=5"]) == 0
    assert Rollbacks(tmp_path / "fork").skipped_batches(4) == 3
    assert Rollbacks(tmp_path / "fork").skipped_batches(6) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_steps=6"], "is at step 8, and this run ends at step 6"),
        (["trainer.max_steps=9", "run.seed=1"], r"(?s)differs in more than schedule.*run.seed: 0 there, 1 here"),
        (["trainer.max_steps=9", "model.k_rank=1"], "model.k_rank: 2 there, 1 here"),
        (["trainer.max_steps=9", "trainer.global_batch_size=16"], "global_batch_size: 8 there, 16 here"),
        (["trainer.max_steps=9", "optim=sgd"], "optim.name: 'adamw' there, 'sgd' here"),
        (["trainer.fork_from=nowhere"], "trainer.fork_from=nowhere: is neither a checkpoint nor a run folder"),
        (["trainer.init_from=TRUNK"], "trainer.fork_from: trainer.init_from is set too"),
    ],
)
def test_what_is_no_fork_is_refused(trunk, settings, tmp_path, overrides, message):
    overrides = [word.replace("TRUNK", str(trunk)) for word in overrides]
    with pytest.raises(ConfigError, match=message):
        run([*settings, f"run.dir={tmp_path}/fork", f"trainer.fork_from={trunk}", *overrides])
    assert list(tmp_path.iterdir()) == []
