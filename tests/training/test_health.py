"""Losses and gradients that go wrong: skipped steps, rollbacks past the data that did it, and giving up."""

import json
import math

import pytest
import torch

import train
from configs.app import configured
from training import health
from training.config import Config
from training.health import Health
from training.jsonl import read_lines


def run(overrides: list[str]) -> int:
    return train.main(configured(Config, [*overrides, "trainer.samples=0"]))


@pytest.fixture
def poison(monkeypatch):
    """Data of some global batches (counted from 0) on which the loss is as given; and the batches that were read."""
    bad, read = {}, []
    micro_batch, forward = train.TrainLoader.micro_batch, train.Transformer.forward

    def poisoned_batch(self, step, micro):
        rows = micro_batch(self, step, micro)
        read.extend([step] if micro == 0 else [])
        return -rows - 1 if step in bad else rows

    def poisoned_forward(self, tokens, targets=None, *args, **kwargs):
        if targets is None or not bool((tokens < 0).any()):
            return forward(self, tokens, targets, *args, **kwargs)
        out = forward(self, -tokens - 1, -targets - 1, *args, **kwargs)
        return bad["how"](out)

    monkeypatch.setattr(train.TrainLoader, "micro_batch", poisoned_batch)
    monkeypatch.setattr(train.Transformer, "forward", poisoned_forward)

    def set_poison(batches, how=lambda loss: loss * math.nan):
        bad.clear()
        bad.update(dict.fromkeys(batches), how=how)
        read.clear()
        return read

    return set_poison


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def infinite_loss_with_finite_gradients(loss):
    return loss + torch.inf


@pytest.mark.parametrize("how", [lambda loss: loss * math.nan, infinite_loss_with_finite_gradients])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_leaves_no_trace_in_the_weights(small_run, tmp_path, poison, stage, how):
    poison({2, 3}, how)
    assert run([*small_run, f"deepspeed=zero{stage}"]) == 0
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["optim/skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert lines[2]["train/loss"] is None and all(line["train/loss"] > 0 for line in lines[4:])
    manifest = json.loads((tmp_path / "run/checkpoints/step_00000008/manifest.json").read_text())
    assert manifest["optimizer_scalars"] == {"step": 6.0}


def test_after_too_many_it_goes_back_and_skips_the_data(small_run, tmp_path, poison, capsys):
    read = poison({4, 5, 6})
    assert run([*small_run, "trainer.max_bad_steps=2"]) == 0
    # From step 6 (batch 5) back to step 4, past batches 4 and 5; batch 6 alone is skipped.
    after = read[read.index(5) + 1 :]
    assert [batch for batch in after if batch >= 6][-4:] == [6, 7, 8, 9]
    assert [(e["event"], e["step"]) for e in events(tmp_path / "run")] == [("start", 0), ("rollback", 6)]
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["optim/skipped_steps"] for line in lines] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert "Going back from step 6 to step 4" in capsys.readouterr().out


def test_a_rollback_is_remembered_by_the_next_start(small_run, tmp_path, poison, monkeypatch):
    overrides = [*small_run, "trainer.max_bad_steps=2"]
    poison({4, 5})
    assert run(overrides) == 0
    whole = read_lines(tmp_path / "run/metrics.jsonl")
    other = [*overrides, f"run.dir={tmp_path}/other"]
    poison({4, 5})
    original = train.seed_step

    def crash(seed, step, rank):
        if step == 7:
            raise KeyboardInterrupt
        original(seed, step, rank)

    monkeypatch.setattr(train, "seed_step", crash)
    with pytest.raises(KeyboardInterrupt):
        run(other)
    monkeypatch.setattr(train, "seed_step", original)
    assert run(other) == 0
    keys = ("step", "train/loss", "optim/grad_norm")
    theirs = read_lines(tmp_path / "other/metrics.jsonl")
    assert [[line[k] for k in keys] for line in theirs] == [[line[k] for k in keys] for line in whole]
    assert [e["event"] for e in events(tmp_path / "other")] == ["start", "rollback", "start"]


def test_a_spike_goes_back_too(small_run, tmp_path, poison, monkeypatch):
    monkeypatch.setattr(health, "WINDOW", 3)
    read = poison({6}, lambda loss: loss * 3)
    assert run(small_run) == 0
    rollback = events(tmp_path / "run")[1]
    assert (rollback["event"], rollback["step"], rollback["to_step"]) == ("rollback", 7, 4)
    assert "more than trainer.max_loss_spike=3.0 over its mean" in rollback["reason"]
    assert read[-4:] == [7, 8, 9, 10]  # batches 4, 5 and 6 are skipped
    poison({6}, lambda loss: loss * 3)
    assert run([*small_run, f"run.dir={tmp_path}/any", "trainer.max_loss_spike=null"]) == 0
    assert [e["event"] for e in events(tmp_path / "any")] == ["start"]


def test_it_gives_up_where_going_back_does_not_help(small_run, tmp_path, poison, capsys):
    poison(range(100))
    assert run([*small_run, "trainer.max_bad_steps=3", "trainer.max_rollbacks=2", "deepspeed=zero1"]) == 1
    assert [e["event"] for e in events(tmp_path / "run")] == ["start", "rollback", "rollback", "gave_up"]
    out = capsys.readouterr().out
    assert "Giving up at step 3: the loss or the gradient was not finite for 3 steps in a row" in out
    assert not (tmp_path / "run/summary.json").exists()
    assert len(read_lines(tmp_path / "run/metrics.jsonl")) == 3


def test_the_window_of_losses_is_restored_from_a_checkpoint():
    config = configured(Config, []).trainer
    watched = Health(config)
    for _ in range(health.WINDOW):
        assert watched.observe(2.0, 1.0) is None
    resumed = Health(config, **json.loads(json.dumps(watched.state())))
    assert resumed.observe(4.9, 1.0) is None
    assert "the loss is 5.2" in resumed.observe(5.2, 1.0)
