"""Ranks that hang, die or are cut off, and signals at bad moments. Real processes, real signals."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.conftest import ROOT
from tests.distributed.helpers import curve, deviation, events, last_step, run, start, wait_for, worker
from training import checkpoint
from training.metrics import read_metrics

pytestmark = pytest.mark.distributed


@pytest.fixture
def pair(small_run) -> list[str]:
    """Overrides for a run on two processes that lasts until something happens to it."""
    return [*small_run, "trainer.micro_batch_size=2", "trainer.max_steps=100000", "trainer.eval_every=null",
            "trainer.rank_timeout=12", "deepspeed=zero2"]  # fmt: skip


def test_a_hung_rank_ends_the_job_and_is_named(pair, tmp_path):
    process = start(pair, 2)
    wait_for(lambda: last_step(tmp_path / "run") >= 5, process)
    other, hung = worker(process, 0), worker(process, 1)
    hung.suspend()
    other.wait(timeout=30)
    hung.resume()  # torchrun would give a stopped process half a minute to end
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"pid {hung.pid}) has not been heard of for" in output and "THE JOB ENDS: rank 1 (" in output
    assert checkpoint.newest(tmp_path / "run", print)
    # The preflight of several ranks
    assert "2 ranks agree" in output and "x the median time of a matrix product" in output and "clocks  " in output


def test_a_rank_that_stops_moving_is_named(pair, tmp_path):
    """It lives, and its threads answer, but it never comes to the collective that the other waits in."""
    script = patched(tmp_path, """
        read = train.TrainLoader.micro_batch
        def stuck(self, step, micro):
            if self.rank == 1 and step == 5:
                time.sleep(3600)
            return read(self, step, micro)
        train.TrainLoader.micro_batch = stuck
    """)  # fmt: skip
    process = start(pair, 2, script=script)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "no rank has moved for 12 s; furthest behind: rank 1 (" in output and "reading a batch" in output


def test_a_rank_that_fails_is_named_by_the_others(pair, tmp_path):
    script = patched(tmp_path, """
        read = train.TrainLoader.micro_batch
        def broken(self, step, micro):
            if self.rank == 1 and step == 5:
                raise OSError(5, "Input/output error", "shard 7")
            return read(self, step, micro)
        train.TrainLoader.micro_batch = broken
    """)  # fmt: skip
    process = start(pair, 2, script=script)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "THE JOB ENDS: rank 1 (" in output and "failed: OSError: [Errno 5] Input/output error: 'shard 7'" in output


def test_a_loss_that_is_infinite_on_one_rank_is_skipped_on_all(small_run, tmp_path):
    script = patched(tmp_path, """
        forward, calls = train.Transformer.forward, []
        def spoiled(self, tokens, targets=None, *args, **kwargs):
            loss = forward(self, tokens, targets, *args, **kwargs)
            calls.append(self.training)
            return loss + float("inf") if sum(calls) == 3 and os.environ["RANK"] == "1" else loss
        train.Transformer.forward = spoiled
    """)  # fmt: skip
    run([*small_run, "deepspeed=zero2", "trainer.samples=0", "trainer.eval_every=null"], 2, script=script)
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["optim/skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert lines[2]["train/loss"] is None and lines[7]["train/loss"] < lines[1]["train/loss"]
    assert checkpoint.read_manifest(checkpoint.newest(tmp_path / "run", print))["optimizer_updates"] == 7


def test_torchrun_brings_a_killed_rank_back(small_run, tmp_path):
    overrides = [*small_run, "trainer.micro_batch_size=2", "trainer.checkpoint_every=2", "deepspeed=zero1"]
    run([*overrides, f"run.dir={tmp_path}/whole"])
    script = patched(tmp_path, """
        step = train.seed_step
        def kill(seed, number, rank):
            if number == 6 and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            step(seed, number, rank)
        train.seed_step = kill
    """)  # fmt: skip
    process = start(overrides, 2, "--max-restarts=1", script=script)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output[-5000:]
    assert deviation(curve(tmp_path / "run"), curve(tmp_path / "whole")) < 1e-4
    assert events(tmp_path / "run") == ["start", "start"]
    assert "rank 1 (" in output and "is gone" in output


def test_signals_during_a_save_do_not_hurt(small_run, tmp_path):
    """The first asks for the save, the others come while its files are written."""
    script = patched(tmp_path, """
        import training.saver
        write = training.saver.write
        def slow(*args):
            print("writing", flush=True)
            time.sleep(2)
            write(*args)
        training.saver.write = slow
    """)  # fmt: skip
    overrides = [*small_run, "trainer.max_steps=100000", "trainer.checkpoint_every=null", "trainer.eval_every=null"]
    process = subprocess.Popen(
        [sys.executable, script, *overrides], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: last_step(tmp_path / "run") >= 3, process)
    process.send_signal(signal.SIGUSR1)
    while "writing" not in process.stdout.readline():
        pass
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process.send_signal(number)
    assert process.wait(timeout=60) == 75
    found = checkpoint.newest(tmp_path / "run", print)
    assert checkpoint.read_manifest(found)["step"] == last_step(tmp_path / "run")
    assert events(tmp_path / "run") == ["start", "preempted"]


def test_a_signal_on_any_rank_saves_the_same_step_on_all(pair, tmp_path):
    process = start(pair, 2)
    wait_for(lambda: last_step(tmp_path / "run") >= 3, process)
    worker(process, 1).send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    step = last_step(tmp_path / "run")
    assert f"saved step {step}; the same command goes on from here" in output
    assert checkpoint.read_manifest(checkpoint.newest(tmp_path / "run", print))["step"] == step


def patched(tmp_path, code: str) -> str:
    """A script that runs train.py with something in it that goes wrong."""
    path = tmp_path / "patched_train.py"
    head = "import os, signal, time\nimport train\nfrom configs.app import app\n"
    path.write_text(f"{head}{textwrap.dedent(code)}\napp(train.main)\n")
    return str(path)


# --- two hosts -------------------------------------------------------------------------------------------------------

HOSTS = {"t6a": "10.77.0.1", "t6b": "10.77.0.2"}


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    """Two network namespaces, joined by one cable."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need the ip command and root")
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", "cable-a", "netns", "t6a", "type", "veth", "peer", "name", "cable-b", "netns", "t6b")
        for (name, address), end in zip(HOSTS.items(), ("cable-a", "cable-b"), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield lambda state: ip("-n", "t6b", "link", "set", "cable-b", state)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_on_hosts(script: str, overrides: list[str], **environment: str) -> list[subprocess.Popen]:
    """One process a host, as srun would start them."""
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": HOSTS["t6a"], "MASTER_PORT": "29512"}
    common |= {"PYTHONPATH": str(ROOT), **environment}
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, script, *overrides], cwd=ROOT, text=True,
            env=os.environ | common | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": f"cable-{'ab'[rank]}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, host in enumerate(HOSTS)
    ]  # fmt: skip


def test_a_host_that_is_cut_off_ends_the_job_and_it_goes_on_when_it_is_back(two_hosts, small_run, tmp_path):
    overrides = [*small_run, "trainer.micro_batch_size=2", "trainer.rank_timeout=12", "deepspeed=zero2",
                 "trainer.max_steps=20", "trainer.checkpoint_every=5"]  # fmt: skip
    run([*overrides, f"run.dir={tmp_path}/whole"])
    restored = tmp_path / "restored"
    script = patched(tmp_path, f"""
        step = train.seed_step
        def linger(seed, number, rank):
            time.sleep(0 if number <= 12 or os.path.exists({str(restored)!r}) else 1)
            step(seed, number, rank)
        train.seed_step = linger
    """)  # fmt: skip
    hosts = start_on_hosts(script, overrides)
    wait_for(lambda: last_step(tmp_path / "run") >= 12, hosts[0])
    two_hosts("down")
    began = time.monotonic()
    outputs = [host.communicate(timeout=90)[0] for host in hosts]
    assert time.monotonic() - began < 40
    assert [host.returncode for host in hosts] == [1, 1]
    assert "THE JOB ENDS: rank 1 (" in outputs[0] and "has not been heard of for" in outputs[0]
    assert f"has had no contact with the rendezvous at {HOSTS['t6a']}:29512" in outputs[1]
    two_hosts("up")
    restored.touch()
    hosts = start_on_hosts(script, overrides)
    outputs = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert deviation(curve(tmp_path / "run"), curve(tmp_path / "whole")) < 1e-4
