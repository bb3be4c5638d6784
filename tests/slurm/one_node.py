"""A SLURM of one node on this machine, for as long as this process lives: `python tests/slurm/one_node.py FOLDER`.

Needs root and Debian's slurm-wlm and munge. Prints `export SLURM_CONF=...` when jobs can be sent, and takes its own
daemons down again when its standard input ends or on ctrl-C. Nothing of a SLURM that is installed here is touched: key,
ports, state and logs are its own, in FOLDER, which it makes; every user must be able to enter that, or munge objects.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
CONF = """
ClusterName=one-node
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
# A requeued job waits until the credential of its last start has expired: 2 minutes unless told otherwise.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=300
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait(what: str, ready: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come up in {seconds:g} s: see the logs")
        time.sleep(0.1)


def _answer(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


class OneNode:
    """The three daemons, each in the foreground and a child of this process, so that it ends these and no others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []

    def configure(self) -> None:
        """Folders, munge's key and slurm.conf; the commands of this process and its children use it from here on."""
        self.folder.mkdir(mode=0o755)
        for name in ("munge", "controller", "node"):
            (self.folder / name).mkdir()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        controller_port, node_port = _free_ports(2)
        conf = self.folder / "slurm.conf"
        conf.write_text(
            CONF.format(
                host=socket.gethostname().partition(".")[0],
                controller_port=controller_port,
                node_port=node_port,
                folder=self.folder,
                cpus=os.cpu_count(),
                memory=memory - 512,
            )
        )
        # Without these SLURM 22 looks for cgroups that a container does not have.
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n")
        os.environ["SLURM_CONF"] = str(conf)
        subprocess.run(["mungekey", "--create", "--keyfile", str(self.folder / "munge/key")], check=True)

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as output:
            daemon = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a ctrl-C reaches this process alone, which ends them in order
                preexec_fn=_die_with_parent,
            )
        self.daemons.append(daemon)

    def up(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}={munge / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._start("munged", "--foreground", f"--key-file={munge / 'key'}", *files)
        _wait("munged", (munge / "socket").exists)
        self._start("slurmctld", "-D", "-f", os.environ["SLURM_CONF"])
        _wait("slurmctld", lambda: "UP" in _answer("scontrol", "ping"))
        self._start("slurmd", "-D", "-f", os.environ["SLURM_CONF"])
        _wait("slurmd", lambda: "idle" in _answer("sinfo", "--noheader", "--format=%t"))

    def down(self) -> None:
        """Cancel what is queued, give it a few seconds, and end the daemons, the node first."""
        if len(self.daemons) == 3:
            _answer("scancel", "--user=root")
            deadline = time.monotonic() + 15
            while _answer("squeue", "--noheader").strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def main(folder: Path) -> None:
    """Bring it up, say so, and stay until standard input ends."""
    node = OneNode(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        node.configure()
        node.up()
        print(f"export SLURM_CONF={os.environ['SLURM_CONF']}", flush=True)
        sys.stdin.read()
    except KeyboardInterrupt:
        print("taking the node down", file=sys.stderr)
    finally:
        node.down()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
