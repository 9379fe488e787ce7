"""A real Slurm on this machine for the time of a test: munged, slurmctld, and nodes that can lose power and network.

It uses Debian's packages and, as root, installs missing ones. Each node is one slurmd in PID, UTS, mount and network
namespaces of its own. When their first process is killed, the kernel ends slurmd, its steps and all tasks at once. When
the node's link is down, they continue without the network, on the file system that all nodes share.
"""

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from conftest import find_free_port
from debian import install, skip_because

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "slurm-wlm-basic-plugins", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "ip")
NAMESPACES = ("--pid", "--fork", "--mount-proc", "--uts", "--mount", "--net", "--kill-child=KILL")
PATIENCE_SECONDS = 240

CONFIGURATION = """\
ClusterName=dpokit
SlurmctldHost={host}({network}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PropagateResourceLimits=NONE
# A node that returns is used again; a node that is silent for 5 s is down.
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=5
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
PARTITIONS = """\
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def find_obstacle() -> str | None:
    """Why no Slurm can be started here, after trying to install it; None if it can."""
    if os.geteuid() != 0:
        return "a Slurm of several nodes needs root"
    obstacle = install(PACKAGES, PROGRAMS)
    if obstacle is not None:
        return obstacle
    probe = f"probe{os.getpid()}"
    for command in (["unshare", *NAMESPACES, "true"], ["ip", "link", "add", probe, "type", "bridge"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if done.returncode != 0:
            return f"no nodes can be created here: {' '.join(command)}: {done.stderr.strip()}"
    ip("link", "delete", probe)
    return None


def skip_without_slurm() -> None:
    """Skips the test if no Slurm can run here; under CI_MUST_RUN_SLURM=1 the test fails instead."""
    skip_because(find_obstacle(), unless="CI_MUST_RUN_SLURM")


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True)


class Cluster:
    """Controller and nodes n1, n2, ...; node names resolve only inside the nodes, as on many real clusters."""

    def __init__(self, nodes: int) -> None:
        # Not pytest's folder: the path of a Unix socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._bridge, self._network = self._add_bridge()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Writes the configuration, starts every daemon and waits until all nodes are idle."""
        (self.folder / "munge").mkdir(mode=0o711)
        (self.folder / "state").mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host, port = socket.gethostname().partition(".")[0], find_free_port()
        text = CONFIGURATION.format(host=host, port=port, folder=self.folder, network=self._network)
        for node in self.nodes:
            text += f"NodeName={node} NodeAddr={self._address(node)} Port={find_free_port()} CPUs=2 RealMemory=1000\n"
        (self.folder / "slurm.conf").write_text(text + PARTITIONS)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # a plugin must be named
        names = "".join(f"{self._address(node)} {node}\n" for node in self.nodes)
        (self.folder / "hosts").write_text(names + Path("/etc/hosts").read_text())
        ip("address", "add", f"{self._network}.1/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")
        self._start_munge()
        self.start_controller()
        for node in self.nodes:
            self.power_on(node)
        self.wait_until(self.all_idle, "the nodes to be idle")

    def _add_bridge(self) -> tuple[str, str]:
        """Adds a bridge that no other cluster on this machine uses; returns its name and network."""
        for number in range(256):
            # A bridge without a fixed address takes that of a link, and changes it when that link is removed.
            command = ["link", "add", f"dpokit{number}", "address", "02:00:00:00:00:01", "type", "bridge"]
            if subprocess.run(["ip", *command], capture_output=True).returncode == 0:
                return f"dpokit{number}", f"10.77.{number}"
        raise OSError("256 clusters run on this machine")

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={folder / file}" for name, file in files.items()]
        self._begin("munged", ["munged", "--foreground", "--force", *options])
        self.wait_until((folder / "socket").exists, "munged")

    def start_controller(self) -> None:
        """Starts slurmctld with its saved state."""
        self._begin("slurmctld", ["slurmctld", "-D"])
        self.wait_until(lambda: "UP" in self.run("scontrol", "ping"), "slurmctld")

    def kill_controller(self) -> None:
        """Kills slurmctld; nodes and jobs continue."""
        self._end("slurmctld")

    def power_on(self, node: str) -> None:
        """Starts a node, also again after `power_off`."""
        script = f"""set -e; mount --bind {self.folder}/hosts /etc/hosts; hostname {node}
            until ip address add {self._address(node)}/24 dev eth0 2>/dev/null; do sleep 0.1; done
            ip link set lo up; ip link set eth0 up
            slurmd -D -N {node} &
            wait; exec sleep infinity"""
        process = self._begin(node, ["unshare", *NAMESPACES, "bash", "-c", script])
        network_namespace = Path(f"/proc/{process.pid}/ns/net")
        self.wait_until(
            lambda: network_namespace.readlink() != Path("/proc/self/ns/net").readlink(), f"the network of {node}"
        )
        self.wait_until(lambda: self._plug_in(node, process.pid), f"a link for {node}", seconds=30)
        ip("link", "set", self._link(node), "master", self._bridge, "up")

    def _plug_in(self, node: str, pid: int) -> bool:
        """Adds the node's link; False while the kernel still removes that of a former node of this name."""
        # A former cluster or node may have left its link.
        subprocess.run(["ip", "link", "delete", self._link(node)], capture_output=True)
        command = ["link", "add", self._link(node), "type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        return subprocess.run(["ip", *command], capture_output=True).returncode == 0

    def _address(self, node: str) -> str:
        return f"{self._network}.{10 + int(node[1:])}"

    def _link(self, node: str) -> str:
        return f"{self._bridge}{node}"

    def cut(self, node: str) -> None:
        """Takes the node's link down; its processes continue, and its files stay reachable."""
        ip("link", "set", self._link(node), "down")

    def reconnect(self, node: str) -> None:
        """Takes the node's link up again."""
        ip("link", "set", self._link(node), "up")

    def kill_slurmd(self, node: str) -> None:
        """Kills only a node's slurmd; the processes that it started continue until `power_off`."""
        (slurmd,) = (
            child
            for child in psutil.Process(self._processes[node].pid).children(recursive=True)
            if child.name() == "slurmd" and child.parent().name() == "bash"
        )
        slurmd.kill()

    def power_off(self, node: str) -> None:
        """Kills a node with all of its processes."""
        self._end(node)
        # The kernel removes the link later; a node that is started again needs a new link at once.
        subprocess.run(["ip", "link", "delete", self._link(node)], capture_output=True)

    def _begin(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        bound_command = ["setpriv", "--pdeathsig", "KILL", *command]  # a killed test leaves no daemon
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                bound_command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return self._processes[name]

    def _end(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """Ends everything and removes its files."""
        for name in reversed(list(self._processes)):
            self._end(name)
        for node in self.nodes:
            subprocess.run(["ip", "link", "delete", self._link(node)], capture_output=True)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, text: str | None = None) -> str:
        """The output of a command of Slurm, with its errors; empty if it fails."""
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, env=self.environment)
        return done.stdout + done.stderr if done.returncode == 0 else ""

    def show(self, job: str) -> dict[str, str]:
        """Slurm's record of a job, `JobState` and others; empty if the controller does not answer."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def tasks(self, name: str) -> list[int]:
        """The process ids, on this machine, of the processes whose command line contains `name`."""
        process_ids = subprocess.run(["pgrep", "-f", name], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in process_ids]

    def all_idle(self) -> bool:
        """Whether every node is idle."""
        return sorted(self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split()) == self.nodes

    def wait_for_requeue(self, job: str, times: int = 1) -> None:
        """Waits until a job that was requeued `times` times runs again.

        Slurm itself waits two minutes before it starts the job; a test does not wait.
        """

        def has_begun_anew() -> bool:
            shown = self.show(job)
            if int(shown.get("Restarts", 0)) >= times and shown["JobState"] == "RUNNING":
                return True
            self.hurry(job, shown)
            return False

        self.wait_until(has_begun_anew, f"job {job} to be requeued {times} times")

    def hurry(self, job: str, shown: dict[str, str]) -> None:
        """Lets a requeued job start at once; called repeatedly, as Slurm resets the start time."""
        if shown.get("JobState") != "PENDING" or shown.get("Restarts") == "0":
            return
        if "held" in shown["Reason"].lower():  # a node that has just returned could not start it
            self.run("scontrol", "release", job)
        if shown["EligibleTime"] > datetime.now().isoformat():
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait_for(self, job: str, states: Iterable[str], seconds: float = PATIENCE_SECONDS) -> dict[str, str]:
        """Waits for one of the states and returns the job's record."""
        expected = set(states)
        self.wait_until(lambda: self.show(job).get("JobState") in expected, f"job {job} to be {expected}", seconds)
        return self.show(job)

    def wait_until(
        self,
        holds: Callable[[], bool],
        condition: str,
        seconds: float = PATIENCE_SECONDS,
        more: Callable[[], str] = str,
    ) -> None:
        """Waits until the condition holds; after `seconds` it fails with the daemons' logs and `more`."""
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                logs = "\n".join(f"{log.name}: {log.read_text()[-6000:]}" for log in self.folder.glob("*.log"))
                pytest.fail(
                    f"waited {seconds:g} s without success for {condition}\n{self.run('squeue')}\n{logs}\n{more()}"
                )
            time.sleep(0.3)
