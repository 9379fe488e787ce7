"""What tests leave behind: processes, ports, mounts and network devices (a Slurm node has one), named at the end.

Orphans of a test are children of the process that ran it, as tests/warm.py makes it their reaper. What fixtures of a
module hold is looked at when the module is through.
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
    """{(kind, identity): in words} of what this process and its children hold now."""
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
    """The same of TCP ports that this process itself listens on."""
    own = psutil.Process().net_connections(kind="tcp")
    ports = {str(one.laddr.port) for one in own if one.status == psutil.CONN_LISTEN and one.type == socket.SOCK_STREAM}
    return {("port", port): f"port {port}" for port in ports}


def is_there(kind: str, identity: str) -> bool:
    """Whether it outlived the suite: other tests that ran at the same time may have had a mount or a device."""
    if kind == "process":
        with suppress(psutil.Error):
            return bool(psutil.Process(int(identity)).status() != psutil.STATUS_ZOMBIE)
        return False
    return kind == "port" or (kind, identity) in find_held()


class Leftovers:
    """The plugin: in each process that runs tests it looks, in the one that reports it prints."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.left: list[tuple[str, str, str]] = []  # kind, identity, in words
        self.known = find_held() | find_ports()
        self.new: dict[tuple[str, str], tuple[str, str]] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
        outcome = yield
        held = find_held()
        ends = nextitem is None or nextitem.path != item.path
        if ends:
            held |= find_ports()
        for key, words in held.items():
            if key not in self.known:
                self.new.setdefault(key, (item.nodeid, words))
        if ends:
            left = {key: f"{name} left {words}" for key, (name, words) in self.new.items() if key in held}
            self.left += [(*key, words) for key, words in left.items()]
            self.known |= held
            self.new.clear()
        return outcome

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["leftovers"] = self.left

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.left += [tuple(one) for one in getattr(node, "workeroutput", {}).get("leftovers", [])]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        lines = [words for kind, identity, words in self.left if is_there(kind, identity)]
        if lines:
            terminalreporter.section("left behind")
            for line in lines:
                terminalreporter.write_line(line)
