"""What W&B gets of real runs, read back from its files, and from a server that `wandb sync` sends them to."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import train
from configs.app import compose
from configs.load import load, load_flat
from configs.schema import flatten, to_dict
from configs.schema_eval import EvalConfig
from eval import run as eval_run
from tests.conftest import ROOT, SMALL_RUN
from tests.training.wandb_server import wandb_server
from training.metrics import Metrics, read_metrics
from training.run_folder import create_run_folder
from training.wandb_files import logged_history, read_records, run_id
from training.wandb_run import WandbRun, log_preparation, wandb_mode

OFFLINE = ["wandb.mode=offline", "wandb.group=experiment", "wandb.tags=[night]"]


def records(run_dir, kind: str, id: str | None = None) -> list[dict]:
    """The records of a kind in a run folder's W&B files, read by W&B itself."""
    paths = sorted(run_dir.glob(f"wandb/offline-run-*-{id or run_id(run_dir)}/run-*.wandb"))
    return [record[kind] for path in paths for record in read_all(path) if record["type"] == kind]


@functools.cache
def read_all(path) -> list[dict]:
    return read_records(path)


def history_of(items) -> dict[tuple[int, str], list[float | None]]:
    """What was logged for each (step, metric), in order."""
    found = {}
    for item in items:
        for key, value in item.items():
            if key not in ("step", "tokens") and "/" in key and not key.startswith(("plots/", "samples")):
                found.setdefault((item["step"], key), []).append(value)
    return found


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    """A real run with an evaluation after its end, W&B offline."""
    folder = tmp_path_factory.mktemp("wandb") / "run"
    overrides = [*SMALL_RUN, *small_data, *OFFLINE, f"run.dir={folder}", "run.name=one"]
    config = load(compose("train", overrides))
    assert train.main(config) == 0
    assert eval_run.main(load_flat(compose("eval", [f"run={folder}", "limit=8"]), EvalConfig)) == 0
    return config, folder


def test_wandbs_files_hold_what_metrics_jsonl_holds(finished):
    _, folder = finished
    lines = read_metrics(folder / "metrics.jsonl")
    logged = list(logged_history(folder))
    assert any(key.startswith("eval/perplexity/") for line in lines for key in line)
    assert history_of(logged) == history_of(lines)  # evaluations included, at the step they belong to
    assert all(len(values) == 1 for values in history_of(logged).values())
    tokens = {line["step"]: line["tokens"] for line in lines}
    assert all(item["tokens"] == tokens[item["step"]] for item in logged if "train/loss" in item)


def test_a_run_says_what_it_is(finished):
    config, folder = finished
    first = records(folder, "run")[0]
    assert first["run_group"] == "experiment" and first["job_type"] == "train" and first["display_name"] == "one"
    assert set(first["tags"]) == {"t6", "tiny", "night"} and first["run_id"] == run_id(folder)
    flat = {key.replace(".", "/"): value for key, value in flatten(to_dict(config)).items()}
    sent = {key: value for key, value in first["config"]["update"].items() if key != "_wandb"}
    assert sent == json.loads(json.dumps(flat)) and sent["model/q_rank"] == config.model.q_rank
    summary = {}
    for record in records(folder, "summary"):
        summary |= record.get("update", {})
    counts = json.loads((folder / "summary.json").read_text())
    for key in ("params", "training_flops_per_token", "kv_bytes_per_token", "unigram_entropy"):
        assert summary[key] == counts[key]
    assert len(summary["data_fingerprint"]) == 64


def test_axes_and_summaries_are_defined(finished):
    metrics = {m.get("name") or m["glob_name"]: m for m in records(finished[1], "metric")}
    assert metrics["*"]["step_metric"] == "tokens" and {"tokens", "step"} <= metrics.keys()
    assert metrics["val/loss"]["summary"] == {"min": True, "last": True}
    assert metrics["perf/tokens_per_second"]["summary"] == {"mean": True, "max": True, "last": True}


def test_code_configuration_samples_and_plots_are_kept(finished):
    folder = finished[1]
    saved = {file["path"] for record in records(folder, "files") for file in record["files"]}
    assert {"code/train.py", "code/model/attention/tensor_product.py", "code/run_config.yaml"} <= saved
    assert any(path.startswith("media/table/samples") for path in saved)
    assert any(path.startswith("media/images/plots/loss") for path in saved)
    kept = next(folder.glob("wandb/offline-run-*/files/code/run_config.yaml"))
    assert kept.read_text() == (folder / "config.yaml").read_text()


def test_an_evaluation_is_a_job_of_its_own_too(finished):
    _, folder = finished
    first = records(folder, "run", run_id(folder, "eval", "one perplexity"))[0]
    assert first["job_type"] == "eval" and first["run_group"] == "experiment"


def test_a_preparation_is_a_job_too(finished, tmp_path):
    from data.prepare import prepared

    config = finished[0]
    manifest = prepared(config)
    config.data.dir = str(tmp_path)
    log_preparation(config, manifest)
    first = records(tmp_path, "run", run_id(tmp_path, "prepare", f"prepare {config.data.name}"))[0]
    assert first["tags"] == ["files", "night"] and first["job_type"] == "prepare"
    assert first["config"]["update"]["data/source"] == "files"


def kill_at(step: int, folder, overrides: list[str]) -> int:
    """Train until this step is logged, and kill the process; the last step that it logged."""
    alone = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # with a W&B process of its own
    command = [sys.executable, "train.py", *overrides]
    process = subprocess.Popen(command, cwd=ROOT, env=alone, stdout=subprocess.DEVNULL)
    deadline, path = time.monotonic() + 240, folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if any(line["step"] == step for line in read_metrics(path)):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return read_metrics(path)[-1]["step"]


@pytest.fixture(scope="module")
def requeued(small_data, tmp_path_factory):
    """A run that was killed twice, at once and past a checkpoint, and goes on from there to its end."""
    folder = tmp_path_factory.mktemp("requeued") / "run"
    overrides = [*SMALL_RUN, *small_data, *OFFLINE, f"run.dir={folder}", "trainer.max_steps=40"]
    overrides += ["trainer.checkpoint_every=10", "trainer.eval_every=10", "trainer.samples=0"]  # a table is an artifact
    assert 1 <= kill_at(1, folder, overrides) < 40, "it should have been killed before its end"
    died_at = kill_at(24, folder, overrides)
    assert 24 <= died_at < 40, "it should have been killed between a checkpoint and its end"
    time.sleep(2)  # W&B's own process ends by itself
    assert train.main(load(compose("train", overrides))) == 0
    return folder, died_at


def test_a_requeued_run_has_one_id_no_gap_and_no_doubled_step(requeued):
    folder, _ = requeued
    runs = records(folder, "run")
    assert {run["run_id"] for run in runs} == {run_id(folder)} and all(run["resume"] for run in runs)
    logged, lines = history_of(logged_history(folder)), history_of(read_metrics(folder / "metrics.jsonl"))
    assert logged.keys() == lines.keys() and {step for step, _ in logged} == set(range(1, 41))
    assert all(len(values) == 1 for values in logged.values())
    losses = [key for key in lines if key[1] == "train/loss"]  # speeds are what they were at each attempt
    assert all(logged[key] == lines[key] for key in losses)


def test_wandb_sync_puts_a_requeued_run_together(requeued):
    folder, _ = requeued
    with wandb_server() as server:
        environment = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
        paths = [str(path) for path in sorted(folder.glob("wandb/offline-run-*"))]
        command = [sys.executable, "-m", "wandb", "sync", *paths]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    history = server[run_id(folder)]["history"]
    steps = [line["step"] for line in history if "train/loss" in line]
    assert sorted(steps) == list(range(1, 41))
    assert [line["_step"] for line in history] == list(range(len(history)))
    assert server[run_id(folder)]["facts"]["groupName"] == "experiment"


def test_the_training_process_passes_on_what_an_evaluation_adds(small_run):
    config = load(compose("train", [*small_run, *OFFLINE]))
    record = Metrics(config, create_run_folder(config), 0)
    record.log(1, 10, {"train/loss": 2.0})
    with open(record.path, "a") as file:
        file.write('{"step": 1, "tokens": 10, "eval/task/acc": 0.5}\n')
    record.log(2, 20, {"train/loss": 1.0})
    record.close()
    again = WandbRun(config, to_dict(config))
    again.finish()
    found = history_of(logged_history(record.run_dir))
    assert found == {(1, "train/loss"): [2.0], (1, "eval/task/acc"): [0.5], (2, "train/loss"): [1.0]}


def test_wandb_that_cannot_start_or_fails_later_does_not_stop_a_run(small_run, monkeypatch, capsys):
    import wandb

    def refuse(*args, **kwargs):
        raise OSError("no network")

    config = load(compose("train", [*small_run, "wandb.mode=offline"]))
    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", refuse)
        record = Metrics(config, create_run_folder(config), 0)
        record.log(1, 10, {"train/loss": 1.0})
        record.close()
    assert "W&B could not start (no network)" in capsys.readouterr().out

    record = Metrics(config, {"a": 1}, 1)
    assert record.wandb.run is not None
    monkeypatch.setattr(record.wandb.run, "log", refuse)
    record.log(2, 20, {"train/loss": 0.5})
    record.log(3, 30, {"train/loss": 0.4})
    record.close()
    assert "W&B failed and is off from here on" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(record.path)] == [1, 2, 3]


def test_auto_is_online_only_where_somebody_is_logged_in(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode("auto") == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode("auto") == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode("auto") == "online" and wandb_mode("disabled") == "disabled"
