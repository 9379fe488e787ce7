"""A signal at any moment gives one line, exit code 75 and the right state in run.json, and the next start continues.

Real processes get real signals. A test recognises a moment by a line of output, or by a file that appears.
"""

import json
import os
import pty
import random
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from compare_runs import check_same
from conftest import ROOT, find_free_port, write_pairs
from soak.faults import make_flags
from soak.lives import LIFE_SECONDS, Lives, kill_tree

from dpokit.checkpoint.store import find_checkpoints
from dpokit.interrupts import SIGNALS
from dpokit.rundir import RunDir

OURS = re.compile(r"^(interrupted by SIG\w+.*|SIG\w+ on rank \d: saving step .*|SIG\w+ on rank \d: ending.*)$", re.M)
SIGINT, SIGTERM, SIGUSR1 = SIGNALS

# -- signals in programs without torch ---------------------------------------------------------------------------------

BEGIN = """
import atexit, os, signal, sys, tempfile, time
from dpokit import interrupts
from dpokit.interrupts import ending_on_signals, left_to_python, recording, working
def wait(): time.sleep(60)
def ready(): print("ready", flush=True)
"""
# name: (program, signals, seconds between them, exit code)
PROGRAMS = {
    "importing": ("with ending_on_signals():\n ready(); wait()", [SIGINT], 0, 75),
    "working": ("with ending_on_signals(), working():\n ready(); wait()", [SIGTERM], 0, 75),
    "five at once": ("with ending_on_signals(), working():\n ready(); wait()", [SIGINT, SIGTERM, SIGUSR1] * 2, 0, 75),
    "caught by a library": (
        "interrupts.GRACE_SECONDS = 0.3\nwith ending_on_signals(), working():\n ready()\n"
        " try: wait()\n except BaseException: pass\n wait()",
        [SIGTERM],
        0,
        75,
    ),
    "caught, and Ctrl-C again": (
        "with ending_on_signals(), working():\n ready()\n try: wait()\n except BaseException: pass\n wait()",
        [SIGINT, SIGINT],
        1.5,
        75,
    ),
    "lost in a finalizer": (
        "class Slow:\n def __del__(self): ready(); wait()\nwith ending_on_signals(), working():\n Slow(); wait()",
        [SIGINT],
        0,
        75,
    ),
    "followed by another error": (
        "with ending_on_signals(), working():\n ready()\n try: wait()\n finally: raise TimeoutError('pool')",
        [SIGTERM],
        0,
        75,
    ),
    "in a library's code": (
        "import ctypes\nlib, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "interrupts.GRACE_SECONDS = 0.3\nwith ending_on_signals(), working():\n"
        " lib.pthread_mutex_lock(mutex); ready(); lib.pthread_mutex_lock(mutex)",
        [SIGTERM],
        0.2,
        75,
    ),
    "in a helper of its own": (
        "interrupts.GRACE_SECONDS = 0.3\nwith ending_on_signals(), working():\n pid = os.fork()\n"
        " if not pid: ready(); wait()\n"
        " time.sleep(0.5); os.kill(pid, signal.SIGTERM); assert os.waitpid(pid, 0)[1] >> 8 == 75; time.sleep(1)",
        [],
        0,
        0,
    ),
    "of a library with its own handler": (
        "with ending_on_signals(), working():\n ready(); signal.signal(2, signal.default_int_handler); ready(); wait()",
        [SIGINT],
        0.2,
        75,
    ),
    "ignored from the beginning": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwith ending_on_signals(), working():\n ready(); time.sleep(1)",
        [SIGTERM],
        0,
        0,
    ),
    "after the work": (
        "def end(): ready(); time.sleep(0.5)\natexit.register(end)\nwith ending_on_signals(): pass",
        [SIGINT, SIGTERM],
        0.1,
        0,
    ),
    "ended by the user, at a prompt": (
        "with ending_on_signals(), working():\n try:\n  with left_to_python(): ready(); wait()\n"
        " except KeyboardInterrupt: pass",
        [SIGINT],
        0,
        0,
    ),
}


@pytest.mark.cold
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_signal_ends_a_program_with_one_line(name, tmp_path):
    program, signals, seconds, code = PROGRAMS[name]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", BEGIN + program], **pipes, env=environment, cwd=tmp_path)
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        time.sleep(seconds)
        if process.poll() is None:
            process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert stderr.count("\n") == (1 if code else 0), stderr
    assert bool(OURS.search(stderr)) == bool(code)


@pytest.mark.cold
@pytest.mark.parametrize("where", ["importing", "working", "lost in a finalizer"])
def test_the_reason_is_recorded_and_partial_files_removed(where, tmp_path):
    program = (
        "class Slow:\n def __del__(self): ready(); wait()\n"
        "with ending_on_signals(), recording(lambda why: open('why', 'w').write(why)):\n"
        f" with {'tempfile.TemporaryDirectory(dir=os.getcwd())' if where == 'importing' else 'working()'}:\n"
        "  with tempfile.TemporaryDirectory(prefix='half', dir=os.getcwd()):\n"
        f"   {'Slow(); wait()' if where == 'lost in a finalizer' else 'ready(); wait()'}"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", BEGIN + program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(SIGTERM)
    process.communicate(timeout=30)
    assert (tmp_path / "why").read_text() == "SIGTERM"
    assert bool(list(tmp_path.glob("half*"))) == (where == "importing")


# -- recipes ----------------------------------------------------------------------------------------------------------


def build_lives(folder: Path, name: str, *more: str, config: str | None = None, steps: int = 12) -> Lives:
    flags = [*make_flags(folder, list(more)), "--max_steps", str(steps)]
    return Lives(RunDir(folder / name), flags, config, folder / f"{name}.cache")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a model, pairs, and an uninterrupted run."""
    folder = tmp_path_factory.mktemp("signals")
    build_lives(folder, "whole", "--precompute_ref_log_probs").finish()
    began = time.monotonic()  # measured at the second run: the first one waits for the server of warm processes
    build_lives(folder, "again", "--precompute_ref_log_probs").finish()
    (folder / "seconds").write_text(str(time.monotonic() - began))
    return folder


Moment = Callable[[Lives], object]
MOMENTS: dict[str, Moment] = {
    "importing": lambda lives: "importing torch" in lives.last_log(),
    "claimed": lambda lives: lives.run.run_json.exists(),
    "prepared": lambda lives: lives.run.data_json.exists(),
    "reference": lambda lives: list(lives.cache.rglob("*.safetensors")),
    "training": lambda lives: lives.last_step() > 0,
    "saving": lambda lives: list(lives.run.path.glob(".checkpoint-*.part")),
    "evaluating": lambda lives: lives.last_step() == 8,
    "final weights": lambda lives: list(lives.run.path.glob(".model.part")) or lives.run.model.exists(),
    "merging": lambda lives: list(lives.run.path.glob(".merged.part")),
}


@contextmanager
def until(lives: Lives, moment: Moment) -> Iterator[subprocess.Popen]:
    with lives.living() as process:
        end = time.monotonic() + LIFE_SECONDS
        while process.poll() is None and not moment(lives):
            assert time.monotonic() < end, lives.last_log()[-3000:]
            time.sleep(0.0005)
        yield process


def check_end(lives: Lives, code: int, *, lines: int = 1) -> None:
    """Checks the log and the folder after an interrupted start. `lines`: most lines of dpokit about a signal."""
    log = lives.last_log()
    assert code in (0, 75), log[-3000:]
    assert "Traceback" not in log
    assert "Exception ignored" not in log
    assert len(OURS.findall(log)) <= lines, log
    record = json.loads(lives.run.run_json.read_text()) if lives.run.run_json.exists() else {}
    # A signal may come after the run's end and before that of its process.
    states = (None, "preempted", "finished") if code else ("finished",)
    assert record.get("state") in states or "to continue: dpokit" in log
    assert not [checkpoint for checkpoint in find_checkpoints(lives.run, deep=True) if checkpoint.resume_problem]


def go_on(lives: Lives, world: Path) -> None:
    """Starts the run again, which must end like the uninterrupted run."""
    if (lives.run.read_run() or {}).get("state") != "finished":
        lives.finish()
    check_same(lives.run, RunDir(world / "whole"))
    assert not [path for path in lives.run.path.iterdir() if path.name.startswith(".")]


# Moments and signals. Only a cold process can be interrupted while it imports; see tests/warm.py.
TABLE = [
    ("prepared", [SIGINT]),
    ("importing", [SIGINT]),
    ("importing", [SIGTERM]),
    ("claimed", [SIGTERM, SIGTERM, SIGINT]),
    ("reference", [SIGUSR1]),
    ("training", [SIGINT]),
    ("training", [SIGINT, SIGTERM, SIGINT]),
    ("evaluating", [SIGINT]),
    ("saving", [SIGINT]),
    ("final weights", [SIGINT, SIGTERM]),
]


@pytest.mark.parametrize(
    ("moment", "signals"),
    [
        pytest.param(*row, marks=[pytest.mark.slow] * bool(at) + [pytest.mark.cold] * (row[0] == "importing"))
        for at, row in enumerate(TABLE)
    ],
)
def test_a_signal_at_a_moment_of_a_run_costs_nothing(moment, signals, world):
    lives = build_lives(world, f"{moment}-{len(signals)}-{signals[0].name}", "--precompute_ref_log_probs")
    with until(lives, MOMENTS[moment]) as process:
        for number in signals:
            process.send_signal(number)
        code = process.wait(timeout=60)
    check_end(lives, code)
    assert code == 75 or moment in ("final weights", "evaluating", "saving")
    assert signals[0] != SIGINT or moment not in ("prepared", "importing") or not lives.run.checkpoints()
    if lives.run.run_json.exists() and code:
        assert lives.run.read_run()["why"].startswith("SIG")
    go_on(lives, world)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_signal_at_a_random_moment_of_a_run_costs_nothing(seed, world):
    chance = random.Random(seed)
    lives = build_lives(world, f"random-{seed}", "--precompute_ref_log_probs")
    due = time.monotonic() + chance.uniform(0.1, 1.0) * float((world / "seconds").read_text())
    # A warm process handles signals only after the first lines of the recipe.
    with until(lives, lambda lives: time.monotonic() > due and MOMENTS["importing"](lives)) as process:
        process.send_signal(chance.choice(SIGNALS))
        code = process.wait(timeout=60)
    check_end(lives, code)
    go_on(lives, world)


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "ddp_cpu"])
def test_ctrl_c_again_ends_a_run_that_is_still_saving(config, world):
    """A launcher of several processes passes the first one on as SIGINT, and the second one as SIGTERM."""
    pairs = write_pairs(world / "many.jsonl", 8000)
    steps = 6000 if config is None else 3000
    one_long_step = ["--gradient_accumulation_steps", str(steps), "--per_device_train_batch_size", "1"]
    lives = build_lives(world, f"long step {config}", "--dataset_name", str(pairs), *one_long_step, config=config)
    with until(lives, lambda lives: lives.run.metrics_jsonl.exists()) as process:
        time.sleep(1.5)  # until the first step has begun
        process.send_signal(SIGINT)
        time.sleep(1.5)
        assert process.poll() is None, lives.last_log()[-3000:]
        process.send_signal(SIGINT)
        code = process.wait(timeout=30)
        assert not children(process.pid)
    assert lives.run.read_run()["state"] == "preempted"
    assert not lives.run.checkpoints()
    assert len(OURS.findall(lives.last_log())) == 1, lives.last_log()
    if config is None:
        check_end(lives, code)


def read_until(terminal: int, condition: Callable[[bytes], bool]) -> bytes:
    """The output of a terminal until a condition on it is true."""
    output, end = b"", time.monotonic() + LIFE_SECONDS
    while not condition(output):
        assert time.monotonic() < end, output[-3000:].decode()
        if select.select([terminal], [], [], 0.05)[0]:
            output += os.read(terminal, 65536)
    return output


@pytest.mark.slow
@pytest.mark.cold
def test_ctrl_c_in_a_terminal_ends_the_launcher_and_saves(world):
    """accelerate's launcher of one process ends with a traceback; a line then names the process that is left."""
    pairs = write_pairs(world / "many.jsonl", 8000)
    one_long_step = ["--gradient_accumulation_steps", "2000", "--per_device_train_batch_size", "1"]
    lives = build_lives(world, "terminal", "--dataset_name", str(pairs), *one_long_step)
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "recipes" / "dpo_gpt2.py"), *lives.flags]
    command += ["--use_cpu", "--output_dir", str(lives.run.path)]
    shell, terminal = pty.fork()
    if not shell:
        os.execvpe("bash", ["bash", "--norc", "-i"], os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        os.write(terminal, f"{shlex.join(command)}\n".encode())
        output = read_until(terminal, lambda _: lives.run.metrics_jsonl.exists())
        time.sleep(1.5)  # until the first step has begun
        os.write(terminal, b"\x03")
        output += read_until(terminal, lambda text: b"and ending" in text)
        os.write(terminal, b"exit\n")
        end = time.monotonic() + LIFE_SECONDS
        while lives.run.read_run()["state"] == "running" and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        kill_tree(shell)
        os.waitpid(shell, 0)
        os.close(terminal)
    text = output.decode()
    assert "SIGINT: saving at the end of this step" in text
    assert re.search(r"the launcher ended, but process \d+ is still saving", text), text[-3000:]
    assert "SIGINT on rank 0: saving step 1 and ending" in text
    assert [checkpoint.step for checkpoint in find_checkpoints(lives.run, deep=True)] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=lambda number: number.name)
def test_a_signal_during_a_verb_after_training_names_the_rest(number, world):
    lives = build_lives(world, f"merging-{number.name}", "--merge_after_training", "true")
    with until(lives, MOMENTS["merging"]) as process:
        process.send_signal(number)
        assert process.wait(timeout=60) == 75
    check_end(lives, 75, lines=2)
    assert lives.run.read_run()["state"] == "finished"
    assert f"to continue: dpokit merge {lives.run.path}\n" in lives.last_log()
    assert not lives.run.merged.exists()
    again = subprocess.run([sys.executable, "-m", "dpokit.cli", "merge", str(lives.run.path)], capture_output=True)
    assert again.returncode == 0, again.stderr.decode()
    assert lives.run.merge_json.exists()


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["prepared", "training"])
@pytest.mark.parametrize("to", ["terminal", "launcher"])
def test_a_signal_ends_all_ranks_with_one_line(moment, to, world):
    lives = build_lives(world, f"two-{moment}-{to}", config="ddp_cpu", steps=200)
    with until(lives, MOMENTS[moment]) as launcher:
        for pid in [launcher.pid, *children(launcher.pid)] if to == "terminal" else [launcher.pid]:
            os.kill(pid, SIGINT if to == "terminal" else SIGTERM)
        assert launcher.wait(timeout=90) != 0
        assert not children(launcher.pid)
    assert lives.run.read_run()["state"] == "preempted", lives.last_log()[-3000:]
    assert len(OURS.findall(lives.last_log())) == 1, lives.last_log()[-3000:]
    # Ctrl-C before the first step ends all ranks at once; SIGTERM may come from a launcher that lost another rank.
    assert (moment, to) != ("prepared", "terminal") or not lives.run.checkpoints()


def children(pid: int) -> list[int]:
    pids = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(child) for child in pids.split()]


@pytest.mark.slow
def test_a_signal_before_the_first_step_preempts_both_ranks(world):
    """There is no launcher, which would end the other rank."""
    lives = build_lives(world, "one of two", steps=200)
    argv = [sys.executable, str(ROOT / "recipes" / "dpo_gpt2.py"), *lives.flags, "--use_cpu", "--ddp_timeout", "30"]
    places = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port()}
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            name: str(value) for name, value in (places | {"RANK": rank, "LOCAL_RANK": rank}).items()
        }
        command = [*argv, "--output_dir", str(lives.run.path)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        while not lives.run.run_json.exists():
            assert all(process.poll() is None for process in ranks)
            time.sleep(0.001)
        ranks[1].send_signal(SIGTERM)
        logs = [process.communicate(timeout=90)[1] for process in ranks]
    finally:
        for process in ranks:
            kill_tree(process.pid)
    assert [process.returncode for process in ranks] == [75, 75], logs
    assert len(OURS.findall("".join(logs))) == 1, logs
    assert lives.run.read_run()["state"] == "preempted"


# -- verbs -------------------------------------------------------------------------------------------------------------

DDP = ROOT / "accelerate_configs" / "ddp_cpu.yaml"
# Arguments of `dpokit`; RUN is replaced by a finished run, FLAGS by the flags of its training.
VERBS = {
    "evaluate": ["evaluate", "RUN", "--answers", "4", "--max-new-tokens", "32"],
    "merge": ["merge", "RUN"],
    "report": ["report", "RUN"],
    "verify": ["verify", "RUN"],
    "push": ["push", "RUN", "--repo-id", "me/model", "--license", "mit", "--dry-run"],
    "plan": ["plan", "dpo_gpt2", "FLAGS"],
    "prepare": ["prepare", "dpo_gpt2", "FLAGS"],
    "submit": [
        "submit",
        "dpo_gpt2",
        "--config-file",
        str(ROOT / "accelerate_configs/ddp_cpu.yaml"),
        "--dry-run",
        "FLAGS",
    ],
}


def build_command(verb: str, run: RunDir, world: Path) -> list[str]:
    places = {"RUN": [str(run.path)], "FLAGS": [*build_lives(world, "flags").flags, "--use_cpu"]}
    return [sys.executable, "-m", "dpokit.cli", *[each for word in VERBS[verb] for each in places.get(word, [word])]]


def undated(path: Path) -> str:
    """A path without the date in the name of an evaluation's folder."""
    return re.sub(r"/eval/\d{8}-\d{6}-", "/eval/", str(path))


def delete(paths: set[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_at_a_random_moment_leaves_no_partial_output(verb, world, tmp_path):
    run = RunDir(tmp_path / "run")
    shutil.copytree(world / "whole", run.path)
    command = build_command(verb, run, world)
    before = set(run.path.rglob("*"))
    began = time.monotonic()
    whole = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert whole.returncode == 0, whole.stderr
    left = set(run.path.rglob("*")) - before
    made = {undated(path) for path in left}
    chance = random.Random(verb)
    for number in (SIGINT, SIGTERM, SIGINT):
        delete(left)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(chance.uniform(0.3, 0.9) * seconds)
        process.send_signal(number) if process.poll() is None else None
        _, stderr = process.communicate(timeout=60)
        assert process.returncode in (0, 75), stderr
        assert "Traceback" not in stderr
        assert len(OURS.findall(stderr)) == (1 if process.returncode else 0), stderr
        left = set(run.path.rglob("*")) - before
        assert {undated(path) for path in left} <= made
    delete(left)
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0


# -- the run folder disappears -----------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    while path.exists():
        shutil.rmtree(path, ignore_errors=True)


def move(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.moved"))


def replace_by_file(path: Path) -> None:
    move(path)
    path.write_text("not a folder")


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Makes the folder read-only by a mount on itself; skips the test if mounting is not possible."""
    if os.geteuid() != 0 or subprocess.run(["mount", "--bind", str(path), str(path)], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        # The kernel refuses while a file there is open for writing.
        end = time.monotonic() + 10
        while subprocess.run(["mount", "-o", "remount,bind,ro", str(path)], check=False).returncode:
            assert time.monotonic() < end
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


GONE = "was deleted, moved or replaced while the run wrote to it"
LOSSES = {
    "removed": (remove, GONE),
    "moved": (move, GONE),
    "a file": (replace_by_file, GONE),
    "read-only": (read_only, "the file system is read-only"),
}


@pytest.mark.parametrize(
    ("loss", "moment"),
    [
        ("removed", "training"),
        *(
            pytest.param(loss, moment, marks=pytest.mark.slow)
            for loss, moment in [
                *[("removed", "prepared"), ("removed", "saving"), ("removed", "evaluating")],
                *[("moved", "training"), ("moved", "saving"), ("a file", "training"), ("a file", "saving")],
                *[("read-only", "prepared"), ("read-only", "training"), ("read-only", "saving")],
            ]
        ),
    ],
)
def test_a_lost_run_folder_ends_the_run_in_one_message(loss, moment, world):
    act, message = LOSSES[loss]
    lives = build_lives(world, f"gone-{loss}-{moment}", steps=200)
    with until(lives, MOMENTS[moment]) as process, act(lives.run.path) or nullcontext():
        assert process.wait(timeout=60) == 2, lives.last_log()[-3000:]
    log = lives.last_log()
    assert "Traceback" not in log
    assert log.count("RunFolderError") == 1, log
    assert message in log
    assert "could not be updated" not in log
    if loss == "removed":
        assert not lives.run.run_json.exists(), "a deleted run must not be created again"


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["evaluate", "merge", "report", "verify"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_run_folder_lost_during_a_verb_is_one_message(share, verb, world, tmp_path):
    run = RunDir(tmp_path / "run")
    shutil.copytree(world / "whole", run.path)
    command = build_command(verb, run, world)
    began = time.monotonic()
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    seconds = time.monotonic() - began
    remove(run.path)
    shutil.copytree(world / "whole", run.path)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(share * seconds)
    remove(run.path)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 1, 2), err
    assert "Traceback" not in err
    assert process.returncode != 2 or err.count("\n  expected:") == 1, err
    assert process.returncode != 1 or verb == "verify", out
