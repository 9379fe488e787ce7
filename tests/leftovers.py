"""Reports what tests leave behind: processes, ports, mounts and network devices (a Slurm node has one).

Orphans of a test become children of the process that ran it, because tests/warm.py makes it their reaper. Resources of
module fixtures are checked at the end of the module.
"""

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm


def find_held() -> dict[tuple[str, str], str]:
    """{(kind, identity): description} of the processes, mounts and network devices that exist now."""
    held = {}
    for pid in find_children():
        with suppress(psutil.Error):  # it has just ended
            process = psutil.Process(int(pid))
            if process.status() != psutil.STATUS_ZOMBIE and not warm.is_server(process.pid):
                held["process", pid] = f"process {pid}: {' '.join(process.cmdline())[:120]}"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = line.split()[1]
        held["mount", place] = f"mount {place}"
    for device in Path("/sys/class/net").iterdir():
        held["device", device.name] = f"network device {device.name}"
    return held


def find_children() -> list[str]:
    pids = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread has just ended
            pids += (task / "children").read_text().split()
    return pids


def find_ports() -> dict[tuple[str, str], str]:
    """{(kind, identity): description} of the TCP ports that this process itself listens on."""
    sockets = psutil.Process().net_connections(kind="tcp")
    listening = [item for item in sockets if item.status == psutil.CONN_LISTEN and item.type == socket.SOCK_STREAM]
    return {("port", str(item.laddr.port)): f"port {item.laddr.port}" for item in listening}


def is_there(kind: str, identity: str) -> bool:
    """Whether it still exists at the end; a mount or a device may have belonged to a test that ran at the same time."""
    if kind == "process":
        with suppress(psutil.Error):
            return bool(psutil.Process(int(identity)).status() != psutil.STATUS_ZOMBIE)
        return False
    return kind == "port" or (kind, identity) in find_held()


class Leftovers:
    """The pytest plugin: each process that runs tests checks for leftovers, and the reporting process prints them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.left: list[tuple[str, str, str]] = []  # kind, identity, description
        self.known = find_held() | find_ports()
        self.new: dict[tuple[str, str], tuple[str, str]] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
        outcome = yield
        held = find_held()
        ends = nextitem is None or nextitem.path != item.path
        if ends:
            held |= find_ports()
        for key, text in held.items():
            if key not in self.known:
                self.new.setdefault(key, (item.nodeid, text))
        if ends:
            left = {key: f"{name} left {text}" for key, (name, text) in self.new.items() if key in held}
            self.left += [(*key, text) for key, text in left.items()]
            self.known |= held
            self.new.clear()
        return outcome

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["leftovers"] = self.left

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.left += [tuple(entry) for entry in getattr(node, "workeroutput", {}).get("leftovers", [])]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        lines = [text for kind, identity, text in self.left if is_there(kind, identity)]
        if lines:
            terminalreporter.section("left behind")
            for line in lines:
                terminalreporter.write_line(line)
