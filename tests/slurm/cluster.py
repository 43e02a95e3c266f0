"""A real Slurm cluster of two nodes on this machine, for an ordinary user: one slurmctld, two slurmd.

Both nodes claim more processors than there are, and eight GPUs that are device files of terminals. Nothing here needs
systemd, munge or a database; without a database there is no `sacct`, so `scontrol show job` tells about jobs.
"""

import contextlib
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
NODES = ("node1", "node2")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE"}

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=30
InactiveLimit=0
FirstJobId={first_job}
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/%n
SlurmdPidFile={dir}/%n.pid
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/%n.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32 Gres=gpu:8 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=24:00:00 PreemptMode=OFF PriorityTier=1
PartitionName=spare Nodes=node[1-2] MaxTime=24:00:00 PreemptMode=REQUEUE GraceTime=60 PriorityTier=1
PartitionName=urgent Nodes=node[1-2] MaxTime=24:00:00 PreemptMode=OFF PriorityTier=10
"""


def why_not() -> str | None:
    """Return why there can be no cluster here, or None if there can be one."""
    missing = [program for program in PROGRAMS if find(program) is None]
    return f"Slurm is not installed (no {', '.join(missing)}); .ci/run says how" if missing else None


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """A context. With `environment`, Slurm's commands talk to this cluster."""

    def __enter__(self) -> "Cluster":
        self.dir = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets live in it
        host = socket.gethostname().split(".")[0]
        facts = {"dir": self.dir, "host": host, "ports": free_ports(3), "user": user_name()}
        config = CONFIG.format(**facts, first_job=random.randrange(1000, 15000))
        (self.dir / "slurm.conf").write_text(config)
        (self.dir / "gres.conf").write_text("Name=gpu File=/dev/tty[0-7]\n")
        (self.dir / "state").mkdir()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SALLOC_", "SRUN_"))}
        self.environment = clean | {"SLURM_CONF": str(self.dir / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}
        try:
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait(lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 30, "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        try:
            jobs = self("squeue", "-h", "-o", "%i").split()
            if jobs:
                self("scancel", *jobs)
                self.wait(lambda: not self("squeue", "-h").strip(), 30, "an empty queue")
        except (AssertionError, RuntimeError) as problem:  # the daemons are stopped nevertheless
            print(f"while the cluster was stopped: {problem}")
        for daemon in reversed(self.daemons.values()):
            stop(daemon)
        shutil.rmtree(self.dir, ignore_errors=True)

    def _start(self, name: str, program: str, *options: str) -> None:
        with open(self.dir / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [find(program), *options], env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """End the node's daemon and everything that runs there, as a power cut would."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        tasks = self.processes(SLURMD_NODENAME=node)
        for pid in {parent_of(pid) for pid in tasks} - {0, 1, os.getpid()} | set(tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, command: str = "", **environment: str) -> list[int]:
        """Return the processes of this cluster's jobs with these variables and this text in their command line."""
        wanted = {
            f"{key}={value}" for key, value in ({"SLURM_CONF": self.environment["SLURM_CONF"]} | environment).items()
        }
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_text(errors="replace").split("\0")
                if wanted <= set(variables) and command in (folder / "cmdline").read_text(errors="replace"):
                    found.append(int(folder.name))
        return found

    @contextlib.contextmanager
    def held(self, job: str):
        """Stop the training processes of a job while the context lasts, so that nothing happens in the meantime."""
        pids = self.processes("train.py", SLURM_JOB_ID=job)
        pids = [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().startswith("python")]
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield pids
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def __call__(self, program: str, *arguments: str, **options) -> str:
        """Return the standard output of one of Slurm's commands. RuntimeError if it fails."""
        done = subprocess.run(
            [find(program), *arguments], env=self.environment, capture_output=True, text=True, timeout=60, **options
        )
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """Return what Slurm knows about a job, or a task of an array (`12_3`)."""
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", "-o", job)))

    def ended(self, job: str) -> bool:
        return self.job(job)["JobState"] in ENDED

    def wait(self, condition, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after {seconds} s\n{self('squeue', '-l')}"
            time.sleep(0.1)


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def is_pending(pid: int, number: int) -> bool:
    """Return whether a signal is pending for a stopped process, or has reached it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:  # it has reached it: with SIGTERM, Slurm continues a stopped process
        return True
    return any(int(mask, 16) >> (number - 1) & 1 for mask in re.findall(r"(?:SigPnd|ShdPnd):\s*(\w+)", status))


def user_name() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def stop(daemon: subprocess.Popen) -> None:
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
