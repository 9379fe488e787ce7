"""Runs programs in a network namespace without a route, and records each attempt to leave this machine.

    python tests/outside.py CALLS.json

CALLS.json names programs: `{name: argv}`, run one after the other; `serve` also answers a question. It is replaced by
`{name: {"code": exit code, "output": its output, "python": attempts, "kernel": number}}`.

Two counts, because neither sees everything: an audit hook in each Python process records connections and name lookups
with their code, and the kernel counts packets of any program that have no route. Without the right to make a namespace
(`unshare`), the second is None.
"""

import ctypes
import fcntl
import ipaddress
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG = "DPOKIT_TEST_ATTEMPTS"  # the variable with the path of the file for all attempts
EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg")
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP_RUNNING = 0x8914, 0x41
# Counters of packets without a route, and of those to a name server on this machine that the namespace does not have.
COUNTERS = ("Ip.OutNoRoutes", "Ip6OutNoRoutes", "Udp.NoPorts", "Udp6NoPorts")


def is_outside(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is a connection or a name lookup that leaves this machine."""
    if event in LOOKUPS:
        host = arguments[0]
    elif event in EVENTS and isinstance(arguments[-1], tuple):  # an address of IPv4 or IPv6, not a path
        host = arguments[-1][0]
    else:
        return False
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return False
    try:
        return not ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return True


def record_attempts() -> None:
    """Records the attempts of this process and of its forks; each Python of the test calls it at its start."""
    log = os.environ[LOG]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith("socket.") and is_outside(event, arguments):
            frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack(limit=25)[:-1]]
            attempt = {"event": event, "address": str(arguments[-1 if event in EVENTS else 0]), "code": frames[::-1]}
            with Path(log).open("a") as file:
                file.write(json.dumps(attempt) + "\n")

    sys.addaudithook(note)


def enter_namespace() -> bool:
    """Moves this process into a network namespace that has loopback only; False if the machine does not allow it."""
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        return False
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP_RUNNING))
    return True


def read_counters() -> int:
    """The sum of COUNTERS in this process's namespace."""
    values: dict[str, int] = {}
    lines = Path("/proc/self/net/snmp").read_text().splitlines()
    for names, numbers in zip(lines[::2], lines[1::2], strict=True):
        protocol, *names_ = names.split()
        values |= {f"{protocol[:-1]}.{name}": int(n) for name, n in zip(names_, numbers.split()[1:], strict=True)}
    for line in Path("/proc/self/net/snmp6").read_text().splitlines():
        name, number = line.split()
        values[name] = int(number)
    return sum(values[name] for name in COUNTERS)


def run_program(argv: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit code and output. With Python's option -B the process is an ordinary one, in exactly this environment."""
    env = environment if "-B" in argv else None
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(argv, **streams, env=env, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def serve_and_ask(argv: list[str], _: Mapping[str, str]) -> tuple[int, str]:
    """Starts the page, asks it a question as a browser does, and ends it."""
    from asking import Asker, read_text

    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        events = read_text(Asker(url).ask("How do I bake bread?")) if url else ""
        process.terminate()
        code = process.wait(timeout=60)
        log.seek(0)
        return code if "process_completed" in events else 1, log.read() + events


def run_all(
    calls: Mapping[str, list[str]], log: Path, environment: Mapping[str, str], *, is_alone: bool
) -> dict[str, dict[str, Any]]:
    results = {}
    for name, argv in calls.items():
        log.write_text("")
        before, began = read_counters() if is_alone else 0, time.monotonic()
        code, output = (serve_and_ask if name == "serve" else run_program)(argv, environment)
        results[name] = {
            "code": code,
            "output": output[-4000:],
            "python": [json.loads(line) for line in log.read_text().splitlines()],
            "kernel": read_counters() - before if is_alone else None,
            "seconds": time.monotonic() - began,
        }
    return results


def main(path: Path) -> None:
    import warm

    calls = json.loads(path.read_text())
    is_alone = enter_namespace()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "attempts")
        # Python imports sitecustomize at its start, also in processes that the programs start.
        Path(folder, "sitecustomize.py").write_text("import outside\noutside.record_attempts()\n")
        os.environ[LOG] = str(log)
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, str(Path(__file__).parent), os.environ["PYTHONPATH"]])
        environment = dict(os.environ)
        warm.install(os.environ)
        path.write_text(json.dumps(run_all(calls, log, environment, is_alone=is_alone)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
