"""A run that is being trained is not trained by another process as well."""

import signal
import subprocess
import sys

import pytest

import train
from configs.app import configured
from configs.errors import ConfigError
from tests.conftest import ROOT
from training.config import Config
from training.run_folder import RunLock

HOLD = """
import sys, time
from training.run_folder import RunLock
from training.config import Config
lock = RunLock(sys.argv[1])
print(lock.acquire(0, print), flush=True)
time.sleep(60)
"""


def test_a_run_has_one_process_at_a_time_whatever_becomes_of_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "None\n"
        said, lock = [], RunLock(tmp_path / "run")
        problem = lock.acquire(0.3, said.append)
        assert f"run is in use by process {holder.pid} on " in problem and "choose another run.name" in problem
        assert len(said) == 1 and said[0].endswith("waiting for 0 s")
        holder.send_signal(signal.SIGKILL)
        assert lock.acquire(30, said.append) is None
    assert RunLock(tmp_path / "run").acquire(0, said.append)  # it holds for this process too
    lock.release()
    again = RunLock(tmp_path / "run")
    assert again.acquire(0, said.append) is None
    again.release()
    assert not (tmp_path / "run").exists()


def test_a_holder_that_takes_its_folder_with_it_is_waited_for(tmp_path):
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    assert first.acquire(0, print) is None
    assert second.acquire(30, lambda line: first.release()) is None
    second.release()


def test_folders_that_were_made_for_a_lock_alone_are_gone_with_it(tmp_path):
    lock = RunLock(tmp_path / "runs/deep/a")
    assert lock.acquire(1, print) is None and (tmp_path / "runs/deep/a/.lock").exists()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.dir=.*/file/run: cannot write .* \(Not a directory\)"):
        RunLock(tmp_path / "file/run").acquire(0, print)


def test_a_second_start_leaves_everything_as_it_is(small_run, tmp_path, capsys):
    lock = RunLock(tmp_path / "run")
    assert lock.acquire(0, print) is None
    config = configured(Config, [*small_run, "trainer.rank_timeout=5"])
    assert train.main(config) == 1
    assert "is in use by process" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    lock.release()
    assert train.main(config) == 0


def test_ctrl_c_while_a_command_starts_is_no_traceback():
    lines = (
        "from configs.app import app",
        "from training.config import Config",
        "def main(config): raise KeyboardInterrupt",
        "app(main, Config)",
    )
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
