#!/usr/bin/env python3
"""A real Slurm on one host, to test against: munge, slurmctld and a slurmd for each of a few virtual nodes.

    python tests/slurm/cluster.py start [--dir DIR] [--nodes 2] [--cpus 2]    prints lines for `eval` in a shell
    python tests/slurm/cluster.py stop [--dir DIR]

Needs Debian's `slurmctld slurmd slurm-client munge` (22.05 or later), no root, no systemd, no cgroups; only loopback
addresses are used. All files are in DIR; clusters in different folders are independent. A second start does nothing.

Partitions: `high`, which preempts `low` (default; its jobs are requeued) and `spare` (its jobs are cancelled); and
`gpu`, whose nodes with eight GPUs exist only in the configuration: nothing runs there, but sbatch checks requests
against it.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DIR = Path("/tmp/next-parameter-slurm")
PORTS = range(7300, 9300, 100)
PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "sbatch")

# Node names are loopback addresses, so that MASTER_ADDR, which is a node's name, resolves.
# cred_expire: a requeued job waits one second longer than this; Slurm replaces values below 5 by 120.
# preempt_send_user_signal: without it a preempted job does not get the warning signal that it requested.
# OverMemoryKill: without cgroups, nothing else enforces the memory limit of a job.
CONF = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
PlugStackConfig={dir}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
LaunchParameters=disable_send_gids
ReturnToService=2
EnforcePartLimits=ALL
SlurmctldParameters=preempt_send_user_signal
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherParams=OverMemoryKill
JobAcctGatherFrequency=task=1
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=2000
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,nohold_on_prolog_fail
SlurmdParameters=config_overrides
MaxArraySize=1001
MinJobAge=3600
KillWait=2
CompleteWait=0
InactiveLimit=0
SlurmdTimeout=60
MessageTimeout=20
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
SuspendExcParts=low,spare,high
{nodes}
NodeName=gpu[1-64] NodeAddr=127.0.0.1 Port={far} CPUs=128 RealMemory=2000000 Gres=gpu:8 State=CLOUD
PartitionName=low Nodes={names} Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=spare Nodes={names} MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL
PartitionName=high Nodes={names} MaxTime=INFINITE DefaultTime=5 PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=gpu[1-64] MaxTime=INFINITE DefaultTime=5
"""


class Cluster:
    """The daemons below one folder."""

    def __init__(self, folder: Path, nodes: int, cpus: int) -> None:
        self.folder, self.cpus = folder, cpus
        self.names = [f"127.0.0.{number}" for number in range(1, nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons that do not run, and wait until every node accepts jobs."""
        missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
        if missing:
            sys.exit(f"cluster: {', '.join(missing)} not found; Debian: slurmctld slurmd slurm-client munge")
        for name in self.names:
            (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        self.folder.chmod(0o755)
        self._start_munge()
        self._configure()
        if not self._alive("slurmctld"):
            self._run("slurmctld")
        _wait("slurmctld", lambda: self._answers("scontrol", "ping"))
        for name in self.names:
            if not self._alive(f"slurmd-{name}"):
                self._run("slurmd", "-N", name)
        _wait("the nodes", self._nodes_are_up)
        print(f"export SLURM_CONF={self.folder / 'slurm.conf'}")

    def stop(self) -> None:
        """End every job, then the daemons, and remove the folder."""
        if self._alive("slurmctld"):
            # Jobs first, because their processes would outlive the daemons.
            self._answers("scancel", "--user", getpass.getuser())
            _wait("the jobs to end", lambda: not self._output("squeue", "--noheader", "--states=running,completing"))
        for pid_file in (*self.folder.glob("slurmd-*.pid"), *self.folder.glob("slurmctld.pid")):
            self._end(pid_file)
        self._end(self.folder / "munged.pid")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_munge(self) -> None:
        if self._alive("munged"):
            return
        secrets = self.folder / "munge"
        secrets.mkdir(mode=0o700, exist_ok=True)
        key = secrets / "key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
        socket_path = self.folder / "munge.socket"
        self._run(
            "munged",
            "--force",
            f"--socket={socket_path}",
            f"--key-file={key}",
            f"--seed-file={secrets / 'seed'}",
            f"--pid-file={self.folder / 'munged.pid'}",
            f"--log-file={self.folder / 'munged.log'}",
            "--num-threads=2",
        )
        _wait("munge", lambda: self._answers("munge", "--no-input", f"--socket={socket_path}"))

    def _configure(self) -> None:
        path = self.folder / "slurm.conf"
        if path.exists():
            return
        host, port = socket.gethostname().split(".")[0], self._free_ports()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 10 + number} CPUs={self.cpus} "
            f"RealMemory=8000 State=UNKNOWN"
            for number, name in enumerate(self.names)
        )
        conf = CONF.format(
            host=host,
            port=port,
            far=port + 9,
            user=getpass.getuser(),
            dir=self.folder,
            nodes=nodes,
            names=",".join(self.names),
        )
        (self.folder / "gres.conf").write_text("NodeName=gpu[1-64] Name=gpu Count=8\n")
        (self.folder / "plugstack.conf").touch()
        path.write_text(conf)

    def _free_ports(self) -> int:
        """The first of enough consecutive free ports."""
        for first in PORTS:
            if all(_is_free(first + number) for number in range(10 + len(self.names))):
                return first
        sys.exit(f"cluster: found no free ports, starting at {PORTS[0]}")

    def _nodes_are_up(self) -> bool:
        states = dict(
            line.split() for line in self._output("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
        )
        for name, state in states.items():
            if state.startswith(("drain", "down")) and not state.endswith("*"):
                self._answers("scontrol", "update", f"NodeName={name}", "State=RESUME")
        up = ("idle", "mixed", "allocated", "completing")
        return set(states) == set(self.names) and all(state in up for state in states.values())

    def _end(self, pid_file: Path) -> None:
        pid = _pid(pid_file)
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            _wait(f"{pid_file.stem} to end", lambda: _pid(pid_file) is None)

    def _alive(self, daemon: str) -> bool:
        return _pid(self.folder / f"{daemon}.pid") is not None

    def _run(self, *command: str) -> None:
        # Daemons keep their output open, so it must not be the pipe that this program writes to.
        with (self.folder / "start.log").open("a") as log:
            subprocess.run(command, env=self.environment | {"PATH": _path()}, check=True, stdout=log, stderr=log)

    def _answers(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment, capture_output=True, timeout=20).returncode == 0

    def _output(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=20).stdout.strip()


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _pid(pid_file: Path) -> int | None:
    """The process id in a pid file, if that process is alive (a zombie is not)."""
    try:
        pid = int(pid_file.read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else pid


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait(what: str, ready: Callable[[], bool], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not ready():
        if time.monotonic() > deadline:
            sys.exit(f"cluster: waited {patience_s:.0f} s for {what}")
        time.sleep(0.2)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("start", "stop"))
    parser.add_argument("--dir", type=Path, default=DIR)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args()
    cluster = Cluster(options.dir.resolve(), options.nodes, options.cpus)
    cluster.start() if options.verb == "start" else cluster.stop()


if __name__ == "__main__":
    main()
