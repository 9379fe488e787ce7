"""Starts Python processes warm: forks them from a server that has imported everything, which saves 5 to 9 s each.

`Popen` replaces subprocess.Popen. The process is a child of the caller; /proc shows the command and the environment it
was given; its exit code, output and signals are those of an ordinary process. Processes that it starts are warm too: a
launcher's workers, the trials of a sweep, the verbs that follow a run.

Other programs start as usual, and so does a command that changes an environment variable which a library reads at
import. tests/conftest.py uses `Popen` for all tests except those marked `cold`: tests of imports, of start-up, and
those that need two different interpreters (all warm processes share one hash seed).
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Never

# Variables that a library, the C library or the interpreter reads at import or at its start.
READ_EARLY = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "TRACKIO_", "OMP_", "MKL_", "OPENBLAS_", "MALLOC_", "LD_")
READ_EARLY += ("CUDA_", "MPL", "HOME", "XDG_CACHE_HOME", "LANG", "LC_", "PYTHONHASHSEED", "PYTHONWARNINGS")
READ_EARLY += ("PYTHONUTF8", "TORCH_EXTENSIONS_DIR", "CXX")
# Exceptions: a child applies these itself.
READ_BY_HUB = ("HF_HUB_", "HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HF_XET_")  # by huggingface_hub.constants
READ_BY_DATASETS = ("HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE")  # by datasets.config
THREADS = "OMP_NUM_THREADS"
SETTLED = (*READ_BY_HUB, *READ_BY_DATASETS, THREADS)
PADDING_BYTES = 50_000  # space in /proc for a child's command, and as much for its environment
PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None)
COLD = subprocess.Popen


class ForkServer:
    """The client's end of a process that forks on demand.

    Args:
        near: the socket that is connected to it.
        environment: the variables it was started with.
        pid: its process id.
    """

    def __init__(self, near: socket.socket, environment: Mapping[str, str], pid: int) -> None:
        self.pid = pid
        self.near = near
        self.environment = environment
        self.lock = threading.Lock()
        # The server forks twice; when the process in between exits, the kernel makes this process the parent.
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """The pid of the new child, which gets the files as stdin, stdout and stderr."""
        with self.lock:
            socket.send_fds(self.near, [json.dumps(request).encode()], list(files))
            return int(self.near.recv(64))

    def end(self) -> None:
        self.near.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def serves(self, environment: Mapping[str, str]) -> bool:
        return pick_early(environment) == pick_early(self.environment)


def pick_early(environment: Mapping[str, str]) -> dict[str, str]:
    early = {name: value for name, value in environment.items() if name.startswith(READ_EARLY)}
    return {name: value for name, value in early.items() if not name.startswith(SETTLED)}


class Popen(COLD):
    """subprocess.Popen that forks from the server where possible."""

    def _execute_child(self, args: Any, executable: Any, *more: Any) -> None:
        # CPython's order after `executable`: preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
        # shell, then both ends of three pipes, restore_signals, four for users, start_new_session, process_group.
        preexec, _, passed, cwd, env, _, _, shell = more[:8]
        environment = dict(os.environ if env is None else env)
        argv = [] if isinstance(args, (str, bytes)) else [os.fspath(word) for word in args]
        special = shell or preexec or passed or executable or any(isinstance(word, bytes) for word in argv)
        server = None if special or read_program(argv) is None else get_server()
        if server is None or not server.serves(environment):
            super()._execute_child(args, executable, *more)
            return
        request = {"argv": argv, "environment": environment, "cwd": os.fspath(cwd or Path.cwd()), "session": more[-2]}
        stdin, _, _, stdout, _, stderr = more[8:14]
        self.pid = server.fork(request, [end if end >= 0 else n for n, end in enumerate((stdin, stdout, stderr))])
        self._child_created = True
        self._close_pipe_fds(*more[8:14])


def read_program(argv: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """(`-m`, `-c` or `file`; what it names; arguments) of a Python command; None for any other."""
    if not argv or argv[0] != sys.executable:
        return None
    rest = list(argv[1:])
    while rest[:1] in (["-u"], ["-P"]):
        rest.pop(0)
    if len(rest) > 1 and rest[0] in ("-m", "-c"):
        return rest[0], rest[1], rest[2:]
    return ("file", rest[0], rest[1:]) if rest and not rest[0].startswith("-") else None


_server: ForkServer | None = None
_environment = dict(os.environ)


def install(environment: Mapping[str, str]) -> None:
    """Makes subprocess start processes warm; the server starts on first use, with this environment.

    Does nothing on a machine with an NVIDIA GPU: CUDA does not work in a forked process.
    """
    global _environment
    importlib.import_module("dpokit")  # sets variables that libraries read at import, so all processes have them
    _environment = dict(environment)
    if sys.platform == "linux" and not Path("/dev/nvidiactl").exists():
        subprocess.Popen = Popen


def get_server() -> ForkServer:
    """This process's server; starts it on first use."""
    global _server
    if _server is None:
        near, far = connect()
        padding = " " * PADDING_BYTES
        command = [sys.executable, __file__, str(far.fileno()), padding]
        process = COLD(command, pass_fds=[far.fileno()], env={**_environment, "PADDING": padding})
        far.close()
        _server = ForkServer(near, _environment, process.pid)
    return _server


def is_server(pid: int) -> bool:
    return _server is not None and _server.pid == pid


def connect() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PADDING_BYTES)
    return ends


# The server's end, and the first steps of its children.


def import_all() -> None:
    """Imports everything that a recipe, a verb or a launcher imports."""
    import dpokit

    modules = [module.name for module in pkgutil.walk_packages(dpokit.__path__, "dpokit.")]
    modules += ["accelerate.commands.launch", "torch.distributed.run", "deepspeed", "bitsandbytes"]
    with contextlib.redirect_stdout(sys.stderr):
        for name in modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    # A lock that another thread holds would stay locked in a child; jemalloc (pyarrow) handles its own thread's.
    assert len(set(threads) - {"jemalloc_bg_thd"}) == 1, f"a process with threads cannot be forked: {threads}"


def serve(far: socket.socket) -> Mapping[str, Any]:
    """Forks a child for each request. Returns in the child only; exits when the client closes its end."""
    while True:
        message, files, *_ = socket.recv_fds(far, 4 * PADDING_BYTES, 3)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            if child := os.fork():
                os.write(writing, str(child).encode())
                os._exit(0)
            for end in (far.detach(), reading):
                os.close(end)
            for place, file in enumerate(files):
                os.dup2(file, place)
            for file in files:
                os.close(file)
            return {**json.loads(message), "until_ready": writing}
        for end in (writing, *files):
            os.close(end)
        os.waitpid(between, 0)
        child = os.read(reading, 64)
        os.read(reading, 1)  # returns when the child is set up, or has exited
        os.close(reading)
        far.send(child)


def become(request: Mapping[str, Any]) -> Never:
    """Turns this process into the requested one, runs its program and exits."""
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(request["environment"])
    settle_libraries(before)
    show_in_proc(command=request["argv"], environment=request["environment"])
    start_nested_server(request["until_ready"])
    os.close(request["until_ready"])
    random.seed()
    settle_streams(at_once="-u" in request["argv"][1:3])
    kind, name, arguments = read_program(request["argv"]) or ("", "", [])
    sys.argv = ["-c" if kind == "-c" else name, *arguments]
    sys.path[0] = {"file": str(Path(name).parent.absolute()), "-m": request["cwd"], "-c": ""}[kind]
    if "-P" in request["argv"][1:3]:
        sys.path.pop(0)
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [place for place in places if place and place not in sys.path]
    code: Any = 0
    try:
        if kind == "-m":
            sys.modules.pop(name, None)  # runpy warns of a module that is imported already
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif kind == "file":
            runpy.run_path(name, run_name="__main__")
        else:
            exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    # The interpreter's own exit, without tearing down every imported module, which takes a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if _server is not None:
        _server.end()
    os._exit(int(code or 0) & 0xFF)


def settle_libraries(before: Mapping[str, str]) -> None:
    """Makes libraries read their variables again, where they differ from those at the import."""
    if differs(before, READ_BY_HUB):
        from huggingface_hub import constants, hf_api

        importlib.reload(constants)
        hf_api.api.endpoint = constants.ENDPOINT
    if differs(before, (*READ_BY_HUB, *READ_BY_DATASETS)):
        importlib.reload(importlib.import_module("datasets.config"))
    if differs(before, (THREADS,)):
        import torch

        from dpokit.distributed.cores import count_cores

        threads = os.environ.get(THREADS, "")
        torch.set_num_threads(int(threads) if threads.isdecimal() else count_cores())
    tempfile.tempdir = None  # found again when it is asked for


def differs(before: Mapping[str, str], variables: tuple[str, ...]) -> bool:
    names = {name for name in (*before, *os.environ) if name.startswith(variables)}
    return any(before.get(name) != os.environ.get(name) for name in names)


def settle_streams(*, at_once: bool) -> None:
    """Opens stdin and stdout as the interpreter does at its start."""
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    options: dict[str, Any] = {"encoding": encoding or sys.stdin.encoding, "errors": errors or None, "closefd": False}
    # New objects: the server's files may have been seekable where these are not.
    sys.stdin, sys.stdout = os.fdopen(0, **options), os.fdopen(1, "w", **options)
    at_once = at_once or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(write_through=at_once, line_buffering=os.isatty(1))


def start_nested_server(until_ready: int) -> None:
    """Starts a server for this process's own children, while it has a single thread."""
    global _server
    near, far = connect()
    if (pid := os.fork()) == 0:
        near.close()
        os.close(until_ready)
        show_in_proc(command=["fork server"], environment={})
        nowhere = os.open(os.devnull, os.O_RDWR)
        for place in range(3):  # a server must not keep a test's pipes open
            os.dup2(nowhere, place)
        os.close(nowhere)
        become(serve(far))
    far.close()
    _server = ForkServer(near, dict(os.environ), pid)
    subprocess.Popen = Popen
    subprocess_handler = importlib.import_module("torch.distributed.elastic.multiprocessing.subprocess_handler")
    subprocess_handler.subprocess_handler.Popen = Popen


def show_in_proc(*, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Overwrites the command and the environment that /proc shows of this process."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arg_start, arg_end, env_start, env_end = (int(field) for field in fields[45:49])  # see proc(5)
    # The kernel shows the command up to its first NUL if the last byte of the area is not NUL.
    text = os.fsencode(" ".join(command))[: arg_end - arg_start - 2]
    ctypes.memmove(arg_start, text.ljust(arg_end - arg_start - 1, b"\0") + b".", arg_end - arg_start)
    text = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    ctypes.memmove(env_start, text[: env_end - env_start].ljust(env_end - env_start, b"\0"), env_end - env_start)


if __name__ == "__main__":
    _far = socket.socket(fileno=int(sys.argv[1]))
    import_all()
    gc.collect()
    gc.freeze()
    become(serve(_far))
