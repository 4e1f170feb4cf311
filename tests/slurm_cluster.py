"""A real Slurm on this machine: munged, slurmctld and a slurmd per node, all in one folder, on ports of their own.

Promise: several clusters may stand side by side and none outlives its context manager; jobs are tracked by cgroup, as
real clusters do, so whatever leaves its step dies with it. Nodes pretend to have GPUs, CPUs and memory.
Cost: two seconds to start. Needs root and Debian's `slurm-wlm` and `munge`; `why_not()` says what is missing.

Partitions: `main` (the default) and `low` on all nodes, and `high`, which preempts `low` with GRACE_S of grace.
`python -m tests.slurm_cluster` starts one to play with and a shell in it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tests.ports import free_port

N_NODES = 3
GRACE_S = 30
KILL_WAIT_S = 5
GPUS_PER_NODE = 8
CGROUP_V1 = Path("/sys/fs/cgroup/freezer")
_PR_SET_PDEATHSIG = 1  # prctl(2)
# Of jobs that are over for good. A requeued job passes through PREEMPTED, NODE_FAIL or CANCELLED on its way.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}

T = TypeVar("T")


def why_not() -> str | None:
    """Why no cluster can be started here; None: it can."""
    missing = [name for name in ("slurmctld", "slurmd", "srun", "munged") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here; apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd needs root"
    return None if CGROUP_V1.is_dir() else f"no {CGROUP_V1}: process tracking needs cgroup v1"


def until(found: Callable[[], T | None], what: str, timeout_s: float = 120.0) -> T:
    """Look every tenth of a second until `found` gives something true."""
    deadline = time.monotonic() + timeout_s
    while not (value := found()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.1)
    return value


class Cluster:
    """A running cluster. A context manager."""

    def __init__(self, folder: Path, n_nodes: int = N_NODES) -> None:
        self.folder = folder
        self._ports = [free_port() for _ in range(1 + n_nodes)]
        # A cgroup is called after its node: names of our own, or two clusters would share them.
        self.nodes = [f"n{self._ports[0]}-{i}" for i in range(1, n_nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def env(self) -> dict[str, str]:
        """The environment of a user of this cluster, and of no other."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return {**outside, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._write_config()
            munge = self.folder / "munge"
            names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            self._start("munged", "--foreground", "--force", *(f"--{k}={munge / v}" for k, v in names.items()))
            until((munge / "socket").exists, "munged listens")
            self._start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            for node in self.nodes:
                self.start_node(node)
            until(lambda: self.idle_nodes() == len(self.nodes), f"{len(self.nodes)} idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if "slurmctld" in self._daemons:
            self.cancel_all()
        for name in reversed(self._daemons):
            self._daemons[name].terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def cancel_all(self) -> None:
        """Cancel every job and wait until its processes are gone."""
        subprocess.run(["scancel", "--user=root"], env=self.env, check=False)
        try:
            until(lambda: not self.run("squeue", "--noheader").strip(), "no job is left", 30)
        except (AssertionError, subprocess.CalledProcessError) as error:
            print(f"cluster: {error}", file=sys.stderr)

    # -- what a user types -----------------------------------------------------------------------------------------

    def run(self, *words: str, cwd: Path | None = None, **env: str) -> str:
        """Output of a command; raises CalledProcessError with its words."""
        done = subprocess.run(words, cwd=cwd, env={**self.env, **env}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
        return done.stdout

    def sbatch(self, *words: str, cwd: Path, **env: str) -> str:
        """Submit; returns the job id."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **env).strip().partition(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job_id)))

    def wait(self, job_id: str, *states: str, timeout_s: float = 240.0) -> dict[str, str]:
        """The job's facts once it is in one of these states; without states, once it is over."""
        wanted = set(states) or ENDED

        def found() -> dict[str, str] | None:
            facts = self.job(job_id)
            return facts if facts["JobState"] in wanted else None

        try:
            return until(found, f"job {job_id} is {' or '.join(sorted(wanted))}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.job(job_id)}") from None

    # -- what an operator does -------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        """Start a node's daemon, in a mount namespace of its own: `memory` there is the node's alone."""
        mount = f'mount -t tmpfs tmpfs "{self.folder}/memory" && exec "$0" "$@"'
        slurmd = [shutil.which("slurmd") or "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", node]
        self._start(node, "--mount", "--propagation=private", "sh", "-c", mount, *slurmd, program="unshare")

    def memory_of(self, node: str) -> Path:
        """The folder `memory` as the processes of a node see it: for checkpoint.shm_path."""
        return Path(f"/proc/{self._daemons[node].pid}/root{self.folder}/memory")

    def kill_node(self, node: str, *, all_is_gone: bool = True) -> None:
        """As if its power failed: the daemon and all that ran there are gone at once; or the daemon alone is."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for pid in [*self.processes_of(node), *self._managers_of(node)] if all_is_gone else []:
            os.kill(pid, signal.SIGKILL)

    def processes_of(self, node: str) -> list[int]:
        """Of the jobs there."""
        groups = CGROUP_V1.glob(f"slurm_{node}/**/cgroup.procs")
        return [int(pid) for group in groups for pid in group.read_text().split()]

    def _managers_of(self, node: str) -> list[int]:
        """The slurmstepd processes of a node: they hold its spool folder open."""
        found, spool = [], str(self.folder / "spool" / node)
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "comm").read_text().strip() == "slurmstepd" and spool in (
                    os.readlink(folder / "cwd"),
                    *(os.readlink(link) for link in (folder / "fd").iterdir()),
                ):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def idle_nodes(self) -> int:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%D", "--states=idle", "--partition=main"],
            env=self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return sum(map(int, done.stdout.split()))

    def _start(self, name: str, *words: str, program: str | None = None) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        command = [shutil.which(program or name) or name, *words]
        libc = ctypes.CDLL(None)
        self._daemons[name] = subprocess.Popen(
            command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # also when the tests are killed
        )  # fmt: skip
        log.close()

    def _write_config(self) -> None:
        for name in ("munge", "state", "spool", "gpus", "memory"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for gpu in range(GPUS_PER_NODE):
            os.mknod(self.folder / "gpus" / f"gpu{gpu}", 0o666 | 0o020000, os.makedev(1, 3))  # a /dev/null
        ports = self._ports
        host = socket.gethostname().partition(".")[0]
        names = ",".join(self.nodes)
        machines = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=160 RealMemory=2500000 "
            f"Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(f"""\
ClusterName=lingua{ports[0]}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired: 5 s, instead of 2 minutes.
AuthInfo=socket={self.folder}/munge/socket,cred_expire=5
StateSaveLocation={self.folder}/state
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdSpoolDir={self.folder}/spool/%n
SlurmdPidFile={self.folder}/slurmd.%n.pid
SlurmdLogFile={self.folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={KILL_WAIT_S}
SlurmdTimeout=8
JobRequeue=1
MinJobAge=3600
MaxArraySize=1001
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
{machines}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes={names} MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_S}
PartitionName=high Nodes={names} MaxTime=INFINITE PriorityTier=20 PreemptMode=OFF
""")
        (self.folder / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n"
        )
        (self.folder / "gres.conf").write_text(
            f"NodeName={names} Name=gpu File={self.folder}/gpus/gpu[0-{GPUS_PER_NODE - 1}]\n"
        )


def main(words: Sequence[str]) -> int:
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as cluster:
        return subprocess.run(list(words) or ["bash"], env=cluster.env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
