"""Evaluation and sampling of a real run's checkpoint."""

import json
import math
import pydoc_data.topics
import shutil

import pytest
import torch
import yaml

import train
from configs.app import configured
from configs.errors import ConfigError
from data.loader import EvalLoader
from data.shards import TokenShards
from data.tokenizers import train_sentencepiece
from eval import run as eval_run
from eval.config import EvalConfig
from eval.loading import load_run
from eval.perplexity import evaluate
from tests.conftest import SMALL_RUN
from training.config import Config
from training.jsonl import read_lines
from training.run_folder import read_config


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    overrides = [*SMALL_RUN, *small_data, "optim.lr=1e-2", "trainer.eval_batches=null", f"run.dir={folder}"]
    assert train.main(configured(Config, overrides)) == 0
    return folder


def test_a_checkpoint_evaluates_to_the_loss_that_training_logged(finished):
    assert eval_run.main(configured(EvalConfig, [f"run={finished}", "batch_size=3"])) == 0
    record = json.loads((finished / "results/perplexity.json").read_text())
    *_, last, evaluated = read_lines(finished / "metrics.jsonl")
    results = record["results"]
    assert evaluated["step"] == 8 and evaluated["eval/perplexity/loss"] == results["loss"]
    assert record["step"] == 8 and record["tokens"] == last["tokens"]
    assert results["loss"] == pytest.approx(last["val/loss"], abs=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(results["loss"]))
    assert results["bits_per_byte"] == pytest.approx(last["val/bits_per_byte"], abs=1e-5)


@torch.no_grad()
def test_the_loss_does_not_depend_on_batches_or_ranks(finished):
    run = load_run(str(finished), device="cpu")
    shards = TokenShards(run.config.data.dir, "val")
    whole = evaluate(run.model, EvalLoader(shards, 64, 7, max_samples=25), torch.device("cpu"))
    parts = [
        evaluate(run.model, EvalLoader(shards, 64, 4, r, 3, max_samples=25), torch.device("cpu")) for r in range(3)
    ]
    assert whole[1] == sum(tokens for _, tokens in parts) == 25 * 64
    assert whole[0] == pytest.approx(sum(loss * tokens for loss, tokens in parts) / whole[1], abs=1e-5)
    rows = torch.tensor(EvalLoader(shards, 64, 1).samples.read(EvalLoader(shards, 64, 1, max_samples=25).numbers))
    logp = run.model.logits(rows[:, :-1]).log_softmax(-1).gather(-1, rows[:, 1:, None])
    assert whole[0] == pytest.approx(-logp.mean().item(), abs=1e-5)


def test_an_evaluation_has_the_tokenizer_and_the_data_of_training(finished, tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    config = read_config(finished)
    shutil.copytree(finished, run)
    shutil.copytree(config.data.dir, data)
    other = train_sentencepiece(list(pydoc_data.topics.topics.values())[:20], config.tokenizer)
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["dir"] = str(data)
    (run / "config.yaml").write_text(yaml.safe_dump(tree))

    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "other", "checksum": ""}))
    loaded = load_run(str(run))
    with pytest.raises(ConfigError, match="was trained on other data than .*data holds now"):
        loaded.validation()
    other.save(data)  # makes no difference, since the run has a copy of its own
    assert load_run(str(run)).tokenizer.fingerprint == loaded.tokenizer.fingerprint
    other.save(run)
    with pytest.raises(ConfigError, match="was trained with another tokenizer than .*run holds now"):
        load_run(str(run))


def test_what_is_not_a_run_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        load_run(str(tmp_path))
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="has no whole checkpoint yet"):
        load_run(str(tmp_path))
    (tmp_path / "results").write_text("no folder")
    with pytest.raises(ConfigError, match="results: cannot be written"):
        eval_run.main(configured(EvalConfig, [f"run={tmp_path}"]))
