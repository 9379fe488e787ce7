"""Python processes that start warm: forked from one that has imported everything, instead of importing for 5 to 9 s.

`Popen` is subprocess.Popen: the process is a child of the caller, shows the command line and the environment that it
was given in /proc, too, and ends as any other. Whatever it starts itself is started warm as well: a launcher's workers,
the trials of a search, the verbs that follow a run.

As ever are started: other programs than this interpreter, and a command that changes an environment variable which
a library reads while it is imported. tests/conftest.py puts `Popen` in subprocess's place for all tests but those
marked `cold`: tests of imports, of start-up, of a launcher, and those in which two interpreters must differ (warm ones
share the order of their sets).
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
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Never

# Read while a library is imported, or by the C library and the interpreter before that.
READ_EARLY = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "TRACKIO_", "OMP_", "MKL_", "OPENBLAS_", "MALLOC_", "LD_")
READ_EARLY += ("CUDA_", "MPL", "HOME", "XDG_CACHE_HOME", "TMPDIR", "LANG", "LC_", "PYTHONHASHSEED", "PYTHONWARNINGS")
READ_EARLY += ("PYTHONUTF8", "TORCH_EXTENSIONS_DIR", "CXX")
# Read by one module, which a child reads again where they are others.
READ_BY_HUB = ("HF_HUB_", "HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HF_XET_")
ROOM_BYTES = 50_000  # in /proc for another command, and as many for another environment
PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None)
COLD = subprocess.Popen


class Nursery:
    """The near end of a process that forks on demand.

    Args:
        near: to it.
        environment: that it was begun with.
        pid: its own.
    """

    def __init__(self, near: socket.socket, environment: Mapping[str, str], pid: int) -> None:
        self.pid = pid
        self.near = near
        self.environment = environment
        self.lock = threading.Lock()
        # A child is forked twice: once the process between is gone, it is this one's own, which can wait for it.
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """The pid of the new child, whose first three files these are."""
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
    return {name: value for name, value in early.items() if not name.startswith(READ_BY_HUB)}


class Popen(COLD):  # type: ignore[type-arg, misc]
    """subprocess.Popen, forked from the nursery where that can be."""

    def _execute_child(self, args: Any, executable: Any, *more: Any) -> None:
        # CPython's order behind `executable`: preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
        # shell, then both ends of three pipes, restore_signals, four of users, start_new_session, process_group.
        preexec, _, passed, cwd, env, _, _, shell = more[:8]
        environment = dict(os.environ if env is None else env)
        words = [] if isinstance(args, (str, bytes)) else [os.fspath(word) for word in args]
        special = shell or preexec or passed or executable or any(isinstance(word, bytes) for word in words)
        nursery = None if special or read_program(words) is None else find_nursery()
        if nursery is None or not nursery.serves(environment):
            super()._execute_child(args, executable, *more)
            return
        request = {"words": words, "environment": environment, "cwd": os.fspath(cwd or Path.cwd()), "session": more[-2]}
        stdin, _, _, stdout, _, stderr = more[8:14]
        self.pid = nursery.fork(request, [end if end >= 0 else n for n, end in enumerate((stdin, stdout, stderr))])
        self._child_created = True
        self._close_pipe_fds(*more[8:14])


def read_program(words: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """(`-m`, `-c` or `file`; what it names; arguments) of a Python command; None for any other."""
    if not words or words[0] != sys.executable:
        return None
    rest = list(words[2:] if words[1:2] == ["-u"] else words[1:])
    if len(rest) > 1 and rest[0] in ("-m", "-c"):
        return rest[0], rest[1], rest[2:]
    return ("file", rest[0], rest[1:]) if rest and not rest[0].startswith("-") else None


_nursery: Nursery | None = None
_environment = dict(os.environ)


def put_in_place(environment: Mapping[str, str]) -> None:
    """From now on subprocess starts warm; the nursery is begun on first use, under this environment."""
    global _environment
    _environment = dict(environment)
    if sys.platform == "linux":
        subprocess.Popen = Popen  # type: ignore[misc]


def find_nursery() -> Nursery:
    """This process's own, begun on first use."""
    global _nursery
    if _nursery is None:
        near, far = connect()
        padding = " " * ROOM_BYTES
        command = [sys.executable, __file__, str(far.fileno()), padding]
        process = COLD(command, pass_fds=[far.fileno()], env={**_environment, "PADDING": padding})
        far.close()
        _nursery = Nursery(near, _environment, process.pid)
    return _nursery


def is_nursery(pid: int) -> bool:
    return _nursery is not None and _nursery.pid == pid


def connect() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * ROOM_BYTES)
    return ends


# The far end, and what its children do first.


def import_all() -> None:
    """Everything that a recipe, a verb or a launcher imports."""
    import dpokit

    modules = [module.name for module in pkgutil.walk_packages(dpokit.__path__, "dpokit.")]
    modules += ["accelerate.commands.launch", "torch.distributed.run", "deepspeed", "bitsandbytes"]
    with contextlib.redirect_stdout(sys.stderr):
        for name in modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    threads = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    # A lock that another thread holds stays locked in a child. pyarrow's allocator sees to its own thread's.
    assert len(set(threads) - {"jemalloc_bg_thd"}) == 1, f"a process with threads cannot be forked: {threads}"


def serve(far: socket.socket) -> Mapping[str, Any]:
    """Forks a child for each request. Returns in the child alone; ends the process with its near end."""
    while True:
        message, files, *_ = socket.recv_fds(far, 4 * ROOM_BYTES, 3)
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
        os.read(reading, 1)  # until the child is what was asked for, or gone
        os.close(reading)
        far.send(child)


def become(request: Mapping[str, Any]) -> Never:
    """Makes this process the one that was asked for, runs its program and ends."""
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(request["environment"])
    settle_hub(before)
    show_in_proc(command=request["words"], environment=request["environment"])
    begin_nursery(request["until_ready"])
    os.close(request["until_ready"])
    random.seed()
    settle_streams(at_once="-u" in request["words"][1:2])
    kind, name, arguments = read_program(request["words"]) or ("", "", [])
    sys.argv = ["-c" if kind == "-c" else name, *arguments]
    sys.path[0] = {"file": str(Path(name).parent.absolute()), "-m": request["cwd"], "-c": ""}[kind]
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [place for place in places if place and place not in sys.path]
    code: Any = 0
    try:
        if kind == "-m":
            sys.modules.pop(name, None)  # it is to be run, not found
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
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    # As the interpreter ends, but for taking each module apart: with all that is imported that takes a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if _nursery is not None:
        _nursery.end()
    os._exit(int(code or 0) & 0xFF)


def settle_hub(before: Mapping[str, str]) -> None:
    """Gives the Hub's client the variables that it would have read at its import."""
    names = {name for name in (*before, *os.environ) if name.startswith(READ_BY_HUB)}
    if any(before.get(name) != os.environ.get(name) for name in names):
        from huggingface_hub import constants, hf_api

        importlib.reload(constants)
        hf_api.api.endpoint = constants.ENDPOINT


def settle_streams(*, at_once: bool) -> None:
    """What the interpreter does at its start with the streams that it finds."""
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    options: dict[str, Any] = {"encoding": encoding or sys.stdin.encoding, "errors": errors or None, "closefd": False}
    # Anew: what the nursery's could do (seek, say) these files may not.
    sys.stdin, sys.stdout = os.fdopen(0, **options), os.fdopen(1, "w", **options)
    at_once = at_once or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(write_through=at_once, line_buffering=os.isatty(1))  # type: ignore[union-attr]


def begin_nursery(until_ready: int) -> None:
    """A nursery for what this process starts, begun while it has one thread only; the file is not the nursery's."""
    global _nursery
    near, far = connect()
    if (pid := os.fork()) == 0:
        near.close()
        os.close(until_ready)
        show_in_proc(command=["nursery"], environment={})
        nowhere = os.open(os.devnull, os.O_RDWR)
        for place in range(3):  # no pipe of a test stays open for a nursery
            os.dup2(nowhere, place)
        os.close(nowhere)
        become(serve(far))
    far.close()
    _nursery = Nursery(near, dict(os.environ), pid)
    subprocess.Popen = Popen  # type: ignore[misc]
    subprocess_handler = importlib.import_module("torch.distributed.elastic.multiprocessing.subprocess_handler")
    subprocess_handler.subprocess_handler.Popen = Popen


def show_in_proc(*, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Overwrites what /proc shows of this process: its command, with spaces between the words, and its environment."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arg_start, arg_end, env_start, env_end = (int(field) for field in fields[45:49])  # see proc(5)
    # The kernel shows the command up to its first NUL where the last byte of its area is none.
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
