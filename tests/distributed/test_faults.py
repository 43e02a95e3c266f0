"""Ranks that hang, die or are cut off, and signals at bad moments. Real processes, real signals."""

import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from tests.distributed.helpers import (
    curve,
    deviation,
    events,
    last_step,
    python,
    run,
    start,
    start_in,
    torchrun,
    wait_for,
    worker,
)  # fmt: skip
from training import checkpoint
from training.jsonl import read_lines


@pytest.fixture
def pair(small_run) -> list[str]:
    """Return overrides for a run on two processes that lasts until something happens to it."""
    return [*small_run, "trainer.micro_batch_size=2", "trainer.max_steps=100000", "trainer.eval_every=null",
            "trainer.rank_timeout=12", "deepspeed=zero2"]  # fmt: skip


def test_a_hung_rank_ends_the_job_and_is_named(pair, tmp_path):
    process = start(torchrun(2), pair)
    wait_for(lambda: last_step(tmp_path / "run") >= 5, process)
    other, hung = worker(process, 0), worker(process, 1)
    hung.suspend()
    other.wait(timeout=120)
    hung.resume()  # torchrun would give a stopped process half a minute to end
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert f"pid {hung.pid}) has been silent for" in output and "The job ends: rank 1 (" in output
    assert checkpoint.newest(tmp_path / "run", print)
    # The preflight of several ranks
    assert "2 ranks agree" in output and "x the median time of a matrix product" in output


WATCHED = """
import os, pathlib, sys, time
import torch
from training.watchdog import Watchdog
torch.distributed.init_process_group("gloo")
with Watchdog(torch.distributed.get_rank(), 2, timeout=6) as watchdog:
    folder = pathlib.Path(sys.argv[1])
    (folder / f"{os.getpid()}.pid").touch()
    while not (folder / "end").exists():
        watchdog.mark("waiting")
        time.sleep(0.2)
"""


def test_a_job_that_was_suspended_goes_on(tmp_path):
    """As `scontrol suspend` does, for longer than a rank may be silent; and ranks wake up one after the other."""
    (tmp_path / "watched.py").write_text(WATCHED)
    process = start_in(tmp_path, [*torchrun(2), str(tmp_path / "watched.py"), str(tmp_path)])
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2, process)
    time.sleep(2)
    ranks = [psutil.Process(int(path.stem)) for path in tmp_path.glob("*.pid")]
    for rank in ranks:
        rank.suspend()
    time.sleep(9)
    for rank in ranks:
        rank.resume()
        time.sleep(2)
    time.sleep(3)
    (tmp_path / "end").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "The job ends" not in output, output


def test_a_rank_that_stops_moving_is_named(pair, tmp_path):
    process = start(torchrun(2), pair, ("hang rank=1 step=5",))
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "no rank has moved for 12 s; furthest behind: rank 1 (" in output and "reading a batch" in output


def test_a_rank_that_fails_is_named_by_the_others(pair, tmp_path):
    process = start(torchrun(2), pair, ("fail rank=1 step=5",))
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "The job ends: rank 1 (" in output and "failed: OSError: [Errno 5] Input/output error: 'shard 7'" in output


def test_an_infinite_loss_on_one_rank_is_skipped_on_all_and_a_signal_on_one_ends_all(pair, tmp_path):
    process = start(torchrun(2), pair, ("infinite_loss rank=1 step=3",))
    wait_for(lambda: last_step(tmp_path / "run") >= 8, process)
    worker(process, 1).send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["optim/skipped_steps"] for line in lines[:8]] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert lines[2]["train/loss"] is None and lines[7]["train/loss"] < lines[1]["train/loss"]
    last = lines[-1]["step"]
    assert f"saved step {last}; the same command resumes from here" in output
    manifest = checkpoint.read_manifest(checkpoint.newest(tmp_path / "run", print))
    assert manifest["step"] == last and manifest["optimizer_scalars"]["step"] == last - 1


def test_torchrun_restarts_a_killed_rank(small_run, tmp_path):
    overrides = [*small_run, "trainer.micro_batch_size=2", "trainer.checkpoint_every=2", "deepspeed=zero1"]
    run([*overrides, f"run.dir={tmp_path}/whole"])
    process = start(torchrun(2, "--max-restarts=1"), overrides, ("kill rank=1 step=6",))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-5000:]
    assert deviation(curve(tmp_path / "run"), curve(tmp_path / "whole")) < 1e-4
    assert events(tmp_path / "run") == ["start", "start"]
    assert "rank 1 (" in output and "is gone" in output


def test_signals_during_a_save_do_no_harm(small_run, tmp_path):
    """The first signal asks for the save, the others come while its files are written."""
    overrides = [*small_run, "trainer.max_steps=100000", "trainer.checkpoint_every=null", "trainer.eval_every=null"]
    process = start(python(), overrides, ("slow_save seconds=2",))
    wait_for(lambda: last_step(tmp_path / "run") >= 3, process)
    process.send_signal(signal.SIGUSR1)
    while "writing" not in process.stdout.readline():
        assert process.poll() is None
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process.send_signal(number)
    assert process.wait(timeout=300) == 75
    found = checkpoint.newest(tmp_path / "run", print)
    assert checkpoint.read_manifest(found)["step"] == last_step(tmp_path / "run")
    assert events(tmp_path / "run") == ["start", "preempted"]


# --- two hosts -------------------------------------------------------------------------------------------------------

HOSTS = {"t6a": "10.77.0.1", "t6b": "10.77.0.2"}
CABLES = ("cable-a", "cable-b")  # the two ends of one


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    """Make two network namespaces joined by one cable; yield a function that sets its state, up or down."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need the ip command and root")
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", CABLES[0], "netns", "t6a", "type", "veth", "peer", "name", CABLES[1], "netns", "t6b")
        for (name, address), cable in zip(HOSTS.items(), CABLES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")
        yield lambda state: ip("-n", "t6b", "link", "set", CABLES[1], state)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_on_hosts(overrides: list[str], fault: str) -> list[subprocess.Popen]:
    """Start one process on each host, as srun would."""
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": HOSTS["t6a"], "MASTER_PORT": "29512"}
    return [
        start(["ip", "netns", "exec", host, *python()], overrides, (fault,),
              **common, RANK=str(rank), GLOO_SOCKET_IFNAME=cable)
        for rank, (host, cable) in enumerate(zip(HOSTS, CABLES, strict=True))
    ]  # fmt: skip


def test_a_host_that_is_cut_off_ends_the_job_which_resumes_when_it_is_back(two_hosts, small_run, tmp_path):
    overrides = [*small_run, "trainer.micro_batch_size=2", "trainer.rank_timeout=12", "deepspeed=zero2",
                 "trainer.max_steps=20", "trainer.checkpoint_every=5"]  # fmt: skip
    run([*overrides, f"run.dir={tmp_path}/whole"])
    restored = tmp_path / "restored"
    fault = f"slow_steps rank=1 past=12 seconds=1 until={restored}"
    hosts = start_on_hosts(overrides, fault)
    wait_for(lambda: last_step(tmp_path / "run") >= 12, hosts[0])
    two_hosts("down")
    outputs = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [1, 1]
    assert "The job ends: rank 1 (" in outputs[0] and "has been silent for" in outputs[0]
    # The other host has lost the rendezvous and rank 0, which are on the same host: either may be noticed first.
    no_rendezvous = f"has had no contact with the rendezvous at {HOSTS['t6a']}:29512"
    assert no_rendezvous in outputs[1] or "The job ends: rank 0 (" in outputs[1]
    two_hosts("up")
    restored.touch()
    hosts = start_on_hosts(overrides, fault)
    outputs = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert deviation(curve(tmp_path / "run"), curve(tmp_path / "whole")) < 1e-4
