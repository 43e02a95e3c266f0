"""What W&B has of a run: with the real client and a small server, after deaths at every moment, each step just once."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import wandb

import train
from configs.app import configured
from configs.block import to_dict
from configs.load import flatten
from data.tokenizers import load_tokenizer
from eval import run as eval_run
from eval.config import EvalConfig
from tests.conftest import ROOT, SMALL_RUN
from tests.training.wandb_server import wandb_server
from training import wandb_run
from training.config import Config, WandbConfig
from training.jsonl import append_line, read_lines
from training.metrics import Metrics
from training.run_folder import create_run_folder
from training.wandb_run import WandbRun, run_id, wandb_mode

OFFLINE = ["wandb.mode=offline", "wandb.group=experiment", "wandb.tags=[night]"]
TREE = {"run": {"name": "one"}, "model": {"name": "t6"}, "size": {"name": "tiny"}}

# A run's record without the training: logs steps FIRST to LAST, with a value that tells the attempts apart, for each
# line "FIRST LAST" it reads.
WRITER = f"""
import sys
from pathlib import Path
from training.config import WandbConfig
from training.jsonl import append_line
from training.metrics import drop_lines_after
from training.wandb_run import WandbRun
folder, attempt, resumed_from = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
drop_lines_after(folder / "metrics.jsonl", resumed_from)
view = WandbRun(folder, WandbConfig(), {TREE})
for command in sys.stdin:
    first, last = map(int, command.split())
    for step in range(first, last + 1):
        append_line(folder / "metrics.jsonl", {{"step": step, "tokens": 10 * step, "train/loss": step + attempt / 10}})
        view.catch_up()
    print("logged", flush=True)
view.finish()
"""


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process that has a W&B service of its own."""
    return {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"} | variables


def kill(process: subprocess.Popen, with_service: bool) -> None:
    service = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for child in service if with_service else []:
        child.kill()
    process.wait()


class Writer:
    """A process that runs WRITER."""

    def __init__(self, folder, attempt: int, resumed_from: int = 0, **variables: str):
        command = [sys.executable, "-c", WRITER, str(folder), str(attempt), str(resumed_from)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment(**variables), **pipes)

    def log(self, first: int, last: int) -> None:
        """Log these steps, and return when W&B's client has them."""
        self.process.stdin.write(f"{first} {last}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            assert "failed" not in line
            if line == "logged\n":
                return

    def finish(self) -> None:
        said, _ = self.process.communicate(timeout=100)
        assert self.process.returncode == 0 and "failed" not in said


def sync(server, folder) -> None:
    """Send the offline files of a run folder to a server, also those that were sent before."""
    paths = [str(path) for path in sorted(folder.glob("wandb/offline-run-*"))]
    command = [sys.executable, "-m", "wandb", "sync", "--include-synced", *paths]
    done = subprocess.run(command, env=environment(**server.environment), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def values(rows: list[dict]) -> dict[tuple[int, str], list[float | None]]:
    """Return what was logged for each (step, metric), in order."""
    found = {}
    for row in rows:
        for key, value in row.items():
            if "/" in key and not key.startswith("plots/"):
                found.setdefault((row["step"], key), []).append(value)
    return found


def losses(server, folder) -> dict[int, list[float]]:
    """Return what a server has of the training loss, by step; no row's number is missing."""
    history = server[run_id(folder)]["history"]
    assert [row["_step"] for row in history] == list(range(len(history)))
    return {step: found for (step, key), found in values(history).items() if key == "train/loss"}


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    """A real run with an evaluation after its end, W&B offline, and what `wandb sync` sends of it."""
    folder = tmp_path_factory.mktemp("wandb") / "run"
    config = configured(Config, [*SMALL_RUN, *small_data, *OFFLINE, f"run.dir={folder}", "run.name=one"])
    assert train.main(config) == 0
    assert eval_run.main(configured(EvalConfig, [f"run={folder}", "limit=8"])) == 0
    with wandb_server() as server:
        sync(server, folder)
    return config, folder, server


def test_wandb_has_what_metrics_jsonl_has(finished):
    _, folder, server = finished
    lines, history = read_lines(folder / "metrics.jsonl"), server[run_id(folder)]["history"]
    assert any(key.startswith("eval/perplexity/") for line in lines for key in line)
    assert values(history) == values(lines)  # evaluations included, at the step they belong to
    assert all(len(found) == 1 for found in values(history).values())
    tokens = {line["step"]: line["tokens"] for line in lines}
    assert all(row["tokens"] == tokens[row["step"]] for row in history if "train/loss" in row)


def test_a_run_says_what_it_is(finished):
    config, folder, server = finished
    run = server[run_id(folder)]
    facts = run["facts"]
    assert (facts["groupName"], facts["jobType"], facts["displayName"]) == ("experiment", "train", "one")
    assert set(facts["tags"]) == {"t6", "tiny", "night"}
    flat = {key.replace(".", "/"): value for key, value in flatten(to_dict(config)).items()}
    sent = {key: item["value"] for key, item in run["config"].items() if key != "_wandb"}
    assert sent == json.loads(json.dumps(flat)) and sent["model/q_rank"] == config.model.q_rank
    counts = json.loads((folder / "summary.json").read_text())
    for key in ("params", "training_flops_per_token", "kv_bytes_per_token", "unigram_entropy"):
        assert run["summary"][key] == counts[key]
    assert len(run["summary"]["data_fingerprint"]) == 64 and run["summary"]["data/train/tokens"] > 0


def test_axes_and_summaries_are_defined(finished):
    _, folder, server = finished
    run, lines = server[run_id(folder)], read_lines(folder / "metrics.jsonl")
    names = [metric.get("1", "*") for metric in run["config"]["_wandb"]["value"]["m"]]
    axes = {
        metric.get("1", "*"): names[metric["5"] - 1]
        for metric in run["config"]["_wandb"]["value"]["m"]
        if "5" in metric
    }
    assert axes["*"] == axes["train/loss"] == "tokens" and "step" not in axes
    found = [line["train/loss"] for line in lines if "train/loss" in line]
    assert run["summary"]["train/loss"] == {"min": min(found), "last": found[-1]}
    assert run["summary"]["step"] == {"max": lines[-1]["step"]}
    assert run["summary"]["perf/tokens_per_second"].keys() == {"mean", "max", "last"}


def test_of_the_code_the_script_and_the_difference_of_tracked_files_leave(finished):
    _, folder, _ = finished
    for files in folder.glob("wandb/wandb/offline-run-*/files"):
        names = {path.relative_to(files) for path in files.rglob("*") if path.is_file()}
        code = {name for name in names if name.parts[0] == "code"}
        assert len(code) <= 1 and {name.suffix for name in code} <= {".py"}
        known = {
            "requirements.txt",
            "diff.patch",
            "config.yaml",
            "wandb-metadata.json",
            "wandb-summary.json",
            "output.log",
        }
        assert {name.parts[0] for name in names} <= known | {"code", "media"}


def test_samples_and_plots_are_kept(finished):
    _, folder, server = finished
    shown = {key for row in server[run_id(folder)]["history"] for key, value in row.items() if isinstance(value, dict)}
    assert {"samples", "plots/loss"} <= shown


@pytest.mark.parametrize("death", ["trainer", "trainer and service, while the server is away"])
def test_online_nothing_is_lost_or_doubled(death, tmp_path):
    """A run is killed at step 30, goes back to its checkpoint of step 20, and ends at step 40."""
    with wandb_server() as server:
        first = Writer(tmp_path, 1, **server.environment)
        first.log(1, 10)
        deadline = time.monotonic() + 60
        while not server[run_id(tmp_path)]["history"] and time.monotonic() < deadline:
            time.sleep(0.1)
        server.is_away = death.endswith("away")
        first.log(11, 30)
        kill(first.process, with_service=death != "trainer")
        server.is_away = False
        second = Writer(tmp_path, 2, resumed_from=20, **server.environment)
        second.log(21, 40)
        second.finish()
        # Steps that were trained twice keep the values of the first attempt.
        assert losses(server, tmp_path) == {step: [step + (0.1 if step <= 30 else 0.2)] for step in range(1, 41)}


def test_offline_nothing_is_lost_or_doubled(tmp_path):
    """A run is killed with its W&B service, resumed, requeued and evaluated, and sent at every moment."""
    with wandb_server() as replacing, wandb_server() as keeping:
        keeping.replaces = False

        def check(expected: dict[int, list[float]]) -> None:
            for server in (replacing, keeping):
                sync(server, tmp_path)
                assert losses(server, tmp_path) == expected

        first = Writer(tmp_path, 1)
        first.log(1, 300)
        kill(first.process, with_service=True)
        ((torn),) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        second = Writer(tmp_path, 2, resumed_from=200)
        second.log(201, 320)
        kill(second.process, with_service=False)
        third = Writer(tmp_path, 3, resumed_from=310)
        third.log(311, 330)
        third.finish()
        assert not torn.exists()  # and with it what `wandb sync` might stop at
        expected = {step: [step + (0.1 if step <= 300 else 0.2 if step <= 320 else 0.3)] for step in range(1, 331)}
        check(expected)
        check(expected)
        fourth = Writer(tmp_path, 4, resumed_from=330)
        fourth.log(331, 340)
        fourth.finish()
        append_line(tmp_path / "metrics.jsonl", {"step": 300, "tokens": 3000, "eval/task/acc": 0.5})
        Writer(tmp_path, 5, resumed_from=340).finish()
        check(expected | {step: [step + 0.4] for step in range(331, 341)})
        for server in (replacing, keeping):
            assert values(server[run_id(tmp_path)]["history"])[300, "eval/task/acc"] == [0.5]


def test_offline_files_of_a_killed_run_can_be_sent_before_it_is_resumed(tmp_path):
    with wandb_server() as server:
        first = Writer(tmp_path, 1)
        first.log(1, 300)
        kill(first.process, with_service=True)
        paths = list(map(str, tmp_path.glob("wandb/offline-run-*")))
        command = [sys.executable, "-m", "wandb", "sync", *paths]  # ends with an error if the file is torn
        subprocess.run(command, env=environment(**server.environment), capture_output=True, timeout=120)
        second = Writer(tmp_path, 2, resumed_from=300)
        second.log(301, 310)
        second.finish()
        sync(server, tmp_path)
        assert losses(server, tmp_path) == {step: [step + (0.1 if step <= 300 else 0.2)] for step in range(1, 311)}


def test_a_run_goes_from_offline_to_online(tmp_path):
    with wandb_server() as server:
        first = Writer(tmp_path, 1)
        first.log(1, 10)
        first.finish()
        sync(server, tmp_path)
        (tmp_path / "wandb/rows.jsonl").write_text('{"step": 1, "tok')  # a disk that has lost it
        second = Writer(tmp_path, 2, resumed_from=10, **server.environment)
        second.log(11, 20)
        second.finish()
        assert losses(server, tmp_path) == {step: [step + (0.1 if step <= 10 else 0.2)] for step in range(1, 21)}
        assert not list(tmp_path.glob("wandb/offline-run-*"))  # they would replace newer rows


def test_wandb_that_cannot_start_online_is_recorded_offline(tmp_path, monkeypatch, capsys):
    begin = wandb.init
    tried = []

    def init(**options):
        tried.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("no route")
        return begin(**options)

    monkeypatch.setattr(wandb, "init", init)
    append_line(tmp_path / "metrics.jsonl", {"step": 1, "tokens": 10, "train/loss": 1.0})
    view = WandbRun(tmp_path, WandbConfig(mode="online"), TREE)
    view.finish()
    assert tried == ["online", "offline"] and list(tmp_path.glob("wandb/offline-run-*"))
    assert f"could not start online (no route); send it later: wandb sync {tmp_path}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def requeued(small_data, tmp_path_factory):
    """A run that was killed with its W&B service past a checkpoint, and resumed from there to its end."""
    folder = tmp_path_factory.mktemp("requeued") / "run"
    overrides = [*SMALL_RUN, *small_data, *OFFLINE, f"run.dir={folder}", "trainer.max_steps=40"]
    overrides += ["trainer.checkpoint_every=10", "trainer.eval_every=10"]
    process = subprocess.Popen([sys.executable, "train.py", *overrides], cwd=ROOT, env=environment())
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if any(line["step"] == 24 for line in read_lines(folder / "metrics.jsonl")):
            break
        time.sleep(0.005)
    kill(process, with_service=True)
    died_at = read_lines(folder / "metrics.jsonl")[-1]["step"]
    assert 24 <= died_at < 40, "it should have been killed between a checkpoint and its end"
    assert train.main(configured(Config, overrides)) == 0
    return folder, died_at


def test_a_requeued_run_is_one_run_without_a_gap(requeued):
    folder, _ = requeued
    with wandb_server() as server:
        sync(server, folder)
        assert server.keys() == {run_id(folder)}
        lines = values(read_lines(folder / "metrics.jsonl"))
        history = values(server[run_id(folder)]["history"])
        assert history.keys() == lines.keys() and all(len(found) == 1 for found in history.values())
        assert losses(server, folder) == {step: found for (step, key), found in lines.items() if key == "train/loss"}


def test_an_id_is_made_once_and_moves_with_its_folder(tmp_path, monkeypatch):
    first = run_id(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run_id(tmp_path / "moved") == first != run_id(tmp_path / "run")
    monkeypatch.setenv("WANDB_RUN_ID", "agents")  # of a sweep
    assert run_id(tmp_path / "third") == "agents" and run_id(tmp_path / "moved") == first
    monkeypatch.delenv("WANDB_RUN_ID")
    assert run_id(tmp_path / "third") == "agents"  # as an evaluation later finds it
    (tmp_path / "older/wandb").mkdir(parents=True)
    (tmp_path / "older/wandb/rows.jsonl").touch()  # from before ids were kept: they followed from the path
    assert run_id(tmp_path / "older") == hashlib.sha256(str((tmp_path / "older").resolve()).encode()).hexdigest()[:16]


def test_the_training_process_passes_on_what_an_evaluation_adds(small_run):
    config = configured(Config, [*small_run, *OFFLINE])
    create_run_folder(config, load_tokenizer(config.tokenizer, config.data.dir))
    record = Metrics(config, 0)
    record.log(1, 10, {"train/loss": 2.0})
    append_line(record.path, {"step": 1, "tokens": 10, "eval/task/acc": 0.5})
    record.log(2, 20, {"train/loss": 1.0})
    record.close()
    append_line(record.path, {"step": 1, "tokens": 10, "eval/task/acc": 0.5})  # found a second time
    append_line(record.path, {"step": 1, "tokens": 10, "eval/task/acc": 0.6})  # and with another result
    WandbRun(record.run_dir, config.wandb, to_dict(config)).finish()
    listed = values(read_lines(record.run_dir / "wandb/rows.jsonl"))
    assert listed == {(1, "train/loss"): [2.0], (1, "eval/task/acc"): [0.5, 0.6], (2, "train/loss"): [1.0]}


def test_wandb_that_cannot_start_or_fails_later_does_not_stop_a_run(small_run, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("no room")

    config = configured(Config, [*small_run, "wandb.mode=offline"])
    create_run_folder(config, load_tokenizer(config.tokenizer, config.data.dir))
    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", refuse)
        record = Metrics(config, 0)
        record.log(1, 10, {"train/loss": 1.0})
        record.close()
    assert "W&B failed and is off from here on (metrics.jsonl has everything): no room" in capsys.readouterr().out

    record = Metrics(config, 1)
    assert record.wandb.is_on
    monkeypatch.setattr(record.wandb.run, "log", refuse)
    record.log(2, 20, {"train/loss": 0.5})
    record.log(3, 30, {"train/loss": 0.4})
    record.close()
    assert capsys.readouterr().out.count("W&B failed") == 1
    assert [line["step"] for line in read_lines(record.path)] == [1, 2, 3]


def test_one_process_at_a_time_writes_to_the_wandb_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_run, "PATIENCE", 0.1)
    one = WandbRun(tmp_path, WandbConfig(mode="offline"), TREE)
    other = WandbRun(tmp_path, WandbConfig(mode="offline"), TREE)
    assert one.is_on and not other.is_on
    other.finish()
    one.finish()
    assert "W&B failed" in capsys.readouterr().out


def test_auto_is_online_only_if_somebody_is_logged_in(monkeypatch, tmp_path):
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
