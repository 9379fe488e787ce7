"""A real Slurm on this machine, made for a test and gone after it: munged, slurmctld, and nodes that can lose power.

Debian's packages, installed where they are missing and this is root. Each node is one slurmd in PID, UTS, mount and
network namespaces of its own: when their first process is killed, the kernel ends slurmd, its steps and all
tasks at once; when its cable is cut, they go on, out of reach, with the file system that all nodes share.
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
# A node that comes back serves again; one that is silent for 5 s is down.
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
    """Why no Slurm can be started here, after trying to install it; None where it can."""
    if os.geteuid() != 0:
        return "a Slurm of several nodes needs root"
    obstacle = install(PACKAGES, PROGRAMS)
    if obstacle is not None:
        return obstacle
    probe = f"probe{os.getpid()}"
    for words in (["unshare", *NAMESPACES, "true"], ["ip", "link", "add", probe, "type", "bridge"]):
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
        if done.returncode != 0:
            return f"no nodes can be made here: {' '.join(words)}: {done.stderr.strip()}"
    ip("link", "delete", probe)
    return None


def skip_without_slurm() -> None:
    """Skips the test where there can be no Slurm; under CI_MUST_RUN_SLURM=1 that is a failure."""
    skip_because(find_obstacle(), unless="CI_MUST_RUN_SLURM")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Cluster:
    """Controller and nodes n1, n2, ...; node names resolve inside the nodes alone, as on many a real cluster."""

    def __init__(self, nodes: int) -> None:
        # Not pytest's folder: the path of a Unix socket has at most 107 letters.
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
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # named, as there is no way to have none
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
        """Its name and the network of a bridge that no other cluster on this machine has."""
        for number in range(256):
            # With an address of its own: a bridge without one takes a cable's, and another one when that cable goes.
            words = ["link", "add", f"dpokit{number}", "address", "02:00:00:00:00:01", "type", "bridge"]
            if subprocess.run(["ip", *words], capture_output=True).returncode == 0:
                return f"dpokit{number}", f"10.77.{number}"
        raise OSError("256 clusters run on this machine")

    def _start_munge(self) -> None:
        place = self.folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={place / file}" for name, file in files.items()]
        self._begin("munged", ["munged", "--foreground", "--force", *options])
        self.wait_until((place / "socket").exists, "munged")

    def start_controller(self) -> None:
        """Starts slurmctld, with what it knew before."""
        self._begin("slurmctld", ["slurmctld", "-D"])
        self.wait_until(lambda: "UP" in self.run("scontrol", "ping"), "slurmctld")

    def kill_controller(self) -> None:
        """Kills slurmctld; nodes and jobs go on."""
        self._end("slurmctld")

    def power_on(self, node: str) -> None:
        """Starts a node, or brings it back."""
        inside = f"""set -e; mount --bind {self.folder}/hosts /etc/hosts; hostname {node}
            until ip address add {self._address(node)}/24 dev eth0 2>/dev/null; do sleep 0.1; done
            ip link set lo up; ip link set eth0 up
            slurmd -D -N {node} &
            wait; exec sleep infinity"""
        process = self._begin(node, ["unshare", *NAMESPACES, "bash", "-c", inside])
        own = Path(f"/proc/{process.pid}/ns/net")
        self.wait_until(lambda: own.readlink() != Path("/proc/self/ns/net").readlink(), f"the network of {node}")
        self.wait_until(lambda: self._plug_in(node, process.pid), f"a cable for {node}", seconds=30)
        ip("link", "set", self._cable(node), "master", self._bridge, "up")

    def _plug_in(self, node: str, pid: int) -> bool:
        """Makes the cable; False while the kernel still takes that of a former node of this name away."""
        subprocess.run(["ip", "link", "delete", self._cable(node)], capture_output=True)  # of a former cluster, or node
        words = ["link", "add", self._cable(node), "type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    def _address(self, node: str) -> str:
        return f"{self._network}.{10 + int(node[1:])}"

    def _cable(self, node: str) -> str:
        return f"{self._bridge}{node}"

    def cut(self, node: str) -> None:
        """Nobody reaches the node any more, nor it them; what runs on it goes on, and so do its files."""
        ip("link", "set", self._cable(node), "down")

    def mend(self, node: str) -> None:
        """Plugs the cable of a node in again."""
        ip("link", "set", self._cable(node), "up")

    def kill_slurmd(self, node: str) -> None:
        """Ends a node's slurmd alone; what it started lives on until the power is off."""
        (slurmd,) = (
            child
            for child in psutil.Process(self._processes[node].pid).children(recursive=True)
            if child.name() == "slurmd" and child.parent().name() == "bash"
        )
        slurmd.kill()

    def power_off(self, node: str) -> None:
        """A node is gone, with all that ran on it."""
        self._end(node)
        # The kernel takes the cable away in its own time; a node that is switched on again needs a new one now.
        subprocess.run(["ip", "link", "delete", self._cable(node)], capture_output=True)

    def _begin(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        mortal = ["setpriv", "--pdeathsig", "KILL", *words]  # no daemon outlives tests that are killed
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                mortal, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
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
            subprocess.run(["ip", "link", "delete", self._cable(node)], capture_output=True)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *words: str, text: str | None = None) -> str:
        """What a command of Slurm prints, errors included; empty where it fails."""
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=60, env=self.environment)
        return done.stdout + done.stderr if done.returncode == 0 else ""

    def show(self, job: str) -> dict[str, str]:
        """Slurm's record of a job, `JobState` and others; empty where the controller does not answer."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def tasks(self, name: str) -> list[int]:
        """Process ids, on this machine, of whatever has these words in its command line."""
        found = subprocess.run(["pgrep", "-f", name], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found]

    def all_idle(self) -> bool:
        """Whether every node waits for work."""
        return sorted(self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split()) == self.nodes

    def wait_for_requeue(self, job: str, times: int = 1) -> None:
        """Waits until a job that was put back into the queue for so many times has left it again.

        By itself it would wait two minutes, for its old nodes to be cleared; a test does not.
        """

        def has_begun_anew() -> bool:
            shown = self.show(job)
            if int(shown.get("Restarts", 0)) >= times and shown["JobState"] == "RUNNING":
                return True
            self.hurry(job, shown)
            return False

        self.wait_until(has_begun_anew, f"job {job} to be requeued {times} times")

    def hurry(self, job: str, shown: dict[str, str]) -> None:
        """Lets a job that was requeued begin at once; to be asked again and again, as Slurm sets its time anew."""
        if shown.get("JobState") != "PENDING" or shown.get("Restarts") == "0":
            return
        if "held" in shown["Reason"].lower():  # a node that has just come back could not begin it
            self.run("scontrol", "release", job)
        if shown["EligibleTime"] > datetime.now().isoformat():
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait_for(self, job: str, states: Iterable[str], seconds: float = PATIENCE_SECONDS) -> dict[str, str]:
        """Waits for one of the states; the job's record then."""
        wanted = set(states)
        self.wait_until(lambda: self.show(job).get("JobState") in wanted, f"job {job} to be {wanted}", seconds)
        return self.show(job)

    def wait_until(
        self,
        holds: Callable[[], bool],
        what: str,
        seconds: float = PATIENCE_SECONDS,
        more: Callable[[], str] = str,
    ) -> None:
        """Waits until it holds, and fails with the daemons' last words, and `more`, where it never does."""
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                last = "\n".join(f"{log.name}: {log.read_text()[-6000:]}" for log in self.folder.glob("*.log"))
                pytest.fail(f"waited {seconds:g} s in vain for {what}\n{self.run('squeue')}\n{last}\n{more()}")
            time.sleep(0.3)
